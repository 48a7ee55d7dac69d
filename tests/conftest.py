"""What several test files share: no network, the same numbers on every run, a tiny model whose weights all matter."""

import gc
import os

gc.disable()  # until all is imported, among which it would look for garbage in vain: 16 s become 9
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported; the commands that tests start inherit it
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import settings
from torch.utils._python_dispatch import TorchDispatchMode

from model import GPT, GPTConfig

torch.set_num_threads(1)  # for models this small one thread is the fastest, and sums come out the same everywhere

# Hypothesis tries the same examples every time, keeps no directory, and does not mind a busy machine.
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")


# The files that take longest come first, so that of two workers none is left with one of them at the end.
LONGEST_FIRST = ["test_cli", "test_train", "test_distributed", "test_notebooks", "test_writing", "test_shards"]
LONGEST_FIRST += ["test_optim", "test_survival", "test_export"]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST_FIRST.index(item.path.stem) if item.path.stem in LONGEST_FIRST else 99)


@pytest.hookimpl(hookwrapper=True)
def pytest_collection():  # around the whole, so that it ends in the process that only hands tests to others, too
    yield
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def same_dice():
    """Each test draws the same numbers, whatever ran before it in its process."""
    torch.manual_seed(0)


def forked(function, *args):
    """Call a function in a child, which has loaded all that this process has. Returns the child's id; it ends with
    status 0, after an error with 1."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function(*args)
            status = 0
        finally:
            os._exit(status)  # whatever happens, the child does not go on with the tests
    return child


class OnMeta(TorchDispatchMode):
    """Every tensor lies on PyTorch's "meta", where only shapes and types are computed: no CPU, in want of a GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        tensors = made if isinstance(made, (tuple, list)) else [made]
        assert all(t.is_meta for t in tensors if isinstance(t, torch.Tensor)), f"{function} made a tensor on the CPU"
        return made


@pytest.fixture(scope="session")
def make_model():
    """make_model(seed=0, **sizes) -> a tiny GPT in eval mode whose every parameter is random, biases included.

    Freshly initialised, a model hides mistakes: its biases are 0, its LayerNorms do nothing, its logits are all alike.
    """

    def make(seed=0, **sizes):
        defaults = dict(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = GPT(GPTConfig(**{**defaults, **sizes}))
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.2 * torch.randn_like(p))
        return model.eval()

    return make
