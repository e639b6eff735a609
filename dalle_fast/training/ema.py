"""A moving average of the weights: what is evaluated, pictured and saved in place of the last ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class MovingAverage:
    """average <- decay average + (1 - decay) weight, from the weights as they are now.

    Args: named: the parameters that are trained, whole in every process.   decay: of the average.
    """

    def __init__(self, named: list[tuple[str, nn.Parameter]], decay: float) -> None:
        self._parameters = dict(named)
        self.average = {name: parameter.detach().clone() for name, parameter in named}
        self._update = get_ema_multi_avg_fn(decay)

    def update(self) -> None:
        """Takes the weights in."""
        weights = [parameter.detach() for parameter in self._parameters.values()]
        self._update(list(self.average.values()), weights, None)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The parameters hold the average, and then what they held before."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.data, self.average[name] = self.average[name], parameter.data

    def save(self, path: Path) -> None:
        """As safetensors, by parameters' names."""
        save_file({name: average.contiguous() for name, average in self.average.items()}, path)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """What `save` wrote. Raises: ValueError (of other parameters)."""
        stored = load_file(path)
        if {name: average.shape for name, average in self.average.items()} != {k: v.shape for k, v in stored.items()}:
            raise ValueError(f"train: {path} must hold the average of this model's weights, got another one's.")
        for name, average in self.average.items():
            average.copy_(stored[name])
