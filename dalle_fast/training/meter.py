"""Means of figures over the steps since the last log, over all processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


class Meter:
    """Sums stay on the device, so that adding to them waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}

    def add(self, figures: Mapping[str, Tensor], weight: float) -> None:
        """Scalars; those of one name weigh in as `weight` says."""
        for name, figure in figures.items():
            figure = figure.detach().to(self._device, torch.float32) * weight
            self._sums[name] = self._sums[name] + figure if name in self._sums else figure
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """By name; all processes call it together, with the same names in the same order."""
        names = list(self._sums)
        if not names:
            return {}
        sums = accelerator.reduce(torch.stack([self._sums[name] for name in names]), "mean").tolist()
        return {name: total / self._weights[name] for name, total in zip(names, sums, strict=True)}

    def clear(self) -> None:
        """Begins anew."""
        self._sums, self._weights = {}, {}

    def state_dict(self, accelerator: Accelerator) -> dict[str, Any]:
        """Numbers alone, for JSON; all processes call it together."""
        return {name: [mean, self._weights[name]] for name, mean in self.means(accelerator).items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` gave."""
        self._weights = {name: weight for name, (_, weight) in state.items()}
        self._sums = {
            name: torch.tensor(mean * weight, dtype=torch.float32, device=self._device)
            for name, (mean, weight) in state.items()
        }
