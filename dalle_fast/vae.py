"""The original's `vae` module: image tokenizers, and the pixel range that OpenAI's was trained with."""

from __future__ import annotations

from torch import Tensor

from dalle_fast.models.dvae import DiscreteVAE

__all__ = ["DiscreteVAE", "map_pixels", "unmap_pixels"]


def map_pixels(x: Tensor, eps: float = 0.1) -> Tensor:
    """Pixels in [0, 1] -> [eps, 1 - eps], away from where a logit is infinite."""
    return (1 - 2 * eps) * x + eps


def unmap_pixels(x: Tensor, eps: float = 0.1) -> Tensor:
    """The inverse of `map_pixels`, clamped to [0, 1]."""
    return ((x - eps) / (1 - 2 * eps)).clamp(0, 1)
