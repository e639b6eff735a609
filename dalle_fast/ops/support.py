"""What several ops share: why an implementation cannot run a call, in words (see `dispatch.register`); autocast."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch
from torch import Tensor

from dalle_fast import _extension, dispatch

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

T = TypeVar("T", Tensor, "Tensor | None")

_missing_extension = dispatch.constant(_extension.missing)


@dispatch.constant
def _missing_triton() -> str | None:
    return None if importlib.util.find_spec("triton") else "missing: triton is not installed. Install it with torch."


@dispatch.constant
def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not_dtype(dtype: torch.dtype) -> str | None:
    """None where a kernel that computes in float32 takes `dtype`."""
    name = str(dtype).removeprefix("torch.")
    return None if dtype in KERNEL_DTYPES else f"it computes in float32, which {name} exceeds."


def why_not_cpu(device: str, dtype: torch.dtype = torch.float32) -> str | None:
    """None where the compiled extension runs a call on this kind of device with this dtype."""
    if device != "cpu":
        return f"the extension runs on the CPU, the tensors are on {device!r}."
    return why_not_dtype(dtype) or _missing_extension()


def why_not_triton(device: str, dtype: torch.dtype = torch.float32) -> str | None:
    """None where Triton runs a call on this kind of device with this dtype."""
    if device != "cuda" and not _interpreted():
        return f"Triton's kernels run on GPUs, the tensors are on {device!r}."
    return why_not_dtype(dtype) or _missing_triton()


def auto_avoids_triton(*, device: str = "cpu", **_: object) -> str | None:
    """Why `auto` passes over Triton's kernels where only its interpreter could run them."""
    return "Triton's interpreter is for tests: ask for it by name." if device != "cuda" else None


def in_autocast_dtype(t: T) -> T:
    """The tensor in the dtype of torch.autocast where that is on for its device; float64 and integers stay."""
    if t is None or not t.is_floating_point() or t.dtype == torch.float64:
        return t
    device = t.device.type
    return t.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else t


def refuse_second_derivative(op: str) -> Callable[..., NoReturn]:
    """What autograd calls to differentiate the backward of `op`: raises RuntimeError."""

    def refuse(*_: object) -> NoReturn:
        raise RuntimeError(
            f"{op}: only impl='reference' has a second derivative. Pass it where a gradient is differentiated again."
        )

    return refuse
