"""The logit-Laplace distribution of pixel values, the likelihood that the paper's discrete VAE is trained with.

    f(x | mu, b) = exp(-|logit x - mu| / b) / (2 b x (1 - x))         x in (0, 1): the density of sigmoid(mu + b L),
                                                                      L of the standard Laplace distribution
    -ln f = |logit x - mu| / b + ln b + ln 2 + ln x + ln(1 - x)

x, mu and ln b: one number a pixel and channel, [B, c, H, W]. It lives on the open interval, as pixels do, where a
normal or Laplace distribution would give a part of its mass to values that no pixel has. At 0 and 1 a logit is
infinite, so pictures are mapped to (0.1, 0.9) first.
Source: DALL-E paper (arXiv 2102.12092), appendix A.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPS = 0.1  # how far from 0 and 1 pixels are kept


def map_pixels(x: Tensor, eps: float = EPS) -> Tensor:
    """Pixels in [0, 1] -> [eps, 1 - eps], away from where a logit is infinite."""
    return (1 - 2 * eps) * x + eps


def unmap_pixels(x: Tensor, eps: float = EPS) -> Tensor:
    """The inverse of `map_pixels`, clamped to [0, 1]."""
    return ((x - eps) / (1 - 2 * eps)).clamp(0, 1)


def logit_laplace_nll(x: Tensor, mu: Tensor, log_b: Tensor) -> Tensor:
    """-ln f(x | mu, b) element by element; x, mu, log_b: one shape.

    x must be inside (0, 1): elsewhere the result is infinite or NaN.
    """
    return (x.logit() - mu).abs() * (-log_b).exp() + log_b + math.log(2) + x.log() + (-x).log1p()


def logit_laplace_loss(maps: Tensor, x: Tensor) -> Tensor:
    """The mean of -ln f(x | mu, b), in nats a pixel and channel.

    Args: maps: [B, 2c, H, W], what a decoder gives: c maps mu, then c maps ln b.   x: [B, c, H, W] inside (0, 1).
    Returns: a scalar of at least float32.
    Raises: ValueError (shapes that do not fit).
    Numerics: 16-bit inputs are computed in float32.
    """
    if maps.dim() != 4 or (maps.shape[0], maps.shape[1], *maps.shape[2:]) != (len(x), 2 * x.shape[1], *x.shape[2:]):
        raise ValueError(
            f"logit_laplace_loss: maps must be {[len(x), 2 * x.shape[1], *x.shape[2:]]} for pictures {list(x.shape)}, "
            f"got {list(maps.shape)}. The decoder gives mu and ln b of every channel."
        )
    dtype = torch.promote_types(maps.dtype, torch.float32)
    mu, log_b = maps.to(dtype).chunk(2, dim=1)
    return logit_laplace_nll(x.to(dtype), mu, log_b).mean()
