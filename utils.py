"""What every command needs: its command line, a device and a number format, and errors that fit on one line."""

import os
import time

STARTED = time.perf_counter()  # before PyTorch is loaded: a run's seconds are those of the whole process
if "OMP_WAIT_POLICY" not in os.environ:  # PyTorch's threads wait awake for some 20 us, then sleep: docs/speed.md
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# isort: split
import gc
import multiprocessing
import signal
import sys

HERE = os.path.dirname(os.path.abspath(__file__))


def leave(*_):
    """What Ctrl-C does before run_command is reached, and once it is over: a traceback would help nobody."""
    os._exit(130)


NEEDED = ("torch", "numpy", "tqdm", "matplotlib", "safetensors")


def name_what_is_missing(kind, error, trace):
    """What is shown of an error that nothing has caught: of a needed package that is not installed, one line."""
    if getattr(error, "name", None) not in NEEDED or not issubclass(kind, ModuleNotFoundError):
        return sys.__excepthook__(kind, error, trace)
    remedy = "install all that is needed with: pip install -r requirements.txt"
    print(f"{os.path.basename(program)}: error: the package '{error.name}' is missing; {remedy}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(2)


# Where one of our own commands is starting, and not in a notebook that imports this.
program = os.path.abspath(getattr(sys.modules["__main__"], "__file__", None) or "")
if os.path.dirname(program) == HERE and multiprocessing.parent_process() is None:
    signal.signal(signal.SIGINT, leave)
    sys.excepthook = name_what_is_missing
    gc.disable()  # until run_command: of all that loading PyTorch makes, next to nothing is garbage

# isort: split
import argparse
import contextlib
import difflib
import errno
import functools
import json
import re
import threading
import typing
from dataclasses import field, fields

import torch

# ---------------------------------------------------------------------------------------------------------------------
# Errors


class UserError(Exception):
    """Something the person at the keyboard can put right. The message names what is wrong, its value and the remedy."""

    def _render_traceback_(self):  # what Jupyter shows of it
        return [str(self)]


def run_command(main):
    """Run `main(argv)` as a program: a UserError becomes one line on stderr and exit status 2, Ctrl-C status 130."""
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not gc.isenabled():  # what is loaded stays, so that it is not looked through again and again, nor at the end
        gc.freeze()
        gc.enable()
    open_streams()
    outlive_readers(sys.stderr)
    _watch(sys.stdout, _name_output)
    if hasattr(sys.stdout, "reconfigure"):
        # A ? for a character that a terminal's encoding lacks. A file's lacks none: not even on Windows (1252).
        to_file = not sys.stdout.isatty() and "PYTHONIOENCODING" not in os.environ
        sys.stdout.reconfigure(errors="replace", **(dict(encoding="utf-8") if to_file else {}))
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()  # here a full disk can still be told
    except UserError as error:
        status = refuse(error)
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # the reader of our output left early, as in `python sample.py | head`
        _to_nobody(sys.stdout)
        status = 0
    except OSError as error:
        if error.filename != OUTPUT:
            raise
        _to_nobody(sys.stdout)
        status = refuse(f"{OUTPUT}: cannot be written ({error.strerror}); make room there, or send it elsewhere")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        status = refuse("out of memory; take a smaller model or text, or a machine with more")
    with contextlib.suppress(ValueError):  # in another thread than the first
        signal.signal(signal.SIGINT, leave)  # while threads that compute are waited for, and all else that is left
    sys.exit(status)


def refuse(problem):
    """Tell of a problem in one line on stderr. Returns the exit status for it, 2."""
    print(f"{os.path.basename(sys.argv[0])}: error: {problem}", file=sys.stderr)
    return 2


OUTPUT = "standard output"


def open_streams():
    """Open what was closed when the command was started (`python sample.py >&-`), as if it were /dev/null."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def outlive_readers(stream):
    """Let print go on, in vain, where nobody takes our output any more: its reader has left (`python train.py | head`),
    its terminal is gone, its disk is full. The work is done for what it leaves on disk."""
    _watch(stream, lambda error: _to_nobody(stream))


def _watch(stream, failed):
    """Call failed(error) where a stream cannot be written."""

    def watched(function):
        def call(*args):
            try:
                return function(*args)
            except OSError as error:
                failed(error)

        return call

    for name in ("write", "flush"):
        setattr(stream, name, watched(getattr(stream, name)))


def _to_nobody(stream):
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _name_output(error):
    error.filename = error.filename or OUTPUT  # tells it from the errors of other files
    raise error


# ---------------------------------------------------------------------------------------------------------------------
# The command line: one dataclass per command says it all


def option(default, help, at_least=None, above=None, below=None, choices=None):
    """A dataclass field that is also a flag: its default, its one line of help and the values it takes."""
    return field(
        default=default, metadata=dict(help=help, at_least=at_least, above=above, below=below, choices=choices)
    )


def argument(help):
    """A dataclass field that is given by its place on the command line, without a flag's name."""
    return field(default=None, metadata=dict(help=help, positional=True))


def parse_options(cls, argv, description, prog=None):
    """Read the flags in `argv` into an instance of the dataclass `cls`.

    Returns (options, given): the instance, and the set of names that were on the command line (the others hold their
    default). Raises UserError for an unknown flag or a value that does not fit.
    prog: what the help calls the command, where that is more than the file.
    """
    parser = _Parser(description=description, allow_abbrev=False, prog=prog)
    types = typing.get_type_hints(cls)
    for f in fields(cls):
        if f.metadata.get("positional"):
            parser.add_argument(f.name, metavar=f.name.upper(), help=f.metadata["help"])
            continue
        kind = _plain_type(types[f.name])
        help = f.metadata["help"]
        if f.default is not None:
            help += f" (default: {f.default})"
        help = help.replace("%", "%%")
        flag = dict(dest=f.name, default=argparse.SUPPRESS)
        if kind is bool:  # --compile, --compile False, --no-compile
            parser.add_argument(f"--{f.name}", nargs="?", const=True, type=_boolean, metavar="BOOL", help=help, **flag)
            off = (f"--no-{f.name}", f"--no_{f.name}")
            parser.add_argument(*off, action="store_const", const=False, help=argparse.SUPPRESS, **flag)
        else:
            metavar = {int: "N", float: "X", str: "TEXT"}[kind]
            parser.add_argument(f"--{f.name}", type=_converter(kind, f.metadata), metavar=metavar, help=help, **flag)
    given = vars(parser.parse_args(argv))
    return cls(**given), set(given)


class _Parser(argparse.ArgumentParser):
    def parse_args(self, argv):
        known, unknown = self.parse_known_args(argv)
        if unknown:
            name = unknown[0].split("=")[0]
            if not name.startswith("-"):
                self.error(f"{unknown[0]}: belongs to no flag; put quotes around a value with spaces or with a *")
            near = difflib.get_close_matches(name, self._option_string_actions, n=1)
            self.error(f"unknown flag {name}" + (f"; did you mean {near[0]}?" if near else "; --help lists them all"))
        return known

    def error(self, message):
        if message.endswith("expected one argument"):
            message += "; one that begins with a dash is written with =, as in --out_dir=-name"
        raise UserError(message.replace("argument ", "", 1))


def _plain_type(annotation):
    """Optional[int] -> int; int -> int."""
    inner = [a for a in typing.get_args(annotation) if a is not type(None)]
    return inner[0] if inner else annotation


def _boolean(text):
    if text.lower() in ("true", "yes", "on", "1"):
        return True
    if text.lower() in ("false", "no", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"wants True or False, not '{text}'")


def _converter(kind, rules):
    low, above, high, choices = rules["at_least"], rules["above"], rules["below"], rules["choices"]
    wants = {int: "a whole number", float: "a number", str: "text"}[kind]
    if low is not None:
        wants += f" of at least {low}"
    if above is not None:
        wants += f" above {above}"
    if high is not None:
        wants += f"{'' if low is None and above is None else ' and'} below {high}"
    if choices is not None:
        wants = "one of " + ", ".join(choices)

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        fits = value is not None and value == value and value not in (float("inf"), float("-inf"))
        if fits and kind is int and abs(value) >= 2**32:
            raise argparse.ArgumentTypeError(f"{text} is too large; the most is {2**32 - 1}")
        fits = (
            fits
            and (low is None or value >= low)
            and (above is None or value > above)
            and (high is None or value < high)
        )
        fits = fits and (choices is None or value in choices)
        if not fits:
            raise argparse.ArgumentTypeError(f"wants {wants}, not '{text}'")
        return value

    return convert


def environment_number(name, default, at_least=0):
    """The whole number in an environment variable of torchrun's; the default where it is not set. Raises UserError."""
    text = os.environ.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < at_least:
        raise UserError(
            f"{name}={text}: this environment variable wants a whole number of at least {at_least}, as torchrun sets "
            f"it; unset it, or start with torchrun"
        )
    return int(text)


# ---------------------------------------------------------------------------------------------------------------------
# Device, number format and random numbers


def pick_device(name=None):
    """The torch.device called `name`; for None the best there is: a CUDA GPU, an Apple GPU, else the CPU."""
    mps = torch.backends.mps.is_available()
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: no such device; use cpu, cuda, cuda:1 or mps")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: PyTorch finds no CUDA GPU on this machine; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} GPU(s), counted from cuda:0")
    if device.type == "cuda" and not made_for(device):
        name, number = torch.cuda.get_device_name(device), "{}.{}".format(*torch.cuda.get_device_capability(device))
        raise UserError(
            f"--device {device}: this PyTorch ({torch.__version__}) was not built for the {name} (compute capability "
            f"{number}); install one that was, as pytorch.org lists them, or use --device cpu"
        )
    if device.type == "mps" and not mps:
        raise UserError(f"--device {name}: PyTorch finds no Apple GPU on this machine; use --device cpu")
    return device


def made_for(device):
    """Has PyTorch kernels for this CUDA GPU? Each release leaves the oldest GPUs out, and some come in several builds.

    Kernels run on GPUs of their own major version that are no older; what is there as PTX is compiled on any newer one.
    """
    built_for = torch.cuda.get_arch_list()
    if torch.version.hip or not built_for:
        return True
    ours = torch.cuda.get_device_capability(device)
    for kind, major, minor in re.findall(r"(sm|compute)_(\d+)(\d)", " ".join(built_for)):
        theirs = int(major), int(minor)
        if theirs <= ours and (kind == "compute" or theirs[0] == ours[0]):
            return True
    return False


def version(package):
    """The version of an imported package, such as torch: (2, 4) for 2.4.1."""
    return tuple(int(part) for part in package.__version__.split(".")[:2])


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def has_bfloat16(device):
    """Does the device multiply bfloat16 matrices in hardware? (Elsewhere they work too, but slower than float32.)"""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and _cpu_has_bfloat16()


@functools.lru_cache(maxsize=None)  # asked at every step of Muon
def _cpu_has_bfloat16():
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
        return re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", f.read()) is not None
    return False


def pick_dtype(name, device):
    """The torch.dtype called `name`; for None bfloat16 if the hardware has it, else float16 on CUDA, else float32."""
    if name is None:
        name = "bfloat16" if has_bfloat16(device) else "float16" if device.type == "cuda" else "float32"
    if name == "float16" and device.type != "cuda":
        raise UserError(f"--dtype float16 needs a CUDA GPU, not {device.type}; use bfloat16 or float32")
    return DTYPES[name]


def dtype_name(dtype):
    """What --dtype calls a torch.dtype: "bfloat16" for torch.bfloat16."""
    return str(dtype).replace("torch.", "")


def autocast(device, dtype):
    """The context in which matrix products run in `dtype` while the weights stay float32 (mixed precision)."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device_type=device.type, dtype=dtype)


def random_states(device):
    """Where the random numbers of the CPU and of the device stand."""
    states = dict(cpu=torch.get_rng_state())
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def restore_random_states(states, device):
    """Go back to where they stood; those of a kind of device that had none then go on."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and isinstance(states.get("cuda"), torch.Tensor):
        torch.cuda.set_rng_state(states["cuda"], device)
    if device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])


@contextlib.contextmanager
def same_dice(device):
    """A context that leaves the random numbers of the CPU and of the device as they were."""
    states = random_states(device)
    try:
        yield
    finally:
        restore_random_states(states, device)


@contextlib.contextmanager
def told_when_slow(line, seconds=2.0):
    """A context that prints a line on stderr when what is in it takes longer than that."""
    timer = threading.Timer(seconds, print, [f"\n{line}"], dict(file=sys.stderr))  # a prompt may stand before it
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


CGROUP = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # version 2, version 1


def memory_of(device):
    """The bytes of memory that a GPU, or else the machine or container, has; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):  # Windows
        return None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in CGROUP:
        with contextlib.suppress(OSError, ValueError), open(path) as f:  # "max": no limit
            memory = min(memory, int(f.read()))
    return memory


# ---------------------------------------------------------------------------------------------------------------------
# Files


def write_atomically(path, write):
    """Call write(temporary_path), sync what it wrote and rename it to path. On failure the old file stays.

    Where the machine loses its power, path is the old file or the new one too: both the file and its name are on the
    disk when this returns. Raises OSError.
    """
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        return write(path)  # a device or a pipe, whose place a file shall not take
    path = os.path.realpath(path)  # a link stays, and leads to what is new
    temporary = f"{path}.tmp"
    try:
        write(temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise
    sync_directory(os.path.dirname(path))


def sync_directory(directory):
    """Have the names of the directory's files on the disk when this returns. Windows does so by itself."""
    if os.name != "nt":
        names = os.open(directory or ".", os.O_RDONLY)
        try:
            os.fsync(names)
        except OSError as error:
            if error.errno != errno.EINVAL:  # what a file system says that cannot sync a directory
                raise
        finally:
            os.close(names)


def write_json(path, content):
    """Write content to path as JSON, whole or not at all."""

    def write(temporary):
        # A name of a file that is no UTF-8 has half surrogates; the backslash makes them what JSON knows too.
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as f:
            json.dump(content, f, ensure_ascii=False, indent=1)

    write_atomically(path, write)


# ---------------------------------------------------------------------------------------------------------------------
# Words


def seconds_in_words(seconds):
    """95 -> '1.6 minutes'."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


# What PyTorch says then: on a CUDA or Apple GPU, in cuBLAS, on a CPU (Linux and macOS, Windows).
OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "not enough memory")


@functools.lru_cache(maxsize=None)
def say_once(line):
    """Print a line on stderr, the first time."""
    print(line, file=sys.stderr)


def first_line(error):
    """What an error says, of many lines the first; "" where it says nothing."""
    return (str(error).strip().splitlines() or [""])[0]


def first_problem(error):
    """The first thing that load_state_dict says does not fit, of which it makes a list below a title."""
    lines = [line.strip() for line in str(error).splitlines()]
    line = lines[1] if len(lines) > 1 else lines[0]
    return line if len(line) <= 200 else line[:200] + " ..."


def is_out_of_memory(error):
    """Is an error PyTorch's or Python's way to say that there is no memory left?"""
    return isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def missing_extra(package, purpose):
    """The error for an optional package that is not installed."""
    return UserError(f"{purpose} needs the package '{package}'; install it with: pip install {package}")
