"""Peak memory of one call beyond what was resident before it."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # see proc(5): resets the peak resident set size


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that `call` needs at its peak over what was held before it, its result included.

    CUDA: torch's allocator. CPU: the resident set (Linux with glibc; pages free in the heap are handed back first, so
    that a buffer reused from an earlier call is counted again); accurate to about 1 MiB, other threads count too.
    Returns None where the system does not tell.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not _trim() or not _reset_peak():
        return None
    resident = _status_bytes("VmRSS")
    call()
    return max(_status_bytes("VmHWM") - resident, 0)


def _trim() -> bool:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        return False
    libc.malloc_trim(0)
    return True


def _reset_peak() -> bool:
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:  # no /proc, or a sandbox that forbids it: the caller reports no number
        return False
    return True


def _status_bytes(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"peak_bytes: {STATUS} must have a line {key!r}, got none. Is this Linux?")
    return int(found[1]) * 1024
