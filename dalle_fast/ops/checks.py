"""Checks that every op makes of its tensors, and the one wording of each."""

from __future__ import annotations

import torch
from torch import Tensor


def dtype_name(tensor: Tensor) -> str:
    """`float32` for a tensor of torch.float32."""
    return str(tensor.dtype).removeprefix("torch.")


def check_one_dtype(op: str, **tensors: Tensor | None) -> None:
    """Raises TypeError unless all tensors (those that are None aside) are of one floating dtype."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    found = [tensor.dtype for tensor in given.values()]
    if not found[0].is_floating_point or len(set(found)) != 1:
        names = ", ".join(dtype_name(tensor) for tensor in given.values())
        raise TypeError(
            f"{op}: {', '.join(given)} must have one floating dtype, got {names}. Convert them with .to(dtype)."
        )


def check_one_device(op: str, **tensors: Tensor | None) -> None:
    """Raises ValueError unless all tensors (those that are None aside) are on one device."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if len({tensor.device for tensor in given.values()}) != 1:
        places = ", ".join(str(tensor.device) for tensor in given.values())
        raise ValueError(f"{op}: {', '.join(given)} must be on one device, got {places}. Move them with .to(device).")


def check_shape(op: str, name: str, tensor: Tensor, shape: dict[str, int], advice: str) -> None:
    """Raises ValueError unless `tensor` has the sizes of `shape`, named by its keys ({"K": 512, "F": 64})."""
    if list(tensor.shape) != list(shape.values()):
        wanted = ", ".join(f"{letter}={size}" for letter, size in shape.items())
        raise ValueError(f"{op}: {name} must be [{wanted}], got {list(tensor.shape)}. {advice}")


def check_finite(op: str, name: str, tensor: Tensor, axes: str, advice: str) -> None:
    """Raises ValueError with the first place of a NaN or an infinity, an index for each letter of `axes`.

    While a CUDA graph is captured nothing is checked: the host must not wait.
    """
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    # A sum stores nothing and is finite only where all terms are; where it alone overflows, the places decide.
    if tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)).isfinite():
        return
    places = (~tensor.isfinite()).nonzero()
    if len(places):
        first = places[0].tolist()
        where = ", ".join(f"{letter}={index}" for letter, index in zip(axes, first, strict=True))
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        raise ValueError(f"{op}: {name} must be finite, got {tensor[tuple(first)].item()} at [{where}]{more}. {advice}")
