"""What test_notebooks.py starts: notebooks from top to bottom, each in a process that has PyTorch loaded already.

    python run_notebooks.py NOTEBOOK...     # prints a list, in JSON: of each, how many pictures it shows and its error

They run in Jupyter's kernel, but without the messages between its processes, of which one was lost now and then: the
kernel idle, the client waiting (as in ipykernel's issue 1554).
"""

import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor

import ipywidgets  # noqa: F401
import matplotlib.figure  # noqa: F401
import nbformat
import torch  # noqa: F401
from ipykernel.inprocess.manager import InProcessKernelManager
from matplotlib.backend_bases import FigureCanvasBase

draw = FigureCanvasBase.print_figure


def draw_fast(self, *args, dpi=None, bbox_inches=None, **kwargs):
    """Draw a figure once, not twice more to find the room that its parts and its edges need, and with few pixels."""
    self.figure.set_layout_engine("none")
    return draw(self, *args, dpi=40, **kwargs)


def main(paths):
    FigureCanvasBase.print_figure = draw_fast
    found = []
    for path in map(os.path.abspath, paths):  # of our own modules none is loaded here
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
            found.append(pool.submit(run, path).result())
    print(json.dumps(found))


def run(path):
    """Run every cell, up to the first error: {"pictures": how many were shown, "error": a traceback or None}."""
    os.chdir(os.path.dirname(path))  # as Jupyter does
    sys.path[0] = ""
    manager = InProcessKernelManager()
    manager.start_kernel()
    client = manager.client()
    client.start_channels()
    pictures = 0
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            client.execute(cell.source)
            reply = client.get_shell_msg(timeout=0)["content"]
            while client.iopub_channel.msg_ready():
                pictures += "image/png" in client.get_iopub_msg(timeout=0)["content"].get("data", {})
            if reply["status"] != "ok":
                return dict(pictures=pictures, error="\n".join(reply["traceback"]))
    return dict(pictures=pictures, error=None)


if __name__ == "__main__":
    main(sys.argv[1:])
