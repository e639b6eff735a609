"""What the tasks share: seeds of a step, pictures as tensors, where a micro-batch is in its batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

_SEEDS = 2**63


def seed_of_step(seed: int, step: int) -> int:
    """The 64-bit seed of a step's noise, in 0 .. 2**63 - 1."""
    return (seed * 1_000_003 + step) % _SEEDS


def world_size() -> int:
    """Processes that train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def accumulation(batch: int, micro_batch: int) -> int:
    """Forward passes of this process in a step."""
    return max(1, batch // (micro_batch * world_size()))


def first_position(positions: Tensor) -> int:
    """The number of a micro-batch's first sample among all that were ever trained on."""
    return int(positions[0])


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters with gradients, by their names in the model."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def device_of(model: nn.Module) -> torch.device:
    """Where a model is."""
    return next(model.parameters()).device


def images_of(pixels: Tensor) -> Tensor:
    """uint8 [B, c, S, S] -> float32 in 0..1."""
    return pixels.float() / 255


def as_rgb(pixels: Tensor) -> Tensor:
    """Pictures [B, c, S, S] in 0..1 as uint8 [B, 3, S, S] on the CPU: grey three times, alpha left out."""
    rgb = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)
    return (rgb.detach().float().clamp(0, 1) * 255).round().to("cpu", torch.uint8)


def grid_of(rows: Sequence[Tensor]) -> Tensor:
    """uint8 pictures, [n, 3, H, W] a row, as one picture [3, rows H, n W]."""
    return torch.cat([torch.cat(tuple(row), dim=2) for row in rows], dim=1)


def build(op: str, cls: type, **arguments: Any) -> Any:
    """cls(**arguments), with an error that says where the arguments come from.

    Raises: ValueError (an unknown argument, or one that `cls` refuses).
    """
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ValueError(f"{op}: model must hold arguments of {cls.__name__}, got others ({error}).") from None
