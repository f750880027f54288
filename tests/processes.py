"""A script of the project in a process of its own, as a user starts it, without the seconds that its imports take.

The process is forked from a server that did nothing but import the libraries: no threads, no weights, nothing of an
earlier test. Under torchrun, and in the demo, the tests start scripts the ordinary way."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path
from subprocess import CompletedProcess

ROOT = Path(__file__).parents[1]
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["open_clip", "transformers.models.auto.tokenization_auto"])


def start_script(script: str, *arguments: str | Path, out: Path, err: Path) -> multiprocessing.Process:
    """Start `python ROOT/script arguments` in the folder /, its output going to two files."""
    process = _server.Process(target=_run, args=(script, list(map(str, arguments)), out, err))
    process.start()
    return process


def run_script(script: str, *arguments: str | Path) -> CompletedProcess:
    """The same to its end: exit status and output."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = start_script(script, *arguments, out=out, err=err)
        process.join()
        return CompletedProcess([script, *arguments], process.exitcode, out.read_text(), err.read_text())


def _run(script: str, arguments: list[str], out: Path, err: Path) -> None:
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    multiprocessing.set_start_method(None, force=True)  # the platform's own: it would be this server's for all below
    os.chdir("/")
    sys.argv = [str(ROOT / script), *arguments]
    sys.path[0] = str((ROOT / script).parent)  # what `python script` puts there, instead of the tests' paths
    runpy.run_path(sys.argv[0], run_name="__main__")
