"""What README, docs, scripts and configs show: code blocks and commands, and how a command is started without its work.

A dry start is the real thing up to the first work: a shell script runs with an interpreter that only takes down what
it is asked for, torchrun's own parser takes torchrun's options, the command's own parser takes the rest, and
configurations and sweeps are loaded with their overrides. A wrong option, key, file of the repository or extra fails.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import yaml
from torch.distributed.run import parse_args as parse_torchrun

from evaluation.evaluate_retrieval import check_lambda_split
from scripts.ablate import chosen_names
from scripts.train_embedder import read_config
from training.config import load_config
from training.sweep import read_sweep

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
REPOSITORY_PATH = re.compile(r"(?:configs|benchmarks|scripts|tests)/\S+")

_FENCE = re.compile(r"^( *)```([\w-]*)\n(.*?)^\1```$", re.S | re.M)
_COMMAND = re.compile(
    r"(?:[A-Z]+=\S+ )*(?:(?:python|torchrun --nproc_per_node=\d+) (?:-m (?:data|evaluation|training)\.|[\w/]+\.py\b)"
    r"|bash (?:scripts/\w+\.sh|\.ci/run)\b|pip install )[^\n`]*"
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `output` is the block without a language that directly follows it."""

    page: Path
    line: int
    language: str
    text: str
    output: str | None = None

    @property
    def place(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """The blocks of a page in order. A block without a language is the output of the one that it directly follows."""
    text, found, end = page.read_text(encoding="utf-8"), [], -1
    for match in _FENCE.finditer(text):
        block = Block(page, text.count("\n", 0, match.start()) + 2, match[2], match[3])
        if not block.language and match.start() == end + 1:
            block = replace(found.pop(), output=block.text)
        found.append(block)
        end = match.end()
    return found


def commands_of(block: Block) -> list[str]:
    """The commands of a shell block, one a string: continued lines are joined, comments left out. Others have none."""
    if block.language != "bash":
        return []
    lines = re.sub(r" *\\\n\s*", " ", block.text).splitlines()
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


def mentioned_commands() -> Iterator[tuple[Path, str]]:
    """Commands outside of blocks: in prose, in the docstrings of modules, in the headers of scripts and configs."""
    sources = [*PAGES, ROOT / "train.py", *sorted((ROOT / "configs").rglob("*.yaml"))]
    sources += [file for folder in ("scripts", "data", "evaluation", "training") for file in _scripts(ROOT / folder)]
    for source in sources:
        text = source.read_text(encoding="utf-8")
        if source.suffix == ".md":
            text = re.sub(r"<!-- table: .*? -->", "", _FENCE.sub("", text))  # tests/test_docs_tables.py runs those
        elif source.suffix == ".py":
            text = ast.get_docstring(ast.parse(text)) or ""
        else:
            text = "\n".join(re.findall(r"^ *#(.*)", text, re.M))
        for match in _COMMAND.finditer(re.sub(r" *\\\n\s*", " ", text)):
            yield source, re.split(r"  | #|;| -->| >", match[0])[0].strip()


def _scripts(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix in (".py", ".sh"))


@functools.cache
def start_dry(command: str) -> None:
    """Start a command without its work. Raises AssertionError, SystemExit or UserError where it is wrong."""
    words = shlex.split(command)
    settings = list(_settings(words))
    program, *rest = words[len(settings) :]
    for word in rest:
        path = word.partition("=")[2] if "=" in word else word
        if REPOSITORY_PATH.match(path):
            assert list(ROOT.glob(path)), f"{path} is not in the repository"
    match Path(program).name:
        case "python":
            _start_python(rest)
        case "torchrun":
            start_dry(shlex.join(on_one_process(words)))
        case "bash":
            for call in calls_of(rest, dict(setting.split("=", 1) for setting in settings)):
                start_dry(shlex.join(["python", *call]))
        case "pip":
            _check_pip(rest)
        case _:
            raise AssertionError(f"{command}: nothing here knows how to start {program} dry")


def on_one_process(words: Sequence[str]) -> list[str]:
    """A command without torchrun, whose options its own parser has taken, and without the path of the interpreter."""
    if words[0] == "torchrun":
        arguments = parse_torchrun(list(words[1:]))
        return ["python", arguments.training_script, *arguments.training_script_args]
    return ["python" if Path(words[0]).name == "python" else words[0], *words[1:]]


def _settings(words: Sequence[str]) -> Iterator[str]:
    """The variables that a shell command sets for itself, `OUT=runs/a bash ...`."""
    for word in words:
        if not re.match(r"[A-Z_]+=", word):
            return
        yield word


def command_module(words: Sequence[str]) -> tuple[ModuleType, list[str]]:
    """The module that `python words` starts and the arguments that are left for it."""
    if words[0] == "-m":
        name, arguments = words[1], words[2:]
        package = importlib.import_module(name)
        name += ".__main__" if hasattr(package, "__path__") else ""
    else:
        assert (ROOT / words[0]).is_file(), f"{words[0]} is not in the repository"
        name, arguments = words[0].removesuffix(".py").replace("/", "."), words[1:]
    return importlib.import_module(name), list(arguments)


def _start_python(words: Sequence[str]) -> None:
    if list(words[:2]) == ["-m", "pytest"]:
        _check_pytest(words[2:])
    elif list(words[:2]) in (["-m", "ruff"], ["-m", "mypy"]):  # what CI runs
        return
    else:
        module, arguments = command_module(words)
        if not hasattr(module, "parse_arguments"):
            assert not arguments, f"{module.__name__} takes no arguments"
            return
        _CHECKS.get(module.__name__, lambda parsed: parsed)(module.parse_arguments(arguments))


def _check_sweep(arguments: argparse.Namespace) -> None:
    """Load every variant's configuration with the command's overrides, as its runs would."""
    if arguments.table:
        return
    file, *overrides = arguments.sweep
    sweep = read_sweep(file)
    chosen_names(arguments.only, list(sweep.variants), "--only")
    with tempfile.TemporaryDirectory() as folder:
        for name, variant in sweep.variants.items():
            written = Path(folder) / f"{name}.yaml"
            written.write_text(yaml.safe_dump(variant.config(arguments.out)))
            load_config(written, overrides)


_CHECKS = {
    "evaluation.evaluate_retrieval": check_lambda_split,
    "scripts.ablate": _check_sweep,
    "scripts.train_embedder": read_config,
}
"""What a command checks of its arguments after parsing them, before its work."""


def calls_of(words: Sequence[str], settings: dict[str, str]) -> list[list[str]]:
    """What a shell script would ask its interpreter for: a copy of it runs with one that only takes that down."""
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder)
        for scripts in ("scripts", ".ci"):
            shutil.copytree(ROOT / scripts, checkout / scripts, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
        (checkout / "configs").symlink_to(ROOT / "configs")
        taken_down, interpreter = checkout / "calls", checkout / "interpreter"
        interpreter.write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" >> '{taken_down}'\necho >> '{taken_down}'\n")
        interpreter.chmod(0o755)
        environment = os.environ | settings | {"EDJE_PYTHON": str(interpreter)}
        ended = subprocess.run(["bash", *words], cwd=checkout, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, f"{shlex.join(words)}: {ended.stderr}"
        return [line.removesuffix("\0").split("\0") for line in taken_down.read_text().splitlines()]


def _check_pytest(arguments: Sequence[str]) -> None:
    """pytest takes these options and paths; it prints its markers instead of collecting tests."""
    for argument in arguments:
        assert not argument.startswith("tests") or (ROOT / argument).exists(), f"{argument} is not in the repository"
    command = [sys.executable, "-m", "pytest", "--noconftest", "--markers", *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def _check_pip(arguments: Sequence[str]) -> None:
    """Requirement files are there, extras are declared, and other packages are ones that pyproject.toml names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = {_package(requirement) for requirement in sum(extras.values(), project["dependencies"])}
    assert arguments[0] == "install"
    for before, argument in pairwise(arguments):
        if before == "-r":
            assert (ROOT / argument).is_file(), f"{argument} is not in the repository"
        elif match := re.fullmatch(rf"(?:\.|{project['name']})\[(.+)\]", argument):
            assert set(match[1].split(",")) <= set(extras), f"{argument}: the extras are {', '.join(extras)}"
        elif not argument.startswith("-") and argument not in (".", project["name"]):
            assert _package(argument) in declared, f"pyproject.toml does not name {argument}"


def _package(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")
