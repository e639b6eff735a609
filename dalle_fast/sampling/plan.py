"""What a drawing takes: how many samples at a time, and bytes of memory, known before anything runs.

Samples are drawn in micro-batches of at most 64, beyond which more of them read the weights no more often. The codes of
a sample do not depend on the plan.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dalle_fast.models.dalle import DALLE
from dalle_fast.native.decode import CacheSizes, workspace_floats
from dalle_fast.native.packing import Arena
from dalle_fast.sampling.cpu_caches import ROWS_AT_ONCE
from dalle_fast.sampling.engine import choose_engine
from dalle_fast.sampling.packed import PackedDALLE, measured, weight_dtype_of

MOST_SAMPLES = 64  # of a micro-batch
_SHARE = 0.8  # of the memory that is available now
_MIB = 1 << 20


@dataclass(frozen=True)
class DrawingPlan:
    """How the `cpu` engine draws a batch: str(plan) is a table.

    Attributes:
        micro_batches: samples of each.
        weight_bytes: packed weights, embeddings included.
        text_bytes: keys and values of the prompts of one micro-batch.
        sample_bytes: of one sample, with guidance of two sequences.
        workspace_bytes: activations.
        max_memory: bytes there are; None: nobody knows.
    """

    micro_batches: tuple[int, ...]
    weight_bytes: int
    text_bytes: int
    sample_bytes: int
    workspace_bytes: int
    max_memory: int | None

    @property
    def total_bytes(self) -> int:
        """The most that is held at a time."""
        samples = max(self.micro_batches, default=0) * self.sample_bytes
        return self.weight_bytes + self.text_bytes + samples + self.workspace_bytes

    def __str__(self) -> str:
        most = max(self.micro_batches, default=0)
        lines = [
            ("weights", self.weight_bytes),
            ("texts", self.text_bytes),
            (f"{most} samples", most * self.sample_bytes),
            ("workspace", self.workspace_bytes),
            ("together", self.total_bytes),
        ]
        if self.max_memory is not None:
            lines.append(("there is", self.max_memory))
        head = f"{sum(self.micro_batches)} samples in {len(self.micro_batches)} micro-batches of at most {most}"
        return "\n".join((head, *(f"  {name:<12}{nbytes / _MIB:>10.1f} MiB" for name, nbytes in lines)))


def plan_drawing(
    model: DALLE,
    batch: int = 512,
    *,
    prompts: int = 1,
    cond_scale: float = 1.0,
    weight_dtype: torch.dtype | None = None,
    max_memory: int | None = None,
    primed: bool = False,
) -> DrawingPlan:
    """The plan by which `DALLE.generate_images` draws this batch with the `cpu` engine.

    Args:
        batch: samples.
        prompts: how many of their texts differ.
        cond_scale, weight_dtype: as there.
        max_memory: bytes, weights included; None: four fifths of what the machine has available now.
        primed: whether every sample starts with known codes, which are read a grid row at a time.
    Raises: ValueError (sizes below 1, a max_memory too small for one sample), MemoryError (so little is available),
        and what `choose_engine` raises.
    """
    for name, value in (("batch", batch), ("prompts", prompts)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"plan_drawing: {name} must be an int of at least 1, got {value!r}.")
    choose_engine(model, "cpu", weight_dtype=weight_dtype, max_memory=max_memory, op="plan_drawing")
    sizes = _Sizes(measured(model, weight_dtype_of(model, weight_dtype)), prompts, cond_scale != 1, primed)
    budget = _available_memory() if max_memory is None else max_memory
    most = min(batch, MOST_SAMPLES)
    if budget is not None:
        while most > 1 and sizes.plan((most,), budget).total_bytes > budget:
            most -= 1
        one = sizes.plan((1,), budget)
        if one.total_bytes > budget:
            raise (MemoryError if max_memory is None else ValueError)(_too_little(one, max_memory is None))
    n = -(-batch // most)
    return sizes.plan(tuple(batch // n + (i < batch % n) for i in range(n)), budget)


class _Sizes:
    def __init__(self, model: PackedDALLE, prompts: int, guided: bool, primed: bool) -> None:
        self._model, self._prompts, self._guided = model, prompts, guided
        slack = model.layout.grid_cols - 1 if primed else 0
        self._cache, self._slots = model.sizes(slack), model.layout.grid_cols + 1 + slack
        self._structure = model.structure(slack)
        self._rows = model.layout.grid_cols if primed else 1  # of a sequence in one call

    def plan(self, micro_batches: tuple[int, ...], budget: int | None) -> DrawingPlan:
        sequences = max(micro_batches) * (1 + self._guided)
        texts = min(self._prompts, max(micro_batches)) + self._guided
        text_len = self._model.layout.text_len
        at_once = min(texts, max(1, ROWS_AT_ONCE // text_len))
        rows = max(at_once * text_len, sequences, min(sequences * self._rows, ROWS_AT_ONCE))
        rings = _counted(lambda arena: self._cache.shift(at_once, text_len + 1, False, arena))
        return DrawingPlan(
            micro_batches,
            self._model.nbytes,
            _counted(lambda arena: self._cache.text(texts, arena)),
            (1 + self._guided) * _sample_bytes(self._cache, self._slots),
            rings + 4 * workspace_floats(self._structure, rows),
            budget,
        )


def _sample_bytes(sizes: CacheSizes, slots: int) -> int:
    return _counted(lambda arena: (sizes.image(1, arena), sizes.shift(1, slots, True, arena)))


def _counted(make: Callable[[Arena], object]) -> int:
    arena = Arena(None)
    make(arena)
    return arena.used


def _too_little(plan: DrawingPlan, available: bool) -> str:
    needed, there_is = -(-plan.total_bytes // _MIB), (plan.max_memory or 0) // _MIB
    told = f"the memory available now, {there_is} MiB," if available else f"max_memory, {there_is} MiB,"
    return (
        f"generate_images: {told} must hold weights, a text and one sample, {needed} MiB together. "
        "Free some, or hold the weights in fewer bits (weight_dtype)."
    )


def _available_memory() -> int | None:
    """Bytes for a drawing, of those that the system could give now; None where it does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            kib = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
        if kib is not None:
            return int(int(kib) * 1024 * _SHARE)
    except OSError:  # not Linux
        pass
    names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
    if "SC_AVPHYS_PAGES" in names:
        return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * _SHARE)
    return None
