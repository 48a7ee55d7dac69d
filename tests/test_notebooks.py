"""The notebooks run from top to bottom, and were committed as such a run left them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = [ROOT / "gpt_dev.ipynb", *sorted((ROOT / "notebooks").glob("*.ipynb"))]

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    notebook = nbformat.read(str(path), as_version=4)
    nbformat.validate(notebook)
    return notebook, [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(cells, mime_type):
    """The outputs of one type: "image/png", say, or "text/plain", which also finds what was printed."""
    for cell in cells:
        for output in cell.outputs:
            if mime_type in output.get("data", {}):
                yield output.data[mime_type]
            elif mime_type == "text/plain" and output.output_type == "stream":
                yield output.text


@pytest.fixture(scope="module")
def runs():
    """{notebook: {"pictures": how many it shows, "error": a traceback or None}} of a run of each."""
    command = [sys.executable, str(ROOT / "tests" / "run_notebooks.py"), *map(str, NOTEBOOKS)]
    fast = {"NANOGPT_FAST": "1", "OMP_NUM_THREADS": "1"}  # hardly any training, but every cell
    done = subprocess.run(
        command, env={**os.environ, **fast}, stdout=subprocess.PIPE, text=True, check=True, timeout=900
    )
    return dict(zip(NOTEBOOKS, json.loads(done.stdout.splitlines()[-1])))


@each_notebook
def test_runs_from_top_to_bottom(path, runs):
    assert runs[path]["error"] is None, runs[path]["error"]
    committed = len(list(outputs(read(path)[1], "image/png")))
    assert runs[path]["pictures"] == committed > 0, "the pictures do not show"


@each_notebook
def test_was_saved_from_a_clean_run(path):
    notebook, cells = read(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell.source.strip() for cell in notebook.cells)
    assert notebook.metadata.kernelspec.name == "python3"
    assert "FAST" in cells[0].source, "NANOGPT_FAST=1 makes it quick, for the tests"
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error", cell.source
            assert output.get("name") != "stderr", f"a warning was left in the output: {output.text}"
            assert not any("widget" in mime_type for mime_type in output.get("data", {})), (
                "`make notebooks` draws plainly"
            )
    assert "widgets" not in notebook.metadata
    assert path.stat().st_size < (1_500_000 if path.stem == "gpt_dev" else 600_000)


@each_notebook
def test_shows_and_asks(path):
    notebook, cells = read(path)
    first, last = notebook.cells[0], notebook.cells[-1]
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert list(outputs(cells, "image/png"))
    assert first.cell_type == "markdown" and "?" in first.source, "it opens with a question"
    assert last.cell_type == "markdown" and "<details>" in last.source, "it ends with exercises"
    assert re.search(r"\bexercise", text, re.IGNORECASE)
    assert text.count("<details>") == text.count("</details>") >= 1, "answers are folded away"
    assert text.count("<details>") == text.count("</summary>")


@each_notebook
def test_names_no_place_on_the_authors_machine(path):
    notebook, cells = read(path)
    for text in [*(cell.source for cell in notebook.cells), *outputs(cells, "text/plain")]:
        assert not re.search(r"(?<![\w.])/(work|home|root|tmp|Users|usr|opt)/|[A-Z]:\\", text), text
