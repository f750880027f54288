"""Contrastive training of an open_clip model: the embedder that stands before the reranker.

The loss is open_clip's own (ClipLoss). The learning rate warms up, stays constant until validation recall has stopped
rising, then falls linearly to zero over the cooldown; the weights of the best evaluation are kept. With `towers`, both
towers are pretrained and frozen, their features are computed once, and only the heads learn (LiT, arXiv 2111.07991).

Why not open_clip's own entry (open_clip_train, 2,700 lines): its cooldown begins at a fixed epoch, not when validation
recall stops rising; it resumes at whole epochs and draws other batches then; frozen towers run again at every step; and
two images with the same caption in a batch become each other's negatives. Model, loss and transforms are open_clip's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip import ClipLoss
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from models.errors import UserError
from models.files import write_atomically
from models.vision.open_clip_backbone import OpenClipModel

from .samples import Samples, cached_side, draw_batch, normalise, random_crops

EVALUATION_BATCH = 256
MAX_LOGIT_SCALE = math.log(100)


@dataclass(frozen=True, kw_only=True)
class TowersConfig:
    """Pretrained towers, kept frozen. Each is a folder or `package:NAME/FOLDER`."""

    image: str
    """Folder with one .pth file whose tensors go one to one, in order, onto the timm tower of the model."""
    text: str
    """Folder of a Hugging Face text model with its tokenizer."""


@dataclass(frozen=True, kw_only=True)
class EmbedderConfig:
    """A whole embedder: architecture, preprocessing, training."""

    model: dict
    """open_clip's model_cfg. Vocabulary size and tokenizer are filled in from the training captions."""
    preprocess: dict
    """open_clip's preprocess_cfg: mean, std, interpolation, resize_mode."""
    towers: TowersConfig | None = None
    """Frozen pretrained towers; None trains everything from scratch."""
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    warmup_steps: int = 100
    max_steps: int = 10000
    """Most steps, including the cooldown."""
    evaluate_every: int = 100
    patience: int = 6
    """Evaluations without a better validation recall, after which the cooldown begins."""
    cooldown_steps: int = 300
    min_crop: float = 1.0
    """Random square crops of at least this share of the area; 1 is no augmentation. Ignored under frozen towers."""
    half: bool = True
    """Save the weights as float16."""

    def __post_init__(self) -> None:
        if not 0 < self.min_crop <= 1:
            raise UserError(f"min_crop is {self.min_crop}; expected a share of the area in (0, 1]")
        if self.max_steps <= self.cooldown_steps:
            raise UserError(f"max_steps is {self.max_steps}; it must exceed cooldown_steps ({self.cooldown_steps})")

    @property
    def image_side(self) -> int:
        return self.model["vision_cfg"]["image_size"]

    @property
    def cached_side(self) -> int:
        """Side that training images are decoded to."""
        return self.image_side if self.towers else cached_side(self.image_side, self.min_crop)


@dataclass
class Progress:
    """Where a training stands."""

    step: int = 0
    seconds: float = 0.0
    best_recall: float = -1.0
    best_step: int = 0
    stale: int = 0
    """Evaluations since the best one."""
    cooldown_start: int | None = None
    history: list[dict] = field(default_factory=list)
    """One entry per evaluation: step, loss, t2i, i2t (R@1 in percent), seconds."""

    def learning_rate(self, config: EmbedderConfig) -> float:
        warm = min(1.0, (self.step + 1) / config.warmup_steps)
        cool = 1.0 if self.cooldown_start is None else 1 - (self.step - self.cooldown_start) / config.cooldown_steps
        return config.learning_rate * min(warm, cool)

    def is_done(self, config: EmbedderConfig) -> bool:
        return self.cooldown_start is not None and self.step >= self.cooldown_start + config.cooldown_steps


class EmbedderTraining:
    """Model, optimizer and progress of one training; `run` continues from its checkpoint, if any, to the end."""

    def __init__(
        self, config: EmbedderConfig, clip: OpenClipModel, train: Samples, val: Samples, seed: int, dtype: torch.dtype
    ):
        self.config, self.clip, self.train, self.val, self.seed, self.dtype = config, clip, train, val, seed, dtype
        self.device: torch.device = clip.logit_scale.device
        self.loss = ClipLoss()
        self.learned = {name: p for name, p in clip.named_parameters() if p.requires_grad}
        decayed = [p for p in self.learned.values() if p.ndim > 1]
        plain = [p for p in self.learned.values() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-6)
        self.progress = Progress()
        self.best = self._snapshot()

    def run(self, checkpoint: Path, minutes: float | None = None) -> Progress:
        """Train to the end; `checkpoint` is read first if it exists, and rewritten at each evaluation.

        minutes: start the cooldown early enough to end within them; such a run depends on the machine's speed."""
        if checkpoint.exists():
            self._restore(checkpoint)
        config, progress = self.config, self.progress
        bar = tqdm(total=config.max_steps, initial=progress.step, desc="embedder", unit="step")
        begin, losses = time.perf_counter() - progress.seconds, []
        while not progress.is_done(config):
            losses.append(self._step())
            progress.seconds = time.perf_counter() - begin
            bar.update()
            is_due = progress.step % config.evaluate_every == 0 or progress.is_done(config)
            if is_due:
                self._evaluate(sum(losses) / len(losses), bar)
                losses.clear()
            if progress.cooldown_start is None and self._should_cool_down(minutes):
                progress.cooldown_start = progress.step
            if is_due:  # after the cooldown was decided, which the checkpoint must know
                self._save(checkpoint)
        bar.close()
        self.clip.load_state_dict(self.best, strict=False)
        return progress

    def embed_images(self, images: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] float, or features [B, F] -> [B, De] float32, L2-normalised."""
        with self._autocast():
            features = self.clip.visual.head(images) if self.config.towers else self.clip.encode_image(images)
        return F.normalize(features.float(), dim=-1)

    def embed_texts(self, texts: Tensor) -> Tensor:
        """Token ids [B, L], or features [B, F] -> [B, De] float32, L2-normalised."""
        with self._autocast():
            features = self.clip.text.proj(texts) if self.config.towers else self.clip.encode_text(texts)
        return F.normalize(features.float(), dim=-1)

    @torch.no_grad()
    def recall(self, samples: Samples) -> tuple[float, float]:
        """R@1 in percent, text to image and image to text, every caption a query, every image a candidate."""
        self.clip.eval()
        images = torch.cat([self.embed_images(self._prepare(part)) for part in samples.images.split(EVALUATION_BATCH)])
        texts = torch.cat([self.embed_texts(part.to(self.device)) for part in samples.texts.split(EVALUATION_BATCH)])
        owner = samples.caption_image.to(self.device)
        similarities = texts @ images.T  # [C, N]
        t2i = (similarities.argmax(1) == owner).float().mean()
        i2t = (owner[similarities.argmax(0)] == torch.arange(len(images), device=self.device)).float().mean()
        return 100 * float(t2i), 100 * float(i2t)

    def _step(self) -> float:
        config, progress = self.config, self.progress
        self.clip.train()  # frozen towers do not run here, so their batch statistics stay as they are
        torch.manual_seed(self.seed * 1_000_003 + progress.step)  # dropout: a function of (seed, step), as the batch
        image_index, caption_index = draw_batch(self.train, config.batch_size, self.seed, progress.step)
        images = self._prepare(self.train.images[image_index])
        if images.shape[-1] != config.image_side and not config.towers:
            images = random_crops(images, config.image_side, config.min_crop, self.seed, progress.step)
        texts = self.train.texts[caption_index].to(self.device)
        with self._attention():
            loss = self.loss(self.embed_images(images), self.embed_texts(texts), self.clip.logit_scale.exp())
        if not torch.isfinite(loss):
            raise UserError(f"loss is {float(loss)} at step {progress.step}; lower learning_rate")
        for group in self.optimizer.param_groups:
            group["lr"] = progress.learning_rate(config)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.learned.values(), 1.0)
        self.optimizer.step()
        self.clip.logit_scale.data.clamp_(0, MAX_LOGIT_SCALE)
        progress.step += 1
        return loss.item()

    def _prepare(self, images: Tensor) -> Tensor:
        images = images.to(self.device)
        return normalise(images, self.config.preprocess) if images.dtype == torch.uint8 else images

    def _evaluate(self, loss: float, bar: tqdm) -> None:
        progress = self.progress
        t2i, i2t = self.recall(self.val)
        entry = {"step": progress.step, "loss": loss, "t2i": t2i, "i2t": i2t, "seconds": progress.seconds}
        progress.history.append({key: round(value, 4) for key, value in entry.items()})
        bar.set_postfix(loss=f"{loss:.3f}", t2i=f"{t2i:.1f}", i2t=f"{i2t:.1f}")
        if (t2i + i2t) / 2 > progress.best_recall:
            progress.best_recall, progress.best_step, progress.stale = (t2i + i2t) / 2, progress.step, 0
            self.best = self._snapshot()
        else:
            progress.stale += 1

    def _should_cool_down(self, minutes: float | None) -> bool:
        config, progress = self.config, self.progress
        seconds_a_step = progress.seconds / progress.step
        is_late = minutes is not None and progress.seconds + config.cooldown_steps * seconds_a_step >= 60 * minutes
        return is_late or progress.stale >= config.patience or progress.step >= config.max_steps - config.cooldown_steps

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype != torch.float32)

    def _attention(self) -> contextlib.AbstractContextManager:
        # On a CPU, the backward pass of fused attention takes ten times the plain one's at these lengths.
        return sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else contextlib.nullcontext()

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.learned.items()}

    def _save(self, checkpoint: Path) -> None:
        state = {
            "weights": self._snapshot(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "progress": dataclasses.asdict(self.progress),
            "seed": self.seed,
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(checkpoint, buffer.getvalue())

    def _restore(self, checkpoint: Path) -> None:
        state = torch.load(checkpoint, map_location=self.device, weights_only=True)
        if state["seed"] != self.seed:
            raise UserError(f"{checkpoint}: belongs to seed {state['seed']}, not {self.seed}; choose another --out")
        self.clip.load_state_dict(state["weights"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.best, self.progress = state["best"], Progress(**state["progress"])
