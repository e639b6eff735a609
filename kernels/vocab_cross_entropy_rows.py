"""The row kernels of vocab_cross_entropy: the LayerNorm and its gradient; formulas are in vocab_cross_entropy.py."""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl
from dalle_fast.kernels.attention_blocks import unspecialised
from dalle_fast.kernels.vocab_cross_entropy_arguments import Call, Half, cdiv
from dalle_fast.kernels.vocab_cross_entropy_blocks import (
    DIVISOR,
    IGNORED,
    MEAN,
    RSTD,
    load_hidden,
    load_labels,
    load_parameter,
    load_statistic,
    row_offsets,
    store_statistic,
)
from dalle_fast.kernels.vocab_cross_entropy_sizes import Launch
from torch import Tensor


@triton.jit
def _row_statistics(
    hidden_ptr,
    offsets,
    counted,
    eps,
    DIVIDE_MAX: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """divisor, mean and rstd of the rows, float32 [BLOCK_M] each; the variance is that of what the mean leaves."""
    divisor = tl.full([BLOCK_M], 1.0, tl.float32)
    if DIVIDE_MAX:
        largest = tl.full([BLOCK_M], -float("inf"), tl.float32)
        for first in range(0, WIDTH, BLOCK_N):
            x = load_hidden(hidden_ptr, offsets, counted, divisor, first, False, WIDTH, BLOCK_N)
            in_row = (first + tl.arange(0, BLOCK_N) < WIDTH)[None, :]
            largest = tl.maximum(largest, tl.max(tl.where(in_row, x, -float("inf")), axis=1))
        divisor = tl.where(counted, largest, 1.0)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, WIDTH, BLOCK_N):
        total += tl.sum(load_hidden(hidden_ptr, offsets, counted, divisor, first, DIVIDE_MAX, WIDTH, BLOCK_N), axis=1)
    rough = total / WIDTH
    # far from zero the rough mean is off by some units: what it leaves says by how much
    total = tl.zeros([BLOCK_M], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, WIDTH, BLOCK_N):
        x = load_hidden(hidden_ptr, offsets, counted, divisor, first, DIVIDE_MAX, WIDTH, BLOCK_N) - rough[:, None]
        x = tl.where((first + tl.arange(0, BLOCK_N) < WIDTH)[None, :], x, 0.0)
        total += tl.sum(x, axis=1)
        squares += tl.sum(x * x, axis=1)
    left = total / WIDTH
    return divisor, rough + left, tl.rsqrt(squares / WIDTH - left * left + eps)


@unspecialised("n_positions", "first_position", "first_row", "start", "end", "n_statistics")
@triton.jit
def _vocab_cross_entropy_norm(
    hidden_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    labels_ptr,
    statistics_ptr,
    normed_ptr,
    hidden_strides,
    labels_strides,
    n_positions,
    first_position,
    first_row,
    start,
    end,
    n_statistics,
    eps,
    AGAIN: tl.constexpr,
    DIVIDE_MAX: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """normed [*, PADDED] of the rows start..end-1 of a half, zeros beyond rows and channels and where no label counts.

    AGAIN: statistics are read; else they are computed, and written from column first_row of [6, n_statistics] on.
    """
    local = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = start + local
    counted = load_labels(labels_ptr, row, end, labels_strides, n_positions, first_position) != IGNORED
    offsets = row_offsets(row, hidden_strides, n_positions, first_position)
    place = first_row + row
    if AGAIN:
        divisor = load_statistic(statistics_ptr, DIVISOR, place, n_statistics, counted, 1.0)
        mean = load_statistic(statistics_ptr, MEAN, place, n_statistics, counted, 0.0)
        rstd = load_statistic(statistics_ptr, RSTD, place, n_statistics, counted, 0.0)
    else:
        divisor, mean, rstd = _row_statistics(hidden_ptr, offsets, counted, eps, DIVIDE_MAX, WIDTH, BLOCK_M, BLOCK_N)
        store_statistic(statistics_ptr, DIVISOR, place, n_statistics, row < end, divisor)
        store_statistic(statistics_ptr, MEAN, place, n_statistics, row < end, mean)
        store_statistic(statistics_ptr, RSTD, place, n_statistics, row < end, rstd)
    for first in range(0, PADDED, BLOCK_N):
        x = load_hidden(hidden_ptr, offsets, counted, divisor, first, DIVIDE_MAX, WIDTH, BLOCK_N)
        weight = load_parameter(norm_weight_ptr, first, WIDTH, BLOCK_N)
        bias = load_parameter(norm_bias_ptr, first, WIDTH, BLOCK_N)
        normed = (x - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
        channel = first + tl.arange(0, BLOCK_N)
        normed = tl.where(counted[:, None] & (channel < WIDTH)[None, :], normed, 0.0)
        pointers = normed_ptr + local[:, None].to(tl.int64) * PADDED + channel[None, :]
        tl.store(pointers, normed.to(normed_ptr.dtype.element_ty), mask=(channel < PADDED)[None, :])


@triton.jit
def _norm_gradients(
    hidden_ptr,
    parts_ptr,
    local,
    offsets,
    counted,
    divisor,
    mean,
    rstd,
    rate,
    first,
    n_parts,
    part_rows,
    DIVIDE_MAX: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradient of the normed rows and the rows without weight and bias, float32 [BLOCK_M, BLOCK_N], from `first` on."""
    channel = first + tl.arange(0, BLOCK_N)
    mask = counted[:, None] & (channel < WIDTH)[None, :]
    pointers = parts_ptr + local[:, None].to(tl.int64) * PADDED + channel[None, :]
    dnormed = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(n_parts):
        dnormed += tl.load(pointers, mask=mask, other=0.0)
        pointers += part_rows.to(tl.int64) * PADDED
    dnormed = tl.where(mask, dnormed * rate, 0.0)
    x = load_hidden(hidden_ptr, offsets, counted, divisor, first, DIVIDE_MAX, WIDTH, BLOCK_N)
    return dnormed, tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)


@unspecialised(
    "half", "n_positions", "first_position", "first_row", "start", "end", "n_statistics", "n_parts", "part_rows",
    "first_program",
)  # fmt: skip
@triton.jit
def _vocab_cross_entropy_norm_bwd(
    hidden_ptr,
    norm_weight_ptr,
    labels_ptr,
    statistics_ptr,
    parts_ptr,
    rates_ptr,
    dhidden_ptr,
    dnorm_ptr,
    hidden_strides,
    labels_strides,
    dhidden_strides,
    half,
    n_positions,
    first_position,
    first_row,
    start,
    end,
    n_statistics,
    n_parts,
    part_rows,
    first_program,
    inverse_scale,
    DIVIDE_MAX: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dhidden of the rows start..end-1 of a half, and what they give to dnorm [programs, 2, C], weight and bias.

    parts [n_parts, part_rows, PADDED]: the gradient of normed is their sum times the half's rate and inverse_scale.
    """
    local = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = start + local
    counted = load_labels(labels_ptr, row, end, labels_strides, n_positions, first_position) != IGNORED
    offsets = row_offsets(row, hidden_strides, n_positions, first_position)
    dhidden_offsets = row_offsets(row, dhidden_strides, n_positions, first_position)
    place = first_row + row
    divisor = load_statistic(statistics_ptr, DIVISOR, place, n_statistics, counted, 1.0)
    mean = load_statistic(statistics_ptr, MEAN, place, n_statistics, counted, 0.0)
    rstd = load_statistic(statistics_ptr, RSTD, place, n_statistics, counted, 0.0)
    rate = tl.load(rates_ptr + half) * inverse_scale

    mean_g = tl.zeros([BLOCK_M], tl.float32)
    mean_gx = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, WIDTH, BLOCK_N):
        dnormed, x = _norm_gradients(
            hidden_ptr, parts_ptr, local, offsets, counted, divisor, mean, rstd, rate, first, n_parts, part_rows,
            DIVIDE_MAX, WIDTH, PADDED, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        g = dnormed * load_parameter(norm_weight_ptr, first, WIDTH, BLOCK_N)[None, :]
        mean_g += tl.sum(g, axis=1)
        mean_gx += tl.sum(g * x, axis=1)
    mean_g /= WIDTH
    mean_gx /= WIDTH
    dnorm_ptr += (first_program + tl.program_id(0)).to(tl.int64) * 2 * WIDTH
    for first in range(0, WIDTH, BLOCK_N):
        dnormed, x = _norm_gradients(
            hidden_ptr, parts_ptr, local, offsets, counted, divisor, mean, rstd, rate, first, n_parts, part_rows,
            DIVIDE_MAX, WIDTH, PADDED, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        channel = first + tl.arange(0, BLOCK_N)
        in_width = channel < WIDTH
        tl.store(dnorm_ptr + channel, tl.sum(dnormed * x, axis=0), mask=in_width)
        tl.store(dnorm_ptr + WIDTH + channel, tl.sum(dnormed, axis=0), mask=in_width)
        g = dnormed * load_parameter(norm_weight_ptr, first, WIDTH, BLOCK_N)[None, :]
        dhidden = rstd[:, None] * (g - mean_g[:, None] - x * mean_gx[:, None])
        if DIVIDE_MAX:
            dhidden = dhidden / divisor[:, None]
        dhidden = tl.where(counted[:, None], dhidden, 0.0)
        pointers = dhidden_ptr + dhidden_offsets[:, None] + channel[None, :]
        mask = (row < end)[:, None] & in_width[None, :]
        tl.store(pointers, dhidden.to(dhidden_ptr.dtype.element_ty), mask=mask)


def launch_norm(
    call: Call, half: Half, statistics: Tensor, normed: Tensor, rows: range, launch: Launch, *, eps: float | None
) -> None:
    """Fills all of normed [at least the rows, channels]; statistics, too, where eps is given, else they are read."""
    sizes = launch.rows
    _vocab_cross_entropy_norm[(len(normed) // sizes.block_m,)](
        call.hidden, call.norm_weight, call.norm_bias, call.labels, statistics, normed, *call.strides,
        half.n_positions, half.first_position, half.first_row, rows.start, rows.stop, statistics.shape[1],
        0.0 if eps is None else eps, AGAIN=eps is None, DIVIDE_MAX=call.divide_max, WIDTH=call.width,
        PADDED=normed.shape[1], BLOCK_M=sizes.block_m, BLOCK_N=sizes.block_n, num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
    )  # fmt: skip


def launch_norm_gradients(
    call: Call,
    half: Half,
    statistics: Tensor,
    parts: Tensor,
    rates: Tensor,
    dhidden: Tensor,
    dnorm: Tensor,
    rows: range,
    first_program: int,
    launch: Launch,
    *,
    scale: float,
) -> None:
    """Writes the rows of dhidden [B, N, C], and dnorm [programs, 2, C] from first_program on.

    Args: parts: float32 [n_parts, at least the rows, channels], `scale` times a sum of gradients but for the rates [2].
    """
    sizes = launch.rows
    _vocab_cross_entropy_norm_bwd[(cdiv(len(rows), sizes.block_m),)](
        call.hidden, call.norm_weight, call.labels, statistics, parts, rates, dhidden, dnorm, *call.strides,
        (dhidden.stride(0), dhidden.stride(1)), half.which, half.n_positions, half.first_position, half.first_row,
        rows.start, rows.stop, statistics.shape[1], parts.shape[0], parts.shape[1], first_program, 1 / scale,
        DIVIDE_MAX=call.divide_max, WIDTH=call.width, PADDED=parts.shape[2], BLOCK_M=sizes.block_m,
        BLOCK_N=sizes.block_n, num_warps=sizes.num_warps, num_stages=sizes.num_stages,
    )  # fmt: skip
