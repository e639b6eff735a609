"""What a row says about where it was measured: device, versions, commit. No host name, no path."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch

# What decides the speed of a vector or matrix kernel; the rest of /proc/cpuinfo's flags is noise in a row.
ISA_FLAGS = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip
BFLOAT16_PRODUCTS = ("avx512_bf16", "amx_bf16")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
ROOT = Path(__file__).resolve().parent.parent
DEFAULT_CACHE_BYTES = 64 * 2**20


def last_level_cache_bytes(device: torch.device) -> int:
    """Bytes of the largest cache between the processor and its memory (64 MiB where the system does not say)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [int(f.read_text().strip().removesuffix("K")) * 1024 for f in CACHES.glob("index*/size")]
    return max(sizes, default=DEFAULT_CACHE_BYTES)


def describe_device(device: torch.device) -> dict[str, object]:
    """The machine in words and numbers: processor model, instruction sets, cores, threads, last-level cache."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "kind": "cuda",
            "name": properties.name,
            "isa": [f"sm_{properties.major}{properties.minor}"],
            "cores": properties.multi_processor_count,
            "threads": torch.get_num_threads(),
            "memory_bytes": properties.total_memory,
            "cache_bytes": last_level_cache_bytes(device),
        }
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    present = set(flags[1].split()) if flags else set()
    return {
        "kind": "cpu",
        "name": model[1].strip() if model else platform.machine(),
        "isa": [flag for flag in ISA_FLAGS if flag in present],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "cache_bytes": last_level_cache_bytes(device),
    }


def has_bfloat16_products() -> bool:
    """Whether this processor multiplies bfloat16: without, autocast to it is no faster than float32."""
    isa = describe_device(torch.device("cpu"))["isa"]
    return isinstance(isa, list) and any(name in isa for name in BFLOAT16_PRODUCTS)


def versions(*packages: str) -> dict[str, str | None]:
    """Versions of Python, torch, dalle_fast and `packages` (None: used from a checkout, or not installed)."""
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("dalle_fast", *packages):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> tuple[str | None, bool | None]:
    """(commit of the checkout, does the tree differ from it); (None, None) outside a checkout.

    The rows themselves (benchmarks/results) do not make a tree dirty: appending one would taint all that follow.
    """
    try:
        head = _git("rev-parse", "HEAD")
        changes = _git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None, None
    return head, bool(changes)


def load_average() -> float | None:
    """Processes that wanted a core during the last minute (None where the system does not say)."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()
