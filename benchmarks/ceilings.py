"""What this machine can do at best, measured: stream read and write at a working set, matrix product in a dtype.

A percentage of ceiling in a row is (the time the ceilings allow) / (the time measured). The ceilings come from the
same run as the measurement, through torch's own threads; each is the best of several ways to do the same thing, so
that a slow library routine does not flatter the benchmark.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from benchmarks.machine import last_level_cache_bytes
from benchmarks.timing import Clock, median, warm_up

COLD_FACTOR = 8  # a stream this many times the last-level cache comes from memory
ROW = 1024  # floats a row of the matrix-vector product
MATRIX_SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
TOY_MATRIX, TOY_BYTES = 64, 2**16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Ceilings:
    """The ceilings of one device, each measured once, when first asked for."""

    def __init__(self, device: torch.device, *, toy: bool = False, budget_s: float = 1.0) -> None:
        self.device = device
        self.toy = toy
        self.budget_s = 0.01 if toy else budget_s
        self.cold_bytes = COLD_FACTOR * last_level_cache_bytes(device)
        self._measured: dict[tuple[str, int | str], float] = {}

    def stream_read(self, working_set: int | None = None) -> float:
        """Bytes a second of reading one buffer again and again; None: a buffer that comes from memory."""
        return self._once("stream_read", self._size(working_set), self._measure_read)

    def stream_write(self, working_set: int | None = None) -> float:
        """Bytes a second of overwriting one buffer again and again."""
        return self._once("stream_write", self._size(working_set), self._measure_write)

    def matrix_product(self, dtype: torch.dtype) -> float:
        """FLOPs a second of a square matrix product, a multiply-add counting two.

        16-bit numbers may be multiplied as float32 as well: where torch does that faster, it is the ceiling.
        """
        name = str(dtype).removeprefix("torch.")
        rate = self._once("matrix_product", name, functools.partial(self._measure_product, dtype))
        return max(rate, self.matrix_product(torch.float32)) if dtype.itemsize < 4 else rate

    def measured(self) -> dict[tuple[str, int | str], float]:
        """{(kind, bytes or dtype): bytes or FLOPs a second} of everything asked for so far."""
        return dict(self._measured)

    def _once(self, kind: str, size: int | str, measure: Callable[..., float]) -> float:
        if (kind, size) not in self._measured:
            self._measured[kind, size] = measure(size) if isinstance(size, int) else measure()
        return self._measured[kind, size]

    def _size(self, working_set: int | None) -> int:
        if self.toy:
            return TOY_BYTES
        rows = -(-(self.cold_bytes if working_set is None else working_set) // (4 * ROW))
        return rows * 4 * ROW

    def _measure_read(self, n_bytes: int) -> float:
        buffer = torch.zeros(n_bytes // 4, device=self.device)
        vector = torch.zeros(ROW, device=self.device)
        ways: list[Callable[[], object]] = [
            buffer.sum,
            buffer.amax,
            lambda: torch.dot(buffer, buffer),
            lambda: torch.mv(buffer.view(-1, ROW), vector),
        ]
        return n_bytes / min(self._seconds(way) for way in ways)

    def _measure_write(self, n_bytes: int) -> float:
        buffer = torch.zeros(n_bytes // 4, device=self.device)
        ways: list[Callable[[], object]] = [buffer.zero_, lambda: buffer.fill_(1.0)]
        return n_bytes / min(self._seconds(way) for way in ways)

    def _measure_product(self, dtype: torch.dtype) -> float:
        sizes = (TOY_MATRIX,) if self.toy else MATRIX_SIZES[self.device.type]
        rates = []
        for size in sizes:
            left, right = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
            out = torch.empty_like(left)
            rates.append(2 * size**3 / self._seconds(functools.partial(torch.mm, left, right, out=out)))
        return max(rates)

    def _seconds(self, call: Callable[[], object]) -> float:
        clock = Clock(self.device, cold=False)
        spent, samples = warm_up(call, self.budget_s / 4), list[float]()
        while spent < self.budget_s or len(samples) < 3:
            samples.append(clock.seconds(call))
            spent += samples[-1]
        return median(samples)
