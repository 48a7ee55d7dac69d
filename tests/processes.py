"""Commands of ours in processes of their own which have loaded PyTorch already: forks of one that is kept for that.

    python processes.py     # is that one: a line of JSON on its stdin asks for a fork, or for the end of one

What a test sees of a process is all there: its exit status, signals, streams, memory and files. Saved are the seconds
in which Python loads PyTorch, which most of such a test would take. Some tests of each command start it in full.
"""

import functools
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Command:
    """A process of a command, much as subprocess.Popen has it; its output is in files, and not piped.

    stdin: bytes. stdout, stderr: paths of files there are, /dev/full say, in place of those that communicate returns.
    limit: on the size of a file that it writes, in bytes.
    """

    def __init__(self, script, *args, cwd, env=(), stdin=b"", stdout=None, stderr=None, threads=1, limit=None):
        self.args, self.returncode = [str(script), *map(str, args)], None
        self.files = [tempfile.NamedTemporaryFile() for _ in range(3)]  # noqa: SIM115
        self.files[0].write(stdin)
        self.files[0].flush()
        streams = [given or file.name for given, file in zip((None, stdout, stderr), self.files)]
        self.pid = ask(args=self.args, cwd=str(cwd), env=dict(env), streams=streams, threads=threads, limit=limit)

    def poll(self):
        if self.returncode is None:
            self.returncode = ask(end_of=self.pid)
        return self.returncode

    def wait(self, timeout=300):
        """Returns the exit status; raises TimeoutExpired, as a Popen does."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.005)
        return self.returncode

    def communicate(self, timeout=300):
        """Wait for the end: (what came on stdout, on stderr), in bytes."""
        self.wait(timeout)
        return tuple(Path(file.name).read_bytes() for file in self.files[1:])

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


@functools.lru_cache(maxsize=None)
def keeper():
    """The process that is kept; it ends with this one, whose pipe it reads."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, __file__], **pipes)


def ask(**question):
    kept = keeper()
    kept.stdin.write(json.dumps(question) + "\n")
    kept.stdin.flush()
    return json.loads(kept.stdout.readline())


# ---------------------------------------------------------------------------------------------------------------------
# The process that is kept


def main():
    load()
    for line in sys.stdin:
        question = json.loads(line)
        if "end_of" in question:
            pid, status = os.waitpid(question["end_of"], os.WNOHANG)
            answer = None if pid == 0 else -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        else:
            answer = os.fork()
            if answer == 0:
                return be(**question)
        print(json.dumps(answer), flush=True)


def load():
    """What commands load; as in them, Python looks for no garbage in it."""
    gc.disable()
    sys.path[:0] = [str(ROOT)]
    import export  # noqa: F401
    import sample  # noqa: F401
    import train  # noqa: F401
    import trigram  # noqa: F401


def be(args, cwd, env, streams, threads, limit):
    """In a fork: run a file as Python does."""
    import torch

    import utils

    for number, (name, mode) in enumerate(zip(streams, "rww")):
        file = os.open(name, os.O_RDONLY if mode == "r" else os.O_WRONLY)
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout = open(0, encoding="utf-8"), open(1, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8")  # noqa: SIM115
    if limit is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    os.chdir(cwd)
    os.environ.update(env)
    torch.set_num_threads(threads)
    utils.STARTED = time.perf_counter()
    sys.argv = [str(ROOT / args[0]), *args[1:]]
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
