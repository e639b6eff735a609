"""What both trainers share: a budget in steps or minutes, the schedule over it, atomic checkpoints, a CSV log.

A run is resumed by the same command: the checkpoint holds parameters, optimiser state, the step and the seconds spent.
Random draws of a step come from a generator seeded with (seed, step) alone, so a resumed run with a budget in steps
continues bit for bit.
"""

from __future__ import annotations

import csv
import logging
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)


@dataclass
class Budget:
    """How long a run lasts: `steps` or `minutes` of running time, exactly one of them.

    `elapsed` counts the seconds of earlier, interrupted runs too.
    """

    steps: int | None = None
    minutes: float | None = None
    elapsed: float = 0.0
    _started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        given = [value for value in (self.steps, self.minutes) if value is not None]
        if len(given) != 1 or given[0] <= 0:
            raise ValueError(
                f"Budget: exactly one of steps and minutes must be positive, got steps={self.steps}, "
                f"minutes={self.minutes}. Give one of them."
            )

    def seconds(self) -> float:
        """Seconds of training so far, earlier runs included."""
        return self.elapsed + time.monotonic() - self._started

    def progress(self, step: int) -> float:
        """The part of the budget that is used up before `step` runs: 0 at the start, 1 when the run is over."""
        if self.steps is not None:
            return min(1.0, step / self.steps)
        assert self.minutes is not None
        return min(1.0, self.seconds() / (60 * self.minutes))


def learning_rate_scale(step: int, progress: float, warmup_steps: int) -> float:
    """Linear warm-up over `warmup_steps`, times half a cosine over `progress` from 1 to 0."""
    return min(1.0, (step + 1) / max(1, warmup_steps)) * 0.5 * (1 + math.cos(math.pi * progress))


def step_generator(seed: int, step: int) -> torch.Generator:
    """The generator of one step's random draws, independent of the steps before it."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write beside `path` and rename, so that a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(dict(state), partial)
    os.replace(partial, path)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The state that `save_checkpoint` wrote, None if there is none yet."""
    if not path.is_file():
        return None
    logger.info("resuming from %s", path)
    return torch.load(path, map_location="cpu", weights_only=True)


class CsvLog:
    """Rows appended to a CSV file, the header written once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, row: Mapping[str, float | int]) -> None:
        """Append one row; values are rounded to six digits."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(row)
            writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in row.values()])
