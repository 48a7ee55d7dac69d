"""What the benchmarks share: the peers that are asked for, processes as peers have them, a GPU's clock, --json."""

import importlib.util
import json
import os
import subprocess
import sys

import torch

from utils import UserError, missing_extra, pick_dtype

AS_PYTORCH_HAS_IT = dict(os.environ, GOMP_SPINCOUNT="300000")  # for peers: utils.py set this to another value for us


def peers(options):
    """The peers that are asked for. Raises UserError where one is not there."""
    found = []
    if options.peers:
        if importlib.util.find_spec("transformers") is None:
            raise missing_extra("transformers", "--peers")
        found.append("transformers")
    if options.nanogpt is not None:
        if not os.path.isfile(os.path.join(options.nanogpt, "model.py")):
            raise UserError(f"--nanogpt {options.nanogpt}: holds no model.py; give the directory of a nanoGPT clone")
        found.append("nanogpt")
    return found


def nanogpt_module(clone):
    """The model.py of a nanoGPT clone, imported."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", os.path.join(clone, "model.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def dtype_of(device):
    """The number format in which peers are measured: 16 bits on a CUDA GPU, float32 elsewhere."""
    return pick_dtype(None, device) if device.type == "cuda" else torch.float32


def synchronize(device):
    """Wait until a GPU has done what it was asked for; the clock is read after that."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def check_json(path):
    """Raises UserError where --json cannot be written: before the measuring, not after it. None is no file."""
    if path is None:
        return
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"--json {path}: cannot be written (it is no file); name another")
    try:
        open(f"{path}.tmp", "w").close()  # where utils.write_json begins
        os.remove(f"{path}.tmp")
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written ({error.strerror}); name another file") from None


def finished(command, what, **settings):
    """Run a command to its end. Raises UserError with its last line where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, **settings)
    if done.returncode != 0:
        raise UserError(f"{what} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return done


def in_turns(cases, rounds, run_case):
    """Measure each case in each round: {case: [what run_case(case) gave, ...]}. Says each figure as it comes."""
    results = {case: [] for case in cases}
    for number in range(rounds):
        for case in cases:
            print(f"round {number + 1} of {rounds}: {case}", file=sys.stderr)
            found = run_case(case)
            results[case].append(found)
            print(f"  {next(iter(found.values())):,.1f}", file=sys.stderr)  # the figure comes first
    return results


def measured(command, case, ours=None):
    """The JSON that a command prints which measures a case, SYSTEM|..., in a process as that system has it.

    ours: the environment of our own processes, where it is another than this one's.
    """
    env = ours if case.startswith("ours") else AS_PYTORCH_HAS_IT
    return json.loads(finished(command, f"measuring {case}", env=env).stdout.splitlines()[-1])
