"""Saving, resuming, importing.

A run's directory is a Hugging Face model directory, with our own files beside it. transformers reads that of a GPT as
it lies; a modern model has the same files, but transformers knows no such model.

    config.json  model.safetensors                 the best weights so far, in Hugging Face's names and orientation
    tokenizer.json  tokenizer_config.json          the tokenizer
    state.pt                                       the newest state to resume from: weights, optimizer, random numbers
    state-STEP.pt                                  the states before it, in case that one is damaged
    state.dcp/  state-STEP.dcp/                    the same of a sharded model (sharding.py), in place of a file
    run.lock                                       the process that trains here, or did so last
    metrics.jsonl  loss.png                        what train.py measured
    draft.safetensors                              counts of the text, with which sample.py is faster (draft.py)

No pickle in a file is ever executed: weights are safetensors, all else is read with torch.load(weights_only=True), or,
where a run was sharded, by a reader that takes plain classes only (sharding.py).
Weights, states and all JSON files are written beside their places, synced, and renamed over them, so that a crash
leaves the old one or the new one.
Weights and states carry a checksum, so that what was damaged on the disk is noticed.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import socket
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields

import torch
from safetensors import SafetensorError, safe_open

from model import GPT, GPTConfig
from modern import Modern, ModernConfig
from sharding import file_sum, write_tensors
from tokenizer import ByteTokenizer, CharTokenizer, load_tokenizer, save_tokenizer
from utils import (
    UserError,
    first_line,
    first_problem,
    is_out_of_memory,
    memory_of,
    missing_extra,
    sync_directory,
    write_atomically,
    write_json,
)

METRICS = "metrics.jsonl"
MODERN_TYPE = "nanogpt-modern"  # in config.json, where a GPT has "gpt2"
BEFORE_NGRAMS = dict(ngram=1, ngram_rows=1)  # what a config.json says that is older than these
ONLY_TO_LEARN = "ahead"  # of modern.py: what foretells further tokens; a model that writes has none
HUB_NAMES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}

# GPT-2's published weights hold these matrices as (in, out); a PyTorch Linear holds (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
NORMS = ("ln_1.weight", "ln_2.weight", "ln_f.weight")
BIASES = tuple(name.replace("weight", "bias") for name in TRANSPOSED + NORMS)  # a GPT has them, or with bias=False not

# ---------------------------------------------------------------------------------------------------------------------
# Files


def _read_json(path):
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); restore it") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: does not hold a JSON object; restore it")
    return content


def _load_torch(path):
    """torch.load without ever running a pickle's code."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about an unusual pickle; the error says it better
            _check_no_program(path)
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: is damaged, or a pickle that could run code; it was not loaded") from None
    except Exception as error:  # a damaged file shows as one of a dozen classes, depending on where the damage lies
        if is_out_of_memory(error):  # the file may be whole
            raise
        reason = first_line(error) or type(error).__name__
        raise UserError(f"{path}: cannot be read, it may be truncated ({reason})") from None


def _check_no_program(path):
    """Raises UnpicklingError for a TorchScript archive, whose code PyTorch before 2.6 runs, weights_only or not."""
    try:
        from torch.serialization import _is_torchscript_zip, _is_zipfile, _open_zipfile_reader
    except ImportError:  # PyTorch's own names: a version without them refuses such archives by itself
        return
    with open(path, "rb") as f:
        if not _is_zipfile(f):
            return
    with _open_zipfile_reader(path) as archive:  # as torch.load reads it
        if _is_torchscript_zip(archive):
            raise pickle.UnpicklingError("a program")


def _named_tensors(path, content):
    """`content`, where it is what the weights of a model are: tensors by name. Raises UserError."""
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in content.items()
    ):
        raise UserError(f"{path}: holds no weights (tensors by name); give a file that does")
    return content


def _load_bin(path):
    return _named_tensors(path, _load_torch(path))


def _load_safetensors(path):
    return _load_noted(path)[0]


def _load_noted(path):
    """(tensors by name, notes) of a safetensors file. Raises UserError where it is damaged, as its checksum tells.

    Weights that others wrote have no checksum, and are taken as they are.
    """
    try:
        with safe_open(path, "pt") as f:
            notes = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read, it may be truncated ({error}); restore it") from None
    if notes.pop(CHECKSUM, None) not in (None, _checksum(tensors, notes)):
        raise UserError(f"{path}: is damaged, its checksum does not match; restore it or train again")
    return tensors, notes


CHECKSUM = "nanogpt_tensors_sha256"  # among the notes


def _checksum(tensors, notes):
    """The checksum of tensors by name, their types and shapes, and of notes."""
    sha256 = hashlib.sha256(json.dumps(notes, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        sha256.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha256.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha256.hexdigest()


def _write_weights(path, tensors, notes):
    """Write float32 tensors by name in the safetensors format, with notes (text by name) and a checksum.

    The format is 8 bytes of length, a JSON header of that length, and the numbers. The library writes it too, but the
    notes in any order, where equal weights shall be equal files; it leaves a file of its own behind where it is killed,
    and a full disk is no OSError to it. Raises OSError.
    """
    notes = {"format": "pt", **notes}
    header, end = {"__metadata__": {**notes, CHECKSUM: _checksum(tensors, notes)}}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)  # so that the numbers lie where a processor likes to read them
    with open(path, "wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            f.write(tensor.reshape(-1).numpy())


# ---------------------------------------------------------------------------------------------------------------------
# Models


def save_model(directory, model, tokenizer=None):
    """Write model and tokenizer: a GPT as a Hugging Face GPT-2 directory, a Modern in the same layout as it is.

    Also of a model that torch.compile or DistributedDataParallel has wrapped. Raises ValueError for one that could not
    be loaded again, such as what lighten makes.
    """
    for wrapper in ("_orig_mod", "module"):
        model = getattr(model, wrapper, model)
    with torch.device("meta"):
        expected = set(type(model)(model.config).state_dict())
    different = sorted(expected ^ set(model.state_dict()))
    if different:
        raise ValueError(f"{different[0]}: a {type(model).__name__} of its config, and this one, do not both have it")
    os.makedirs(directory, exist_ok=True)
    write_model(directory, *model_files(model), tokenizer, model.config.block_size)


def model_files(model, weights=None):
    """What config.json and model.safetensors hold of a model: a dict and tensors by name.

    weights: by name, of a model that does not have them itself because it is sharded.
    """
    weights = model.state_dict() if weights is None else weights
    if isinstance(model, Modern):
        return _modern_files(model.config, weights)
    if isinstance(model, GPT):
        return _gpt2_files(model.config, weights)
    raise TypeError(f"a {type(model).__name__} has no files yet: say in checkpoint.py what config.json tells of it")


def write_model(directory, config, tensors, tokenizer, block_size, val_loss=None):
    """Write what model_files gave, and the tokenizer. The weights come last: where they are, all else is.

    val_loss: of these weights, in nats per token, for saved_loss.
    """
    if tokenizer is not None:
        save_tokenizer(directory, tokenizer, block_size)
    write_json(os.path.join(directory, "config.json"), config)
    notes = {} if val_loss is None else {"val_loss": repr(val_loss)}
    write_atomically(os.path.join(directory, "model.safetensors"), lambda path: _write_weights(path, tensors, notes))


def saved_loss(directory):
    """The val loss of the weights in a run's directory, which a crash may have left newer than its newest state.

    None where nobody noted it, infinity where there are no whole weights.
    """
    path = os.path.join(directory, "model.safetensors")
    if not os.path.exists(path):
        return math.inf
    try:
        loss = _load_noted(path)[1].get("val_loss")
    except UserError as error:
        print(f"{error}: the next evaluation writes it anew")
        return math.inf
    return None if loss is None else float(loss)


def _modern_files(config, weights):
    """The config.json and tensors of modern.py's model."""
    kept = {name: p for name, p in weights.items() if not name.startswith(f"{ONLY_TO_LEARN}.")}
    tensors = {name: p.float().cpu().contiguous() for name, p in kept.items()}
    sizes = asdict(config)
    del sizes[ONLY_TO_LEARN]
    return {"model_type": MODERN_TYPE, **sizes}, tensors


def _gpt2_files(c, weights):
    """The config.json and tensors of model.py's GPT, under Hugging Face's names. c: its GPTConfig.

    What others have added to model.py is kept by its own name; a head of its own, too.
    """
    head, wte = weights.get("lm_head.weight"), weights["transformer.wte.weight"]
    tied = head is None or head.data_ptr() == wte.data_ptr() or torch.equal(head, wte)
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "vocab_size": c.vocab_size,
        "n_positions": c.block_size,
        "n_embd": c.n_embd,
        "n_layer": c.n_layer,
        "n_head": c.n_head,
        "n_inner": None,
        "attn_pdrop": c.dropout,
        "embd_pdrop": c.dropout,
        "resid_pdrop": c.dropout,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "bias": c.bias,  # ours; Hugging Face's GPT-2 always has biases, and gets zeros for the ones we leave out
    }
    tensors = {}
    for name, p in weights.items():
        if name != "lm_head.weight" or not tied:
            tensors[name] = (p.t() if name.endswith(TRANSPOSED) else p).float().cpu().contiguous()
            if not c.bias and name.endswith(TRANSPOSED + NORMS):
                tensors[name[: -len("weight")] + "bias"] = torch.zeros(tensors[name].size(-1))
    return config, tensors


def load_model(path_or_name, block_size=None, dropout=None):
    """Load a model, in evaluation mode. Returns (model, tokenizer); the tokenizer is None where the source has none.

    path_or_name: a run's directory, any other in Hugging Face's GPT-2 format, a nanoGPT ckpt.pt, or the name of a
    published GPT-2, which is taken from the local cache or downloaded. block_size crops the positions, dropout
    replaces the saved rate. Raises UserError.
    """
    if os.path.isdir(path_or_name):
        config, weights, tokenizer = _read_directory(path_or_name)
    elif os.path.isfile(path_or_name):
        config, weights = _read_nanogpt(path_or_name)
        tokenizer = load_tokenizer(os.path.dirname(path_or_name) or ".")  # None, but for one that was put there
    elif path_or_name in HUB_NAMES:
        config, weights, tokenizer = _read_directory(find_on_hub(path_or_name))
    else:
        raise UserError(
            f"{path_or_name}: no such file or directory, nor one of {', '.join(HUB_NAMES)}; "
            f"train one with: python train.py"
        )
    if block_size is not None and block_size != config.block_size:
        if block_size > config.block_size:
            knows = f"{path_or_name} knows only {config.block_size} positions"
            raise UserError(f"--block_size {block_size}: {knows}; lower it, or leave it out")
        config.block_size = block_size
        if "transformer.wpe.weight" in weights:
            weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:block_size]
    if dropout is not None:
        config.dropout = dropout
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{path_or_name}: its tokenizer has {tokenizer.vocab_size} tokens, its model only {config.vocab_size}; "
            f"put the files of one model together"
        )
    _check_sizes(path_or_name, config, weights)
    if isinstance(config, ModernConfig):
        model = Modern(config)
    else:
        model, wte = GPT(config), weights["transformer.wte.weight"]
        head = weights.setdefault("lm_head.weight", wte)
        tied = model.lm_head.weight is model.transformer.wte.weight
        if tied and head is not wte and not torch.equal(head, wte):
            raise UserError(f"{path_or_name}: reads and writes with a table each; this GPT-2 has one for both only")
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"{path_or_name}: its weights do not fit its own config ({first_problem(error)}); restore both, or put "
            f"back the model.py or modern.py that trained them"
        ) from None
    ours = isinstance(tokenizer, (CharTokenizer, ByteTokenizer))
    if ours and tokenizer.vocab_size < config.vocab_size:  # that of another run
        kind = "characters" if isinstance(tokenizer, CharTokenizer) else "bytes"
        raise UserError(
            f"{path_or_name}: its tokenizer has {tokenizer.vocab_size} {kind}, its model {config.vocab_size}; "
            f"put back the tokenizer.json of the run that trained it"
        )
    return model.eval(), tokenizer


def load_writer(out_dir):
    """load_model for a command that writes with the model of its --out_dir. Raises UserError without a tokenizer."""
    if not out_dir:
        raise UserError("--out_dir: is empty; name a directory")
    try:
        model, tokenizer = load_model(out_dir)
    except UserError as error:
        raise UserError(f"--out_dir {error}") from None
    tokenizer = tokenizer or gpt2_tokenizer(model)
    if tokenizer is None:
        raise UserError(f"--out_dir {out_dir}: has no tokenizer; put the tokenizer.json of its run beside it")
    return model, tokenizer


def _check_sizes(path, config, weights):
    """Raises UserError where weights are of no use, or of other sizes than their config: before a model of those sizes,
    which may be absurd, is made."""
    modern = isinstance(config, ModernConfig)
    tables = {"wte.weight" if modern else "transformer.wte.weight": (config.vocab_size, config.n_embd)}
    if not modern:
        tables["transformer.wpe.weight"] = (config.block_size, config.n_embd)
    elif config.ngram > 1:
        tables["ngrams.table.weight"] = (config.ngram_rows, config.n_embd)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    problems = [
        f"{name} is {shapes.get(name)}, not {size}" for name, size in tables.items() if shapes.get(name) != size
    ]
    layers = sum(name.endswith(".attn.c_proj.weight") for name in weights)
    if config.n_layer > layers:
        problems.append(f"they are those of {layers} layers, not of {config.n_layer}")
    if problems:
        raise UserError(f"{path}: its weights do not fit its own config ({problems[0]}); restore both")
    memory = memory_of(torch.device("cpu"))
    if modern and memory is not None and _context_bytes(config) > memory:
        raise UserError(
            f"{path}: its config has a block_size of {config.block_size}, for which {memory / 2**30:.0f} GiB of memory "
            f"are too few; put back the config.json of the run that trained it"
        )
    for name, tensor in weights.items():
        if not math.isfinite(tensor.sum(dtype=torch.float64)):
            raise UserError(f"{path}: its weights hold infinities or NaN ({name}); restore them or train again")


def _context_bytes(c):
    """What a context of block_size takes in a modern model, of which its weights tell nothing: the rotary tables, while
    they are made, and the cache with which it writes."""
    return c.block_size * (16 * c.n_embd // c.n_head + 8 * c.n_layer * c.n_embd)


def _read_directory(directory):
    """(GPTConfig or ModernConfig, weights under our names, tokenizer) of a run's or another GPT-2 directory."""
    path = os.path.join(directory, "config.json")
    if not os.path.exists(path):
        raise UserError(f"{directory}: holds no model yet (no config.json); train one with: python train.py")
    c = _read_json(path)
    if c.get("model_type") == MODERN_TYPE:
        return _read_modern(path, c), _read_weights(directory), load_tokenizer(directory)
    if c.get("model_type") != "gpt2":
        raise UserError(f"{path}: is a model of type {c.get('model_type')!r}; only 'gpt2' and our own can be loaded")
    wanted = dict(activation_function="gelu_new", layer_norm_epsilon=1e-5, scale_attn_weights=True)
    wanted.update(scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    for key, value in wanted.items():
        if c.get(key, value) != value and c[key] != "gelu_pytorch_tanh":  # another name for gelu_new
            raise UserError(f"{path}: has {key} = {c[key]!r}; this GPT-2 has {value!r} only")
    try:
        config = GPTConfig(
            block_size=c["n_positions"],
            vocab_size=c["vocab_size"],
            n_layer=c["n_layer"],
            n_head=c["n_head"],
            n_embd=c["n_embd"],
            dropout=c.get("resid_pdrop", 0.0),
            bias=c.get("bias", True),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is no complete GPT-2 config ({error}); restore it") from None
    if c.get("n_inner") not in (None, 4 * config.n_embd):
        raise UserError(f"{path}: has n_inner = {c['n_inner']}; this GPT-2 has 4 x n_embd only")
    weights, found = {}, _read_weights(directory)
    tied = c.get("tie_word_embeddings", True)
    if not tied and "lm_head.weight" not in found:
        raise UserError(f"{path}: has tie_word_embeddings = False, but there is no lm_head.weight; restore both")
    bare = not any(name.startswith("transformer.") for name in found)  # those of Hugging Face's GPT2Model
    for name, tensor in found.items():
        name = f"transformer.{name}" if bare and name != "lm_head.weight" else name
        if name.endswith((".attn.bias", ".attn.masked_bias")):  # old files keep the causal mask as a weight
            continue
        if name.endswith(BIASES) and not config.bias:
            continue
        if name == "lm_head.weight" and tied:
            continue
        weights[name] = tensor.t() if name.endswith(TRANSPOSED) and tensor.dim() == 2 else tensor
    return config, weights, load_tokenizer(directory)


def _read_modern(path, c):
    """The ModernConfig in a config.json that was read from path."""
    c = {**BEFORE_NGRAMS, **c, ONLY_TO_LEARN: 1}
    try:
        return ModernConfig(**{f.name: c[f.name] for f in fields(ModernConfig)})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is no complete config ({error!r}); restore it") from None


def _read_weights(directory):
    """All tensors of a directory: model.safetensors or pytorch_model.bin, whole or in parts listed by an index."""
    for name, read in (("model.safetensors", _load_safetensors), ("pytorch_model.bin", _load_bin)):
        path = os.path.join(directory, name)
        if os.path.exists(path):
            return read(path)
        if os.path.exists(f"{path}.index.json"):
            weight_map = _read_json(f"{path}.index.json").get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(part, str) for part in weight_map.values()):
                raise UserError(f"{path}.index.json: has no weight_map that names files; restore it")
            parts = sorted({os.path.basename(part) for part in weight_map.values()})  # never out of the directory
            return {k: v for part in parts for k, v in read(os.path.join(directory, part)).items()}
    raise UserError(
        f"{directory}: has a config.json but neither model.safetensors nor pytorch_model.bin; put one there"
    )


def _read_nanogpt(path):
    """(GPTConfig, weights) of a checkpoint that nanoGPT's train.py saved."""
    saved = _load_torch(path)
    if not isinstance(saved, dict) or not {"model", "model_args"} <= set(saved):
        directory = os.path.dirname(path) or "."
        remedy = f"; name its directory, {directory}" if os.path.exists(os.path.join(directory, "config.json")) else ""
        raise UserError(f"{path}: is no nanoGPT checkpoint (it has no 'model' and 'model_args'){remedy}")
    try:
        config = GPTConfig(**saved["model_args"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: its model_args do not describe a GPT ({error}); restore it") from None
    model, prefix = _named_tensors(path, saved["model"]), "_orig_mod."  # torch.compile's, where the run was compiled
    weights = {k[len(prefix) :] if k.startswith(prefix) else k: v for k, v in model.items()}
    return config, {k: v for k, v in weights.items() if not k.endswith(".attn.bias")}


def gpt2_tokenizer(model):
    """GPT-2's byte-pair encoding for weights that came alone, or None where the model has too few tokens for it."""
    return load_tokenizer(find_on_hub("gpt2")) if model.config.vocab_size >= 50257 else None


def find_on_hub(name, files=("config.json", "model.safetensors", "tokenizer.json")):
    """The local directory of a published GPT-2's files, downloaded by huggingface_hub unless its cache has them."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise missing_extra("huggingface_hub", f"loading '{name}' by name") from None
    try:
        return snapshot_download(HUB_NAMES[name], allow_patterns=list(files))
    except Exception as error:  # offline shows as one of a dozen classes, from the hub's, requests' and the system's
        reason = type(error).__name__
        raise UserError(
            f"'{name}' is not in the local cache and cannot be downloaded ({reason}); connect, or give a directory"
        ) from None


# ---------------------------------------------------------------------------------------------------------------------
# The state of a run


STATE, SHARDS = "state.pt", "state.dcp"  # a state is a file, or of a sharded model a directory
REST = "rest.pt"  # in that directory, what is in no shard, with a checksum of each other file
FORMAT = 2  # of a state; the first one had no checksum
SEAL = re.compile(rb"step (\d{12}) sha256 ([0-9a-f]{64})\n")  # the last bytes of a state
SEAL_BYTES, DIGEST_BYTES = 90, 65  # in all, and of that the checksum, which is of everything before it


def holds_run(directory):
    """Does the directory hold a run (or anything else that training would overwrite)?"""
    paths = [os.path.join(directory, name) for name in (METRICS, "model.safetensors", "config.json")]
    return any(os.path.exists(path) and os.path.getsize(path) > 0 for path in paths + state_files(directory))


def state_files(directory):
    """The paths of the states in a directory, from the newest to the oldest."""
    names = os.listdir(directory) if os.path.isdir(directory) else []
    newest = [name for name in (STATE, SHARDS) if name in names]
    earlier = [name for name in names if _step_in(name) is not None]
    return [os.path.join(directory, name) for name in newest + sorted(earlier, key=_step_in, reverse=True)]


def _step_in(path):
    """The step in the name of an earlier state, else None."""
    named = re.fullmatch(r"state-(\d+)\.(pt|dcp)", os.path.basename(path))
    return named and int(named[1])


def snapshot(content):
    """A copy, in the CPU's memory, of a state's dicts and lists and their tensors, which training goes on to change.

    Tensors that share their numbers (tied weights) share them in the copy too.
    """
    copies = {}

    def copied(part):
        if isinstance(part, dict):
            return {key: copied(value) for key, value in part.items()}
        if isinstance(part, (list, tuple)):
            return type(part)(map(copied, part))
        if not isinstance(part, torch.Tensor):
            return part
        key = (part.data_ptr(), part.shape, part.stride(), part.dtype)
        if key not in copies:
            copies[key] = part.detach().to("cpu", copy=True)
        return copies[key]

    return copied(content)


def save_state(directory, state, keep=1):
    """Keep all that is needed to go on exactly, as state.pt: a dict of tensors, numbers and strings.

    The state before it becomes state-STEP.pt, unless it is damaged; of all states the newest `keep` stay. At every
    instant a whole state is there. Raises OSError where it cannot be written; then the earlier states stay.
    """
    path, step = os.path.join(directory, STATE), state["counters"]["step"]

    def write(temporary):
        _write_state(temporary, {**state, "format": FORMAT}, step)
        _set_aside(directory, path if keep == 1 else None)

    write_atomically(path, write)
    _remove_earlier(directory, step, keep)


def save_shards(directory, tensors, state, keep, processes):
    """save_state for a sharded model: tensors, of which each process has its parts, and all else in process 0.

    All processes call it. Their parts and the rest are written into a new directory, which then gets its name. Raises
    OSError in all of them where one cannot write; then the earlier states stay.
    """
    path, temporary, step = os.path.join(directory, SHARDS), os.path.join(directory, f"{SHARDS}.tmp"), None
    try:
        sums = write_tensors(temporary, tensors, processes)
    except OSError:
        if processes.first:
            _remove(temporary)
        raise
    if processes.first:
        step = state["counters"]["step"]
        rest = {**state, "format": FORMAT, "files": sums}
        write_atomically(os.path.join(temporary, REST), lambda path: _write_state(path, rest, step))
        _set_aside(directory)
        os.replace(temporary, path)
        sync_directory(directory)
        _remove_earlier(directory, step, keep)


def _set_aside(directory, replaced=None):
    """Name the newest state by its step, to make room for a newer one. One that is damaged goes.

    replaced: the path of one that the newer will replace in any case.
    """
    for path in (os.path.join(directory, name) for name in (STATE, SHARDS)):
        if not os.path.exists(path) or path == replaced:
            continue
        step = _whole_step(path)
        if step is None:
            _remove(path)
        else:
            named = os.path.join(directory, f"state-{step}{os.path.splitext(path)[1]}")
            _remove(named)  # a crash may have left it
            os.replace(path, named)


def _remove_earlier(directory, step, keep):
    """Of the states before the newest, which is of `step`, leave keep - 1."""
    earlier = [path for path in state_files(directory) if _step_in(path) is not None]
    later = [path for path in earlier if _step_in(path) >= step]  # damaged, or of a dropped future
    for path in later + [path for path in earlier if path not in later][keep - 1 :]:
        _remove(path)


def _remove(path):
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.exists(path):
        os.remove(path)


def _write_state(path, state, step):
    with open(path, "wb") as f:
        file = _Summed(f)
        try:
            torch.save(state, file)
        except RuntimeError:
            raise file.error or RuntimeError(f"{path}: cannot be written") from None
        file.write(b"step %012d sha256 " % step)
        f.write(file.sha256.hexdigest().encode() + b"\n")


class _Summed:
    """A file with a checksum of what is written. torch.save does not say why a write failed: `error` does."""

    def __init__(self, file):
        self.file, self.sha256, self.error = file, hashlib.sha256(), None

    def write(self, piece):
        try:
            self.file.write(piece)
        except OSError as error:
            self.error = error
            raise
        self.sha256.update(piece)
        return len(piece)

    def flush(self):
        pass  # closing the file does that, where an error is not lost


def _whole_step(path):
    """The step of the state in a file whose checksum is right. None where it is wrong, or there is no such thing.

    Of a directory, the file that was written last counts.
    """
    path = os.path.join(path, REST) if os.path.isdir(path) else path
    try:
        with open(path, "rb") as f:
            size = f.seek(0, os.SEEK_END)
            f.seek(max(0, size - SEAL_BYTES))
            seal = SEAL.fullmatch(f.read())
            if seal is None:
                return None
            sha256, end = hashlib.sha256(), size - DIGEST_BYTES
            f.seek(0)
            for begin in range(0, end, 2**20):
                sha256.update(f.read(min(2**20, end - begin)))
    except OSError:
        return None
    return int(seal[1]) if sha256.hexdigest() == seal[2].decode() else None


def load_state(directory):
    """Read the newest whole state that save_state kept; says so where that is not the newest one.

    Raises UserError where there is nothing to resume, or all of it is damaged.
    """
    problem, paths = None, state_files(directory)
    if not paths:
        remedy = "start anew with --fresh" if holds_run(directory) else "start without --resume"
        raise UserError(f"--resume: {directory} holds no state.pt to resume from; {remedy}")
    for path in paths:
        try:
            state = _read_state(path)
        except UserError as error:
            problem = problem or error
            continue
        if problem is not None:
            print(f"{problem}; going on from the state before it, {path}")
        return state
    before = "nor is an earlier state whole; " if len(paths) > 1 else ""
    raise UserError(f"{problem}; {before}start anew with --fresh")


def _read_state(path):
    """The state in a file or directory. Raises UserError where it is damaged or something else.

    That of a directory names it as "shards": what is there is read by sharding.read_tensors.
    """
    if os.path.isdir(path):
        state = _read_state(os.path.join(path, REST))
        for name, sha256 in state.pop("files").items():
            file = os.path.join(path, name)
            if not os.path.exists(file) or file_sum(file) != sha256:
                raise UserError(f"{file}: is damaged, its checksum does not match")
        return {**state, "shards": path}
    whole = _whole_step(path) is not None
    state = _load_torch(path)  # it may have been written before there were checksums, and names other damage better
    if not isinstance(state, dict) or not {"options", "counters", "model", "optimizers"} <= set(state):
        raise UserError(f"{path}: is not the state of a run")
    if state.pop("format", 1) != 1 and not whole:
        raise UserError(f"{path}: is damaged, its checksum does not match")
    return state


class Saver:
    """Writes in a thread of its own, so that training need not wait for the disk: one thing at a time.

    To be used as a context: at its end all is written, or the error is raised. check: called before anything is
    written; it may raise (Lock.check).
    """

    def __init__(self, check=lambda: None):
        self.thread, self.running, self.seconds, self.check = ThreadPoolExecutor(1), None, 0.0, check

    def start(self, write):
        """Call write() in the thread, once what was started before is done; raises the error of that."""
        self.wait()
        self.running = self.thread.submit(self._timed, write)

    def _timed(self, write):
        start = time.perf_counter()
        self.check()
        write()
        self.seconds = time.perf_counter() - start  # that the last writing took

    def wait(self):
        """Wait until all is written. Raises what went wrong in the thread."""
        running, self.running = self.running, None
        if running is not None:
            running.result()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self.thread.shutdown()
        if error is None:
            self.wait()


def read_metrics(path, say=False):
    """The lines of a metrics.jsonl as dicts, but for those that are damaged; say: tell how many."""
    with open(path, "rb") as f:
        lines = [line for line in f if line.endswith(b"\n")]  # a last line that was cut off is none
    metrics = []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, OverflowError, RecursionError):
            metric = json.loads(line)
            numbers = isinstance(metric, dict) and all(map(math.isfinite, metric.values()))
            if numbers and isinstance(metric.get("step"), int):
                metrics.append(metric)
    if say and len(metrics) < len(lines):
        print(f"{path}: {len(lines) - len(metrics)} of its {len(lines)} lines are damaged, and left out")
    return metrics


# ---------------------------------------------------------------------------------------------------------------------
# One run at a time


LOCK = "run.lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what some network file systems say to a lock


class Lock:
    """Keeps other runs out of the directory that a run writes to.

    The lock is the operating system's, on the open file run.lock: it ends with the process, however that ends. What is
    written in the file is for the reader alone: the process that trains there, or did so last. Used as a context.
    """

    def __init__(self):
        self.file, self.before, self.directory = None, None, None

    def take(self, directory):
        """Lock the directory, in place of one that was locked before. Raises UserError where another run holds it."""
        file = open(os.path.join(directory, LOCK), "a+", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
        if self.file is not None and os.path.samestat(os.fstat(file.fileno()), os.fstat(self.file.fileno())):
            file.close()
            return
        owner = lock_owner(directory)
        try:
            lock_file(file)
        except OSError as error:
            if error.errno in NO_LOCKS:
                print(f"{directory}: its file system has no locks; see to it that no other run writes there")
            else:
                file.close()
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                who = f"process {owner['pid']}" if "pid" in owner else "another process"
                if owner.get("host") not in (None, socket.gethostname()):
                    who += f" on {owner['host']}"
                raise UserError(
                    f"--out_dir {directory}: {who} is training there; wait for it or name another directory"
                ) from None
        self.release()
        file.seek(0)
        self.file, self.before, self.directory = file, file.read(), directory
        self._write_owner(torchrun_job() if owner.get("job") == torchrun_job() else None)

    def _write_owner(self, job):
        self._write(json.dumps(dict(pid=os.getpid(), host=socket.gethostname(), job=job)))

    def _write(self, text):
        self.file.truncate(0)
        self.file.write(text)
        self.file.flush()

    def keep(self):
        """From now on this process is the one that trained there last, and its torchrun job the one that may go on."""
        self.before = None
        self._write_owner(torchrun_job())

    def check(self):
        """Raises UserError where the directory is no longer the one that was locked: it may be another run's by now."""
        if self.file is None:
            return
        try:
            same = os.path.samestat(os.stat(os.path.join(self.directory, LOCK)), os.fstat(self.file.fileno()))
        except FileNotFoundError:
            same = False
        if not same:
            raise UserError(
                f"--out_dir {self.directory}: was moved, deleted or replaced while this run trained; go on with "
                f"--resume where it is now"
            )

    def release(self):
        if self.file is not None:
            if self.before is not None:  # the run was refused: leave everything as it was
                self._write(self.before)
            self.file.close()
            self.file = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release()


def lock_file(file):
    """Lock an open file for this process. Raises OSError where another has locked it."""
    if os.name == "nt":
        import msvcrt

        file.seek(2**30)  # Windows lets nobody else read a locked byte: one far behind the text
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def lock_owner(directory):
    """What the process that trains in a directory, or did so last, wrote of itself: its pid, host and torchrun job."""
    try:
        with open(os.path.join(directory, LOCK), encoding="utf-8") as f:
            owner = json.load(f)
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def torchrun_job():
    """What tells apart the jobs of torchrun, which restarts a worker that died; None without torchrun."""
    job = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if job is None else f"{job} of process {os.getppid()}"
