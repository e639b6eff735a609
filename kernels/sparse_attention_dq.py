"""The query-outer kernel of sparse attention's backward: dq; formulas and precision are in sparse_attention.py.

It runs first: it leaves delta for the key-outer kernel, and what key 0 gets where that is taken apart.
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
    may_attend,
    power,
    turn,
    unspecialised,
)
from dalle_fast.kernels.attention_tiles import QueryTiles
from dalle_fast.kernels.sparse_attention_arguments import Shared, row_strides
from dalle_fast.kernels.sparse_attention_sizes import Sizes
from torch import Tensor


@triton.jit
def _visit_keys(
    q,
    do,
    query,
    key,
    shift,
    delta,
    dq,
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
    """dq / scale [BLOCK_M, HEAD_DIM] grows by one block of keys at positions `key` [BLOCK_N]."""
    turns = load_turns(turn_ptr, key, HEAD_DIM, ROTARY, GATHERED)
    k = turn(load_rows(k_ptr, key, stride_k_n, HEAD_DIM, GATHERED), turns, ROTARY, False)
    v = turn(load_rows(v_ptr, key, stride_v_n, HEAD_DIM, GATHERED), turns, ROTARY, False)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    p = power(scores * factor - shift[:, None], q.dtype)
    if GATHERED or MASK != "none":
        may = legal(query[:, None], key[None, :], geometry, blocks_ptr, mask_ptr, n_masked, PATTERN, MASK, GATHERED)
        p = tl.where(may, p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@unspecialised("mask_stride_b", "n_masked", "n_tiles", "n_heads", "n")
@triton.jit
def _sparse_attention_bwd_queries(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    do_ptr,
    lse_ptr,
    dq_ptr,
    delta_ptr,
    first_ptr,
    keyless_ptr,
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
    do_strides,
    dq_strides,
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
    """One query tile of one head: dq [BLOCK_M, HEAD_DIM] and delta [BLOCK_M].

    FIRST: what its queries give to dk and dv of key 0 goes to first_ptr [B * H, n_tiles, 2, HEAD_DIM], in float32.
    MASK "every_query": the sum of `do` over its queries without a legal key goes to keyless_ptr [B * H, n_tiles, D].
    """
    pid = tl.program_id(0)
    tile = pid % n_tiles
    batch_head = (pid // n_tiles).to(tl.int64)
    batch, head = batch_head // n_heads, batch_head % n_heads
    q_ptr += batch * q_strides[0] + head * q_strides[1]
    k_ptr += batch * k_strides[0] + head * k_strides[1]
    v_ptr += batch * v_strides[0] + head * v_strides[1]
    out_ptr += batch * out_strides[0] + head * out_strides[1]
    do_ptr += batch * do_strides[0] + head * do_strides[1]
    dq_ptr += batch * dq_strides[0] + head * dq_strides[1]
    if MASK != "none":
        mask_ptr += batch * mask_stride_b

    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, HEAD_DIM)
    query = tl.load(tiles_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M))  # [BLOCK_M]
    n_whole = tl.load(walks_ptr + 3 * tile)
    first_row = tl.load(walks_ptr + 3 * tile + 1)
    n_rows = tl.load(walks_ptr + 3 * tile + 2)

    do = load_rows(do_ptr, query, do_strides[2], HEAD_DIM, True)
    out = load_rows(out_ptr, query, out_strides[2], HEAD_DIM, True)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta_ptr + batch_head * n + query, delta, mask=query >= 0)
    lse = tl.load(lse_ptr + batch_head * n + query, mask=query >= 0, other=float("inf"))
    if MASK == "every_query":
        keyless = tl.sum(tl.where((lse == float("inf"))[:, None], do.to(tl.float32), 0.0), axis=0)
        tl.store(keyless_ptr + (batch_head * n_tiles + tile) * HEAD_DIM + offs_d, keyless)

    query_turns = load_turns(turn_ptr, query, HEAD_DIM, ROTARY, True)
    q = turn(load_rows(q_ptr, query, q_strides[2], HEAD_DIM, True), query_turns, ROTARY, False)
    factor, shift = in_exponent(scale, q.dtype), in_exponent(lse, q.dtype)
    dq = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    if FIRST:
        zero = tl.zeros([1], tl.int32)
        turns = load_turns(turn_ptr, zero, HEAD_DIM, ROTARY, False)
        k_first = turn(load_rows(k_ptr, zero, k_strides[2], HEAD_DIM, False), turns, ROTARY, False)  # [1, HEAD_DIM]
        v_first = turn(load_rows(v_ptr, zero, v_strides[2], HEAD_DIM, False), turns, ROTARY, False)
        q_wide, do_wide = q.to(tl.float32), do.to(tl.float32)
        p = power(tl.sum(q_wide * k_first.to(tl.float32), axis=1) * factor - shift, q.dtype)
        if MASK != "none":
            p = tl.where(may_attend(query, zero, mask_ptr, n_masked, geometry[0], MASK), p, 0.0)
        ds = p * (tl.sum(do_wide * v_first.to(tl.float32), axis=1) - delta)
        dq += ds[:, None] * k_first.to(tl.float32)
        pointers = first_ptr + (batch_head * n_tiles + tile) * 2 * HEAD_DIM + offs_d
        tl.store(pointers, tl.sum(ds[:, None] * q_wide, axis=0))
        tl.store(pointers + HEAD_DIM, tl.sum(p[:, None] * do_wide, axis=0))

    for block in range(n_whole):
        key = FIRST + block * BLOCK_N + offs_n
        dq = _visit_keys(
            q, do, query, key, shift, delta, dq, k_ptr, v_ptr, turn_ptr, mask_ptr, blocks_ptr, k_strides[2],
            v_strides[2], n_masked, geometry, factor, PATTERN, MASK, ROTARY, HEAD_DIM, False,
        )  # fmt: skip
    for row in range(first_row, first_row + n_rows):
        key = tl.load(gathered_ptr + row * BLOCK_N + offs_n)
        dq = _visit_keys(
            q, do, query, key, shift, delta, dq, k_ptr, v_ptr, turn_ptr, mask_ptr, blocks_ptr, k_strides[2],
            v_strides[2], n_masked, geometry, factor, PATTERN, MASK, ROTARY, HEAD_DIM, True,
        )  # fmt: skip

    dq = turn(dq * scale, query_turns, ROTARY, True)
    pointers = dq_ptr + query[:, None].to(tl.int64) * dq_strides[2] + offs_d[None, :]
    tl.store(pointers, dq.to(dq_ptr.dtype.element_ty), mask=query[:, None] >= 0)


def launch_queries(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    shared: Shared,
    scale: float,
    tiles: QueryTiles,
    sizes: Sizes,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Writes dq. Returns delta [B, H, N]; parts of key 0's gradients, where it is taken apart; what queries without a
    legal key give to every row of dv, float32 [B * H, D], where there may be such queries.
    """
    batch, heads, n, head_dim = q.shape
    n_tiles = len(tiles.positions)
    delta = torch.empty_like(lse)
    first = lse.new_empty(batch * heads, n_tiles, 2, 1, head_dim) if tiles.first else None
    keyless = lse.new_empty(batch * heads, n_tiles, head_dim) if shared.options["MASK"] == "every_query" else None
    _sparse_attention_bwd_queries[(n_tiles * batch * heads,)](
        q, k, v, out, dout, lse, dq, delta, first, keyless, shared.turns, shared.mask, shared.blocks,
        tiles.positions, tiles.walks, tiles.gathered, row_strides(q), row_strides(k), row_strides(v), row_strides(out),
        row_strides(dout), row_strides(dq), shared.mask_stride_b, shared.n_masked, shared.geometry, scale, n_tiles,
        heads, n, **shared.options, FIRST=tiles.first, BLOCK_M=sizes.block_m, BLOCK_N=sizes.block_n,
        num_warps=sizes.num_warps, num_stages=sizes.num_stages,
    )  # fmt: skip
    return delta, first, None if keyless is None else keyless.sum(1) / n
