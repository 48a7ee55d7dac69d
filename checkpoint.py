"""Saving, resuming, importing.

A run's directory is a Hugging Face model directory that transformers reads as it lies, with our own files beside it:

    config.json  model.safetensors                 the best weights so far, in Hugging Face's names and orientation
    tokenizer.json  tokenizer_config.json          the tokenizer
    state.pt                                       the newest state to resume from: weights, optimizer, random numbers
    metrics.jsonl  loss.png                        what train.py measured
    draft.safetensors                              counts of the text, with which sample.py is faster (draft.py)

No pickle is ever executed: weights are safetensors, and everything else is read with torch.load(weights_only=True).
Every file is written beside its place, synced, and renamed over it, so that a crash leaves the old one or the new one.
"""

import json
import os
import pickle
import warnings
from dataclasses import asdict, fields

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data import load_tokenizer, save_tokenizer
from model import GPT, GPTConfig
from modern import Modern, ModernConfig
from utils import UserError, missing_extra, write_atomically, write_json

METRICS = "metrics.jsonl"
MODERN_TYPE = "nanogpt-modern"  # in config.json, where a GPT has "gpt2"
HUB_NAMES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}

# GPT-2's published weights hold these matrices as (in, out); a PyTorch Linear holds (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

# ---------------------------------------------------------------------------------------------------------------------
# Files


def _read_json(path):
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: does not hold a JSON object")
    return content


def _load_torch(path):
    """torch.load without ever running a pickle's code."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about an unusual pickle; the error says it better
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: is damaged, or a pickle that could run code; it was not loaded") from None
    except Exception as error:  # a damaged file shows as one of a dozen classes, depending on where the damage lies
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read, it may be truncated ({reason})") from None


def _named_tensors(path, content):
    """`content`, where it is what the weights of a model are: tensors by name. Raises UserError."""
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in content.items()
    ):
        raise UserError(f"{path}: holds no weights (tensors by name)")
    return content


def _load_bin(path):
    return _named_tensors(path, _load_torch(path))


def _load_safetensors(path):
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read, it may be truncated ({error})") from None


# ---------------------------------------------------------------------------------------------------------------------
# Models


def save_model(directory, model, tokenizer):
    """Write model and tokenizer: a GPT as a Hugging Face GPT-2 directory, a Modern in the same layout as it is."""
    config, tensors = _modern_files(model) if isinstance(model, Modern) else _gpt2_files(model)
    metadata = {"format": "pt"}
    write_atomically(os.path.join(directory, "model.safetensors"), lambda path: save_file(tensors, path, metadata))
    write_json(os.path.join(directory, "config.json"), config)
    save_tokenizer(directory, tokenizer, model.config.block_size)


def _modern_files(model):
    """The config.json and tensors of modern.py's model."""
    tensors = {name: p.float().cpu().contiguous() for name, p in model.state_dict().items()}
    return {"model_type": MODERN_TYPE, **asdict(model.config)}, tensors


def _gpt2_files(model):
    """The config.json and tensors of model.py's GPT, under Hugging Face's names."""
    c = model.config
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
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "bias": c.bias,  # ours; Hugging Face's GPT-2 always has biases, and gets zeros for the ones we leave out
    }
    tensors = {}
    for name, p in model.state_dict().items():
        if name != "lm_head.weight":  # tied to transformer.wte.weight
            tensors[name] = (p.t() if name.endswith(TRANSPOSED) else p).float().cpu().contiguous()
            if not c.bias and not name.endswith(("wte.weight", "wpe.weight")):
                tensors[name[: -len("weight")] + "bias"] = torch.zeros(tensors[name].size(-1))
    return config, tensors


def load_model(path_or_name, block_size=None, dropout=None):
    """Load a model. Returns (model, tokenizer); the tokenizer is None where the source has none.

    path_or_name: a directory in Hugging Face's GPT-2 format (a run of ours is one), a nanoGPT ckpt.pt, or the name of
    a published GPT-2, which is taken from the local cache or downloaded. block_size crops the positions, dropout
    replaces the saved rate. Raises UserError.
    """
    if os.path.isdir(path_or_name):
        config, weights, tokenizer = _read_directory(path_or_name)
    elif os.path.isfile(path_or_name):
        (config, weights), tokenizer = _read_nanogpt(path_or_name), None
    elif path_or_name in HUB_NAMES:
        config, weights, tokenizer = _read_directory(_find_on_hub(path_or_name))
    else:
        raise UserError(
            f"{path_or_name}: no such file or directory, nor one of {', '.join(HUB_NAMES)}; "
            f"train one with: python train.py"
        )
    if block_size is not None and block_size != config.block_size:
        if block_size > config.block_size:
            raise UserError(f"--block_size {block_size}: {path_or_name} knows only {config.block_size} positions")
        config.block_size = block_size
        if "transformer.wpe.weight" in weights:
            weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:block_size]
    if dropout is not None:
        config.dropout = dropout
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{path_or_name}: its tokenizer has {tokenizer.vocab_size} tokens, its model only {config.vocab_size}"
        )
    if isinstance(config, ModernConfig):
        model = Modern(config)
    else:
        weights["lm_head.weight"] = weights.get("transformer.wte.weight")
        model = GPT(config)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path_or_name}: its weights do not fit its own config ({_first_problem(error)})") from None
    return model, tokenizer


def _first_problem(error):
    lines = [line.strip() for line in str(error).splitlines()]
    line = lines[1] if len(lines) > 1 else lines[0]
    return line if len(line) <= 200 else line[:200] + " ..."


def _read_directory(directory):
    """(GPTConfig, weights under our names, tokenizer) of a Hugging Face GPT-2 directory."""
    path = os.path.join(directory, "config.json")
    if not os.path.exists(path):
        raise UserError(f"{directory}: holds no model yet (no config.json); train one with: python train.py")
    c = _read_json(path)
    if c.get("model_type") == MODERN_TYPE:
        return _read_modern(path, c), _read_weights(directory), load_tokenizer(directory)
    if c.get("model_type") != "gpt2":
        raise UserError(f"{path}: is a model of type {c.get('model_type')!r}; only 'gpt2' and our own can be loaded")
    wanted = dict(
        activation_function="gelu_new", layer_norm_epsilon=1e-5, tie_word_embeddings=True, scale_attn_weights=True
    )
    wanted.update(scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    for key, value in wanted.items():
        if c.get(key, value) != value:
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
        raise UserError(f"{path}: is no complete GPT-2 config ({error})") from None
    if c.get("n_inner") not in (None, 4 * config.n_embd):
        raise UserError(f"{path}: has n_inner = {c['n_inner']}; this GPT-2 has 4 x n_embd only")
    weights = {}
    for name, tensor in _read_weights(directory).items():
        name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        if name.endswith((".attn.bias", ".attn.masked_bias")):  # old files keep the causal mask as a weight
            continue
        if name.endswith(".bias") and not config.bias:
            continue
        weights[name] = tensor.t() if name.endswith(TRANSPOSED) and tensor.dim() == 2 else tensor
    return config, weights, load_tokenizer(directory)


def _read_modern(path, c):
    """The ModernConfig in a config.json that was read from path."""
    try:
        return ModernConfig(**{f.name: c[f.name] for f in fields(ModernConfig)})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is no complete config ({error!r})") from None


def _read_weights(directory):
    """All tensors of a directory: model.safetensors or pytorch_model.bin, whole or in parts listed by an index."""
    for name, read in (("model.safetensors", _load_safetensors), ("pytorch_model.bin", _load_bin)):
        path = os.path.join(directory, name)
        if os.path.exists(path):
            return read(path)
        if os.path.exists(f"{path}.index.json"):
            weight_map = _read_json(f"{path}.index.json").get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(part, str) for part in weight_map.values()):
                raise UserError(f"{path}.index.json: has no weight_map that names files")
            parts = sorted({os.path.basename(part) for part in weight_map.values()})  # never out of the directory
            return {k: v for part in parts for k, v in read(os.path.join(directory, part)).items()}
    raise UserError(f"{directory}: has a config.json but neither model.safetensors nor pytorch_model.bin")


def _read_nanogpt(path):
    """(GPTConfig, weights) of a checkpoint that nanoGPT's train.py saved."""
    saved = _load_torch(path)
    if not isinstance(saved, dict) or not {"model", "model_args"} <= set(saved):
        raise UserError(f"{path}: is no nanoGPT checkpoint (it has no 'model' and 'model_args')")
    try:
        config = GPTConfig(**saved["model_args"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: its model_args do not describe a GPT ({error})") from None
    model, prefix = _named_tensors(path, saved["model"]), "_orig_mod."  # torch.compile's, where the run was compiled
    weights = {k[len(prefix) :] if k.startswith(prefix) else k: v for k, v in model.items()}
    return config, {k: v for k, v in weights.items() if not k.endswith(".attn.bias")}


def gpt2_tokenizer(model):
    """GPT-2's byte-pair encoding for weights that came alone, or None where the model has too few tokens for it."""
    return load_tokenizer(_find_on_hub("gpt2")) if model.config.vocab_size >= 50257 else None


def _find_on_hub(name):
    """The local directory of a published GPT-2, downloaded by huggingface_hub unless its cache has it."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise missing_extra("huggingface_hub", f"loading '{name}' by name") from None
    files = ["config.json", "model.safetensors", "tokenizer.json"]
    try:
        return snapshot_download(HUB_NAMES[name], allow_patterns=files)
    except Exception as error:  # offline shows as one of a dozen classes, from the hub's, requests' and the system's
        reason = type(error).__name__
        raise UserError(
            f"'{name}' is not in the local cache and cannot be downloaded ({reason}); connect, or give a directory"
        ) from None


# ---------------------------------------------------------------------------------------------------------------------
# The state of a run


def holds_run(directory):
    """Does the directory hold a run (or anything else that training would overwrite)?"""
    names = ("state.pt", METRICS, "model.safetensors", "config.json")
    paths = [os.path.join(directory, name) for name in names]
    return any(os.path.exists(path) and os.path.getsize(path) > 0 for path in paths)


def save_state(directory, state):
    """Keep all that is needed to go on exactly: a dict of tensors, numbers and strings."""
    write_atomically(os.path.join(directory, "state.pt"), lambda path: torch.save(state, path))


def load_state(directory):
    """Read what save_state kept. Raises UserError where there is nothing to resume, or it is damaged."""
    path = os.path.join(directory, "state.pt")
    if not os.path.exists(path):
        remedy = "start anew with --fresh" if holds_run(directory) else "start without --resume"
        raise UserError(f"--resume: {directory} holds no state.pt to resume from; {remedy}")
    state = _load_torch(path)
    if not isinstance(state, dict) or not {"options", "counters", "model", "optimizers"} <= set(state):
        raise UserError(f"{path}: is not the state of a run; start anew with --fresh")
    return state
