"""The training loop: steps, logs, evaluations, checkpoints, exact resume.

A step is: features of the rank's rows (stored, or one backbone pass), all losses, backward, gradients averaged over
the ranks, one optimizer step. Nothing random is saved: every choice is a function of (seed, step, row), and dropout is
reseeded each step from (seed, step, rank), so a resumed run is the uninterrupted one, bit for bit in float32.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data.batches import TrainingBatches
from data.caption_datasets import CaptionDataset
from data.neighbours import CaptionKeys
from evaluation.results import with_fitted_scores
from models.checkpoints.checkpoint import read_latest, write_checkpoint_files, write_latest
from models.distributed import DistributedContext
from models.edje import EDJE
from models.errors import UserError, one_line
from models.files import atomic_directory, make_directory, write_atomically

from .config import RunConfig, TrainingConfig, save_config
from .distributed import average_gradients, broadcast_parameters
from .features import Embeddings, Features, StepInputs
from .finite import FiniteGuard
from .objectives import Objectives, StepLosses
from .run_log import RunLog
from .schedule import learning_rate
from .step_reader import StepReader

STATE_FILE = "training_state.pt"


class GuardedAdamW(torch.optim.AdamW):
    """Fused AdamW whose update changes nothing where `found_inf` is 1, read on the device."""

    found_inf: Tensor
    """Scalar float32, under the name by which torch's fused optimizers know it."""


def build_optimizer(model: EDJE, config: TrainingConfig) -> GuardedAdamW:
    """AdamW over the trainable parameters: matrices decay, norms, biases and single vectors do not.

    Each group carries its peak rate as `peak`: encoder_lr for the joint encoder, lr for the rest."""
    if config.freeze_adapter:
        model.adapter.requires_grad_(False)
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            in_encoder = name.startswith("encoder.")
            decays = parameter.ndim > 1 and not name.startswith("adapter.query")
            rate = config.encoder_lr if in_encoder and config.encoder_lr is not None else config.lr
            key = (rate, config.weight_decay if decays else 0.0)
            groups.setdefault(key, []).append(parameter)
    return GuardedAdamW(
        [{"params": p, "lr": lr, "peak": lr, "weight_decay": decay} for (lr, decay), p in groups.items()],
        betas=(0.9, 0.98),
        eps=1e-6,
        fused=True,
    )


@dataclass
class Run:
    """Everything that must survive a kill."""

    config: RunConfig
    model: EDJE
    optimizer: GuardedAdamW
    distributed: DistributedContext
    dtype: torch.dtype
    """Of matrix products, the same on every rank; in training by autocast."""
    step: int = 0
    """Optimizer steps done."""
    unreadable: dict[str, None] = field(default_factory=dict)
    """Images that could not be read, one line each."""

    def __post_init__(self) -> None:
        self.guard = FiniteGuard(self.distributed)

    @property
    def checkpoints(self) -> Path:
        return Path(self.config.output) / "checkpoints"

    @property
    def trainable(self) -> list[torch.nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def restore(self) -> None:
        """Continue after the last complete checkpoint of `output`, if there is one."""
        latest = read_latest(self.checkpoints)
        if latest is None:
            broadcast_parameters(self.model.parameters(), self.distributed)
            return
        if self.config.training.resume == "never":
            raise UserError(f"{latest}: a run is there already and training.resume is 'never'; choose another output")
        path = latest / STATE_FILE
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file
            reason = one_line(error, most=200)
            raise UserError(
                f"{path}: cannot be loaded ({reason}); remove {latest} and its LATEST to start over"
            ) from error
        restored = EDJE.from_pretrained(latest)
        if restored.config.adapter != self.model.config.adapter or restored.config.encoder != self.model.config.encoder:
            raise UserError(f"{latest}: its model is not the one configured; choose another output or the same model")
        self.model.load_state_dict(restored.state_dict())
        self.model.config = self.model.config.with_fitted_scores_of(restored.config)
        configured = [{key: group[key] for key in ("peak", "weight_decay")} for group in self.optimizer.param_groups]
        for group in state["optimizer"]["param_groups"]:
            group["fused"] = True  # also of a run that an older version began
        self.optimizer.load_state_dict(state["optimizer"])
        for group, values in zip(self.optimizer.param_groups, configured, strict=True):
            group.update(values)  # a resumed run follows its configuration, which may have been changed
        self.step = state["step"]
        self.unreadable = dict.fromkeys(state["unreadable"])

    def save(self) -> None:
        """Write checkpoints/step-N, let LATEST name it, then remove old ones; a kill at any line loses nothing."""
        lines = self.distributed.gather_objects(list(self.unreadable))
        self.unreadable = dict.fromkeys(line for of_rank in lines for line in of_rank)
        if self.distributed.is_main:
            final = self.checkpoints / f"step-{self.step:08d}"
            state = {"optimizer": self.optimizer.state_dict(), "step": self.step, "unreadable": list(self.unreadable)}
            with atomic_directory(final) as temporary:
                write_checkpoint_files(temporary, self.model.config, self.model.state_dict(), self.model.tokenizer)
                torch.save(state, temporary / STATE_FILE)
            write_latest(self.checkpoints, final.name)
            self._prune()
        self.distributed.barrier()

    def _prune(self) -> None:
        for old in sorted(self.checkpoints.glob("step-*"))[: -self.config.training.keep_checkpoints]:
            shutil.rmtree(old)

    def update(self, losses: Mapping[str, Tensor], steps_per_epoch: float) -> Tensor:
        """One optimizer step on the accumulated gradients; returns their global norm before clipping.

        It changes nothing where the norm or one of `losses` is not finite; the next step then raises UserError."""
        training = self.config.training
        average_gradients(self.trainable, self.distributed)
        norm = torch.nn.utils.clip_grad_norm_(self.trainable, training.clip_norm or math.inf)
        self.guard.watch(self.step, losses, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(training, group["peak"], self.step, steps_per_epoch)
        self.optimizer.found_inf = self.guard.failed
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return norm


def train(
    run: Run,
    batches: TrainingBatches,
    features: Features,
    retriever: Embeddings | None,
    keys: CaptionKeys,
    objectives: Objectives,
    validation: CaptionDataset | None,
) -> None:
    """Train to the configured number of steps, evaluate, and leave the final checkpoint."""
    config, training, distributed = run.config, run.config.training, run.distributed
    run.restore()
    make_directory(config.output)
    built = _as_built(config, run.model)
    run_log = RunLog(built, run.step, distributed)
    if distributed.is_main:
        save_config(built, Path(config.output) / "config.yaml")
        run_log.announce(_describe(run, batches, features, objectives))
        run_log.announce(_list_left_out(batches.plan.dataset.left_out, Path(config.output)))
    reader = StepReader(config, run.model.tokenizer, batches, features, retriever, keys, distributed, run.step)
    steps_per_epoch = len(batches.plan.dataset) / training.batch_size
    with tqdm(
        total=training.steps, initial=run.step, unit="step", disable=not distributed.is_main, mininterval=2
    ) as bar:
        while run.step < training.steps:
            losses, norm = optimizer_step(run, reader, objectives, steps_per_epoch)
            run_log.add(losses, norm, run.optimizer.param_groups[0]["lr"], reader.seconds_waited)
            bar.update()
            is_last = run.step == training.steps
            if run.step % training.log_every == 0 or is_last:
                run.guard.check()
                bar.set_postfix_str(run_log.write(run.step, training.batch_size))
            if validation and (is_last or (training.evaluate_every and run.step % training.evaluate_every == 0)):
                run.guard.check()
                _validate(run, features, validation, run_log)
            run.unreadable.update(reader.unreadable)
            if run.step % training.checkpoint_every == 0 or is_last:
                run.guard.check()
                run.save()
    run_log.close(list(run.unreadable))


def _list_left_out(left_out: Sequence[str], output: Path) -> list[str]:
    """What is said of annotations that cannot be trained on; all of them are listed in OUTPUT/left_out.txt."""
    if not left_out:
        return []
    file = output / "left_out.txt"
    write_atomically(file, "".join(f"{line}\n" for line in left_out))
    return [f"left out, {len(left_out)} listed in {file}; the first: {left_out[0]}"]


def _as_built(config: RunConfig, model: EDJE) -> RunConfig:
    """The configuration with the sizes of the model itself, where weights brought their own."""
    built = model.config
    model_config = replace(
        config.model, adapter=built.adapter, encoder=built.encoder, max_caption_tokens=built.max_caption_tokens
    )
    return replace(config, model=model_config)


def optimizer_step(
    run: Run, reader: StepReader, objectives: Objectives, steps_per_epoch: float
) -> tuple[list[StepLosses], Tensor]:
    """Losses and gradients of the step's micro-batches, then one update; returns losses and gradient norm."""
    torch.manual_seed(_dropout_seed(run.config.seed, run.step, run.distributed.rank))
    run.model.train()
    micro_batches = [_backward(run, reader.next(), objectives) for _ in range(run.config.training.accumulation)]
    losses = {name: torch.stack([m.losses[name] for m in micro_batches]).sum() for name in micro_batches[0].losses}
    return micro_batches, run.update(losses, steps_per_epoch)


def _dropout_seed(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step) * 1_009 + rank


def _backward(run: Run, inputs: StepInputs, objectives: Objectives) -> StepLosses:
    """Losses and gradients of one micro-batch."""
    with _autocast(run):
        found = objectives(run.model, inputs)
    (found.total / run.config.training.accumulation).backward()
    return StepLosses({name: loss.detach() for name, loss in found.losses.items()}, found.total.detach(), found.stats)


def _autocast(run: Run) -> AbstractContextManager[object]:
    if run.dtype == torch.float32:
        return nullcontext()
    return torch.autocast(run.distributed.device.type, dtype=run.dtype)


def _validate(run: Run, features: Features, validation: CaptionDataset, run_log: RunLog) -> None:
    """Evaluate on the validation split, choose and calibrate the fused score there, and log the recalls."""
    k = min(run.config.evaluation.k, len(validation))
    results = features.evaluate(run.model, validation, run.distributed, k, run.dtype)
    run.model.config = with_fitted_scores(run.model.config, results, run.config.data.val_split)
    run_log.evaluation(run.step, results.with_lambda(run.model.config.fusion_lambda))


def _describe(run: Run, batches: TrainingBatches, features: Features, objectives: Objectives) -> list[str]:
    """What is going to happen, for the first lines of the log."""
    training = run.config.training
    trainable = sum(p.numel() for p in run.trainable)
    start = f"resumed at step {run.step}" if run.step else "from the start"
    return [
        f"{trainable / 1e6:.1f}M trainable parameters; {run.distributed.size} ranks on {run.distributed.device}; "
        f"{len(batches.plan.dataset)} images, {len(batches.plan.dataset.captions)} captions",
        f"{training.steps} steps of {training.batch_size} pairs; hard negatives: {objectives.negatives.describe()}; "
        f"reads {features.describe()}; {start}",
    ]
