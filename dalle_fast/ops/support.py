"""What several ops share: in words why an implementation cannot run (see `dispatch.register`); autocast; seeds."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch
from torch import Tensor

from dalle_fast import _extension, dispatch, rng
from dalle_fast.ops.checks import dtype_name

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


def supports_cpu(*, device: str = "cpu", dtype: torch.dtype = torch.float32, **_: object) -> str | None:
    """`why_not_cpu` as `dispatch.register` takes it, of an op whose kernel runs at every size."""
    return why_not_cpu(device, dtype)


def supports_triton(*, device: str = "cpu", dtype: torch.dtype = torch.float32, **_: object) -> str | None:
    """`why_not_triton` as `dispatch.register` takes it, of an op whose kernels run at every size."""
    return why_not_triton(device, dtype)


def auto_avoids_triton(*, device: str = "cpu", **_: object) -> str | None:
    """Why `auto` passes over Triton's kernels where only its interpreter could run them."""
    return "Triton's interpreter is for tests: ask for it by name." if device != "cuda" else None


def in_autocast_dtype(t: T) -> T:
    """The tensor in the dtype of torch.autocast where that is on for its device; float64 and integers stay."""
    if t is None or not t.is_floating_point() or t.dtype == torch.float64:
        return t
    device = t.device.type
    return t.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else t


def seed_tensor(op: str, seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The seed as int64 [1] on `device`, fresh where None is given; no host waits for it.

    Raises: TypeError, ValueError (not one number in 0 .. 2**64 - 1, not a tensor that `rng.seeds_to_tensor` makes).
    """
    if seed is None:
        return rng.draw_seed(device)
    if not isinstance(seed, Tensor):
        return rng.seeds_to_tensor([seed], op=op).to(device, non_blocking=True)
    if seed.dtype != torch.int64 or seed.shape != (1,) or seed.device.type not in ("cpu", device.type):
        raise TypeError(
            f"{op}: seed as a tensor must be int64 [1] on the CPU or the device of features, got {dtype_name(seed)}"
            f" {list(seed.shape)} on {seed.device}. Make it with rng.seeds_to_tensor."
        )
    return seed.to(device, non_blocking=True)


def refuse_second_derivative(op: str) -> Callable[..., NoReturn]:
    """What autograd calls to differentiate the backward of `op`: raises RuntimeError."""

    def refuse(*_: object) -> NoReturn:
        raise RuntimeError(
            f"{op}: only impl='reference' has a second derivative. Pass it where a gradient is differentiated again."
        )

    return refuse
