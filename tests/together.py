"""What test_distributed.py starts: several runs of train.py in one job of several processes, one after the other.

    torchrun ... together.py RUNS.json
    python together.py RUNS.json 4        # the same without torchrun: four processes that load PyTorch only once

RUNS.json holds a list of {"flags": [...]}, with accidents that happen to one process in one step: "signal": [rank,
step, number], "error": [rank, step], or "nan": [rank, step] for its loss; "late": rank, which gets SIGTERM while the
others are still at their last words. The exit statuses of all runs go to RUNS.json.RANK.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import train
from distributed import job
from optim import Learner
from utils import UserError, parse_options, run_command


def main(argv):
    return work(argv[0]) if "RANK" in os.environ else start(argv[0], int(argv[1]))


def start(path, processes):
    """Be torchrun, by fork. Returns the exit status."""
    with contextlib.suppress(ImportError):  # what a sharded run imports: once, not in each process
        import torch.distributed.checkpoint
        import torch.distributed.fsdp  # noqa: F401
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            return work(path)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]  # of all of them, so that none is left
    return int(any(statuses))


def work(path):
    """Make the runs as one of the processes. Returns the exit status."""
    with open(path) as f:
        runs = json.load(f)
    statuses = []
    make_short()
    with job() as processes:
        for run in runs:
            options, given = parse_options(train.TrainOptions, run["flags"], "")
            with_accidents(run, processes.rank)
            with train.errors_in_words(options):
                statuses.append(train.train(options, given, processes))
    with open(f"{path}.{processes.rank}", "w") as f:
        json.dump(statuses, f)
    return 0


plain_step, plain_loss, plain_sample, plain_report = Learner.step, Learner.loss, train.sample_text, train.report


# What takes longest in a small run, and what stands in for it: the picture, and all but the beginning of a sample.
SHORT = (
    (train.Run, "draw", lambda self: None),
    (train, "sample_text", lambda model, tokenizer, length, device: plain_sample(model, tokenizer, 5, device)),
)


def make_short():
    for place, name, short in SHORT:
        setattr(place, name, short)


def with_accidents(run, rank):
    """Have Learner do to this process what the run says."""
    steps = [0]

    def loss(self, x, y):
        found = plain_loss(self, x, y)
        return found * float("nan") if run.get("nan") == [rank, steps[0]] else found

    def step(self, *args):
        steps[0] += 1
        if run.get("signal") and run["signal"][:2] == [rank, steps[0]]:
            signal.raise_signal(run["signal"][2])
        if run.get("error") == [rank, steps[0]]:
            raise UserError("--accident: it happened; avoid it")
        return plain_step(self, *args)

    def report(*args, **settings):
        if run.get("late") == rank:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        elif "late" in run:
            time.sleep(0.6)
        return plain_report(*args, **settings)

    Learner.step, Learner.loss, train.report = step, loss, report


if __name__ == "__main__":
    run_command(main)
