"""Oracle of sparse attention: dense scores, masked by the pattern, in plain torch.

    s_ij = scale * q_i . k_j          masked where the pattern or the key mask forbids (i, j)
    o_i  = sum_j softmax_j(s_i) v_j   q, k, v: [B, H, N, D], rotated first where `rotary` is given

A masked score is -finfo.max, never -inf: a query with no legal key has N equal scores and returns the mean of v over
all N keys, as the original does, and its scores are constants, so it gives q and k no gradient.

Precision: float32 and float64 stay what they are. For 16-bit inputs the operands of both products are 16-bit (rotated
q, k, v are rounded once, and so are the softmax weights), scores, softmax and sums are float32: what a fused kernel on
matrix units does. Cost: two products of 2 B H N N D FLOPs and four passes over [B, H, N, N], which is what kernels
exist to avoid.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dalle_fast.patterns import AttentionPattern

HALF_DTYPES = (torch.float16, torch.bfloat16)


class DenseMask(NamedTuple):
    """The pattern over the first n positions, as this oracle uses it."""

    forbidden: Tensor  # bool [N, N]
    bias: Tensor  # [1, N, N], 0 or -finfo.max


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: AttentionPattern,
    key_mask: Tensor | None = None,
    scale: float,
    rotary: Tensor | None = None,
) -> Tensor:
    """Attention over the keys that `pattern` and the key masks allow; arguments were checked by the op.

    Args:
        q, k, v: [B, H, N, D], one dtype and device, any strides.
        key_mask: bool, True = may attend: [B, N] for every query where the pattern `masks_every_query`, else
            [B, T or fewer] for image queries only.
        rotary: raw angles [N, rot], interleaved pairs, applied to the first rot channels of q, k and v.
    Returns: [B, H, N, D], dtype of q.
    """
    batch, heads, n, _ = q.shape
    with torch.autocast(q.device.type, enabled=False):
        if rotary is not None:
            q, k, v = (rotate(t, rotary) for t in (q, k, v))
        score_dtype = torch.float32 if q.dtype in HALF_DTYPES else q.dtype
        queries, keys = (t.to(score_dtype).flatten(0, 1) for t in (q, k))  # [B * H, N, D]
        mask = dense_mask(pattern, n, q.device, score_dtype)
        additive = key_mask is None
        # s + (-finfo.max) is exactly -finfo.max for every |s| below 2^102, so the bias equals a fill at the price of no
        # pass over the scores, forward or backward. Only a query without a legal key tells them apart, by its gradient,
        # and every pattern lets a query see itself.
        scores = torch.baddbmm(
            mask.bias if additive else queries.new_zeros(1, 1, 1),
            queries,
            keys.transpose(1, 2),
            beta=1 if additive else 0,
            alpha=scale,
        ).unflatten(0, (batch, heads))  # [B, H, N, N]
        if key_mask is not None:
            if pattern.masks_every_query:
                hidden = ~key_mask[:, None, None, :]
            else:
                hidden = _hidden_from_image_queries(key_mask, n, pattern.layout.text_len)
            scores = scores.masked_fill_(mask.forbidden | hidden, -torch.finfo(score_dtype).max)
        weights = scores.softmax(dim=-1).to(v.dtype)
        return weights @ v


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turns the pairs (2i, 2i + 1) of the first rot channels of x by `angles`; the other channels stay.

    Args:
        x: [..., N, D].
        angles: [>= N, rot], raw radians, the same for both channels of a pair.
    Returns: [..., N, D], dtype of x. Sines, cosines and products are float32 at least, whatever the dtype of x:
        angles reach thousands of radians, which 16 bits cannot hold.
    """
    return turn_pairs(x, turns(angles[: x.shape[-2]], x.dtype))


def turns(angles: Tensor, dtype: torch.dtype) -> Tensor:
    """The rotations by raw angles [N, rot] as complex numbers [N, rot / 2], for values of `dtype`."""
    angle = angles[:, ::2].to(torch.promote_types(dtype, torch.float32))
    return torch.polar(torch.ones_like(angle), angle)


def turn_pairs(x: Tensor, turn: Tensor) -> Tensor:
    """`rotate` with the rotations [N, rot / 2] of `turns`."""
    rot = 2 * turn.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    # A pair is one complex number, its rotation one product: a third fewer passes than with sines and cosines apart.
    pairs = torch.complex(x[..., :rot:2].to(dtype), x[..., 1:rot:2].to(dtype))
    turned = torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)
    return torch.cat((turned, x[..., rot:]), dim=-1)


@lru_cache(maxsize=32)
def dense_mask(pattern: AttentionPattern, n: int, device: torch.device, dtype: torch.dtype) -> DenseMask:
    """The dense mask of the first n positions of `pattern`, built once per (pattern, n, device, dtype)."""
    forbidden = ~pattern.dense(n).to(device)
    bias = torch.zeros(1, n, n, dtype=dtype, device=device)
    return DenseMask(forbidden, bias.masked_fill_(forbidden, -torch.finfo(dtype).max))


def _hidden_from_image_queries(key_mask: Tensor, n: int, text_len: int) -> Tensor:
    """The cells [B, 1, N, N] that a mask over text keys forbids."""
    batch, length = key_mask.shape
    hidden = key_mask.new_zeros(batch, 1, n, n)
    hidden[:, :, text_len:, :length] = ~key_mask[:, None, None, :]
    return hidden
