"""Clocks, warm-up by time, cold caches, interleaved repeats, percentiles."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch

from benchmarks.machine import last_level_cache_bytes

Call = Callable[[], object]
FLUSH_FACTOR = 2  # a flush touches this many times the last-level cache
CUDA_FLUSHES = 20  # about a millisecond: the host has sent all its launches before the device reaches the first


class Clock:
    """Times one call on a device; `flush()` before it makes the call's inputs cold.

    On the CPU the monotonic clock around the call; on CUDA two events around it, so that what is measured is the
    device's time and the launches hide behind the flush.
    """

    def __init__(self, device: torch.device, *, cold: bool) -> None:
        self.device = device
        self._flush_buffer: torch.Tensor | None = None
        if cold:
            n_bytes = FLUSH_FACTOR * last_level_cache_bytes(device)
            self._flush_buffer = torch.zeros(n_bytes // 4, device=device)

    def flush(self) -> None:
        """Writes a buffer larger than the last-level cache, so that nothing a benchmark reads is still in it."""
        if self._flush_buffer is not None:
            for _ in range(CUDA_FLUSHES if self.device.type == "cuda" else 1):
                self._flush_buffer.add_(1.0)

    def seconds(self, call: Call) -> float:
        """Seconds of one call (after a flush, when the clock is a cold one)."""
        self.flush()
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize(self.device)
            return begin.elapsed_time(end) / 1e3
        began = time.perf_counter()
        call()
        return time.perf_counter() - began


def warm_up(call: Call, seconds: float) -> float:
    """Calls until `seconds` have passed (not at all where none are left); returns the seconds spent."""
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        call()
    return time.perf_counter() - began


def interleave(
    jobs: Mapping[str, Mapping[str, Call]],
    clock: Clock,
    *,
    budget_s: float,
    min_rounds: int,
    max_rounds: int,
    on_round: Callable[[int], None] = lambda done: None,
) -> dict[str, list[dict[str, float]]]:
    """Times every piece of every provider once a round, round after round, until the budget is spent.

    A machine that slows down during the run then slows all providers alike. The provider that begins changes from
    round to round, so that none always runs behind the same neighbour.

    Args:
        jobs: {provider: {piece: call}}.
        budget_s: no further round begins after this many seconds, once `min_rounds` are done.
    Returns: {provider: one {piece: seconds} a round}.
    """
    names = list(jobs)
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    began = time.perf_counter()
    for done in range(max_rounds):
        if done >= min_rounds and time.perf_counter() - began >= budget_s:
            break
        start = done % max(len(names), 1)
        for name in names[start:] + names[:start]:
            samples[name].append({piece: clock.seconds(call) for piece, call in jobs[name].items()})
        on_round(done + 1)
    return samples


def percentile(samples: Sequence[float], share: float) -> float:
    """The `share` (0..1) quantile of the samples, interpolated linearly."""
    return float(torch.quantile(torch.tensor(samples, dtype=torch.float64), share))


def median(samples: Sequence[float]) -> float:
    return percentile(samples, 0.5)
