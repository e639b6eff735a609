"""Why an implementation cannot run a call, in words that several ops share (see `dispatch.register`)."""

from __future__ import annotations

import torch

from dalle_fast import _extension, dispatch

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_missing_extension = dispatch.constant(_extension.missing)


def why_not_dtype(dtype: torch.dtype) -> str | None:
    """None where a kernel that computes in float32 takes `dtype`."""
    name = str(dtype).removeprefix("torch.")
    return None if dtype in KERNEL_DTYPES else f"it computes in float32, which {name} exceeds."


def why_not_cpu(device: str, dtype: torch.dtype = torch.float32) -> str | None:
    """None where the compiled extension runs a call on this kind of device with this dtype."""
    if device != "cpu":
        return f"the extension runs on the CPU, the tensors are on {device!r}."
    return why_not_dtype(dtype) or _missing_extension()
