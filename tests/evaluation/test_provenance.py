"""The origin of a record: what a process that writes one can know about itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from evaluation.json_fields import Fields
from evaluation.provenance import Provenance, stamp
from tests.processes import ROOT

PRINT_STAMP = "import json; from evaluation.provenance import stamp; print(json.dumps(stamp().to_json()))"


def stamp_of_checkout(folder: Path) -> dict:
    done = subprocess.run([sys.executable, "-c", PRINT_STAMP], cwd=folder, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_a_stamp_tells_machine_versions_and_date_and_reads_back():
    origin = stamp("cpu", processes=2)
    assert origin.versions["torch"] == torch.__version__ and {"python", "transformers"} <= origin.versions.keys()
    assert origin.machine.cpu and origin.machine.threads == torch.get_num_threads() and not origin.machine.gpu
    assert origin.processes == 2 and origin.command.startswith("python ")
    assert Provenance.from_json(Fields(json.loads(json.dumps(origin.to_json())), "x: ")) == origin


def test_commit_and_changes_are_those_of_the_checkout(tmp_path):
    checkout = tmp_path / "checkout"
    for package in ("evaluation", "models", "data"):
        shutil.copytree(ROOT / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__"))
    outside = stamp_of_checkout(checkout)
    assert outside["commit"] == "" and outside["clean"] is None

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        done = subprocess.run(["git", *identity, *arguments], cwd=checkout, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "x")
    clean = stamp_of_checkout(checkout)
    assert clean["commit"] == git("rev-parse", "HEAD") and clean["clean"] is True
    assert clean["command"] == f"python -c '{PRINT_STAMP}'"
    (checkout / "models" / "errors.py").write_text((checkout / "models" / "errors.py").read_text() + "\n")
    assert stamp_of_checkout(checkout)["clean"] is False
