"""Every picture, as a function: numbers in, a matplotlib Figure out. Show it in a notebook or save it with savefig.

The colours are Okabe and Ito's, which colour-blind people can tell apart; the figures are white whatever the viewer's
theme, so that they read the same in light and dark.
"""

import os

from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator

from utils import UserError

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#7F7F7F"


def new_figure(width=7.0, height=4.0):
    """An empty figure and its axes, without pyplot: nothing is shown or kept alive behind one's back."""
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def loss_curve(metrics, title="loss, in nats per token"):
    """Training and validation loss against steps. metrics: the dicts of a metrics.jsonl."""
    figure, axes = new_figure()
    for key, label, style in (
        ("train_loss", "training (one batch)", dict(color=BLUE, alpha=0.7, linewidth=1)),
        ("val_loss", "validation", dict(color=RED, marker="o", markersize=4)),
    ):
        points = [(m["step"], m[key]) for m in metrics if key in m]
        if points:
            axes.plot(*zip(*points), label=label, **style)
            if key == "val_loss":
                step, loss = min(points, key=lambda p: p[1])
                note = dict(xytext=(0, 8), textcoords="offset points", ha="right", color=RED)
                axes.annotate(f"best {loss:.3f}", (step, loss), **note)
    axes.set(xlabel="step", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    if axes.lines:
        axes.legend(frameon=False)
    return figure


def save_picture(figure, path):
    """Write a figure to the path of a command's --out. Raises UserError where it cannot be written."""
    try:
        figure.savefig(path, dpi=120, format=os.path.splitext(path)[1][1:] or "png")
    except (OSError, ValueError) as error:  # no such directory; no such picture format
        raise UserError(f"--out {path}: cannot be written ({error}); name a .png in a directory that exists") from None
    print(f"picture: {path}")


def visible(char):
    """A label for a character: signs for those that leave no mark, the code point for those that the font lacks."""
    signs = {"\n": "↵", "\r": "␍", "\t": "⇥", " ": "␣"}
    font = get_font(findfont(FontProperties()))
    shows = char.isprintable() and font.get_char_index(ord(char))
    return signs.get(char) or (char if shows else f"{ord(char):x}")


def bigram_table(probs, labels):
    """A heat map of which character follows which. probs: (V, V) tensor, row a, column b; labels: the V characters."""
    V = len(labels)
    side = max(4.0, 0.16 * V)
    figure, axes = new_figure(side + 1.0, side + 0.4)
    # One hue from white to dark: lightness alone carries the number. The square root lifts the rare pairs into view.
    image = axes.imshow(probs, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
    names = [visible(char) for char in labels]
    axes.set_xticks(range(V), names)
    axes.set_yticks(range(V), names)
    axes.tick_params(length=0, labelsize=8, labeltop=True, labelright=True)
    if max(map(len, names)) > 1:
        axes.tick_params(axis="x", rotation=90)
    axes.set(xlabel="next character", ylabel="character")
    axes.set_title("after the character on the left, how probable is the one above?", pad=14)
    colours = figure.colorbar(image, ax=axes, shrink=0.5, ticks=[0, 0.01, 0.05, 0.2, 0.5, 1])
    colours.ax.set_yticklabels(["0", "1 %", "5 %", "20 %", "50 %", "100 %"])
    return figure


def mixing_weights(weights, labels):
    """How much unigram, bigram and trigram each have to say. weights: (K, 3), rows sum to 1; labels: K counts."""
    figure, axes = new_figure()
    low = [0.0] * len(labels)
    for name, colour, share in zip(("unigram", "bigram", "trigram"), (GREY, ORANGE, BLUE), weights.T.tolist()):
        axes.bar(labels, share, bottom=low, color=colour, width=0.9, label=name)
        low = [a + b for a, b in zip(low, share)]
    axes.set(xlabel="how often the text had the two characters before", ylabel="weight")
    axes.set_title("rare contexts lean on shorter ones")
    axes.tick_params(axis="x", rotation=45)
    handles, names = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], names[::-1], loc="upper left", bbox_to_anchor=(1, 1), frameon=False)  # stacked as drawn
    return figure
