"""Sparse attention on NVIDIA GPUs: one kernel forward, three backward, for every pattern.

Forward, for q, k, v [B, H, N, D] turned by the rotary angles of their positions (R_i; the identity without rotary):

    s_ij = scale * (R_i q_i) . (R_j k_j)      over the keys j that pattern and key mask allow
    lse_i = log sum_j exp(s_ij),  p_ij = exp(s_ij - lse_i),  o_i = sum_j p_ij R_j v_j

Backward, with delta_i = do_i . o_i and ds_ij = scale * p_ij (do_i . R_j v_j - delta_i):

    dq_i = R_i' sum_j ds_ij R_j k_j,   dk_j = R_j' sum_i ds_ij R_i q_i,   dv_j = R_j' sum_i p_ij do_i

Saved: q, k, v, o and lse. Recomputed: rotations, scores, probabilities. Scores, sums and gradients are float32; 16-bit
products have 16-bit operands (turned rows, p and ds rounded once), float32 products are float32, never TF32. lse is the
natural logarithm, +inf for a query without a legal key: such a query returns the mean of R_j v_j over all N keys, gives
q and k no gradient, and every row of dv do_i / N.

Work: tiles of queries (keys in the backward's second kernel) walk the blocks that attention_tiles.py lists for them, so
forward costs 4 D and backward 10 D FLOPs a (query, key) pair in those blocks: at T = 257, 32 x 32, row, column and
convolution, 0.2 N^2 pairs a head, against 0.5 N^2 causal. Floor in bytes: forward reads q, k, v and writes o once (8 D
N a head in 16 bits), backward reads q, k, v, o, do and writes three gradients (16 D N); K and V tiles are read again
by every query tile, from the L2 cache. No atomics: the order of every sum depends on the shape alone.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import torch
import triton
import triton.language as tl
from dalle_fast.kernels.attention_blocks import (
    in_exponent,
    legal,
    load_rows,
    load_turns,
    log_sum,
    may_attend,
    power,
    turn,
    unspecialised,
)
from dalle_fast.kernels.attention_tiles import key_tiles, query_tiles
from dalle_fast.kernels.sparse_attention_arguments import (
    architecture,
    empty_like_projection,
    launching_on,
    prepare,
    row_strides,
)
from dalle_fast.kernels.sparse_attention_dkv import launch_keys, launch_sum
from dalle_fast.kernels.sparse_attention_dq import launch_queries
from dalle_fast.kernels.sparse_attention_sizes import Launch, pick_sparse_attention
from torch import Tensor

from dalle_fast.patterns import AttentionPattern

__all__ = ["backward", "forward", "launch_backward", "launch_forward", "pick_sparse_attention"]


@triton.jit
def _visit(
    q,
    query,
    key,
    acc,
    row_max,
    row_sum,
    k_ptr,
    v_ptr,
    turn_ptr,
    mask_ptr,
    blocks_ptr,
    stride_k_n,
    stride_v_n,
    n_masked,
    geometry,
    factor,
    PATTERN: tl.constexpr,
    MASK: tl.constexpr,
    ROTARY: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GATHERED: tl.constexpr,
):
    """One block of keys at positions `key` [BLOCK_N] joins the running softmax of q [BLOCK_M, HEAD_DIM]."""
    turns = load_turns(turn_ptr, key, HEAD_DIM, ROTARY, GATHERED)
    k = turn(load_rows(k_ptr, key, stride_k_n, HEAD_DIM, GATHERED), turns, ROTARY, False)
    v = turn(load_rows(v_ptr, key, stride_v_n, HEAD_DIM, GATHERED), turns, ROTARY, False)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    if GATHERED or MASK != "none":
        may = legal(query[:, None], key[None, :], geometry, blocks_ptr, mask_ptr, n_masked, PATTERN, MASK, GATHERED)
        scores = tl.where(may, scores * factor, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        # a row without a legal key so far: inf - inf would be NaN
        shift = tl.where(new_max == -float("inf"), 0.0, new_max)
        p = power(scores - shift[:, None], q.dtype)
    else:
        # factor >= 0, so it commutes with the maximum, and product and difference are one instruction
        new_max = tl.maximum(row_max, tl.max(scores, axis=1) * factor)
        shift = new_max
        p = power(scores * factor - shift[:, None], q.dtype)
    fade = power(row_max - shift, q.dtype)
    row_sum = row_sum * fade + tl.sum(p, axis=1)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return acc, new_max, row_sum


@unspecialised("mask_stride_b", "n_masked", "n_tiles", "n_heads", "n")
@triton.jit
def _sparse_attention_fwd(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    turn_ptr,
    mask_ptr,
    blocks_ptr,
    tiles_ptr,
    walks_ptr,
    gathered_ptr,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    mask_stride_b,
    n_masked,
    geometry,
    scale,
    n_tiles,
    n_heads,
    n,
    PATTERN: tl.constexpr,
    MASK: tl.constexpr,
    ROTARY: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One query tile of one head: out [BLOCK_M, HEAD_DIM] and lse [BLOCK_M]. Strides are (sample, head, position)."""
    pid = tl.program_id(0)
    tile = pid % n_tiles
    batch_head = (pid // n_tiles).to(tl.int64)
    batch, head = batch_head // n_heads, batch_head % n_heads
    q_ptr += batch * q_strides[0] + head * q_strides[1]
    k_ptr += batch * k_strides[0] + head * k_strides[1]
    v_ptr += batch * v_strides[0] + head * v_strides[1]
    out_ptr += batch * out_strides[0] + head * out_strides[1]
    if MASK != "none":
        mask_ptr += batch * mask_stride_b

    offs_n = tl.arange(0, BLOCK_N)
    query = tl.load(tiles_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M))  # [BLOCK_M]
    n_whole = tl.load(walks_ptr + 3 * tile)
    first_row = tl.load(walks_ptr + 3 * tile + 1)
    n_rows = tl.load(walks_ptr + 3 * tile + 2)

    q = load_rows(q_ptr, query, q_strides[2], HEAD_DIM, True)
    q = turn(q, load_turns(turn_ptr, query, HEAD_DIM, ROTARY, True), ROTARY, False)
    # A negative scale changes the sign of q, exactly, so that scores are multiplied by a number >= 0.
    q = tl.where(scale < 0, -q, q)
    factor = in_exponent(tl.abs(scale), q.dtype)

    if FIRST:
        zero = tl.zeros([1], tl.int32)
        turns = load_turns(turn_ptr, zero, HEAD_DIM, ROTARY, False)
        k_first = turn(load_rows(k_ptr, zero, k_strides[2], HEAD_DIM, False), turns, ROTARY, False)  # [1, HEAD_DIM]
        v_first = turn(load_rows(v_ptr, zero, v_strides[2], HEAD_DIM, False), turns, ROTARY, False)
        row_max = tl.sum(q.to(tl.float32) * k_first.to(tl.float32), axis=1) * factor
        if MASK != "none":
            may = may_attend(query, zero, mask_ptr, n_masked, geometry[0], MASK)
            row_max = tl.where(may, row_max, -float("inf"))
        row_sum = tl.where(row_max == -float("inf"), 0.0, 1.0)
        acc = row_sum[:, None] * v_first.to(tl.float32)
    else:
        row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)

    for block in range(n_whole):
        key = FIRST + block * BLOCK_N + offs_n
        acc, row_max, row_sum = _visit(
            q, query, key, acc, row_max, row_sum, k_ptr, v_ptr, turn_ptr, mask_ptr, blocks_ptr, k_strides[2],
            v_strides[2], n_masked, geometry, factor, PATTERN, MASK, ROTARY, HEAD_DIM, False,
        )  # fmt: skip
    for row in range(first_row, first_row + n_rows):
        key = tl.load(gathered_ptr + row * BLOCK_N + offs_n)
        acc, row_max, row_sum = _visit(
            q, query, key, acc, row_max, row_sum, k_ptr, v_ptr, turn_ptr, mask_ptr, blocks_ptr, k_strides[2],
            v_strides[2], n_masked, geometry, factor, PATTERN, MASK, ROTARY, HEAD_DIM, True,
        )  # fmt: skip

    keyless = row_sum == 0
    row_sum = tl.where(keyless, 1.0, row_sum)
    acc = acc / row_sum[:, None]
    if MASK == "every_query":
        n_keyless = tl.sum((keyless & (query >= 0)).to(tl.int32), axis=0)
        if n_keyless > 0:
            mean = _mean_value(v_ptr, turn_ptr, v_strides[2], n, ROTARY, HEAD_DIM, BLOCK_N)
            acc = tl.where(keyless[:, None], mean[None, :], acc)
    lse = tl.where(keyless, float("inf"), log_sum(row_max, row_sum, q.dtype))

    pointers = out_ptr + query[:, None].to(tl.int64) * out_strides[2] + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(pointers, acc.to(out_ptr.dtype.element_ty), mask=query[:, None] >= 0)
    tl.store(lse_ptr + batch_head * n + query, lse, mask=query >= 0)


@triton.jit
def _mean_value(v_ptr, turn_ptr, stride_v_n, n, ROTARY: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr):
    """float32 [HEAD_DIM]: the mean of all n turned values."""
    total = tl.zeros([HEAD_DIM], tl.float32)
    for start in range(0, n, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        key = tl.where(key < n, key, -1)
        turns = load_turns(turn_ptr, key, HEAD_DIM, ROTARY, True)
        v = turn(load_rows(v_ptr, key, stride_v_n, HEAD_DIM, True), turns, ROTARY, False)
        total += tl.sum(v.to(tl.float32), axis=0)
    return total / n


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: AttentionPattern,
    key_mask: Tensor | None,
    scale: float,
    rotary: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Launches the forward kernel; the arguments were checked by the op.

    Args:
        q, k, v: [B, H, N, D], float32, bfloat16 or float16; D of 16, 32, 64 or 128, with unit stride.
        key_mask: bool, True = may attend; [B, N] where pattern.masks_every_query, else [B, S] for image queries, with
            text keys from S on allowed.
        scale: multiplies q.k.   rotary: raw angles, float32 [>= N, rot], interleaved pairs.
    Returns: out [B, H, N, D], a view of memory laid out [B, N, H, D]; lse float32 [B, H, N], +inf without legal key.
    """
    launch = pick_sparse_attention(tuple(q.shape), q.dtype, architecture(q.device))
    return launch_forward(q, k, v, pattern=pattern, key_mask=key_mask, scale=scale, rotary=rotary, launch=launch)


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: AttentionPattern,
    key_mask: Tensor | None,
    scale: float,
    rotary: Tensor | None,
    launch: Launch,
) -> tuple[Tensor, Tensor]:
    """`forward` with launch sizes of the caller's choice."""
    batch, heads, n, _ = q.shape
    out = empty_like_projection(q)
    lse = q.new_empty(batch, heads, n, dtype=torch.float32)
    block_m, block_n, num_warps, num_stages = launch.forward
    tiles = query_tiles(pattern, n, block_m, block_n, launch.apart, q.device)
    shared = prepare(q, pattern, key_mask, rotary)
    with launching_on(q.device):
        _sparse_attention_fwd[(len(tiles.positions) * batch * heads,)](
            q, k, v, out, lse, shared.turns, shared.mask, shared.blocks, tiles.positions, tiles.walks, tiles.gathered,
            row_strides(q), row_strides(k), row_strides(v), row_strides(out), shared.mask_stride_b, shared.n_masked,
            shared.geometry, scale, len(tiles.positions), heads, n, **shared.options,
            FIRST=tiles.first, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    pattern: AttentionPattern,
    key_mask: Tensor | None,
    scale: float,
    rotary: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the backward kernels for dout [B, H, N, D] and what `forward` took and returned.

    Returns: dq, dk, dv, [B, H, N, D] each, views of memory laid out [B, N, H, D], dtype of q.
    """
    launch = pick_sparse_attention(tuple(q.shape), q.dtype, architecture(q.device))
    return launch_backward(
        dout, q, k, v, out, lse, pattern=pattern, key_mask=key_mask, scale=scale, rotary=rotary, launch=launch
    )


def launch_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    pattern: AttentionPattern,
    key_mask: Tensor | None,
    scale: float,
    rotary: Tensor | None,
    launch: Launch,
) -> tuple[Tensor, Tensor, Tensor]:
    """`backward` with launch sizes of the caller's choice."""
    dq, dk, dv = (empty_like_projection(q) for _ in range(3))
    shared = prepare(q, pattern, key_mask, rotary)
    sizes_q, sizes_k = launch.backward_queries, launch.backward_keys
    n = q.shape[2]
    tiles_q = query_tiles(pattern, n, sizes_q.block_m, sizes_q.block_n, launch.apart, q.device)
    tiles_k = key_tiles(pattern, n, sizes_k.block_m, sizes_k.block_n, tiles_q.first, launch.longest, q.device)
    with launching_on(q.device):
        delta, first, mean = launch_queries(dout, q, k, v, out, lse, dq, shared, scale, tiles_q, sizes_q)
        parts = launch_keys(dout, q, k, v, lse, delta, mean, dk, dv, shared, scale, tiles_k, sizes_k)
        if parts is not None:
            launch_sum(parts, tiles_k.positions, tiles_k.splits, mean, dk, dv, shared, scale)
        if first is not None:
            launch_sum(first, tiles_q.first_key, tiles_q.first_split, mean, dk, dv, shared, scale)
    return dq, dk, dv
