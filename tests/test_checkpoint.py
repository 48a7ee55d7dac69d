"""checkpoint.py: what is saved comes back exactly, what others saved is read, and nothing that is read can run code."""

import errno
import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
from typing import Tuple

import pytest
import tokenizers
import torch
from conftest import forked
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import (
    TRANSPOSED,
    Lock,
    holds_run,
    load_model,
    load_state,
    lock_owner,
    model_files,
    read_metrics,
    save_model,
    save_state,
    snapshot,
    state_files,
)
from lighten import lighten
from model import GPT
from modern import Modern, ModernConfig
from tokenizer import ByteTokenizer, CharTokenizer, LibraryTokenizer, save_tokenizer
from utils import UserError, write_atomically, write_json

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LETTERS = "\nabcdefghij"  # 11, as many as make_model's vocabulary


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture
def saved(model, tmp_path):
    """A directory that holds `model`."""
    save_model(str(tmp_path), model, CharTokenizer(LETTERS))
    return tmp_path


def assert_equal(a, b):
    """The same config and exactly the same weights."""
    assert a.config == b.config
    assert list(a.state_dict()) == list(b.state_dict())
    assert all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))
    assert b.lm_head.weight is b.transformer.wte.weight, "embedding and head are still tied"


def refused(path, words="", load=load_model):
    """Assert that it is refused with a UserError of one line that has these words in it."""
    with pytest.raises(UserError) as error:
        load(str(path))
    message = str(error.value)
    assert words in message and "\n" not in message and len(message) < 500, message


def edit_json(path, **changes):
    """Set keys of a JSON file; a value of ... removes the key."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def hugging_face_weights(model):
    """Our weights in Hugging Face's orientation, by their names without "transformer."."""
    return {
        name[len("transformer.") :]: (p.t() if name.endswith(TRANSPOSED) else p).contiguous()
        for name, p in model.state_dict().items()
        if name != "lm_head.weight"
    }


def write_bin(directory, weights):
    os.remove(directory / "model.safetensors")
    torch.save(weights, directory / "pytorch_model.bin")


# ---------------------------------------------------------------------------------------------------------------------
# Our own directories


@pytest.mark.parametrize("bias", [True, False])
def test_a_saved_model_comes_back_exactly(make_model, tmp_path, bias):
    model = make_model(bias=bias, dropout=0.25)
    save_model(str(tmp_path), model, CharTokenizer(LETTERS))
    read, tokenizer = load_model(str(tmp_path))
    assert_equal(model, read)
    assert tokenizer.chars == list(LETTERS)


def test_a_loaded_model_writes_and_does_not_drop_out(saved):
    assert not load_model(str(saved))[0].training


def test_a_model_is_saved_without_a_tokenizer_into_a_new_directory(model, tmp_path):
    save_model(str(tmp_path / "new" / "model"), model)
    read, tokenizer = load_model(str(tmp_path / "new" / "model"))
    assert_equal(model, read)
    assert tokenizer is None


@pytest.mark.parametrize("wrapper", ["_orig_mod", "module"])
def test_what_wraps_a_model_is_not_saved(model, tmp_path, wrapper):
    wrapped = torch.nn.Module()  # as torch.compile and DistributedDataParallel keep it
    setattr(wrapped, wrapper, model)
    save_model(str(tmp_path), wrapped)
    assert_equal(model, load_model(str(tmp_path))[0])


@pytest.mark.parametrize("arch", [GPT, Modern])
def test_a_model_that_could_not_be_loaded_again_is_not_written_over_one_that_can(saved, arch):
    config = ModernConfig(8, 11, 2, 2, 16) if arch is Modern else load_model(str(saved))[0].config
    with pytest.raises(ValueError, match="do not both have it"):
        save_model(str(saved), lighten(arch(config), "bfloat16"))
    load_model(str(saved))
    with pytest.raises(TypeError, match="a Linear has no files yet"):
        model_files(torch.nn.Linear(1, 1))


# What someone who tries an idea in model.py may add: it is trained, saved, loaded, or refused before that.


class Changed(GPT):
    """A GPT with a head of its own, a new layer, a new number in a block and a bias."""

    def __init__(self, config):
        super().__init__(config)
        self.lm_head.weight = torch.nn.Parameter(torch.randn(config.vocab_size, config.n_embd))
        self.extra = torch.nn.Linear(config.n_embd, 3)
        for block in self.transformer.h:
            block.gain = torch.nn.Parameter(torch.rand(()))
            block.attn.rel = torch.nn.Linear(2, 2)


@pytest.mark.parametrize("bias", [True, False])
def test_what_was_added_to_model_py_is_saved_and_loaded(make_model, tmp_path, monkeypatch, bias):
    model = Changed(make_model(bias=bias).config)
    save_model(str(tmp_path), model)
    monkeypatch.setattr(checkpoint, "GPT", Changed)
    read, _ = load_model(str(tmp_path))
    assert list(model.state_dict()) == list(read.state_dict())
    assert all(map(torch.equal, model.state_dict().values(), read.state_dict().values()))
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    monkeypatch.undo()
    refused(tmp_path, "reads and writes with a table each")


def test_a_head_of_its_own_begins_as_the_table_of_a_tied_model(saved, model, monkeypatch):
    class Untied(GPT):
        def __init__(self, config):
            super().__init__(config)
            self.lm_head.weight = torch.nn.Parameter(torch.randn(config.vocab_size, config.n_embd))

    monkeypatch.setattr(checkpoint, "GPT", Untied)
    read, _ = load_model(str(saved))
    assert read.lm_head.weight is not read.transformer.wte.weight
    assert torch.equal(read.lm_head.weight, model.transformer.wte.weight)


def test_gpt_from_pretrained_is_load_model(saved, model):
    assert_equal(model, GPT.from_pretrained(str(saved)))


def test_bfloat16_weights_are_saved_as_float32(model, tmp_path):
    save_model(str(tmp_path), model.bfloat16(), CharTokenizer(LETTERS))
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}
    assert_equal(model.float(), load_model(str(tmp_path))[0])


def test_saving_leaves_the_four_files_and_nothing_else(saved):
    assert sorted(os.listdir(saved)) == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


def test_saving_again_replaces_the_model(saved, make_model):
    other = make_model(seed=1)
    save_model(str(saved), other, CharTokenizer(LETTERS))
    assert_equal(other, load_model(str(saved))[0])


def test_a_smaller_block_size_keeps_the_first_positions(saved, model):
    read, _ = load_model(str(saved), block_size=5)
    assert read.config.block_size == 5
    idx = torch.arange(5)[None]
    assert torch.equal(read(idx)[0], model(idx)[0])


def test_a_larger_block_size_is_refused(saved):
    refused(saved, "--block_size 9", lambda path: load_model(path, block_size=9))


def test_dropout_can_be_replaced(saved):
    read, _ = load_model(str(saved), dropout=0.5)
    assert read.config.dropout == read.transformer.drop.p == read.transformer.h[0].attn.dropout == 0.5


# ---------------------------------------------------------------------------------------------------------------------
# What others saved


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_directory_with_pytorch_model_bin(saved, model, prefix):
    """The older files keep attention's causal mask among the weights."""
    weights = {prefix + name: p for name, p in hugging_face_weights(model).items()}
    for i in range(2):
        weights[f"{prefix}h.{i}.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
        weights[f"{prefix}h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    if prefix:
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    write_bin(saved, weights)
    assert_equal(model, load_model(str(saved))[0])


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_a_directory_with_weights_in_several_files(saved, model, kind):
    os.remove(saved / "model.safetensors")
    weight_map, stem, ending = {}, *kind.split(".")
    for i, name in enumerate(hugging_face_weights(model)):
        weight_map[name] = f"{stem}-{i % 3 + 1:05d}-of-00003.{ending}"
    for part in set(weight_map.values()):
        tensors = {name: p for name, p in hugging_face_weights(model).items() if weight_map[name] == part}
        (save_file if ending == "safetensors" else torch.save)(tensors, saved / part)
    write_json(str(saved / f"{kind}.index.json"), {"metadata": {}, "weight_map": weight_map})
    assert_equal(model, load_model(str(saved))[0])


def test_a_part_that_the_index_names_and_nobody_has_is_refused(saved):
    os.remove(saved / "model.safetensors")
    write_json(str(saved / "model.safetensors.index.json"), {"weight_map": {"wte.weight": "part-1.safetensors"}})
    refused(saved, "part-1.safetensors: cannot be read")


@pytest.mark.parametrize("outside", ["../{}", "{}", "sub/../../{}"], ids=["parent", "absolute", "winding"])
def test_an_index_cannot_lead_out_of_its_directory(saved, model, tmp_path_factory, outside):
    """The weights it points at are good, and lie elsewhere."""
    directory = saved / "inner"
    directory.mkdir()
    for name in ("config.json", "tokenizer.json"):
        os.rename(saved / name, directory / name)
    elsewhere = saved / "elsewhere.safetensors"
    os.rename(saved / "model.safetensors", elsewhere)
    part = outside.format(elsewhere if outside == "{}" else elsewhere.name)
    weight_map = dict.fromkeys(load_file(elsewhere), part)
    write_json(str(directory / "model.safetensors.index.json"), {"weight_map": weight_map})
    refused(directory, "cannot be read")


def nanogpt(gpt, **changes):
    """What nanoGPT's train.py keeps in ckpt.pt: key for key, as a compiled run writes it."""
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    weights = {f"_orig_mod.{name}": p for name, p in gpt.state_dict().items()}
    weights["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8).tril()  # without flash attention
    optimizer = torch.optim.AdamW(gpt.parameters())
    checkpoint = {
        "model": weights,
        "optimizer": optimizer.state_dict(),
        "model_args": {name: getattr(gpt.config, name) for name in names},
        "iter_num": 2000,
        "best_val_loss": torch.tensor(1.4697),
        "config": {"out_dir": "out-shakespeare-char", "eval_iters": 200, "compile": True, "learning_rate": 1e-3},
    }
    return {**checkpoint, **changes}


@pytest.mark.parametrize("bias", [True, False])
def test_a_nanogpt_checkpoint(make_model, tmp_path, bias):
    model = make_model(bias=bias)
    torch.save(nanogpt(model), tmp_path / "ckpt.pt")
    read, tokenizer = load_model(str(tmp_path / "ckpt.pt"))
    assert_equal(model, read)
    assert tokenizer is None
    save_tokenizer(str(tmp_path), CharTokenizer(LETTERS), 8)  # beside it, as sample.py asks for
    assert load_model(str(tmp_path / "ckpt.pt"))[1].chars == list(LETTERS)


def test_a_byte_pair_tokenizer_is_read_beside_the_weights(model, tmp_path):
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(LETTERS)}, merges=[]))
    save_model(str(tmp_path), model, LibraryTokenizer(bpe))
    assert load_model(str(tmp_path))[1].encode("cab").tolist() == [3, 1, 2]


# ---------------------------------------------------------------------------------------------------------------------
# By name


PROGRAM = """
import sys
from checkpoint import load_model
from utils import UserError
try:
    model, tokenizer = load_model("gpt2")
    print(model.num_params(), tokenizer.chars)
except UserError as error:
    print(error)
"""


def load_gpt2_by_name(**environment):
    """What PROGRAM prints in a process of its own: the hub's library reads the environment when it is imported."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("HF_HOME", "HF_HUB_CACHE")}
    environment = {**inherited, "PYTHONPATH": HERE, "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("variable, folder", [("HF_HOME", "hub"), ("HF_HUB_CACHE", "")])
def test_a_name_is_found_in_the_local_cache(model, tmp_path, variable, folder):
    repository = tmp_path / folder / "models--openai-community--gpt2"
    snapshot = repository / "snapshots" / ("0123456789" * 4)
    for directory in (snapshot, repository / "refs"):
        directory.mkdir(parents=True)
    (repository / "refs" / "main").write_text(snapshot.name)
    save_model(str(snapshot), model, CharTokenizer(LETTERS))
    assert load_gpt2_by_name(**{variable: str(tmp_path)}) == f"{model.num_params()} {list(LETTERS)}\n"


def test_a_name_that_is_not_in_the_cache_is_refused_offline(tmp_path):
    message = load_gpt2_by_name(HF_HOME=str(tmp_path))
    assert message.startswith("'gpt2' is not in the local cache and cannot be downloaded")
    assert message.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Nothing runs code


class Trap:
    """Unpickled the trusting way, it makes a directory: a stand-in for whatever somebody else wants done."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


PICKLES = {  # a trap where a reader of each kind of file would step into it
    "pytorch_model.bin": lambda model, trap: {**hugging_face_weights(model), "trap": trap},
    "ckpt.pt": lambda model, trap: nanogpt(model, config=trap),
    "state.pt": lambda model, trap: dict(options=trap, counters={}, model={}, optimizers={}),
}


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_that_would_run_code_is_refused_and_runs_none(saved, model, name, write):
    trap = Trap(str(saved / "trapped"))
    os.remove(saved / "model.safetensors")
    write(PICKLES[name](model, trap), saved / name)
    load = load_state if name == "state.pt" else load_model
    refused(saved / name if name == "ckpt.pt" else saved, "a pickle that could run code", load)
    assert not os.path.exists(trap.path)


def test_the_trap_of_the_test_above_works(tmp_path):
    trap = Trap(str(tmp_path / "trapped"))
    torch.save(trap, tmp_path / "a.pt")
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert os.path.exists(trap.path)


class Program(torch.nn.Module):
    """Writes a file as it is loaded from a TorchScript archive, by PyTorch before 2.6 even with weights_only."""

    @torch.jit.export
    def __getstate__(self):
        return (1, self.training)

    @torch.jit.export
    def __setstate__(self, state: Tuple[int, bool]):
        torch.save(torch.ones(1), "trap")
        self.training = state[1]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", ["pytorch_model.bin", "ckpt.pt"])
def test_a_torchscript_archive_is_refused_before_its_code_runs(saved, monkeypatch, name):
    """PyTorch before 2.6 would run it, so that torch.load is not even asked."""
    monkeypatch.chdir(saved)
    torch.jit.script(Program()).save(name)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was asked"))
    os.remove("model.safetensors")
    refused("." if name == "pytorch_model.bin" else name, "a pickle that could run code")
    assert not os.path.exists("trap")


# ---------------------------------------------------------------------------------------------------------------------
# What is damaged, or another architecture, is refused


@pytest.mark.parametrize("keep", [0, 0.1, 0.5, 0.99], ids="{:.0%}".format)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "pytorch_model.bin"])
def test_a_truncated_file_is_refused_by_name(saved, model, name, keep):
    if name == "pytorch_model.bin":
        write_bin(saved, hugging_face_weights(model))
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: int(keep * len(content))])
    refused(saved, name)


@pytest.mark.parametrize("keep", [0, 0.1, 0.5, 0.99], ids="{:.0%}".format)
def test_a_truncated_checkpoint_is_refused_by_name(model, tmp_path, keep):
    path = tmp_path / "ckpt.pt"
    torch.save(nanogpt(model), path)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    refused(path, "ckpt.pt")


@pytest.mark.parametrize("content", [b"hello", b"[]", b"\x80\x04", b"PK\x03\x04", bytes(range(256))])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "pytorch_model.bin"])
def test_a_file_of_something_else_is_refused_by_name(saved, name, content):
    if name == "pytorch_model.bin":
        os.remove(saved / "model.safetensors")
    (saved / name).write_bytes(content)
    refused(saved, name)


def test_a_directory_without_a_model_is_refused(tmp_path):
    refused(tmp_path, "holds no model yet (no config.json); train one with: python train.py")


def test_a_directory_without_weights_is_refused(saved):
    os.remove(saved / "model.safetensors")
    refused(saved, "neither model.safetensors nor pytorch_model.bin")


def test_a_path_that_is_neither_there_nor_a_name_is_refused(tmp_path):
    refused(tmp_path / "nowhere", "no such file or directory, nor one of gpt2, gpt2-medium, gpt2-large, gpt2-xl")


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(model_type="llama"), "is a model of type 'llama'; only 'gpt2' and our own can be loaded"),
        (dict(model_type=...), "is a model of type None"),
        (dict(activation_function="relu"), "has activation_function = 'relu'"),
        (dict(n_inner=65), "has n_inner = 65"),
        (dict(layer_norm_epsilon=1e-6), "has layer_norm_epsilon = 1e-06"),
        (dict(tie_word_embeddings=False), "has tie_word_embeddings = False, but there is no lm_head.weight"),
        (dict(scale_attn_weights=False), "has scale_attn_weights = False"),
        (dict(scale_attn_by_inverse_layer_idx=True), "has scale_attn_by_inverse_layer_idx = True"),
        (dict(add_cross_attention=True), "has add_cross_attention = True"),
        (dict(n_layer=3), "its weights do not fit its own config (they are those of 2 layers, not of 3)"),
        (dict(n_layer=1), "its weights do not fit its own config (Unexpected key(s)"),
        (dict(n_embd=32), "its weights do not fit its own config (transformer.wte.weight is (11, 16), not (11, 32))"),
        (dict(vocab_size=12), "its weights do not fit its own config (transformer.wte.weight is (11, 16)"),
        (dict(vocab_size=10**12), "its weights do not fit its own config (transformer.wte.weight is (11, 16)"),
        (dict(n_positions=9), "its weights do not fit its own config (transformer.wpe.weight is (8, 16)"),
        (dict(n_layer=10**9), "its weights do not fit its own config (they are those of 2 layers, not of 1000000000)"),
        (dict(n_head=3), "n_embd 16 is not divisible by n_head 3"),
    ],
)
def test_another_architecture_is_refused(saved, changes, words):
    edit_json(saved / "config.json", **changes)
    refused(saved, words)


@pytest.mark.parametrize("number", [math.nan, math.inf], ids=str)
def test_weights_that_are_no_numbers_are_refused(saved, number):
    weights = load_file(str(saved / "model.safetensors"))
    weights["transformer.h.1.mlp.c_fc.weight"][3, 5] = number
    save_file(weights, str(saved / "model.safetensors"))
    refused(saved, "its weights hold infinities or NaN (transformer.h.1.mlp.c_fc.weight)")


def test_a_tokenizer_of_fewer_bytes_than_the_model_has_tokens_is_refused(make_model, tmp_path):
    save_model(str(tmp_path), make_model(vocab_size=300), ByteTokenizer())
    refused(tmp_path, "its tokenizer has 256 bytes, its model 300; put back the tokenizer.json")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_json_too_deep_to_be_read_is_refused_by_name(saved, name):
    (saved / name).write_bytes(b"[" * 100_000)
    refused(saved, name)


@pytest.mark.parametrize("value", [..., None, "x", -1, 0, 1.5, 16.0, [], {}], ids=repr)
@pytest.mark.parametrize("key", ["n_positions", "vocab_size", "n_layer", "n_head", "n_embd"])
def test_a_config_whose_sizes_are_no_numbers_is_refused(saved, key, value):
    edit_json(saved / "config.json", **{key: value})
    refused(saved, "config.json: is no complete GPT-2 config")


def test_missing_weights_are_named(saved, model):
    weights = hugging_face_weights(model)
    del weights["h.1.mlp.c_fc.weight"]
    write_bin(saved, weights)
    refused(saved, "transformer.h.1.mlp.c_fc.weight")


@pytest.mark.parametrize("name", ["wte.weight", "wpe.weight"])
def test_missing_embeddings_are_named(saved, model, name):
    weights = hugging_face_weights(model)
    del weights[name]
    write_bin(saved, weights)
    refused(saved, f"transformer.{name}")
    refused(saved, f"transformer.{name}", lambda path: load_model(path, block_size=4))


def test_weights_of_another_shape_are_named(saved, model):
    weights = hugging_face_weights(model)
    weights["h.0.attn.c_attn.weight"] = torch.zeros(2, 2, 2)
    write_bin(saved, weights)
    refused(saved, "transformer.h.0.attn.c_attn.weight")


@pytest.mark.parametrize("content", [[1, 2], {"wte.weight": "hello"}, {1: torch.ones(1)}, torch.ones(3)], ids=repr)
def test_a_bin_that_holds_no_tensors_by_name_is_refused(saved, content):
    write_bin(saved, content)
    refused(saved, "pytorch_model.bin")


@pytest.mark.parametrize(
    "index", [[], {}, {"weight_map": None}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}], ids=repr
)
def test_a_damaged_index_is_refused_by_name(saved, index):
    os.remove(saved / "model.safetensors")
    write_json(str(saved / "model.safetensors.index.json"), index)
    refused(saved, "model.safetensors.index.json")


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(model_args=[1]), "model_args do not describe a GPT"),
        (dict(model_args={"n_layer": 2, "n_kv_head": 1}), "model_args do not describe a GPT"),
        (dict(model={}), "its weights do not fit its own config"),
        (dict(model=[1]), "ckpt.pt"),
        (dict(model={"a": 1}), "ckpt.pt"),
    ],
    ids=repr,
)
def test_a_checkpoint_that_is_not_nanogpts_is_refused(model, tmp_path, changes, words):
    torch.save(nanogpt(model, **changes), tmp_path / "ckpt.pt")
    refused(tmp_path / "ckpt.pt", words)


@pytest.mark.parametrize("content", [{}, [1], {"model": {}}, torch.ones(3)], ids=repr)
def test_another_pytorch_file_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "ckpt.pt")
    refused(tmp_path / "ckpt.pt", "is no nanoGPT checkpoint")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(saved):
    save_tokenizer(str(saved), CharTokenizer(LETTERS + "k"), 8)
    refused(saved, "its tokenizer has 12 tokens, its model only 11")


# ---------------------------------------------------------------------------------------------------------------------
# The state of a run


STATE = dict(options={"seed": 1}, counters={"step": 3}, model={"a": torch.ones(2)}, optimizers={"lr": None})


def test_a_state_comes_back(tmp_path):
    save_state(str(tmp_path), STATE)
    read = load_state(str(tmp_path))
    assert torch.equal(read["model"].pop("a"), torch.ones(2))
    assert read == {**STATE, "model": {}}


def numbered(step):
    return {**STATE, "counters": {"step": step}}


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_states_are_kept_and_no_more(tmp_path, keep):
    for step in (8, 9, 10, 11):
        save_state(str(tmp_path), numbered(step), keep)
    names = ["state.pt", "state-10.pt", "state-9.pt"][:keep]
    assert [os.path.basename(path) for path in state_files(str(tmp_path))] == names
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    assert load_state(str(tmp_path))["counters"]["step"] == 11


def test_a_state_for_which_there_is_no_memory_is_not_called_damaged(tmp_path, monkeypatch, capsys):
    for step in (1, 2):
        save_state(str(tmp_path), {"counters": {"step": step}}, keep=2)
    monkeypatch.setattr(torch, "load", lambda *_, **__: torch.empty(10**15))
    with pytest.raises(RuntimeError, match="allocate memory"):
        load_state(str(tmp_path))
    assert capsys.readouterr().out == ""


def test_a_damaged_state_takes_no_place_of_a_whole_one_nor_does_one_of_a_dropped_future(tmp_path, capsys):
    for step in (8, 9, 10):
        save_state(str(tmp_path), numbered(step), 3)
    for name in ("state.pt", "state-9.pt"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1])
    assert load_state(str(tmp_path))["counters"]["step"] == 8
    assert capsys.readouterr().out.count("\n") == 1
    save_state(str(tmp_path), numbered(9), 3)
    assert sorted(os.listdir(tmp_path)) == ["state-8.pt", "state.pt"]
    assert load_state(str(tmp_path))["counters"]["step"] == 9


def test_a_state_without_a_checksum_is_read_where_it_is_from_before_there_were_any_and_only_there(tmp_path):
    torch.save(STATE, tmp_path / "state.pt")
    assert load_state(str(tmp_path))["counters"] == {"step": 3}
    save_state(str(tmp_path), STATE)
    whole = (tmp_path / "state.pt").read_bytes()
    (tmp_path / "state.pt").write_bytes(whole[: -checkpoint.SEAL_BYTES])
    refused(tmp_path, "state.pt: is damaged, its checksum does not match", load_state)


def test_a_snapshot_is_a_copy_in_which_tied_weights_are_still_one(model):
    state = dict(model=model.state_dict(), numbers=[1, torch.ones(2)])
    copied = snapshot(state)
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
        state["numbers"][1].zero_()
    assert copied["model"]["lm_head.weight"] is copied["model"]["transformer.wte.weight"]
    assert copied["model"]["lm_head.weight"].abs().sum() > 0 and torch.equal(copied["numbers"][1], torch.ones(2))


def test_equal_weights_are_equal_files_that_the_library_reads(model, tmp_path):
    config, tensors = checkpoint.model_files(model)
    for name in ("a", "b"):
        os.mkdir(tmp_path / name)
        checkpoint.write_model(str(tmp_path / name), config, tensors, CharTokenizer(LETTERS), 8, 0.1 + 0.2)
    first, second = (tmp_path / name / "model.safetensors" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    read = load_file(first)
    assert set(read) == set(tensors) and all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert checkpoint.saved_loss(str(tmp_path / "a")) == 0.1 + 0.2, "to the last bit"


@pytest.mark.parametrize("notes", [None, {"format": "pt"}, {"format": "pt", "val_loss": "1.5", "nanogpt_sha256": "0"}])
def test_weights_without_a_checksum_of_ours_are_read(saved, model, notes):
    path = saved / "model.safetensors"
    save_file(load_file(path), path, metadata=notes)
    assert_equal(model, load_model(str(saved))[0])
    assert checkpoint.saved_loss(str(saved)) == (1.5 if notes and "val_loss" in notes else None)


@pytest.mark.parametrize("kind", ["a number", "a name", "a shape", "a type", "a note"])
def test_the_checksum_of_weights_is_of_numbers_names_shapes_types_and_notes(model, tmp_path, kind):
    _, tensors = checkpoint.model_files(model)
    checkpoint.write_model(str(tmp_path), {}, tensors, CharTokenizer(LETTERS), 8, 1.5)
    path = tmp_path / "model.safetensors"
    tensors, _ = checkpoint._load_noted(path)
    with safe_open(path, "pt") as f:
        notes = f.metadata()
    name = "transformer.h.0.attn.c_attn.weight"
    if kind == "a number":
        tensors[name][3, 3] += 1e-6
    if kind == "a name":
        tensors["other"] = tensors.pop(name)
    if kind == "a shape":
        tensors[name] = tensors[name].reshape(-1)
    if kind == "a type":
        tensors[name] = tensors[name].view(torch.int32)
    if kind == "a note":
        notes["val_loss"] = "1.4"
    save_file(tensors, path, metadata=notes)
    with pytest.raises(UserError, match="is damaged, its checksum does not match"):
        checkpoint._load_noted(path)


def test_without_a_state_there_is_nothing_to_resume(tmp_path):
    refused(tmp_path, "holds no state.pt to resume from", load_state)


@pytest.mark.parametrize("keep", [0, 0.5, 0.99], ids="{:.0%}".format)
def test_a_truncated_state_is_refused_by_name(tmp_path, keep):
    save_state(str(tmp_path), STATE)
    path = tmp_path / "state.pt"
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    refused(tmp_path, "state.pt", load_state)


@pytest.mark.parametrize("zipped", [True, False], ids=["today's format", "the format before PyTorch 1.6"])
def test_whatever_the_damage_there_is_no_traceback(tmp_path, zipped):
    """Bytes changed and bytes lost, in 300 ways: it is read, or refused as any other damaged file."""
    path, dice = tmp_path / "state.pt", random.Random(0)
    torch.save(STATE, path, _use_new_zipfile_serialization=zipped)
    whole, outcomes = path.read_bytes(), set()
    for _ in range(300):
        damaged = bytearray(whole)
        place = dice.randrange(len(damaged))
        damaged[place : place + dice.choice([0, 1, 1, 20])] = bytes([dice.randrange(256)])
        path.write_bytes(damaged)
        try:
            load_state(str(tmp_path))
            outcomes.add("read")
        except UserError as error:
            assert "state.pt" in str(error) and "\n" not in str(error)
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


@pytest.mark.parametrize("content", [[1], {}, torch.ones(3)], ids=repr)
def test_a_state_of_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "state.pt")
    refused(tmp_path, "is not the state of a run", load_state)


def test_a_directory_holds_a_run_once_something_was_saved(model, tmp_path):
    assert not holds_run(str(tmp_path)) and not holds_run(str(tmp_path / "nowhere"))
    (tmp_path / "notes.txt").write_text("not ours")
    (tmp_path / "metrics.jsonl").touch()  # of a run that failed before its first step
    assert not holds_run(str(tmp_path))
    save_model(str(tmp_path), model, CharTokenizer(LETTERS))
    assert holds_run(str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# Writing whole files or nothing


def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing_behind(tmp_path):
    def write(temporary):
        with open(temporary, "w") as f:
            f.write("half of the ne")
        raise OSError("No space left on device")

    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="No space left"):
        write_atomically(str(path), write)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_an_interrupted_write_leaves_nothing_behind_either(tmp_path):
    def write(temporary):
        with open(temporary, "w"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(str(tmp_path / "a.txt"), write)
    assert os.listdir(tmp_path) == []


def test_until_it_is_whole_the_old_file_stays_in_place(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write(temporary):
        with open(temporary, "w") as f:
            f.write("new")
        assert path.read_text() == "old"

    write_atomically(str(path), write)
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


def test_a_model_that_cannot_be_written_leaves_the_old_one(saved, make_model, model, monkeypatch):
    def fail(path, tensors, notes):
        with open(path, "wb") as f:
            f.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("checkpoint._write_weights", fail)
    with pytest.raises(OSError, match="No space left"):
        save_model(str(saved), make_model(seed=1), CharTokenizer(LETTERS))
    assert_equal(model, load_model(str(saved))[0])
    assert not [name for name in os.listdir(saved) if name.endswith(".tmp")]


# ---------------------------------------------------------------------------------------------------------------------
# One run at a time


def edit_owner(directory, **changes):
    edit_json(directory / "run.lock", **changes)


def test_a_lock_names_its_owner_and_the_machine_where_that_is_another(tmp_path):
    with Lock() as first, Lock() as second:
        first.take(str(tmp_path))
        refused(tmp_path, f": process {os.getpid()} is training there; wait for it", second.take)
        edit_owner(tmp_path, host="elsewhere", pid=7)
        refused(tmp_path, ": process 7 on elsewhere is training there", second.take)
        (tmp_path / "run.lock").write_text("")
        refused(tmp_path, ": another process is training there", second.take)
        first.release()
        second.take(str(tmp_path))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no fork")
@pytest.mark.parametrize("changes", [{}, dict(host="elsewhere"), dict(pid=1)], ids=str)
def test_the_lock_of_an_owner_that_crashed_is_free_whatever_machine_and_process_it_names(tmp_path, changes):
    def crash():
        Lock().take(str(tmp_path))
        os.kill(os.getpid(), signal.SIGKILL)

    owner = forked(crash)
    assert os.waitpid(owner, 0)[1] == signal.SIGKILL and lock_owner(str(tmp_path))["pid"] == owner
    edit_owner(tmp_path, **changes)
    with Lock() as lock:
        lock.take(str(tmp_path))
        assert lock_owner(str(tmp_path))["pid"] == os.getpid()


def test_a_lock_whose_words_are_damaged_can_be_taken_and_is_left_as_it_was(tmp_path):
    (tmp_path / "run.lock").write_bytes(b"\xff\xfe{")
    with Lock() as lock:
        lock.take(str(tmp_path))
    assert (tmp_path / "run.lock").read_bytes() == b"\xff\xfe{"


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, capsys):
    def refuse(_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(checkpoint, "lock_file", refuse)
    with Lock() as lock:
        lock.take(str(tmp_path))
    assert "its file system has no locks" in capsys.readouterr().out


def test_only_a_torchrun_job_that_came_as_far_as_training_is_named_as_the_owner(tmp_path, monkeypatch):
    def take(job):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
        with Lock() as lock:
            lock.take(str(tmp_path))
            lock.before = None  # as after a kill, which leaves the file as it is
        return lock_owner(str(tmp_path))["job"]

    assert take("a") is None
    with Lock() as lock:
        lock.take(str(tmp_path))
        lock.keep()
    assert lock_owner(str(tmp_path))["job"].startswith("a of")
    assert take("a").startswith("a of"), "started again, and killed while it was loading"
    assert take("b") is None


def test_a_directory_that_is_no_longer_the_one_that_was_locked_is_noticed(tmp_path):
    out = tmp_path / "out"
    with Lock() as lock:
        lock.check()
        out.mkdir()
        lock.take(str(out))
        lock.check()
        out.rename(tmp_path / "elsewhere")
        refused(out, "was moved, deleted or replaced while this run trained", lambda _: lock.check())
        out.mkdir()
        with Lock() as other:
            other.take(str(out))
            refused(out, "was moved, deleted or replaced", lambda _: lock.check())
            other.check()


def test_nothing_is_written_into_a_directory_that_is_another_runs_by_now():
    def moved():
        raise UserError("it was moved")

    written = []
    with pytest.raises(UserError, match="it was moved"), checkpoint.Saver(moved) as saver:
        saver.start(lambda: written.append(1))
    assert written == []


@pytest.mark.parametrize(
    "line",
    [
        b'{"step": 2\n',
        b"\0" * 40 + b"\n",
        b'{"st\xe5p": 2}\n',
        b'{"stop": 2}\n',
        b"[2]\n",
        b'{"step": 2, "val_loss": null}\n',
        b'{"step": 2, "val_loss": NaN}\n',
        b'{"step": 2, "val_loss": 1' + b"0" * 400 + b"}\n",
        b"[" * 100_000 + b"\n",
    ],
    ids=lambda line: repr(line[:30]),
)
def test_damaged_lines_of_the_metrics_are_left_out_and_told(tmp_path, capsys, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'{"step": 3}\n{"step": 4')
    assert [m["step"] for m in read_metrics(str(path), say=True)] == [1, 3]
    assert capsys.readouterr().out == f"{path}: 1 of its 3 lines are damaged, and left out\n"
