"""Sparse attention: the contract of its arguments, the choice of implementation, the registration with torch.

    s_ij = scale * q_i . k_j where the pattern and the key mask allow it      o_i = sum_j softmax_j(s_i) v_j

"reference" is plain torch and differentiates itself. The others are pairs of launchers, `forward` and `backward`, in
`dalle_fast.native` and `dalle_fast.kernels`, behind one custom op: saved are q, k, v, o and one or two numbers a query
from which the softmax is made again; nothing of size N x N.
"""

from __future__ import annotations

import importlib
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dalle_fast import dispatch, patterns
from dalle_fast.ops.checks import check_one_device, check_one_dtype, dtype_name
from dalle_fast.ops.support import (
    auto_avoids_triton,
    in_autocast_dtype,
    refuse_second_derivative,
    why_not_cpu,
    why_not_triton,
)
from dalle_fast.patterns import AttentionPattern
from dalle_fast.reference import sparse_attention as reference

OP = "sparse_attention"
TRITON_HEAD_WIDTHS = (16, 32, 64, 128)
_LAUNCHERS = {"cpu": "dalle_fast.native.sparse_attention", "triton": "dalle_fast.kernels.sparse_attention"}
_STATISTICS = {"cpu": (2,), "triton": ()}  # float32 [B, H, N, ...]: maximum and sum, or log-sum-exp


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
        q, k, v: [B, H, N, D], one floating dtype, one device; H and D at least 1, N <= pattern.layout.length. Any
            strides, though channels that are not adjacent in memory are copied first. Under torch.autocast all three
            are cast to its dtype (float64 stays), as scaled_dot_product_attention casts its own.
        pattern: AttentionPattern over the token layout (`dalle_fast.patterns.make`).
        key_mask: bool, True = may attend. [B, N] for every query of `full`, `bidirectional` and `block_sparse`;
            [B, T] for the image queries of the other patterns. A longer mask is cut.
        scale: multiplies q.k; default D ** -0.5 (0.0 is a value, not "unset").
        stable: accepted because the original has it: softmax(alpha * (t / alpha - max)) is softmax, gradients included.
        rotary: raw angles, float32 [>= N, rot] with rot even and <= D, the same for both channels of a pair 2i, 2i+1;
            turns the first rot channels of q, k and v. A constant: it gets no gradient.
        impl: "auto", or the name of one implementation.
    Returns: [B, H, N, D], dtype of q (autocast's under autocast). A query with no legal key returns the mean of v over
        all N keys.
    Raises: TypeError (dtype), ValueError (shape, range), NotImplementedError (impl lacks it), RuntimeError (no GPU, no
        extension, second derivative).
    Numerics: scores and sums in float32, or in float64 for float64 inputs.
    Source: DALLE-pytorch's attention modules; DALL-E paper, appendix B.
    """
    check_one_device(OP, q=q, k=k, v=v)
    q, k, v = (in_autocast_dtype(t) for t in (q, k, v))
    _check_tensors(q, k, v, pattern)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if rotary is not None:
        rotary = _check_rotary(rotary, q)
    if key_mask is not None:
        key_mask = _check_key_mask(key_mask, q, pattern)
    chosen = dispatch.choose(OP, impl, **facts(q, pattern))
    return chosen.function(q, k, v, pattern=pattern, key_mask=key_mask, scale=scale, rotary=rotary)


def facts(q: Tensor, pattern: AttentionPattern) -> dict[str, object]:
    """What decides which implementation runs: `dalle_fast.explain("sparse_attention", **facts(q, pattern))`."""
    return {"device": q.device.type, "dtype": q.dtype, "head_dim": q.shape[-1], "pattern": pattern.name}


# ------------------------------------------------------------------------------------------------ implementations


def _supports_cpu(
    *, device: str = "cpu", dtype: torch.dtype = torch.float32, head_dim: int = 64, pattern: str = "full"
) -> str | None:
    return why_not_cpu(device, dtype)


def _supports_triton(
    *, device: str = "cpu", dtype: torch.dtype = torch.float32, head_dim: int = 64, pattern: str = "full"
) -> str | None:
    reason = why_not_triton(device, dtype)
    if reason is None and head_dim not in TRITON_HEAD_WIDTHS:
        return f"head width D must be one of {', '.join(map(str, TRITON_HEAD_WIDTHS))}, got {head_dim}."
    return reason


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: AttentionPattern,
    key_mask: Tensor | None,
    scale: float,
    rotary: Tensor | None,
    impl: str,
) -> Tensor:
    return _forward(q, k, v, key_mask, rotary, pattern.spec, scale, impl)[0]


dispatch.register(OP, "reference", reference.sparse_attention)
dispatch.register(OP, "cpu", partial(_fused, impl="cpu"), supports=_supports_cpu, rank=1)
dispatch.register(
    OP, "triton", partial(_fused, impl="triton"), supports=_supports_triton, avoid=auto_avoids_triton, rank=2
)


# ------------------------------------------------------------------------------------------------ registration


@torch.library.custom_op("dalle_fast::sparse_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    rotary: Tensor | None,
    pattern: str,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    if not q.numel():
        return _like_output(q), _like_statistics(q, impl)
    q, k, v = (_adjacent_channels(t) for t in (q, k, v))
    return _launchers(impl).forward(q, k, v, **_constants(key_mask, rotary, pattern, scale))


@torch.library.custom_op("dalle_fast::sparse_attention_backward", mutates_args=())
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    statistics: Tensor,
    key_mask: Tensor | None,
    rotary: Tensor | None,
    pattern: str,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if not q.numel():
        return _like_output(q), _like_output(q), _like_output(q)
    dout, q, k, v, out = (_adjacent_channels(t) for t in (dout, q, k, v, out))
    return _launchers(impl).backward(dout, q, k, v, out, statistics, **_constants(key_mask, rotary, pattern, scale))


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *constants: Any) -> tuple[Tensor, Tensor]:
    *_, impl = constants
    return _like_output(q), _like_statistics(q, impl)


@_backward.register_fake
def _(dout: Tensor, q: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return _like_output(q), _like_output(q), _like_output(q)


def _like_output(q: Tensor) -> Tensor:
    batch, heads, n, width = q.shape
    return q.new_empty(batch, n, heads, width).transpose(1, 2)


def _like_statistics(q: Tensor, impl: str) -> Tensor:
    return q.new_empty(*q.shape[:3], *_STATISTICS[impl], dtype=torch.float32)


def _adjacent_channels(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _launchers(impl: str) -> ModuleType:
    return importlib.import_module(_LAUNCHERS[impl])


def _constants(key_mask: Tensor | None, rotary: Tensor | None, pattern: str, scale: float) -> dict[str, Any]:
    return {
        "pattern": patterns.from_spec(pattern),
        "key_mask": None if key_mask is None else key_mask.contiguous(),
        "scale": scale,
        "rotary": None if rotary is None else rotary.contiguous(),
    }


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, key_mask, rotary, *ctx.rest = inputs
    out, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, statistics, key_mask, rotary)


def _differentiate(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    gradients: tuple[Tensor | None, ...] = (None, None, None)
    if dout is not None and any(ctx.needs_input_grad[:3]):
        given = _backward(dout, *ctx.saved_tensors, *ctx.rest)
        gradients = tuple(g if needed else None for g, needed in zip(given, ctx.needs_input_grad, strict=False))
    return *gradients, None, None, None, None, None


torch.library.register_autograd("dalle_fast::sparse_attention", _differentiate, setup_context=_save)
torch.library.register_autograd("dalle_fast::sparse_attention_backward", refuse_second_derivative(OP))


# ------------------------------------------------------------------------------------------------ checks


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern) -> None:
    if not isinstance(pattern, AttentionPattern):
        raise TypeError(
            f"{OP}: pattern must be an AttentionPattern, got {type(pattern).__name__}."
            " Make one with dalle_fast.patterns.make."
        )
    check_one_dtype(OP, q=q, k=k, v=v)
    if q.dim() != 4 or not q.shape == k.shape == v.shape:
        raise ValueError(
            f"{OP}: q, k, v must be of one shape [B, H, N, D], got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}."
            " Did you split the heads?"
        )
    if q.shape[1] < 1 or q.shape[3] < 1:
        raise ValueError(
            f"{OP}: q, k, v must have at least one head and one channel a head, got {list(q.shape)}."
            " Split the width C into H heads of D = C / H."
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


def _check_key_mask(key_mask: Tensor, q: Tensor, pattern: AttentionPattern) -> Tensor:
    """The mask, cut to what it covers."""
    batch, _, n, _ = q.shape
    letter, length = ("N", n) if pattern.masks_every_query else ("T", pattern.layout.text_len)
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
    return key_mask[:, :needed]
