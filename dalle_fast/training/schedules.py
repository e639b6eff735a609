"""Numbers that change while a model learns: functions of the step alone, and one that watches the loss.

A ramp with t = min(1, step / steps): cosine end + (start - end) (1 + cos(pi t)) / 2, exponential start (end / start)^t,
linear start + (end - start) t. The original's trainer multiplies its temperature by exp(-rate * step) again and again;
here a temperature is a function of the step.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from dalle_fast.training.config import OptimiserConfig, Ramp, ScheduleConfig


def ramp(config: Ramp, step: int) -> float:
    """The value at `step`, counted from 0. Raises: ValueError (an exponential one that is not positive)."""
    t = min(1.0, step / config.steps)
    start, end = config.start, config.end
    if config.shape == "constant":
        return start
    if config.shape == "cosine":
        return end + (start - end) * (1 + math.cos(math.pi * t)) / 2
    if config.shape == "linear":
        return start + (end - start) * t
    if start <= 0 or end <= 0:
        raise ValueError(
            f"train: an exponential ramp must go from a positive number to another, got {start} to {end}. "
            "Take another shape."
        )
    return start * (end / start) ** t


def learning_rate_share(config: ScheduleConfig, step: int, steps: int) -> float:
    """The share of optimiser.learning_rate at `step` of `steps`, without what a plateau takes off."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.learning_rate == "cosine":
        t = min(1.0, step / (config.steps or steps))
        return warm * (config.final_share + (1 - config.final_share) * (1 + math.cos(math.pi * t)) / 2)
    if config.learning_rate == "exponential":
        return warm * max(config.final_share, config.factor ** (step // (config.every or 1)))
    return warm


class Plateau:
    """torch's ReduceLROnPlateau on a share of the learning rate, fed with mean losses.

    Args: every: steps of a reading.
    Attributes: share: what is left of the learning rate, 1 at first.
    """

    def __init__(self, config: ScheduleConfig, every: int) -> None:
        self.every = every
        self._optimiser = torch.optim.SGD([torch.zeros(1)], lr=1.0)  # torch's class wants one; its rate is the share
        self._watch = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self._optimiser,
            factor=config.factor,
            patience=config.patience,
            cooldown=config.cooldown,
            min_lr=config.final_share,
            eps=0.0,
        )
        self._total, self._count = 0.0, 0

    @property
    def share(self) -> float:
        """Of the learning rate."""
        return float(self._optimiser.param_groups[0]["lr"])

    def read(self, loss: float) -> None:
        """The loss of one step."""
        self._total += loss
        self._count += 1
        if self._count == self.every:
            self._watch.step(self._total / self._count)
            self._total, self._count = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """Numbers alone, for JSON."""
        names = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")
        watch = {name: getattr(self._watch, name) for name in names}
        return {"share": self.share, "total": self._total, "count": self._count, **watch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        state = dict(state)
        self._optimiser.param_groups[0]["lr"] = state.pop("share")
        self._total, self._count = state.pop("total"), state.pop("count")
        for name, value in state.items():
            setattr(self._watch, name, value)


def learning_rate(
    optimiser: OptimiserConfig, schedule: ScheduleConfig, step: int, steps: int, plateau: Plateau | None
) -> float:
    """The learning rate at `step` of `steps`."""
    share = learning_rate_share(schedule, step, steps)
    return optimiser.learning_rate * share * (1.0 if plateau is None else plateau.share)
