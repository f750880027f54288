"""Learning rate over a run: linear warm-up, then cosine or exponential decay.

Source of the exponential form: the published EDJE configuration (3e-4, times 0.9 an epoch, not below 1e-6).
"""

from __future__ import annotations

import math

from .config import TrainingConfig


def learning_rate(config: TrainingConfig, peak: float, step: int, steps_per_epoch: float) -> float:
    """Learning rate of optimizer step `step` (0-based) for parameters whose peak rate is `peak`."""
    if step < config.warmup_steps:
        return config.warmup_lr + (peak - config.warmup_lr) * (step + 1) / config.warmup_steps
    if config.decay == "exponential":
        return max(peak * config.decay_rate ** int(step / steps_per_epoch), min(peak, config.min_lr))
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    floor = min(peak, config.min_lr)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
