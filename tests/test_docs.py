"""README.md and docs/: each command that stands there is one that its program takes, and each flag exists."""

import argparse
import importlib
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import train
from utils import UserError, parse_options

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("train.py", "sample.py", "export.py", "bench.py", "data.py", "bigram.py", "trigram.py")
SHELLS = ("bash", "sh", "powershell")


def commands(text):
    """The commands in a page's blocks for a shell, and in `python ...`, `torchrun ...`, `make ...` in its sentences."""
    blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    lines = [line for shell, block in blocks if shell in SHELLS for line in block.replace("\\\n", " ").splitlines()]
    sentences = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += [" ".join(line.split()) for line in re.findall(r"`((?:python|torchrun|make) [^`]+)`", sentences)]
    for line in lines:
        parts = shlex.shlex(line, posix=True, punctuation_chars=True)
        parts.whitespace_split = True
        command = []
        for part in [*parts, ";"]:
            if part == "...":  # flags that stand elsewhere
                continue
            if not re.fullmatch(r"[|&;<>]+", part):
                command.append(part)
            elif command:
                yield command
                command = []


ALL = [
    pytest.param(command, id=f"{page.name}: {' '.join(command)}")
    for page in PAGES
    for command in commands(page.read_text(encoding="utf-8"))
]


class Parsed(Exception):
    """A program took its flags, and shall not run."""


def parse(program, flags, monkeypatch):
    """Have a program of ours read its flags, by its own main(), and do nothing else. Raises UserError."""
    module = importlib.import_module(program[: -len(".py")])
    if not hasattr(module, "parse_options"):
        assert flags == [], f"{program} takes no flags"
        return

    def parse_only(*arguments):
        options, given = parse_options(*arguments)
        if program == "train.py":
            train.check_flags(options, given)
        raise Parsed

    monkeypatch.setattr(module, "parse_options", parse_only)
    with pytest.raises(SystemExit if flags == ["--help"] else Parsed):
        module.main(flags)


def check(command, monkeypatch):
    """Raises an error where a command is one of ours and would not be taken."""
    while re.match(r"\w+=", command[0]):  # a variable of the environment
        command = command[1:]
    if command[0] == "torchrun":
        arguments = get_args_parser().parse_args(command[1:])
        command = ["python", arguments.training_script, *arguments.training_script_args]
    if command[0] == "make":
        variables = dict(part.split("=", 1) for part in command[1:] if "=" in part)
        for target in [part for part in command[1:] if "=" not in part]:
            recipe = re.search(rf"^{target}:.*$", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert recipe, f"there is no target {target}"
            if "ARGS" in variables:
                parse(re.search(r"\w+\.py", recipe[0])[0], shlex.split(variables["ARGS"]), monkeypatch)
    if command[0].endswith("python") and not command[1].startswith("-"):
        assert command[1] in PROGRAMS and (ROOT / command[1]).exists(), f"there is no {command[1]}"
        parse(command[1], command[2:], monkeypatch)


@pytest.mark.parametrize("command", ALL)
def test_a_command_in_the_docs_is_taken(command, monkeypatch):
    check(command, monkeypatch)


@pytest.mark.parametrize(
    "line",
    [
        "python train.py --n_layers 4",
        "python train.py --n_layer four",
        "python train.py --peak h100",
        "python nowhere.py",
        "python bench.py speed --rounds 3",
        "echo hello | .venv\\Scripts\\python sample.py --top_x 3",
        "NCCL_DEBUG=INFO torchrun --nproc_per_node 8 train.py --batch 64",
        "torchrun --processes 8 train.py",
        "make sleep",
    ],
)
def test_a_command_that_is_wrong_would_be_seen(line, monkeypatch):
    found = [*commands(f"text\n\n```bash\nls  # nothing of ours\n{line}\n```\n")]
    assert len(found) >= 2
    with pytest.raises((UserError, AssertionError, SystemExit, argparse.ArgumentError)):
        for command in found:
            check(command, monkeypatch)


def test_every_flag_in_the_docs_exists_and_the_readme_has_every_flag_of_training():
    known = {"--help", "--ipc", "--shm-size", "--shutdown-timeout"}  # Docker's are two, the last is in newer torchruns
    for action in get_args_parser()._actions:
        known.update(action.option_strings)
    for program in (*PROGRAMS, "bench_generate.py"):
        module = importlib.import_module(program[: -len(".py")])
        for cls in [value for name, value in vars(module).items() if name.endswith("Options")]:
            known.update(f"--{prefix}{f.name}" for f in fields(cls) for prefix in ("", "no-", "no_"))
    for page in PAGES:
        code = re.findall(r"`(--[^`]+)`", page.read_text(encoding="utf-8"))
        flags = {flag for piece in code for flag in re.findall(r"--[a-zA-Z][\w-]*", piece)}
        assert flags <= known, f"{page.name}: {flags - known}"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [f.name for f in fields(train.TrainOptions) if f"--{f.name}" not in readme]
