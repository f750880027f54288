"""What a run reports: console lines, metrics.jsonl, and whatever training.report_to names (trackers.py)."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from evaluation.results import Results
from models.config_io import to_dict
from models.distributed import DistributedContext
from models.files import write_atomically

from .config import RunConfig
from .objectives import StepLosses
from .trackers import Tracker, open_trackers


class RunLog:
    """Averages what the steps since the last line gave, over all ranks, and writes it on rank 0."""

    def __init__(self, config: RunConfig, first_step: int, distributed: DistributedContext):
        """`config` as the run was built, for the trackers to show. `first_step`: steps done so far; lines of later
        steps, left by a killed run, are dropped. Raises UserError if a tracker does not start."""
        output = Path(config.output)
        self.distributed, self.path = distributed, output / "metrics.jsonl"
        self.values: dict[str, list[Tensor]] = defaultdict(list)
        self.steps, self.learning_rate = 0, 0.0
        self.started, self.waited_before, self.waited = time.perf_counter(), 0.0, 0.0
        self.trackers: list[Tracker] = []
        if distributed.is_main:
            reported = _drop_lines_after(self.path, first_step)
            names = config.training.trackers
            self.trackers = open_trackers(names, output, to_dict(config), first_step, reported)

    def announce(self, lines: list[str]) -> None:
        for line in lines:
            tqdm.write(line)

    def add(self, micro_batches: list[StepLosses], norm: Tensor, rate: float, seconds_waited: float) -> None:
        """One optimizer step. Its numbers stay on the device until a line is written."""
        self.steps, self.learning_rate, self.waited = self.steps + 1, rate, seconds_waited
        self.values["grad_norm"].append(norm)
        for result in micro_batches:
            for name, value in (result.losses | result.stats).items():
                self.values[name].append(value)

    def write(self, step: int, batch_size: int) -> str:
        """A line of metrics since the last one; returns a short form for the progress bar."""
        means = {name: torch.stack(values).double().mean() for name, values in self.values.items()}
        of_ranks = self.distributed.gather_objects({name: mean.item() for name, mean in means.items()})
        metrics = {name: sum(rank[name] for rank in of_ranks) / len(of_ranks) for name in of_ranks[0]}
        seconds = time.perf_counter() - self.started
        metrics |= {
            "lr": self.learning_rate,
            "samples_per_second": self.steps * batch_size / seconds,
            "waiting_share": (self.waited - self.waited_before) / seconds,
        }
        self._record(step, metrics)
        self.values.clear()
        self.steps, self.started, self.waited_before = 0, time.perf_counter(), self.waited
        shown = ("itm", "itm_accuracy", "altered_captions", "mlm", "itc", "distillation")
        return " ".join(f"{name} {metrics[name]:.3f}" for name in shown if name in metrics)

    def evaluation(self, step: int, results: Results) -> None:
        """Recalls of a validation, as val/t2i/reranked/R@1 and so on, in percent."""
        recalls: dict[str, float] = {}
        line = []
        for direction, found in results.figures().directions().items():
            for column, figures in found.columns.items():
                recalls |= {f"val/{direction}/{column}/{name}": value for name, value in figures.numbers().items()}
            recall_at_1 = (f"{column} {figures.metrics['R@1']:.1f}" for column, figures in found.columns.items())
            line.append(f"{direction} R@1 {', '.join(recall_at_1)}")
        self._record(step, recalls)
        if self.distributed.is_main:
            tqdm.write(f"step {step}: validation " + "; ".join(line))
        self.started = time.perf_counter()  # an evaluation is not training time

    def close(self, unreadable: list[str]) -> None:
        """Flush, and list the images that were skipped."""
        for tracker in self.trackers:
            tracker.close()
        if unreadable and self.distributed.is_main:
            tqdm.write(f"{len(unreadable)} images could not be read and were replaced by others:")
            for line in unreadable:
                tqdm.write(f"  {line}")

    def _record(self, step: int, values: dict[str, float]) -> None:
        if not self.distributed.is_main:
            return
        with self.path.open("a", encoding="utf-8", newline="\n") as stream:
            stream.write(json.dumps({"step": step} | values) + "\n")
        scalars = {name if "/" in name else f"train/{name}": value for name, value in values.items()}
        for tracker in self.trackers:
            tracker.log(step, scalars)


def _drop_lines_after(path: Path, step: int) -> int:
    """Remove the lines of later steps; returns the last step that had one, 0 where there is no file yet."""
    if not path.exists():
        return 0
    kept, last = [], 0
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found = json.loads(line)["step"]
        except ValueError:
            continue  # the line that a kill cut short
        last = max(last, found)
        if found <= step:
            kept.append(line + "\n")
    write_atomically(path, "".join(kept))
    return last
