"""Where a record comes from: command, commit, machine, versions and date, the same for every record of this project.

    record = {"provenance": stamp(device).to_json(), ...}

Machines are told apart by the CPU's model and the instruction sets that decide its speed, cores and threads, and the
GPU: two CPUs of one name may differ in bfloat16, two cards in memory.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .json_fields import Fields

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "open_clip_torch", "timm", "numpy")
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
"""What decides the speed of float32, bfloat16 and int8, as /proc/cpuinfo names it."""
NOT_RECORDED = "not recorded"
"""What stands in a record of an earlier version for what nobody wrote down."""


@dataclass(frozen=True)
class Machine:
    """What a record was measured on."""

    cpu: str
    cpu_features: list[str]
    cores: int | None
    threads: int | None
    """Of torch in each process."""
    gpu: str = ""
    """Name and memory; empty where none was used."""
    load_average: float | None = None
    """Of the last minute, when the record was written; 1 is one busy core."""

    def title(self) -> str:
        """`AMD EPYC (avx2, avx512f), 2 threads`, or the GPU's name."""
        if self.gpu:
            return self.gpu
        features = f" ({', '.join(self.cpu_features)})" if self.cpu_features else ""
        return f"{self.cpu}{features}" + (f", {self.threads} threads" if self.threads else "")


@dataclass(frozen=True)
class Provenance:
    """The origin of a record."""

    command: str
    commit: str
    """Of this repository; empty outside of a checkout."""
    clean: bool | None
    """Whether tracked files were as in the commit; None where that is not known."""
    date: str
    """UTC, YYYY-MM-DD."""
    machine: Machine
    versions: dict[str, str]
    processes: int = 1
    note: str = ""
    """What a reader should know, e.g. what of this was filled in later, and from what."""

    def to_json(self) -> dict[str, object]:
        document = asdict(self)
        return {key: value for key, value in document.items() if key != "note" or value}

    @classmethod
    def from_json(cls, fields: Fields) -> Provenance:
        """Raises UserError naming the field that is missing or of another kind."""
        machine = fields.inside("machine")
        return cls(
            command=fields.text("command"),
            commit=fields.text("commit"),
            clean=fields.optional_truth("clean"),
            date=fields.text("date"),
            machine=Machine(
                cpu=machine.text("cpu"),
                cpu_features=machine.texts("cpu_features"),
                cores=machine.optional_whole("cores"),
                threads=machine.optional_whole("threads"),
                gpu=machine.text("gpu"),
                load_average=machine.optional_number("load_average"),
            ),
            versions=fields.named_texts("versions"),
            processes=fields.whole("processes"),
            note=fields.text("note") if "note" in fields else "",
        )

    def title(self) -> str:
        """One line for above a table: machine, versions, date."""
        versions = ", ".join(f"{name} {text}" for name, text in self.versions.items() if name != "numpy")
        return "; ".join(filter(None, (self.machine.title(), versions, self.date)))


def stamp(device: torch.device | str = "cpu", processes: int = 1) -> Provenance:
    """The origin of what this process records now."""
    commit = _git("rev-parse", "HEAD")
    return Provenance(
        command=shlex.join(["python", *sys.orig_argv[1:]]),
        commit=commit,
        clean=not _git("status", "--porcelain", "--untracked-files=no") if commit else None,
        date=time.strftime("%Y-%m-%d", time.gmtime()),
        machine=_machine(torch.device(device)),
        versions={"python": platform.python_version(), **_versions()},
        processes=processes,
    )


def _machine(device: torch.device) -> Machine:
    gpu = ""
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        gpu = f"{card.name}, {card.total_memory / 2**30:.0f} GiB"
    name, features = _cpu()
    return Machine(name, features, os.cpu_count(), torch.get_num_threads(), gpu, round(os.getloadavg()[0], 2))


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # numpy and torch come from elsewhere in some environments
            continue
    return found | {"torch": torch.__version__}


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except OSError:  # no git
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu() -> tuple[str, list[str]]:
    """Model name, and those of CPU_FEATURES that it has; the first processor of /proc/cpuinfo stands for all."""
    information = Path("/proc/cpuinfo")
    if not information.exists():
        return platform.processor(), []
    first = information.read_text(encoding="utf-8").split("\n\n", 1)[0]
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    flags = set(fields.get("flags", "").split())
    return fields.get("model name", platform.processor()), [flag for flag in CPU_FEATURES if flag in flags]
