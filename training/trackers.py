"""Where a run's curves go besides metrics.jsonl: TensorBoard, Weights & Biases, trackio (training.report_to).

Each gets the same scalars at the same steps. A resumed run continues the curves that it began: the file `run_id` in its
directory holds its name there.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from models.errors import UserError, one_line
from models.files import write_atomically

PROJECT = "edje"
ID_FILE = "run_id"


class Tracker(Protocol):
    """One place that curves go to."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoardTracker:
    """Event files in OUTPUT/tensorboard. What a killed run wrote after its last checkpoint is purged and replaced."""

    def __init__(self, output: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(output / "tensorboard"), purge_step=first_step + 1)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """A run of Weights & Biases, its files in OUTPUT/wandb: project WANDB_PROJECT, else `edje`. It obeys all of wandb's
    environment variables; WANDB_MODE=offline needs neither account nor network."""

    def __init__(self, output: Path, name: str, config: dict[str, Any], reported: int):
        """reported: the last step that an earlier process logged; wandb takes no step twice.

        Raises UserError if wandb does not start, e.g. without an account."""
        import wandb

        self._reported = reported
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=name,
                id=name.rpartition("-")[2],
                resume="allow",
                dir=output,
                config=config,
                allow_val_change=True,  # a resumed run may train longer
            )
        except (wandb.Error, ValueError) as error:  # ValueError: a setting from the environment
            raise UserError(
                f"training.report_to: wandb did not start ({one_line(error)}); "
                "run `wandb login`, or set WANDB_MODE=offline"
            ) from error

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        if step > self._reported:
            self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


class TrackioTracker:
    """A run of trackio, in its own folder (TRACKIO_DIR): project TRACKIO_PROJECT, else `edje`."""

    def __init__(self, name: str, config: dict[str, Any], reported: int):
        """reported: the last step that an earlier process logged; trackio would show a step twice."""
        import trackio

        self._reported = reported
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=name,
            resume="allow",
            config=config,
            embed=False,
            auto_log_cpu=False,  # the scalars of the run, as everywhere
            auto_log_gpu=False,
        )

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        if step > self._reported:
            self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS = ("tensorboard", "wandb", "trackio")
"""What training.report_to may name: packages, and the extras that install them."""


def chosen_trackers(report_to: str | Sequence[str]) -> tuple[str, ...]:
    """The trackers that training.report_to names, each once. Raises UserError with the nearest name for one unknown."""
    names = [report_to] if isinstance(report_to, str) else list(dict.fromkeys(report_to))
    if names in (["none"], []):
        return ()
    for name in names:
        if name not in TRACKERS:
            near = difflib.get_close_matches(name, TRACKERS, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"expected none, {', '.join(TRACKERS)} or a list of these"
            raise UserError(f"training.report_to is {report_to!r}; {hint}")
    return tuple(names)


def check_installed(names: Sequence[str]) -> None:
    """Raise UserError that says what to install unless the packages of all trackers are there."""
    for name in names:
        spec = importlib.util.find_spec(name)
        # Trackers leave folders of their own names: without origin it is such a folder, not the package.
        if spec is None or spec.origin is None:
            raise UserError(
                f"training.report_to names {name}, which is not installed; leave it out or run: "
                f'pip install "edje[{name}]"'
            )


def open_trackers(
    names: Sequence[str], output: Path, config: dict[str, Any], first_step: int, reported: int
) -> list[Tracker]:
    """The trackers of a run that has done `first_step` steps, in this process or earlier ones; `config` is shown.

    reported: the last step whose scalars were logged, which a kill may have put behind first_step. Raises UserError
    if one does not start."""
    openers: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoardTracker(output, first_step),
        "wandb": lambda: WandbTracker(output, _run_name(output), config, reported),
        "trackio": lambda: TrackioTracker(_run_name(output), config, reported),
    }
    return [openers[name]() for name in names]


def _run_name(output: Path) -> str:
    """The run's name where names are shared with other runs: that of its directory and a random end, kept there."""
    file = output / ID_FILE
    if not file.exists():
        write_atomically(file, f"{output.resolve().name}-{uuid.uuid4().hex[:8]}\n")
    return file.read_text(encoding="utf-8").strip()
