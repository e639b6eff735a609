"""The products of vocab_cross_entropy's backward: gradients of the logits of a chunk of rows, then what they multiply.

Formulas and precision are in vocab_cross_entropy.py. `dlogits` [rows, codes] is SCALE times softmax less one-hot,
without the rate of the half; rounded to 16 bits its smallest numbers would be lost in float16 otherwise.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import torch
import triton
import triton.language as tl
from dalle_fast.kernels.attention_blocks import unspecialised
from dalle_fast.kernels.vocab_cross_entropy_arguments import Call, Half, cdiv, split
from dalle_fast.kernels.vocab_cross_entropy_blocks import (
    IGNORED,
    LOG2_E,
    LOGIT_MAX,
    LOGIT_SUM,
    load_labels,
    load_statistic,
    tile_logits,
)
from dalle_fast.kernels.vocab_cross_entropy_sizes import Launch
from torch import Tensor

SCALE: tl.constexpr = tl.constexpr(2.0**15)  # the largest power of two in float16: |softmax - one-hot| is at most 1


@unspecialised(
    "half", "n_positions", "first_position", "first_row", "start", "end", "n_statistics", "first_code", "n_codes",
    "first_tile",
)  # fmt: skip
@triton.jit
def _vocab_cross_entropy_bwd_logits(
    normed_ptr,
    weight_ptr,
    bias_ptr,
    labels_ptr,
    statistics_ptr,
    rates_ptr,
    dlogits_ptr,
    dbias_ptr,
    labels_strides,
    stride_weight,
    stride_dlogits,
    half,
    n_positions,
    first_position,
    first_row,
    start,
    end,
    n_statistics,
    first_code,
    n_codes,
    first_tile,
    HAS_BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dlogits [BLOCK_M, BLOCK_N], zeros beyond the last row and code; dbias parts [tiles of rows, n_codes], float32."""
    local = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = start + local
    code = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    label = load_labels(labels_ptr, row, end, labels_strides, n_positions, first_position)
    counted = label != IGNORED
    logits = tile_logits(
        normed_ptr, weight_ptr, bias_ptr, local, code, stride_weight, first_code, n_codes, HAS_BIAS, WIDTH, PADDED,
        BLOCK_K,
    )  # fmt: skip
    largest = load_statistic(statistics_ptr, LOGIT_MAX, first_row + row, n_statistics, counted, float("inf"))
    total = load_statistic(statistics_ptr, LOGIT_SUM, first_row + row, n_statistics, counted, 1.0)
    dlogits = tl.exp2((logits - largest[:, None]) * LOG2_E) / total[:, None]
    dlogits -= tl.where(label.to(tl.int32)[:, None] == code[None, :], 1.0, 0.0)
    # not by a factor of 0: of a row without a label logits need not be numbers
    dlogits = tl.where(counted[:, None], dlogits, 0.0)
    if HAS_BIAS:
        dbias = tl.sum(dlogits, axis=0) * tl.load(rates_ptr + half)
        pointers = dbias_ptr + (first_tile + tl.program_id(0)).to(tl.int64) * n_codes + code
        tl.store(pointers, dbias, mask=code < n_codes)
    pointers = dlogits_ptr + local[:, None].to(tl.int64) * stride_dlogits + code[None, :]
    tl.store(pointers, (dlogits * SCALE).to(dlogits_ptr.dtype.element_ty))


@unspecialised("first_code", "n_codes", "part_blocks", "part_rows")
@triton.jit
def _vocab_cross_entropy_bwd_normed(
    dlogits_ptr,
    weight_ptr,
    parts_ptr,
    stride_weight,
    stride_dlogits,
    first_code,
    n_codes,
    part_blocks,
    part_rows,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dlogits . weight [BLOCK_M, BLOCK_N] over one part of the codes: float32 [parts, part_rows, PADDED]."""
    local = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    dlogits_rows = dlogits_ptr + local.to(tl.int64) * stride_dlogits
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # counted in blocks: the compiler must know that a block starts where 16 bytes do
    for block in range(part * part_blocks, tl.minimum((part + 1) * part_blocks, tl.cdiv(n_codes, BLOCK_K))):
        code = block * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = (code < n_codes)[:, None]
        if WIDTH % BLOCK_N != 0:
            mask = mask & (channel < WIDTH)[None, :]
        pointers = weight_ptr + (first_code + code).to(tl.int64)[:, None] * stride_weight + channel[None, :]
        weight = tl.load(pointers, mask=mask, other=0.0)  # [BLOCK_K, BLOCK_N]
        dlogits = tl.load(dlogits_rows[:, None] + code[None, :])
        acc = tl.dot(dlogits, weight, acc, input_precision="ieee")
    place = part.to(tl.int64) * part_rows + local
    tl.store(parts_ptr + place[:, None] * PADDED + channel[None, :], acc)


@unspecialised("half", "n_rows", "first_code", "n_codes", "is_first", "is_last")
@triton.jit
def _vocab_cross_entropy_bwd_weight(
    dlogits_ptr,
    normed_ptr,
    rates_ptr,
    sums_ptr,
    dweight_ptr,
    stride_dlogits,
    half,
    n_rows,
    first_code,
    n_codes,
    inverse_scale,
    is_first,
    is_last,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dlogits^T . normed [BLOCK_M codes, BLOCK_N channels] over a chunk of rows.

    sums [n_codes, WIDTH], float32: what the chunks before gave, unless is_first; if is_last, dweight [V, WIDTH] gets
    all.
    """
    code = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, n_rows, BLOCK_K):
        row = (first + tl.arange(0, BLOCK_K)).to(tl.int64)
        dlogits = tl.load(dlogits_ptr + row[None, :] * stride_dlogits + code[:, None])  # [BLOCK_M, BLOCK_K]
        normed = tl.load(normed_ptr + row[:, None] * PADDED + channel[None, :])
        acc = tl.dot(dlogits, normed, acc, input_precision="ieee")
    mask = (code < n_codes)[:, None] & (channel < WIDTH)[None, :]
    offsets = code.to(tl.int64)[:, None] * WIDTH + channel[None, :]
    if is_first == 0:
        acc += tl.load(sums_ptr + offsets, mask=mask, other=0.0)
    if is_last == 0:
        tl.store(sums_ptr + offsets, acc, mask=mask)
    else:
        dweight = acc * (tl.load(rates_ptr + half) * inverse_scale)
        pointers = dweight_ptr + tl.cast(first_code, tl.int64) * WIDTH + offsets
        tl.store(pointers, dweight.to(dweight_ptr.dtype.element_ty), mask=mask)


def launch_logit_gradients(
    call: Call,
    half: Half,
    statistics: Tensor,
    normed: Tensor,
    rates: Tensor,
    dlogits: Tensor,
    dbias: Tensor | None,
    rows: range,
    launch: Launch,
) -> None:
    """Fills all of dlogits [at least the rows, at least the codes], and these rows' tiles of dbias [tiles, codes]."""
    sizes = launch.logits
    _vocab_cross_entropy_bwd_logits[(len(dlogits) // sizes.block_m, dlogits.shape[1] // sizes.block_n)](
        normed, call.weight, call.bias, call.labels, statistics, rates, dlogits, dbias, call.strides[1],
        call.weight.stride(0), dlogits.stride(0), half.which, half.n_positions, half.first_position, half.first_row,
        rows.start, rows.stop, statistics.shape[1], half.first_code, half.n_codes, rows.start // sizes.block_m,
        HAS_BIAS=dbias is not None, WIDTH=call.width, PADDED=normed.shape[1], BLOCK_M=sizes.block_m,
        BLOCK_N=sizes.block_n, BLOCK_K=sizes.block_k, num_warps=sizes.num_warps, num_stages=sizes.num_stages,
    )  # fmt: skip


def launch_normed_gradient(call: Call, half: Half, dlogits: Tensor, width: int, launch: Launch) -> Tensor:
    """float32 [parts, rows of dlogits, width]: SCALE times the gradient of normed in parts, but for the rate."""
    sizes = launch.dnormed
    n_tiles, n_blocks = len(dlogits) // sizes.block_m, width // sizes.block_n
    n_parts, part_codes = split(half.n_codes, sizes.block_k, n_tiles * n_blocks)
    parts = dlogits.new_empty(n_parts, len(dlogits), width, dtype=torch.float32)
    _vocab_cross_entropy_bwd_normed[(n_tiles, n_blocks, n_parts)](
        dlogits, call.weight, parts, call.weight.stride(0), dlogits.stride(0), half.first_code, half.n_codes,
        part_codes // sizes.block_k, len(dlogits), WIDTH=call.width, PADDED=width, BLOCK_M=sizes.block_m,
        BLOCK_N=sizes.block_n, BLOCK_K=sizes.block_k, num_warps=sizes.num_warps, num_stages=sizes.num_stages,
    )  # fmt: skip
    return parts


def launch_weight_gradient(
    call: Call,
    half: Half,
    dlogits: Tensor,
    normed: Tensor,
    rates: Tensor,
    sums: Tensor,
    dweight: Tensor,
    rows: range,
    launch: Launch,
) -> None:
    """Adds what these rows give to sums [codes, C], float32; behind the last rows of the half fills its dweight."""
    sizes = launch.dweight
    _vocab_cross_entropy_bwd_weight[(cdiv(half.n_codes, sizes.block_m), cdiv(call.width, sizes.block_n))](
        dlogits, normed, rates, sums, dweight, dlogits.stride(0), half.which, len(rows), half.first_code,
        half.n_codes, 1 / SCALE.value, int(rows.start == 0), int(rows.stop == half.n_rows), WIDTH=call.width,
        PADDED=normed.shape[1], BLOCK_M=sizes.block_m, BLOCK_N=sizes.block_n, BLOCK_K=sizes.block_k,
        num_warps=sizes.num_warps, num_stages=sizes.num_stages,
    )  # fmt: skip
