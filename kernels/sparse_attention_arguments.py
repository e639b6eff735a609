"""What the launchers of sparse attention hand to every kernel: the pattern as numbers, rotations, the key mask."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from dalle_fast.patterns import AttentionPattern

_INTERPRETED_AS = 80  # the architecture whose launch sizes the interpreter takes


class PatternArguments(NamedTuple):
    """A pattern as `attention_blocks.allowed` reads it."""

    name: str  # PATTERN
    geometry: tuple[int, ...]  # text_len, grid_rows, grid_cols, options a, b, c
    blocks: Tensor | None  # int8 [n_blocks, n_blocks], block_sparse only


class Shared(NamedTuple):
    """Arguments that all kernels of one call share."""

    turns: Tensor | None  # float32 [N, D]: cosine and sine of every pair of channels
    mask: Tensor | None  # uint8 [B, n_masked]
    blocks: Tensor | None
    mask_stride_b: int
    n_masked: int
    geometry: tuple[int, ...]
    options: dict[str, object]  # constexpr: PATTERN, MASK, ROTARY, HEAD_DIM


def prepare(q: Tensor, pattern: AttentionPattern, key_mask: Tensor | None, rotary: Tensor | None) -> Shared:
    """The shared arguments of a call with queries [B, H, N, D]; see `sparse_attention.forward` for the others."""
    name, geometry, blocks = pattern_arguments(pattern, q.device)
    mask, kind = None, "none"
    if key_mask is not None:
        mask = key_mask.view(torch.uint8)
        kind = "every_query" if pattern.masks_every_query else "image_queries"
    head_dim = q.shape[-1]
    return Shared(
        turns=None if rotary is None else turns(rotary[: q.shape[2]], head_dim),
        mask=mask,
        blocks=blocks,
        mask_stride_b=0 if mask is None else mask.stride(0),
        n_masked=0 if mask is None else mask.shape[1],
        geometry=geometry,
        options={"PATTERN": name, "MASK": kind, "ROTARY": rotary is not None, "HEAD_DIM": head_dim},
    )


@lru_cache(maxsize=64)
def pattern_arguments(pattern: AttentionPattern, device: torch.device) -> PatternArguments:
    """The pattern as numbers: reach and dilation of conv_like; half, half clipped to the rows and to the columns of the
    grid of paper_conv (a wider window reaches no more, and wraps once at most); block and n_blocks of block_sparse.
    """
    layout, options = pattern.layout, dict(pattern.options)
    name, numbers, blocks = pattern.name, (0, 0, 0), None
    if name == "paper_col":
        name = "axial_col"
    elif name == "conv_like":
        kernel, dilation = _number(options, "kernel"), _number(options, "dilation")
        numbers = ((kernel - 1) * dilation, dilation, 0)
    elif name == "paper_conv":
        name = f"paper_conv_{options['wrap']}"
        half = _number(options, "kernel") // 2
        numbers = (half, min(half, layout.grid_rows), min(half, layout.grid_cols))
    elif name == "block_sparse":
        blocks = torch.tensor(options["layout"], dtype=torch.int8, device=device)
        numbers = (_number(options, "block"), len(blocks), 0)
    return PatternArguments(name, (layout.text_len, layout.grid_rows, layout.grid_cols, *numbers), blocks)


def turns(angles: Tensor, head_dim: int) -> Tensor:
    """float32 [N, head_dim]: cosine and sine of each pair of channels, from raw angles [N, rot].

    Computed once a call, outside of the kernels: angles reach thousands of radians, and every tile reads its rows. The
    channels from rot on get the angle 0, which leaves them exactly as they are.
    """
    angle = pad(angles[:, ::2], (0, (head_dim - angles.shape[1]) // 2))
    return torch.view_as_real(torch.polar(angle.new_ones(()).expand_as(angle), angle)).flatten(1)


def empty_like_projection(x: Tensor) -> Tensor:
    """Uninitialised [B, H, N, D] like x, a view of memory laid out [B, N, H, D]: what the next projection reads."""
    batch, heads, n, head_dim = x.shape
    return x.new_empty(batch, n, heads, head_dim).transpose(1, 2)


def row_strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of x [B, H, N, D] by sample, head and position; that of D is 1."""
    return (x.stride(0), x.stride(1), x.stride(2))


def architecture(device: torch.device) -> int:
    """Compute capability, 90 for 9.0."""
    if device.type != "cuda":
        return _INTERPRETED_AS
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launching_on(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _number(options: dict[str, object], name: str) -> int:
    value = options[name]
    if not isinstance(value, int):
        raise TypeError(f"sparse_attention: option {name} of the pattern must be an int, got {value!r}.")
    return value
