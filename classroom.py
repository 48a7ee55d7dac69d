"""What every notebook begins with: how it draws, its fast setting for the tests, and sliders where they can be had.

import os
if not os.path.exists("classroom.py"):
    os.chdir("..")  # notebooks/ lies beside the modules
from classroom import FAST, begin, sliders
begin()
"""

import inspect
import os
import sys

import matplotlib
from IPython import get_ipython
from IPython.display import display
from tqdm import tqdm

from utils import missing_extra

FAST = os.environ.get("NANOGPT_FAST") == "1"  # the tests set this: the same notebook, with hardly any training
PLAIN = os.environ.get("NANOGPT_PLAIN") == "1"  # `make notebooks` sets this: a picture shows without a kernel, too


def begin(dpi=75):
    """Show figures below their cell, sharp on any screen. dpi: how large they appear on the page."""
    shell = get_ipython()
    shell.run_line_magic("matplotlib", "inline")
    shell.run_line_magic("config", "InlineBackend.figure_formats = ['retina']")
    matplotlib.rcParams["figure.dpi"] = dpi


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
