"""classroom.py: sliders where ipywidgets is installed, else a picture and one line; errors take one line."""

import builtins
import io

import numpy as np
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from matplotlib.figure import Figure
from PIL import Image

import classroom
import plots
from utils import UserError


def draw(layer=1, temperature=0.5):
    drawn.append((layer, temperature))
    return Figure(figsize=(1, 1))


@pytest.fixture(autouse=True)
def shown(monkeypatch):
    """What was displayed."""
    drawn.clear()
    things = []
    monkeypatch.setattr(classroom, "display", things.append)
    monkeypatch.setattr(classroom, "PLAIN", False)
    return things


drawn = []


def test_sliders_begin_at_the_defaults_and_draw_again_when_moved(shown, monkeypatch):
    import ipywidgets

    made = []
    interact = ipywidgets.interact
    monkeypatch.setattr(ipywidgets, "interact", lambda f, **controls: made.append(controls) or interact(f, **controls))
    classroom.sliders(draw, layer=range(3), temperature=[0.5, 1.0])
    assert drawn == [(1, 0.5)] and shown == []
    made[0]["layer"].value = 2
    made[0]["temperature"].value = 1.0
    assert drawn == [(1, 0.5), (2, 0.5), (2, 1.0)]


def test_without_ipywidgets_the_picture_of_the_defaults_and_what_to_install(shown, monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *rest):
        if name == "ipywidgets":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    classroom.sliders(draw, layer=range(3))
    assert drawn == [(1, 0.5)] and isinstance(shown[0], Figure)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "pip install ipywidgets" in out


def test_pictures_for_the_page_need_no_kernel(shown, monkeypatch, capsys):
    monkeypatch.setattr(classroom, "PLAIN", True)
    classroom.sliders(draw, layer=range(3))
    assert isinstance(shown[0], Figure) and capsys.readouterr().out == ""


def test_in_a_notebook_a_user_error_is_one_line(capsys):
    code = "from utils import missing_extra; raise missing_extra('tokenizers', 'byte-pair encoding')"
    result = InteractiveShell.instance().run_cell(code)
    InteractiveShell.clear_instance()
    assert isinstance(result.error_in_exec, UserError)
    printed = capsys.readouterr().out.strip()
    assert printed == "byte-pair encoding needs the package 'tokenizers'; install it with: pip install tokenizers"


def test_a_bar_shows_while_one_waits_and_not_on_the_page(monkeypatch, capsys):
    monkeypatch.setattr(classroom, "FAST", False)
    assert list(classroom.progress(range(3))) == [0, 1, 2]
    printed = capsys.readouterr()
    assert "0/3" in printed.out and printed.err == ""
    monkeypatch.setattr(classroom, "PLAIN", True)
    assert list(classroom.progress(range(3))) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_a_picture_for_the_page_is_sharp_and_small():
    figure = plots.attention_maps([torch.rand(20, 20)], "a" * 20, ["head"])
    plain = io.BytesIO()
    figure.savefig(plain, dpi=150, bbox_inches="tight")
    before = Image.open(plain).convert("RGB")
    data, size = classroom.png(figure, 75)
    after = Image.open(io.BytesIO(data)).convert("RGB")
    assert after.size == before.size and size == dict(width=before.width // 2, height=before.height // 2)
    assert len(data) < len(plain.getvalue()) / 2
    assert np.abs(np.asarray(before, dtype=int) - np.asarray(after, dtype=int)).max() <= 32  # of 255
