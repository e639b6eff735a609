"""The key-outer kernels of sparse attention's backward: dk and dv; formulas and precision are in sparse_attention.py.

Every image query attends to the text, so a text tile walks over nearly all queries. Its walk is cut into items, each a
program, that leave parts; `_sum_parts` adds them in a fixed order. It finishes key 0, too, where that is taken apart:
there the products are vectors, and the query-outer kernel leaves one part a query tile.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl
from dalle_fast.kernels.attention_blocks import in_exponent, legal, load_rows, load_turns, power, turn, unspecialised
from dalle_fast.kernels.attention_tiles import KeyTiles
from dalle_fast.kernels.sparse_attention_arguments import Shared, row_strides
from dalle_fast.kernels.sparse_attention_sizes import Sizes
from torch import Tensor


@triton.jit
def _visit_queries(
    k,
    v,
    query,
    key,
    dk,
    dv,
    q_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    turn_ptr,
    mask_ptr,
    blocks_ptr,
    stride_q_n,
    stride_do_n,
    n_masked,
    geometry,
    factor,
    PATTERN: tl.constexpr,
    MASK: tl.constexpr,
    ROTARY: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GATHERED: tl.constexpr,
):
    """dk / scale and dv [BLOCK_N, HEAD_DIM] grow by one block of queries at positions `query` [BLOCK_M]."""
    turns = load_turns(turn_ptr, query, HEAD_DIM, ROTARY, GATHERED)
    q = turn(load_rows(q_ptr, query, stride_q_n, HEAD_DIM, GATHERED), turns, ROTARY, False)
    do = load_rows(do_ptr, query, stride_do_n, HEAD_DIM, GATHERED)
    shift = in_exponent(tl.load(lse_ptr + query, mask=query >= 0, other=float("inf")), q.dtype)
    delta = tl.load(delta_ptr + query, mask=query >= 0, other=0.0)
    scores = tl.dot(k, tl.trans(q), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
    p = power(scores * factor - shift[None, :], q.dtype)
    if GATHERED or MASK != "none":
        may = legal(query[None, :], key[:, None], geometry, blocks_ptr, mask_ptr, n_masked, PATTERN, MASK, GATHERED)
        p = tl.where(may, p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    dp = tl.dot(v, tl.trans(do), input_precision="ieee")
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@unspecialised("mask_stride_b", "n_masked", "n_items", "n_slots", "n_heads", "n")
@triton.jit
def _sparse_attention_bwd_keys(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    parts_ptr,
    mean_ptr,
    turn_ptr,
    mask_ptr,
    blocks_ptr,
    tiles_ptr,
    items_ptr,
    gathered_ptr,
    q_strides,
    k_strides,
    v_strides,
    do_strides,
    dk_strides,
    dv_strides,
    mask_stride_b,
    n_masked,
    geometry,
    scale,
    n_items,
    n_slots,
    n_heads,
    n,
    PATTERN: tl.constexpr,
    MASK: tl.constexpr,
    ROTARY: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One item of one head: dk and dv of a key tile, or what some of its queries give to them.

    SPLIT: parts go to parts_ptr [B * H, n_slots, 2, BLOCK_N, HEAD_DIM], float32. mean_ptr: as `_store_key_gradients`.
    """
    pid = tl.program_id(0)
    item_ptr = items_ptr + 6 * (pid % n_items)
    batch_head = (pid // n_items).to(tl.int64)
    batch, head = batch_head // n_heads, batch_head % n_heads
    q_ptr += batch * q_strides[0] + head * q_strides[1]
    k_ptr += batch * k_strides[0] + head * k_strides[1]
    v_ptr += batch * v_strides[0] + head * v_strides[1]
    do_ptr += batch * do_strides[0] + head * do_strides[1]
    dk_ptr += batch * dk_strides[0] + head * dk_strides[1]
    dv_ptr += batch * dv_strides[0] + head * dv_strides[1]
    lse_ptr += batch_head * n
    delta_ptr += batch_head * n
    if MASK != "none":
        mask_ptr += batch * mask_stride_b
    if MASK == "every_query":
        mean_ptr += batch_head * HEAD_DIM

    offs_m = tl.arange(0, BLOCK_M)
    key = tl.load(tiles_ptr + tl.load(item_ptr) * BLOCK_N + tl.arange(0, BLOCK_N))  # [BLOCK_N]
    first_query = tl.load(item_ptr + 1)
    n_whole = tl.load(item_ptr + 2)
    first_row = tl.load(item_ptr + 3)
    n_rows = tl.load(item_ptr + 4)
    slot = tl.load(item_ptr + 5)

    turns = load_turns(turn_ptr, key, HEAD_DIM, ROTARY, True)
    k = turn(load_rows(k_ptr, key, k_strides[2], HEAD_DIM, True), turns, ROTARY, False)
    v = turn(load_rows(v_ptr, key, v_strides[2], HEAD_DIM, True), turns, ROTARY, False)
    factor = in_exponent(scale, k.dtype)
    dk = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    dv = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    for block in range(n_whole):
        query = first_query + block * BLOCK_M + offs_m
        dk, dv = _visit_queries(
            k, v, query, key, dk, dv, q_ptr, do_ptr, lse_ptr, delta_ptr, turn_ptr, mask_ptr, blocks_ptr, q_strides[2],
            do_strides[2], n_masked, geometry, factor, PATTERN, MASK, ROTARY, HEAD_DIM, False,
        )  # fmt: skip
    for row in range(first_row, first_row + n_rows):
        query = tl.load(gathered_ptr + row * BLOCK_M + offs_m)
        dk, dv = _visit_queries(
            k, v, query, key, dk, dv, q_ptr, do_ptr, lse_ptr, delta_ptr, turn_ptr, mask_ptr, blocks_ptr, q_strides[2],
            do_strides[2], n_masked, geometry, factor, PATTERN, MASK, ROTARY, HEAD_DIM, True,
        )  # fmt: skip

    if SPLIT and slot >= 0:
        offsets = tl.arange(0, BLOCK_N)[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
        pointers = parts_ptr + (batch_head * n_slots + slot) * 2 * BLOCK_N * HEAD_DIM + offsets
        tl.store(pointers, dk)
        tl.store(pointers + BLOCK_N * HEAD_DIM, dv)
    else:
        _store_key_gradients(
            dk, dv, key, dk_ptr, dv_ptr, mean_ptr, turn_ptr, dk_strides[2], dv_strides[2], scale, MASK, ROTARY, HEAD_DIM
        )


@triton.jit
def _store_key_gradients(
    dk,
    dv,
    key,
    dk_ptr,
    dv_ptr,
    mean_ptr,
    turn_ptr,
    stride_dk_n,
    stride_dv_n,
    scale,
    MASK: tl.constexpr,
    ROTARY: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Finished sums dk / scale and dv [ROWS, HEAD_DIM] of the keys [ROWS] become gradients of what was not turned yet.

    mean_ptr: float32 [HEAD_DIM], what queries without a legal key, which return the mean, give to every row of dv.
    """
    if MASK == "every_query":
        dv += tl.load(mean_ptr + tl.arange(0, HEAD_DIM))[None, :]
    turns = load_turns(turn_ptr, key, HEAD_DIM, ROTARY, True)
    dk = turn(dk * scale, turns, ROTARY, True)
    dv = turn(dv, turns, ROTARY, True)
    position = key[:, None].to(tl.int64)
    offs_d = tl.arange(0, HEAD_DIM)[None, :]
    tl.store(dk_ptr + position * stride_dk_n + offs_d, dk.to(dk_ptr.dtype.element_ty), mask=key[:, None] >= 0)
    tl.store(dv_ptr + position * stride_dv_n + offs_d, dv.to(dv_ptr.dtype.element_ty), mask=key[:, None] >= 0)


@unspecialised("n_splits", "n_slots", "n_heads")
@triton.jit
def _sum_parts(
    parts_ptr,
    dk_ptr,
    dv_ptr,
    mean_ptr,
    turn_ptr,
    tiles_ptr,
    splits_ptr,
    dk_strides,
    dv_strides,
    scale,
    n_splits,
    n_slots,
    n_heads,
    MASK: tl.constexpr,
    ROTARY: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk and dv of one key tile of one head, from its parts in parts_ptr [B * H, n_slots, 2, BLOCK_N, HEAD_DIM]."""
    pid = tl.program_id(0)
    split_ptr = splits_ptr + 3 * (pid % n_splits)
    batch_head = (pid // n_splits).to(tl.int64)
    batch, head = batch_head // n_heads, batch_head % n_heads
    dk_ptr += batch * dk_strides[0] + head * dk_strides[1]
    dv_ptr += batch * dv_strides[0] + head * dv_strides[1]
    if MASK == "every_query":
        mean_ptr += batch_head * HEAD_DIM
    key = tl.load(tiles_ptr + tl.load(split_ptr) * BLOCK_N + tl.arange(0, BLOCK_N))  # [BLOCK_N]
    offsets = tl.arange(0, BLOCK_N)[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    pointers = parts_ptr + (batch_head * n_slots + tl.load(split_ptr + 1)) * 2 * BLOCK_N * HEAD_DIM + offsets
    dk = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    dv = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    for _ in range(tl.load(split_ptr + 2)):
        dk += tl.load(pointers)
        dv += tl.load(pointers + BLOCK_N * HEAD_DIM)
        pointers += 2 * BLOCK_N * HEAD_DIM
    _store_key_gradients(
        dk, dv, key, dk_ptr, dv_ptr, mean_ptr, turn_ptr, dk_strides[2], dv_strides[2], scale, MASK, ROTARY, HEAD_DIM
    )


def launch_keys(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    mean: Tensor | None,
    dk: Tensor,
    dv: Tensor,
    shared: Shared,
    scale: float,
    tiles: KeyTiles,
    sizes: Sizes,
) -> Tensor | None:
    """Writes dk and dv of the key tiles that are one item; returns the parts of the others."""
    batch, heads, n, head_dim = q.shape
    n_items = len(tiles.items)
    parts = lse.new_empty(batch * heads, tiles.n_slots, 2, sizes.block_n, head_dim) if tiles.n_slots else None
    _sparse_attention_bwd_keys[(n_items * batch * heads,)](
        q, k, v, dout, lse, delta, dk, dv, parts, mean, shared.turns, shared.mask, shared.blocks, tiles.positions,
        tiles.items, tiles.gathered, row_strides(q), row_strides(k), row_strides(v), row_strides(dout),
        row_strides(dk), row_strides(dv), shared.mask_stride_b, shared.n_masked, shared.geometry, scale, n_items,
        tiles.n_slots, heads, n, **shared.options, SPLIT=parts is not None, BLOCK_M=sizes.block_m,
        BLOCK_N=sizes.block_n, num_warps=sizes.num_warps, num_stages=sizes.num_stages,
    )  # fmt: skip
    return parts


def launch_sum(
    parts: Tensor,
    positions: Tensor,
    splits: Tensor,
    mean: Tensor | None,
    dk: Tensor,
    dv: Tensor,
    shared: Shared,
    scale: float,
) -> None:
    """Writes dk and dv of the tiles in `splits`, rows of `positions` [n_tiles, BLOCK_N], from their parts."""
    batch_heads, n_slots, _, block_n, _ = parts.shape
    options = {name: shared.options[name] for name in ("MASK", "ROTARY", "HEAD_DIM")}
    _sum_parts[(len(splits) * batch_heads,)](
        parts, dk, dv, mean, shared.turns, positions, splits, row_strides(dk), row_strides(dv), scale, len(splits),
        n_slots, dk.shape[1], **options, BLOCK_N=block_n, num_warps=4 if block_n > 1 else 1,
    )  # fmt: skip
