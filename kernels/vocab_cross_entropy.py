"""The output head with its two losses on NVIDIA GPUs: logits in tiles, the head as two blocks, no atomics.

Forward, for M = B N rows h of C channels; text rows meet text codes, image rows image codes, P logits in all:

    y = LN(h)  or  LN(h / m), m the signed row maximum, a constant to autograd
    l = y . w^T + b        loss of a half = mean over its labels that count of  max l + log sum e^(l - max l) - l_label

Backward, with p = e^(l - max l) / sum, r = dloss of the half / its labels that count, G = p - onehot(label):

    dy = r G . w      dw = r G^T . y      db = r sum over rows of G
    dh = rstd (g - mean g - x mean (g x)) [/ m],  g = dy w_norm, x = (h [/ m] - mean) rstd
    dw_norm = sum over rows of dy x,  db_norm = sum over rows of dy

Saved: the inputs and statistics [6, M], float32: divisor m or 1, mean, rstd, max l, sum e^(l - max l), loss. Maximum
and sum are apart: at logits of 1e4 their logarithm would be off by 1e-3. Forward keeps y [M, C] while it runs; programs
take a tile of rows and a share of the codes and leave three numbers a row and share. Backward takes the rows of a half
in chunks: y and l again, then G of the chunk, at most WORKSPACE bytes, which two products read; so logits are computed
twice, not once for each block of channels of each gradient. dy is summed in parts of the codes, dw over the chunks in
order, the norm's gradients and db over [programs, *]: every order depends on the shape alone.

Precision: statistics, logits and sums float32; operands y, w, G of the products' dtype (G rounded once), those of
float32 products float32, never TF32. A label out of range makes its loss NaN.
Work: forward 2 C P FLOPs, backward 6 C P. Floor in bytes: inputs and gradients once; y is written and read by each tile
of codes, w by each tile of rows, both from the L2 cache; backward writes and reads twice P numbers of G.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import torch
import triton
import triton.language as tl
from dalle_fast.kernels.attention_blocks import unspecialised
from dalle_fast.kernels.sparse_attention_arguments import architecture, launching_on
from dalle_fast.kernels.vocab_cross_entropy_arguments import Call, Half, cdiv, counts_of, filled, prepare, split
from dalle_fast.kernels.vocab_cross_entropy_blocks import (
    IGNORED,
    LOG2_E,
    LOGIT_MAX,
    LOGIT_SUM,
    ROW_LOSS,
    load_labels,
    store_statistic,
    tile_logits,
)
from dalle_fast.kernels.vocab_cross_entropy_products import (
    SCALE,
    launch_logit_gradients,
    launch_normed_gradient,
    launch_weight_gradient,
)
from dalle_fast.kernels.vocab_cross_entropy_rows import launch_norm, launch_norm_gradients
from dalle_fast.kernels.vocab_cross_entropy_sizes import Launch, pick_vocab_cross_entropy
from torch import Tensor

__all__ = ["backward", "forward", "launch_backward", "launch_forward", "pick_vocab_cross_entropy"]

_STATISTICS = 6
MERGE_ROWS = 128  # of a program of the second forward kernel
WORKSPACE = 2**26  # bytes of G at once
# The running maximum begins here: finite, so that a code whose logit is -inf may come first.
_LOWEST: tl.constexpr = tl.constexpr(-1.0e30)


@unspecialised(
    "n_positions", "first_position", "n_rows", "first_code", "n_codes", "share_codes", "part_rows"
)  # fmt: skip
@triton.jit
def _vocab_cross_entropy_fwd(
    normed_ptr,
    weight_ptr,
    bias_ptr,
    labels_ptr,
    parts_ptr,
    labels_strides,
    stride_weight,
    n_positions,
    first_position,
    n_rows,
    first_code,
    n_codes,
    share_codes,
    part_rows,
    HAS_BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Of a tile of rows and a share of the codes: parts [shares, 3, part_rows], largest logit, sum, logit of the label.

    The last is 0 in the shares that the label is not in.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    share = tl.program_id(1)
    label = load_labels(labels_ptr, row, n_rows, labels_strides, n_positions, first_position).to(tl.int32)
    largest = tl.full([BLOCK_M], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    of_label = tl.zeros([BLOCK_M], tl.float32)
    for first in range(share * share_codes, tl.minimum((share + 1) * share_codes, n_codes), BLOCK_N):
        code = first + tl.arange(0, BLOCK_N)
        logits = tile_logits(
            normed_ptr, weight_ptr, bias_ptr, row, code, stride_weight, first_code, n_codes, HAS_BIAS, WIDTH, PADDED,
            BLOCK_K,
        )  # fmt: skip
        new_max = tl.maximum(largest, tl.max(logits, axis=1))
        total *= tl.exp2((largest - new_max) * LOG2_E)
        total += tl.sum(tl.exp2((logits - new_max[:, None]) * LOG2_E), axis=1)
        largest = new_max
        of_label += tl.sum(tl.where(label[:, None] == code[None, :], logits, 0.0), axis=1)
    pointers = parts_ptr + share.to(tl.int64) * 3 * part_rows + row
    tl.store(pointers, largest)
    tl.store(pointers + part_rows, total)
    tl.store(pointers + 2 * part_rows, of_label)


@unspecialised(
    "n_positions", "first_position", "first_row", "n_rows", "n_statistics", "n_codes", "n_shares", "part_rows"
)
@triton.jit
def _vocab_cross_entropy_merge(
    parts_ptr,
    labels_ptr,
    statistics_ptr,
    labels_strides,
    n_positions,
    first_position,
    first_row,
    n_rows,
    n_statistics,
    n_codes,
    n_shares,
    part_rows,
    BLOCK_M: tl.constexpr,
):
    """Largest logit, sum and loss of the rows of a half, from the parts of their shares."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = row < n_rows
    label = load_labels(labels_ptr, row, n_rows, labels_strides, n_positions, first_position)
    largest = tl.full([BLOCK_M], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    of_label = tl.zeros([BLOCK_M], tl.float32)
    pointers = parts_ptr + row
    for _ in range(n_shares):
        share_max = tl.load(pointers, mask=in_rows, other=0.0)
        new_max = tl.maximum(largest, share_max)
        total *= tl.exp2((largest - new_max) * LOG2_E)
        share_sum = tl.load(pointers + part_rows, mask=in_rows, other=1.0)
        total += share_sum * tl.exp2((share_max - new_max) * LOG2_E)
        largest = new_max
        of_label += tl.load(pointers + 2 * part_rows, mask=in_rows, other=0.0)
        pointers += 3 * part_rows
    # the large numbers first: their difference is small
    loss = (largest - of_label) + tl.log(total)
    loss = tl.where((label >= 0) & (label < n_codes), loss, float("nan"))
    place = first_row + row
    store_statistic(statistics_ptr, LOGIT_MAX, place, n_statistics, in_rows, largest)
    store_statistic(statistics_ptr, LOGIT_SUM, place, n_statistics, in_rows, total)
    store_statistic(statistics_ptr, ROW_LOSS, place, n_statistics, in_rows, tl.where(label != IGNORED, loss, 0.0))


def forward(
    hidden: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    n_text: int,
    num_text_tokens: int,
    divide_max: bool,
    eps: float,
    product_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Launches the forward kernels.

    Args: as `dalle_fast.reference.vocab_cross_entropy`, checked by the op; at least one row. Dtypes may differ.
    Returns: float32 [2], text and image; float32 statistics for `backward` [6, B N].
    """
    launch = pick_vocab_cross_entropy(product_dtype, architecture(hidden.device))
    call = prepare(
        hidden, norm_weight, norm_bias, weight, bias, labels, n_text=n_text, num_text_tokens=num_text_tokens,
        divide_max=divide_max, product_dtype=product_dtype,
    )  # fmt: skip
    return launch_forward(call, eps=eps, launch=launch)


def launch_forward(call: Call, *, eps: float, launch: Launch) -> tuple[Tensor, Tensor]:
    """`forward` with launch sizes of the caller's choice."""
    statistics = call.hidden.new_empty(_STATISTICS, call.labels.numel(), dtype=torch.float32)
    with launching_on(call.hidden.device):
        for half in call.halves:
            if half.n_rows:
                _launch_half(call, half, statistics, eps, launch)
    losses = statistics[ROW_LOSS.value].split([half.n_rows for half in call.halves])
    return torch.stack([loss.sum() for loss in losses]) / counts_of(call).clamp(min=1), statistics


def _launch_half(call: Call, half: Half, statistics: Tensor, eps: float, launch: Launch) -> None:
    sizes, rows = launch.logits, range(half.n_rows)
    normed = _buffer(call, half.n_rows, launch)
    launch_norm(call, half, statistics, normed, rows, launch, eps=eps)
    n_tiles = len(normed) // sizes.block_m
    n_shares, share_codes = split(half.n_codes, sizes.block_n, n_tiles)
    parts = statistics.new_empty(n_shares, 3, len(normed))
    _vocab_cross_entropy_fwd[(n_tiles, n_shares)](
        normed, call.weight, call.bias, call.labels, parts, call.strides[1], call.weight.stride(0), half.n_positions,
        half.first_position, half.n_rows, half.first_code, half.n_codes, share_codes, len(normed),
        HAS_BIAS=call.bias is not None, WIDTH=call.width, PADDED=normed.shape[1], BLOCK_M=sizes.block_m,
        BLOCK_N=sizes.block_n, BLOCK_K=sizes.block_k, num_warps=sizes.num_warps, num_stages=sizes.num_stages,
    )  # fmt: skip
    _vocab_cross_entropy_merge[(cdiv(half.n_rows, MERGE_ROWS),)](
        parts, call.labels, statistics, call.strides[1], half.n_positions, half.first_position, half.first_row,
        half.n_rows, statistics.shape[1], half.n_codes, n_shares, len(normed), BLOCK_M=MERGE_ROWS, num_warps=4,
        num_stages=1,
    )  # fmt: skip


def backward(
    dlosses: Tensor,
    hidden: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    statistics: Tensor,
    *,
    n_text: int,
    num_text_tokens: int,
    divide_max: bool,
    product_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launches the backward kernels for dlosses, float32 [2], and what `forward` took and returned.

    Returns: gradients of hidden, norm_weight, norm_bias, weight and bias ([0] where there is none), contiguous, each in
        the dtype of its tensor.
    """
    launch = pick_vocab_cross_entropy(product_dtype, architecture(hidden.device))
    call = prepare(
        hidden, norm_weight, norm_bias, weight, bias, labels, n_text=n_text, num_text_tokens=num_text_tokens,
        divide_max=divide_max, product_dtype=product_dtype,
    )  # fmt: skip
    return launch_backward(dlosses, statistics, call, weight.dtype, launch=launch)


def launch_backward(
    dlosses: Tensor, statistics: Tensor, call: Call, weight_dtype: torch.dtype, *, launch: Launch
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`backward` with launch sizes of the caller's choice."""
    rates = dlosses / counts_of(call).clamp(min=1)
    dhidden = call.hidden.new_empty(call.hidden.shape)
    dweight = call.weight.new_empty(call.weight.shape, dtype=weight_dtype)
    dbias = call.weight.new_empty(0) if call.bias is None else call.bias.new_empty(call.bias.shape)
    n_programs = [cdiv(half.n_rows, launch.rows.block_m) for half in call.halves]
    dnorm = statistics.new_empty(sum(n_programs), 2, call.width)
    with launching_on(dlosses.device):
        for half in call.halves:
            codes = slice(half.first_code, half.first_code + half.n_codes)
            if not half.n_rows:
                dweight[codes], dbias[codes] = 0, 0
                continue
            parts = _launch_half_backward(
                call, half, statistics, rates, dhidden, dnorm, n_programs[0] * half.which, dweight, launch
            )
            if parts is not None:
                dbias[codes] = parts.sum(0)
    parameters = call.norm_weight, call.norm_bias
    # summed apart: results of an op must not share memory
    dnorms = [parts.sum(0).to(t.dtype) for parts, t in zip(dnorm.unbind(1), parameters, strict=True)]
    return dhidden, dnorms[0], dnorms[1], dweight, dbias


def _launch_half_backward(
    call: Call,
    half: Half,
    statistics: Tensor,
    rates: Tensor,
    dhidden: Tensor,
    dnorm: Tensor,
    first_program: int,
    dweight: Tensor,
    launch: Launch,
) -> Tensor | None:
    """Writes all gradients of a half but dbias, of which it returns the parts [tiles, codes], None without bias."""
    n_columns = max(1, filled(half.n_codes, launch.code_multiple))
    fit = WORKSPACE // (n_columns * call.product_dtype.itemsize) // launch.row_multiple * launch.row_multiple
    chunk = max(launch.row_multiple, fit)
    is_whole = half.n_rows <= chunk
    sums = statistics.new_empty(1 if is_whole else (half.n_codes, call.width))
    n_tiles = filled(half.n_rows, launch.row_multiple) // launch.logits.block_m
    dbias = None if call.bias is None else statistics.new_empty(n_tiles, half.n_codes)
    for start in range(0, half.n_rows, chunk):
        rows = range(start, min(start + chunk, half.n_rows))
        parts = _launch_code_gradients(call, half, statistics, rates, sums, dweight, dbias, rows, n_columns, launch)
        launch_norm_gradients(
            call, half, statistics, parts, rates, dhidden, dnorm, rows,
            first_program + start // launch.rows.block_m, launch, scale=SCALE.value,
        )  # fmt: skip
        del parts  # before the next chunk takes as much memory
    return dbias


def _launch_code_gradients(
    call: Call,
    half: Half,
    statistics: Tensor,
    rates: Tensor,
    sums: Tensor,
    dweight: Tensor,
    dbias: Tensor | None,
    rows: range,
    n_columns: int,
    launch: Launch,
) -> Tensor:
    """Adds what a chunk of rows gives to sums, dweight and dbias; returns what `launch_normed_gradient` does."""
    normed = _buffer(call, len(rows), launch)
    dlogits = normed.new_empty(len(normed), n_columns)
    launch_norm(call, half, statistics, normed, rows, launch, eps=None)
    if half.n_codes:
        launch_logit_gradients(call, half, statistics, normed, rates, dlogits, dbias, rows, launch)
        launch_weight_gradient(call, half, dlogits, normed, rates, sums, dweight, rows, launch)
    return launch_normed_gradient(call, half, dlogits, normed.shape[1], launch)


def _buffer(call: Call, n_rows: int, launch: Launch) -> Tensor:
    """Uninitialised, for normed rows: whole blocks of every kernel, which need not ask where it ends."""
    shape = filled(n_rows, launch.row_multiple), filled(call.width, launch.channel_multiple)
    return call.hidden.new_empty(shape, dtype=call.product_dtype)
