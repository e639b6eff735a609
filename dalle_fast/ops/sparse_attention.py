"""Sparse attention: the contract of its arguments and the choice of implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_fast import dispatch
from dalle_fast.ops.checks import check_one_device, check_one_dtype, dtype_name
from dalle_fast.patterns import AttentionPattern
from dalle_fast.reference import sparse_attention as reference

OP = "sparse_attention"

dispatch.register(OP, "reference", reference.sparse_attention)


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: AttentionPattern,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    stable: bool = False,
    rotary: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Causal attention in which an image token sees all text and the image tokens its pattern allows.

    Args:
        q, k, v: [B, H, N, D], one floating dtype, one device, any strides; N <= pattern.layout.length.
        pattern: AttentionPattern over the token layout (`dalle_fast.patterns.make`).
        key_mask: bool, True = may attend. [B, N] for every query of `full`, `bidirectional` and `block_sparse`;
            [B, T] for the image queries of the other patterns. A longer mask is cut.
        scale: multiplies q.k; default D ** -0.5 (0.0 is a value, not "unset").
        stable: accepted because the original has it; it equals plain softmax, gradients included.
        rotary: raw angles, float32 [>= N, rot] with rot even and <= D, the same for both channels of a pair 2i, 2i+1;
            turns the first rot channels of q, k and v. A constant: it gets no gradient.
        impl: "auto", or the name of one implementation.
    Returns: [B, H, N, D], dtype of q. A query with no legal key returns the mean of v over all N keys.
    Raises: TypeError (dtype), ValueError (shape, range), NotImplementedError (impl lacks it), RuntimeError (no GPU, no
        extension).
    Numerics: scores and sums in float32, or in float64 for float64 inputs.
    Source: DALLE-pytorch's attention modules; DALL-E paper, appendix B.
    """
    _check_tensors(q, k, v, pattern)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if rotary is not None:
        rotary = _check_rotary(rotary, q)
    masks = {} if key_mask is None else _check_key_mask(key_mask, q, pattern)
    chosen = dispatch.choose(OP, impl, **facts(q, pattern))
    return chosen.function(q, k, v, pattern=pattern, scale=float(scale), stable=stable, rotary=rotary, **masks)


def facts(q: Tensor, pattern: AttentionPattern) -> dict[str, object]:
    """What decides which implementation runs: `dalle_fast.explain("sparse_attention", **facts(q, pattern))`."""
    return {"device": q.device.type, "dtype": q.dtype, "head_dim": q.shape[-1], "pattern": pattern.name}


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern) -> None:
    if not isinstance(pattern, AttentionPattern):
        raise TypeError(
            f"{OP}: pattern must be an AttentionPattern, got {type(pattern).__name__}."
            " Make one with dalle_fast.patterns.make."
        )
    check_one_dtype(OP, q=q, k=k, v=v)
    check_one_device(OP, q=q, k=k, v=v)
    if q.dim() != 4 or not q.shape == k.shape == v.shape:
        raise ValueError(
            f"{OP}: q, k, v must be of one shape [B, H, N, D], got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}."
            " Did you split the heads?"
        )
    if q.shape[2] > pattern.layout.length:
        raise ValueError(
            f"{OP}: N must be at most the length of the pattern's layout, {pattern.layout.length}, got {q.shape[2]}."
            " Make the pattern for the longer text or grid."
        )


def _check_rotary(rotary: Tensor, q: Tensor) -> Tensor:
    n, width = q.shape[2:]
    if rotary.dtype != torch.float32:
        raise TypeError(
            f"{OP}: rotary must hold raw angles in float32, got {dtype_name(rotary)}. Angles reach thousands of"
            " radians: keep them float32 whatever the model's dtype."
        )
    if rotary.requires_grad:
        raise ValueError(f"{OP}: rotary must be a constant, got a tensor that requires a gradient. Detach it.")
    if rotary.device != q.device:
        raise ValueError(
            f"{OP}: rotary must be on the device of q, {q.device}, got {rotary.device}. Move it with .to(device)."
        )
    if rotary.dim() != 2 or rotary.shape[0] < n or rotary.shape[1] % 2 or rotary.shape[1] > width:
        raise ValueError(
            f"{OP}: rotary must be [>= N={n}, rot] with rot even and at most D={width}, got {list(rotary.shape)}."
            " Build it for the layout of this model."
        )
    return rotary[:n]


def _check_key_mask(key_mask: Tensor, q: Tensor, pattern: AttentionPattern) -> dict[str, Tensor]:
    """The mask under the name that says whom it concerns, cut to what it covers."""
    batch, _, n, _ = q.shape
    every_query = pattern.masks_every_query
    letter, length = ("N", n) if every_query else ("T", pattern.layout.text_len)
    # Image queries exist only behind the whole text; a shorter sequence needs no more of the mask than it has keys.
    needed = min(n, length)
    if key_mask.dtype != torch.bool or key_mask.dim() != 2 or key_mask.shape[0] != batch or key_mask.shape[1] < needed:
        error = TypeError if key_mask.dtype != torch.bool else ValueError
        raise error(
            f"{OP}: key_mask must be bool [B={batch}, {letter}={length}] for pattern {pattern.name!r},"
            f" got {dtype_name(key_mask)} {list(key_mask.shape)}. Did you leave out <bos>?"
        )
    if key_mask.device != q.device:
        raise ValueError(
            f"{OP}: key_mask must be on the device of q, {q.device}, got {key_mask.device}. Move it with .to(device)."
        )
    return {"key_mask" if every_query else "text_key_mask": key_mask[:, :needed]}
