"""What every notebook begins with: how it draws, its fast setting for the tests, and sliders where they can be had.

import os
if not os.path.exists("classroom.py"):
    os.chdir("..")  # notebooks/ lies beside the modules
from classroom import FAST, begin, sliders
begin()
"""

import inspect
import io
import os
import sys

from IPython import get_ipython
from IPython.display import display
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from utils import missing_extra

FAST = os.environ.get("NANOGPT_FAST") == "1"  # the tests set this: the same notebook, with hardly any training
PLAIN = os.environ.get("NANOGPT_PLAIN") == "1"  # `make notebooks` sets this: a picture shows without a kernel, too


def begin(dpi=75):
    """Show figures below their cell. dpi: how large they appear on the page."""
    shell = get_ipython()
    shell.run_line_magic("matplotlib", "inline")
    shell.display_formatter.formatters["image/png"].for_type(Figure, lambda figure: png(figure, dpi))


def png(figure, dpi):
    """A figure as the bytes of a PNG, and the size in which a page shows it.

    It has twice the pixels, for sharp screens, and 128 colours: a third of the bytes, and no eye sees the difference.
    """
    drawn, file = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=2 * dpi, bbox_inches="tight")
    image = Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    image.save(file, format="png", optimize=True)
    return file.getvalue(), dict(width=image.width // 2, height=image.height // 2)


def progress(things):
    """The same things, one after the other, with a bar that says how long the rest will take and then goes away."""
    return tqdm(things, file=sys.stdout, leave=False, disable=PLAIN or FAST)


def sliders(draw, **choices):
    """Show what draw(...) returns, with a slider for each argument. choices: {argument: the values it can take}.

    Every argument has a default, and the slider begins there. Without ipywidgets, the picture of the defaults, and a
    line that says what to install.
    """
    if not PLAIN:
        try:
            import ipywidgets
        except ImportError:
            print(missing_extra("ipywidgets", "a picture with sliders"))
        else:
            begins = inspect.signature(draw).parameters
            controls = {
                name: ipywidgets.SelectionSlider(options=list(values), value=begins[name].default)
                for name, values in choices.items()
            }
            ipywidgets.interact(draw, **controls)
            return
    display(draw())
