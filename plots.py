"""Every picture, as a function: numbers in, a matplotlib Figure out. Show it in a notebook or save it with savefig.

The colours are Okabe and Ito's, which colour-blind people can tell apart; the figures are white whatever the viewer's
theme, so that they read the same in light and dark.
"""

import math
import os

from matplotlib import colormaps
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from utils import UserError, write_atomically

BLUE, ORANGE, GREEN, RED, PINK, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#7F7F7F"
SKY = "#56B4E9"


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
        if len(points) == 1:
            style = dict(style, marker="o")
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
    ending = os.path.splitext(path)[1]
    if not ending and os.path.isfile(path):
        raise UserError(f"--out {path}: is there already and no picture by its name; name a .png file")
    try:
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120, format=ending[1:] or "png"))
    except (OSError, ValueError, RuntimeError) as error:  # no such directory; no such picture format, or no TeX for it
        raise UserError(f"--out {path}: cannot be written ({error}); name a .png in a directory that exists") from None
    print(f"picture: {path}")


def visible(token):
    """A label for a token: signs for characters that leave no mark, the code point for those that the font lacks."""
    if len(token) != 1:
        return "".join(map(visible, token)).replace("$", r"\$")  # two of them would begin and end a formula
    signs = {"\n": "↵", "\t": "⇥", " ": "␣"}
    font = get_font(findfont(FontProperties()))
    shows = token.isprintable() and font.get_char_index(ord(token))
    return signs.get(token) or (token if shows else f"{ord(token):02x}")


def bigram_table(probs, labels, title="after the character on the left, how probable is the one above?"):
    """A heat map of which character follows which. probs: (V, V) tensor, row a, column b; labels: the V characters."""
    V = len(labels)
    side = max(4.0, 0.16 * V)
    figure, axes = new_figure(side + 1.0, side + 0.4)
    # One hue from white to dark: lightness alone carries the number. The square root lifts the rare pairs into view.
    image = axes.imshow(probs.tolist(), cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
    names = [visible(char) for char in labels]
    axes.set_xticks(range(V), names)
    axes.set_yticks(range(V), names)
    axes.tick_params(length=0, labelsize=8, labeltop=True, labelright=True)
    if max(map(len, names)) > 1:
        axes.tick_params(axis="x", rotation=90)
    axes.set(xlabel="next character", ylabel="character")
    axes.set_title(title, pad=14)
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


def frequencies(shares, labels):
    """How often each token occurs, most frequent first. shares: V numbers that sum to 1; labels: the V characters."""
    figure, axes = new_figure(10.0, 3.0)
    order = sorted(range(len(labels)), key=lambda i: -float(shares[i]))
    axes.bar(range(len(order)), [100 * float(shares[i]) for i in order], color=BLUE)
    axes.set_xticks(range(len(order)), [visible(labels[i]) for i in order])
    axes.tick_params(axis="x", length=0)
    axes.margins(x=0.01)
    axes.set(ylabel="share of the text, in %", title="how often each character occurs")
    return figure


def curves(lines, title, xlabel="step", levels=(), log_x=False):
    """Lines in one picture, seven at most. lines: {label: (xs, ys)}; levels: {label: y}, dashed, to compare with."""
    figure, axes = new_figure()
    for (label, (xs, ys)), colour in zip(lines.items(), (BLUE, RED, GREEN, ORANGE, PINK, SKY, GREY)):
        axes.plot(xs, ys, label=label, color=colour, linewidth=1.5, marker="o" if len(xs) < 20 else None, markersize=5)
    for label in levels:
        axes.axhline(levels[label], color=GREY, linestyle="--", linewidth=1)
        note = dict(xytext=(4, 0), textcoords="offset points", va="center", color=GREY)  # beside the axes: no overlap
        axes.annotate(label, (1, levels[label]), xycoords=axes.get_yaxis_transform(), **note)
    if log_x:
        xs = next(iter(lines.values()))[0]
        axes.set_xscale("log", base=2)
        axes.set_xticks(xs, [str(x) for x in xs])
    elif all(float(x).is_integer() for xs, _ in lines.values() for x in xs):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel=xlabel, title=title)
    axes.grid(alpha=0.25)
    if len(lines) > 1:
        axes.legend(frameon=False)
    return figure


def attention_maps(maps, labels, titles, numbers=False, future=False):
    """Who looks at whom, one square for each map. maps: (T, T) tensors, row = who looks; labels: the T tokens.

    What lies in the future of a row is left blank, unless `future`. numbers: write them into the squares.
    """
    T, columns = len(labels), min(len(maps), 2 if len(labels) > 20 else 3)
    rows = -(-len(maps) // columns)
    side = max(3.2, 0.13 * T)
    figure = Figure(figsize=(side * columns, (side + 0.5) * rows), facecolor="white", layout="constrained")
    names = [visible(char) for char in labels]
    for i, (weights, title) in enumerate(zip(maps, titles)):
        axes = figure.add_subplot(rows, columns, i + 1)
        seen = [[float(weights[a][b]) if b <= a or future else float("nan") for b in range(T)] for a in range(T)]
        axes.imshow(seen, cmap="Blues", norm=PowerNorm(1.0 if numbers else 0.5, vmin=0, vmax=1))
        if numbers:
            for a in range(T):
                for b in range(T if future else a + 1):
                    colour = "white" if seen[a][b] > 0.6 else "black"
                    axes.text(b, a, f"{seen[a][b]:.2f}", ha="center", va="center", fontsize=9, color=colour)
        axes.set_xticks(range(T), names)
        axes.set_yticks(range(T), names)
        axes.tick_params(length=0, labelsize=8 if T > 20 else 11)
        axes.spines[:].set_visible(False)
        axes.set_title(title, fontsize=11)
        axes.set(xlabel="is looked at", ylabel="looks" if i % columns == 0 else "")
    return figure


def all_heads(attention, labels):
    """Every head as a small multiple: a row for each layer, a column for each head; darker = looked at more.

    attention: (n_layer, H, T, T), row = who looks; labels: the T tokens. What lies in the future is left blank.
    """
    L, H, T = len(attention), len(attention[0]), len(labels)
    side = max(1.7, 0.085 * T)
    figure = Figure(figsize=(side * H + 0.5, (side + 0.25) * L + 0.3), facecolor="white", layout="constrained")
    names = [visible(label) for label in labels]
    for layer in range(L):
        for head in range(H):
            axes = figure.add_subplot(L, H, layer * H + head + 1)
            weights = attention[layer][head]
            seen = [[float(weights[a][b]) if b <= a else float("nan") for b in range(T)] for a in range(T)]
            axes.imshow(seen, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
            axes.set_xticks(range(T), names if layer == L - 1 else [])
            axes.set_yticks(range(T), names if head == 0 else [])
            axes.tick_params(length=0, labelsize=6, pad=1)
            axes.spines[:].set_visible(False)
            axes.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=9)
    return figure


def head_scores(scores, title, signed=False):
    """A number for each head: rows are layers, columns are heads, counted from 1. scores: (n_layer, H).

    signed: 0 is white, more is orange, less is purple; else from 0, white, to the largest, dark.
    """
    scores = [[float(score) for score in row] for row in scores]
    L, H = len(scores), len(scores[0])
    most = max((abs(score) for row in scores for score in row if score == score), default=0.0) or 1.0
    figure, axes = new_figure(max(3.5, 0.95 * H + 1.2), 0.6 * L + 1.3)
    axes.imshow(scores, cmap="PuOr_r" if signed else "Blues", vmin=-most if signed else 0, vmax=most, aspect="auto")
    for layer in range(L):
        for head in range(H):
            score = scores[layer][head]
            colour = "white" if abs(score) > (0.75 if signed else 0.6) * most else "black"
            axes.text(
                head, layer, f"{score:.2f}" if most >= 0.1 else f"{score:.4f}", ha="center", va="center", color=colour
            )
    axes.set_xticks(range(H), [str(head + 1) for head in range(H)])
    axes.set_yticks(range(L), [str(layer + 1) for layer in range(L)])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="head", ylabel="layer", title=title)
    return figure


def logit_lens(probs, labels, text, answers=None):
    """What the model would say next if it ended early: a row for each layer, a column for each token read.

    probs: (n_layer + 1, T, V); labels: the V tokens; text: the T tokens read; answers: the T that came next, which are
    framed where they are the first guess. In each square stands the first guess, the darker the surer.
    """
    best, guesses = probs.max(dim=-1)  # (n_layer + 1, T) each
    L, T = best.shape
    figure, axes = new_figure(0.3 * T + 1.6, 0.36 * L + 1.2)
    image = axes.imshow(best.tolist(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for layer in range(L):
        for t in range(T):
            guess = labels[int(guesses[layer, t])]
            colour = "white" if best[layer, t] > 0.6 else "black"
            axes.text(t, layer, visible(guess), ha="center", va="center", fontsize=9, color=colour)
            if answers is not None and guess == answers[t]:
                frame = dict(fill=False, edgecolor=RED, linewidth=1.6)
                axes.add_patch(Rectangle((t - 0.44, layer - 0.42), 0.88, 0.84, **frame))
    axes.set_xticks(range(T), [visible(token) for token in text])
    axes.set_yticks(range(L), ["before layer 1", *(f"after layer {layer}" for layer in range(1, L))])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    framed = "" if answers is None else " (framed: right)"
    axes.set(xlabel="the token just read", title=f"what it would guess next, if it ended there{framed}")
    figure.colorbar(image, ax=axes, ticks=[0, 0.5, 1], pad=0.01).ax.set_yticklabels(["0", "50 %", "100 %"])
    return figure


def embedding_map(points, labels, groups, shares=None):
    """Vectors in two dimensions, each drawn as its label in the colour of its group.

    points: (N, 2); labels: the N tokens; groups: a name for each; shares: of the variance, for the two axes.
    """
    figure, axes = new_figure(7.5, 5.5)
    names = list(dict.fromkeys(groups))
    colours = dict(zip(names, (BLUE, RED, GREEN, ORANGE, PINK, GREY)))
    for name in names:  # a point behind each label, so that the axes fit and the legend has a mark
        chosen = [i for i, group in enumerate(groups) if group == name]
        xs, ys = [float(points[i][0]) for i in chosen], [float(points[i][1]) for i in chosen]
        axes.scatter(xs, ys, color=colours.get(name, GREY), s=110, alpha=0.18, linewidths=0, label=name)
        for i, x, y in zip(chosen, xs, ys):
            label = visible(labels[i])
            axes.text(x, y, label, ha="center", va="center", fontsize=11, color=colours.get(name, GREY), weight="bold")
    for axis, share in zip("xy", shares if shares is not None else ()):
        axes.set(**{f"{axis}label": f"{float(share):.0%} of the variance"})
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title("tokens that the model treats alike lie close together")
    if len(names) > 1:
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def neuron_text(texts, activations, marks=None, title="the darker, the more active"):
    """Lines of text, each token on the shade of one neuron's activation; below 0 is white.

    texts: N lists of tokens, or strings; activations: N lists as long; marks: a position in each to frame.
    """
    width = max(map(len, texts), default=1)
    most = max((float(a) for row in activations for a in row if a == a), default=0.0)
    figure, axes = new_figure(0.17 * width + 0.6, 0.3 * len(texts) + 0.6)
    for row, (text, values) in enumerate(zip(texts, activations)):
        for t, (token, value) in enumerate(zip(text, values)):
            share = max(0.0, float(value)) / most if most > 0 else 0.0
            axes.add_patch(Rectangle((t - 0.5, row - 0.42), 1, 0.84, color=colormaps["Blues"](share), linewidth=0))
            mark = dict(ha="center", va="center", fontsize=9, family="monospace")
            axes.text(t, row, visible(token), color="white" if share > 0.6 else "black", **mark)
        if marks is not None:
            frame = dict(fill=False, edgecolor=RED, linewidth=1.4)
            axes.add_patch(Rectangle((marks[row] - 0.5, row - 0.42), 1, 0.84, **frame))
    axes.set(xlim=(-0.6, width - 0.4), ylim=(len(texts) - 0.4, -0.6), title=title)
    axes.set_axis_off()
    return figure


def ladder(names, losses, bits):
    """A bar for each model, from first to last, with its val loss in nats per token and in bits per byte."""
    figure, axes = new_figure(8.5, 0.38 * len(names) + 1.0)
    colours = [GREEN if loss == min(losses) else BLUE for loss in losses]
    axes.barh(names, losses, color=colours, height=0.72)
    for i, (loss, bit) in enumerate(zip(losses, bits)):
        axes.text(loss, i, f" {loss:.3f}  ({bit:.2f})", va="center", fontsize=9)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.15)
    axes.set(xlabel="val loss in nats per token (in brackets: bits per byte)", title="the ladder: shorter is better")
    return figure


def surprise_map(text, names, probs):
    """Which character each model saw coming. text: T characters; probs: a row for each name, what it gave to each."""
    T = len(text)
    figure, axes = new_figure(0.19 * T + 2.6, 0.36 * len(names) + 1.2)
    image = axes.imshow(probs, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(T), [visible(char) for char in text])
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("how probable each model found the character that came next")
    figure.colorbar(image, ax=axes, ticks=[0, 0.5, 1], pad=0.01).ax.set_yticklabels(["0", "50 %", "100 %"])
    return figure


def next_token_bars(probs, labels, titles, most=12):
    """The likeliest next tokens, a panel for each row of probs (N, V), in the order of the first row."""
    order = sorted(range(len(labels)), key=lambda i: -float(probs[0][i]))[:most]
    figure = Figure(figsize=(3.2 * len(titles), 2.8), facecolor="white", layout="constrained")
    first = None
    for i, (row, title) in enumerate(zip(probs, titles)):
        axes = first = figure.add_subplot(1, len(titles), i + 1, sharey=first)
        axes.bar(range(len(order)), [100 * float(row[j]) for j in order], color=BLUE)
        axes.set_xticks(range(len(order)), [visible(labels[j]) for j in order])
        axes.tick_params(axis="x", length=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set(title=title, ylabel="chance in %" if i == 0 else "")
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# For the notebooks on tokens, counting, training, sampling and scale


def coloured_tokens(rows, names, columns=76):
    """A text cut into pieces in several ways. rows: lists of pieces, one list for each name.

    A piece is a str, or an int for a single byte, which is shown as two hexadecimal digits. Neighbours differ in
    colour. columns: the width at which a row goes on in the next line, in characters.
    """
    tints = ("#CFE5F3", "#FBE7BF", "#CDECE1", "#F6D6C2")  # pale forms of the colours above, for black letters
    wide, high = 0.103, 0.27  # of a character and of a line, in inches
    boxes, heads, line = [], [], 0.0  # (text, x, line, tint); (heading, line)
    for row, name in zip(rows, names):
        heads.append((f"{name}: {len(row)} tokens", line))
        line, x = line + 1, 0
        for i, piece in enumerate(row):
            text = f"{piece:02x}" if isinstance(piece, int) else "".join(map(visible, piece))
            if x and x + len(text) > columns:
                line, x = line + 1, 0
            boxes.append((text, x, line, tints[i % len(tints)]))
            x += len(text) + 0.4
        line += 1.5
    most = max([x + len(text) for text, x, _, _ in boxes] + [len(head) for head, _ in heads])
    width, height = wide * most + 0.2, high * (line - 0.4)
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.1, width - 0.1), ylim=(height - high / 2, -high / 2))  # one unit is one inch
    axes.axis("off")
    for head, line in heads:
        axes.text(0, high * line, head, va="center", fontsize=10, color="#404040")
    for text, x, line, tint in boxes:
        corner = (wide * (x - 0.1), high * (line - 0.42))
        axes.add_patch(Rectangle(corner, wide * (len(text) + 0.2), 0.84 * high, facecolor=tint))
        middle = wide * (x + len(text) / 2)
        plain = text.replace("$", r"\$")  # two of them would begin and end a formula
        axes.text(middle, high * line, plain, ha="center", va="center", fontsize=11, family="monospace")
    return figure


def number_table(values, rows, columns, title):
    """A small table with its numbers in it, darker where they are larger. values: (R, C); rows, columns: labels."""
    R, C = len(rows), len(columns)
    numbers = [[float(v) for v in row] for row in values]
    written = [f"{v:.3g}" for row in numbers for v in row]
    wide = 0.15 + 0.1 * max(map(len, [*columns, *written, "00"]))
    figure, axes = new_figure(wide * C + 0.2 + 0.1 * max(map(len, rows)), 0.4 * R + 1.0)
    top = max(map(max, numbers)) or 1.0
    axes.imshow(numbers, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    for a in range(R):
        for b in range(C):
            colour = "white" if numbers[a][b] > 0.6 * top else "black"
            axes.text(b, a, f"{numbers[a][b]:.3g}", ha="center", va="center", fontsize=9, color=colour)
    axes.set_xticks(range(C), [visible(name) if len(name) == 1 else name for name in columns])
    axes.set_yticks(range(R), [visible(name) if len(name) == 1 else name for name in rows])
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=11)
    return figure


def bars(names, values, title, form="{:,.1f}"):
    """A bar for each name, from the first at the top to the last, with its value beside it, written in this form."""
    figure, axes = new_figure(7.0, 0.38 * len(names) + 1.0)
    axes.barh(names, values, color=BLUE, height=0.72)
    for i, value in enumerate(values):
        axes.text(value, i, " " + form.format(value), va="center", fontsize=9)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.15)
    axes.set_title(title)
    return figure


def learning_rates(rates, losses, choice):
    """A learning rate finder's curve: the loss as the rate climbs from step to step, and the rate that was chosen."""
    figure, axes = new_figure()
    axes.plot(rates, losses, color=BLUE, linewidth=1.5)
    axes.axvline(choice, color=RED, linestyle="--", linewidth=1.2)
    low, high = min(losses), losses[0]
    axes.set(xscale="log", ylim=(low - 0.1 * (high - low), high + 0.4 * (high - low)))  # what bursts leaves the picture
    note = dict(xytext=(5, -4), textcoords="offset points", va="top", color=RED)
    axes.annotate(f"{choice:.1g}", (choice, 1), xycoords=axes.get_xaxis_transform(), **note)
    axes.set(xlabel="learning rate", title="the loss while the learning rate climbs")
    axes.grid(alpha=0.25)
    return figure


def reshaped(before, afters, labels, titles, most=14):
    """What settings make of a distribution: outlines as it was, (V,), bars as it became, a panel for each (V,)."""
    order = sorted(range(len(labels)), key=lambda i: -float(before[i]))[:most]
    figure = Figure(figsize=(3.4 * len(titles), 2.9), facecolor="white", layout="constrained")
    first = None
    for i, (after, title) in enumerate(zip(afters, titles)):
        axes = first = figure.add_subplot(1, len(titles), i + 1, sharey=first)
        places = range(len(order))
        axes.bar(places, [100 * float(after[j]) for j in order], color=BLUE, label="after")
        was = [100 * float(before[j]) for j in order]
        axes.bar(places, was, facecolor="none", edgecolor=ORANGE, linewidth=1.4, label="before")
        axes.set_xticks(places, [visible(labels[j]) for j in order])
        axes.tick_params(axis="x", length=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set(title=title, ylabel="chance in %" if i == 0 else "")
    first.legend(frameon=False)
    return figure


def beam_tree(levels, labels, prompt):
    """A beam search as a tree. levels: for each length 1, 2, ... the beams kept, best first, as generate.Hypothesis
    with the sum of log-probabilities for a score; labels: the V tokens; prompt: written at the root.

    Blue is the way to the best text, black what lived to the end, grey what was dropped on the way.
    """
    figure, axes = new_figure(0.62 * len(levels) + 2.6, 0.5 * max(map(len, levels)) + 0.9)
    axes.axis("off")
    places = {(): (0.0, (len(levels[-1]) - 1) / 2)}
    for depth, level in enumerate(levels, 1):
        places.update({tuple(beam.tokens): (float(depth), float(rank)) for rank, beam in enumerate(level)})
    alive = {tuple(beam.tokens[:n]) for beam in levels[-1] for n in range(len(levels) + 1)}
    best = {tuple(levels[-1][0].tokens[:n]) for n in range(len(levels) + 1)}
    dot = dict(boxstyle="circle,pad=0.25", facecolor="white")
    for tokens, (x, y) in places.items():
        colour, order = (BLUE, 3) if tokens in best else ("black", 2) if tokens in alive else ("#A0A0A0", 1)
        if not tokens:
            axes.text(x, y, prompt, ha="right", va="center", fontsize=11)
            continue
        parent = places[tokens[:-1]]
        axes.plot([parent[0], x], [parent[1], y], color=colour, linewidth=2 if tokens in best else 1, zorder=order)
        box = dict(dot, edgecolor=colour)
        letter = visible(labels[tokens[-1]])
        axes.text(x, y, letter, ha="center", va="center", fontsize=11, color=colour, bbox=box, zorder=order + 3)
    for rank, beam in enumerate(levels[-1]):
        chance = f"{100 * math.exp(beam.score):.2g} %"
        axes.text(len(levels) + 0.5, rank, chance, va="center", fontsize=10, color=BLUE if rank == 0 else "black")
    axes.set(xlim=(-0.15 * len(prompt) - 0.3, len(levels) + 1.6), ylim=(max(map(len, levels)) - 0.4, -0.6))
    axes.set_title("the beams kept at each length, the likeliest on top", fontsize=11)
    return figure


def power_law(sizes, losses, laws, held_out, title):
    """Loss against size with both axes logarithmic, and curves fitted to it.

    sizes, losses: the points of the fit; laws: {label: function of a size}; held_out: (size, loss), which the
    fit has not seen.
    """
    figure, axes = new_figure()
    low, high = math.log(min(sizes)), math.log(1.5 * held_out[0])
    grid = [math.exp(low + (high - low) * i / 50) for i in range(51)]
    for (label, law), style, colour in zip(laws.items(), ("--", "-", ":"), (ORANGE, GREEN, GREY)):
        axes.plot(grid, [law(n) for n in grid], linestyle=style, color=colour, label=label, linewidth=1.5)
    axes.plot(sizes, losses, "o", color=BLUE, label="fitted to these")
    axes.plot(*held_out, "D", color=RED, label="not seen by the fit")
    axes.set(xscale="log", yscale="log", xlabel="parameters", title=title)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter("{x:.2f}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(FixedLocator([*sizes, held_out[0]]))
    axes.xaxis.set_major_formatter(lambda n, _: f"{n / 1e6:.1f} M" if n >= 1e6 else f"{n / 1e3:.0f} K")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure
