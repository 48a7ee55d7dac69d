"""C code of ours, compiled once for the CPU that it runs on: what fused_cpu.py and learn_cpu.py have in common.

    library("fused_cpu.c")      # its functions, by way of ctypes

Any C compiler will do. What it makes is kept in __pycache__, and made anew where the code, the compiler or the CPU is
another one.
"""

import ctypes
import functools
import glob
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile

from utils import HERE

KEPT = os.path.join(HERE, "__pycache__")
FLAGS = ["-O3", "-fPIC", "-shared", "-fno-strict-aliasing", "-lm"]
HEADER = "vectors.h"  # which all of it includes


class CannotCompile(Exception):
    """Why C code cannot be compiled here, in words."""


def fields(**names):
    """The fields of a ctypes.Structure. int, long, float, place: names of those of that type, in one string."""
    types = dict(int=ctypes.c_int32, long=ctypes.c_int64, float=ctypes.c_float, place=ctypes.c_void_p)
    return [(name, types[kind]) for kind, several in names.items() for name in several.split()]


def of_shape(tensor, *shape):
    """The tensor, which may be None. Raises ValueError where C code would read beyond it, or not all of it."""
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{tuple(tensor.shape)} in place of {shape}")
    return tensor


def compiler():
    """A C compiler, as the beginning of a command; [] where there is none."""
    for command in (shlex.split(os.environ.get("CC", "")), ["cc"], ["gcc"], ["clang"]):
        if command and shutil.which(command[0]):
            return command
    return []


def processor():
    """What this CPU can do, in words: what was compiled on one may not run on another."""
    try:
        with open("/proc/cpuinfo") as f:
            return next((line for line in f if line.startswith(("flags", "Features"))), platform.machine())
    except OSError:
        return platform.processor() or platform.machine()


def digest(*what):
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def digest_of(path):
    with open(path, "rb") as f:
        return digest(f.read())


@functools.lru_cache(maxsize=None)
def library(source, *defines):
    """The functions of a C file of this directory, compiled for this CPU with such flags as -DNAME.

    Raises CannotCompile, or OSError.
    """
    cc = compiler()
    flags = [*defines, *FLAGS, *(["-march=native"] if platform.machine() in ("x86_64", "AMD64") else [])]
    path, directory = os.path.join(HERE, source), KEPT
    made_of = digest(digest_of(path), digest_of(os.path.join(HERE, HEADER)), cc, flags, processor())
    name = os.path.join(directory, f"{source[:-2]}-{made_of}-")
    for kept in glob.glob(f"{glob.escape(name)}*.so"):  # named by what it was made of and by its own content
        if kept == f"{name}{digest_of(kept)}.so":
            return ctypes.CDLL(kept)
    if not cc:
        raise CannotCompile("there is no C compiler")
    try:
        os.makedirs(directory, exist_ok=True)
        place = tempfile.TemporaryDirectory(dir=directory)
    except OSError:  # not ours to write to: then it is compiled each time
        directory, place = None, tempfile.TemporaryDirectory()
    with place as temporary:
        made = os.path.join(temporary, "made.so")
        compile_to(made, [*cc, path, "-o", made, *flags])
        if directory is None:
            return ctypes.CDLL(made)
        kept = f"{name}{digest_of(made)}.so"
        os.replace(made, kept)  # whole at once: another process may be doing the same
    return ctypes.CDLL(kept)


def compile_to(path, command):
    """Run a compiler's command. Raises CannotCompile where it leaves nothing at path."""
    for each in ([*command, "-fopenmp"], command):  # Apple's Clang has no OpenMP
        done = subprocess.run(each, capture_output=True, text=True, errors="replace")
        if done.returncode == 0 and os.path.exists(path):
            return
    lines = done.stderr.strip().splitlines()
    line = next((line for line in lines if "error" in line), lines[0] if lines else f"{command[0]} failed")
    raise CannotCompile(f"it cannot be compiled: {line}")
