"""Every picture, as a function: numbers in, a matplotlib Figure out. Show it in a notebook or save it with savefig.

The colours are Okabe and Ito's, which colour-blind people can tell apart; the figures are white whatever the viewer's
theme, so that they read the same in light and dark.
"""

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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
