"""What the loop asks of a model that is trained, and of the data that it is trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

Batch = dict[str, Any]
"""Samples side by side.

"pixels" uint8 [b, C, S, S] and/or "codes" int64 [b, n]; "text" int64 [b, T]; "position" int64 [b]: the number of each
sample among all that were ever trained on; "names": b strings, the file each came from.
"""


class Task(Protocol):
    """A model that is trained.

    Attributes:
        name: "vae", "dalle" or "clip".
        module: module(batch, step, progress) -> (loss, figures), both scalars, means over the batch; a batch has no
            "names" then, and its tensors are on the module's device. Whatever steps change is a parameter or a buffer
            of it: nothing else is in a checkpoint. The loop may put another of its class in its place, for `evaluate`,
            `pictures` and `save`, so a task keeps no second reference to it or its parts.
    """

    name: str
    module: nn.Module

    def parameters_for(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters that are trained."""
        ...

    def figures(self) -> dict[str, float]:
        """What was counted since the last call, if anything; all processes call it together."""
        ...

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """uint8 [3, H, W] by name: reconstructions or samples of what a batch holds."""
        ...

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Figures on held-out batches, on the CPU when they arrive."""
        ...

    def save(self, directory: Path) -> None:
        """Writes the result into a directory that is there and empty."""
        ...


class Source(Protocol):
    """Data in a fixed random order, a pure function of seed and step.

    Attributes: n: samples of an epoch.
    """

    n: int

    def loader(
        self,
        *,
        rank: int,
        world: int,
        batch: int,
        micro_batch: int,
        first_step: int,
        steps: int,
        seed: int,
        workers: int,
        pin_memory: bool,
    ) -> Iterable[Batch]:
        """The micro-batches of process `rank` of `world` for `steps` steps from `first_step` on.

        Micro-batch a of step s holds the samples at positions s * batch + (a * world + rank) * micro_batch and on.
        """
        ...

    def held_out(self, batch: int) -> Iterable[Batch] | None:
        """The samples that are kept from training, always the same; None where there are none."""
        ...

    def skipped(self) -> Counter[str]:
        """How many samples could not be read so far, by reason."""
        ...

    def report(self, out: Path) -> str:
        """Describes the data in out/data.txt and out/batch.png before the first step; returns the text."""
        ...
