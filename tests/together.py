"""What test_distributed.py starts under torchrun: several runs of train.py in one job, one after the other.

    torchrun ... together.py RUNS.json

RUNS.json holds a list of {"flags": [...], "signal": [rank, step, number] or null, "error": [rank, step] or null}: that
process gets that signal, or raises an error, in that step. The exit statuses of all runs go to RUNS.json.RANK.
"""

import json
import os
import signal
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import train
from distributed import job
from optim import Learner
from utils import UserError, parse_options, run_command


def main(argv):
    with open(argv[0]) as f:
        runs = json.load(f)
    statuses = []
    with job() as processes:
        for run in runs:
            options, given = parse_options(train.TrainOptions, run["flags"], "")
            with_accidents(run, processes.rank)
            with train.errors_in_words(options):
                statuses.append(train.train(options, given, processes))
    with open(f"{argv[0]}.{processes.rank}", "w") as f:
        json.dump(statuses, f)
    return 0


plain_step = Learner.step


def with_accidents(run, rank):
    """Have Learner.step do to this process what the run says."""
    steps = [0]

    def step(self, *args):
        steps[0] += 1
        if run.get("signal") and run["signal"][:2] == [rank, steps[0]]:
            signal.raise_signal(run["signal"][2])
        if run.get("error") == [rank, steps[0]]:
            raise UserError("--accident: it happened; avoid it")
        return plain_step(self, *args)

    Learner.step = step


if __name__ == "__main__":
    run_command(main)
