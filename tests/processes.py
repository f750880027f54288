"""A script of the project in a process of its own, as a user starts it, without the seconds that its imports take.

The process is forked from a server that did nothing but import the libraries: no threads, no weights, nothing of an
earlier test. Under torchrun, and in the demo, the tests start scripts the ordinary way."""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from pathlib import Path
from subprocess import CompletedProcess

ROOT = Path(__file__).parents[1]
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["open_clip", "transformers.models.auto.tokenization_auto"])


def run_script(script: str, *arguments: str | Path, kill_at: tuple[str, int] | None = None) -> CompletedProcess:
    """Run `python ROOT/script arguments` in the folder / to its end: exit status and output.

    kill_at: a function's full name and a number; that call of it ends the process with SIGKILL, wherever it is then.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = _server.Process(target=_run, args=(script, list(map(str, arguments)), out, err, kill_at))
        process.start()
        process.join()
        return CompletedProcess([script, *arguments], process.exitcode, out.read_text(), err.read_text())


def _run(script: str, arguments: list[str], out: Path, err: Path, kill_at: tuple[str, int] | None) -> None:
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    multiprocessing.set_start_method(None, force=True)  # the platform's own: it would be this server's for all below
    os.chdir("/")
    sys.argv = [str(ROOT / script), *arguments]
    sys.path[0] = str((ROOT / script).parent)  # what `python script` puts there, instead of the tests' paths
    if kill_at is not None:
        _kill_at(*kill_at)
    runpy.run_path(sys.argv[0], run_name="__main__")


def _kill_at(function: str, call: int) -> None:
    """Replace a module's function by one that kills this process at its `call`-th call, counted from 1."""
    module_name, _, name = function.rpartition(".")
    module, calls = importlib.import_module(module_name), itertools.count(1)
    original = getattr(module, name)

    def counted(*arguments, **options):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(module, name, counted)
