"""What several kernels of vocab_cross_entropy do with a tile: find its rows, load hidden rows, form logits.

Rows are those of one half, text or image, counted sample by sample; a tile may reach beyond the last one. Rows that do
not count load as zeros, whatever they hold.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
import triton
import triton.language as tl

IGNORED: tl.constexpr = tl.constexpr(-100)  # a label that does not count, torch's own ignore_index
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
# Rows of the statistics [6, M]; see vocab_cross_entropy.py.
DIVISOR: tl.constexpr = tl.constexpr(0)
MEAN: tl.constexpr = tl.constexpr(1)
RSTD: tl.constexpr = tl.constexpr(2)
LOGIT_MAX: tl.constexpr = tl.constexpr(3)
LOGIT_SUM: tl.constexpr = tl.constexpr(4)
ROW_LOSS: tl.constexpr = tl.constexpr(5)


@triton.jit
def row_offsets(row, strides, n_positions, first_position):
    """int64, shape of row: where the row of a tensor with these strides by sample and position starts."""
    sample, position = row // n_positions, first_position + row % n_positions
    return sample.to(tl.int64) * strides[0] + position.to(tl.int64) * strides[1]


@triton.jit
def load_labels(labels_ptr, row, end, strides, n_positions, first_position):
    """int64, shape of row: the labels; IGNORED for rows from `end` on."""
    offsets = row_offsets(row, strides, n_positions, first_position)
    return tl.load(labels_ptr + offsets, mask=row < end, other=IGNORED)


@triton.jit
def load_hidden(
    hidden_ptr, offsets, counted, divisor, first, DIVIDE_MAX: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr
):
    """float32 [ROWS, BLOCK_N]: channels from `first` on of the rows that start at `offsets`, over their divisor."""
    channel = first + tl.arange(0, BLOCK_N)
    mask = counted[:, None] & (channel < WIDTH)[None, :]
    x = tl.load(hidden_ptr + offsets[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    if DIVIDE_MAX:
        x = tl.div_rn(x, tl.broadcast_to(divisor[:, None], x.shape))
    return x


@triton.jit
def load_parameter(parameter_ptr, first, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    """float32 [BLOCK_N]: channels from `first` on; zeros beyond the last."""
    channel = first + tl.arange(0, BLOCK_N)
    return tl.load(parameter_ptr + channel, mask=channel < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def load_statistic(statistics_ptr, which: tl.constexpr, row, n_statistics, mask, other):
    """float32, shape of row: `which` of statistics [6, n_statistics]."""
    return tl.load(statistics_ptr + which * tl.cast(n_statistics, tl.int64) + row, mask=mask, other=other)


@triton.jit
def store_statistic(statistics_ptr, which: tl.constexpr, row, n_statistics, mask, value):
    """Writes value, shape of row, where `load_statistic` finds it."""
    tl.store(statistics_ptr + which * tl.cast(n_statistics, tl.int64) + row, value, mask=mask)


@triton.jit
def tile_logits(
    normed_ptr,
    weight_ptr,
    bias_ptr,
    local,
    code,
    stride_weight,
    first_code,
    n_codes,
    HAS_BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """float32 [ROWS, CODES]: logits of the rows `local` of a buffer [*, PADDED]; -inf for codes from n_codes on."""
    is_code = code < n_codes
    normed_rows = normed_ptr + local.to(tl.int64) * PADDED
    code_rows = weight_ptr + (first_code + code).to(tl.int64) * stride_weight
    acc = tl.zeros([local.shape[0], code.shape[0]], tl.float32)
    for first in range(0, WIDTH, BLOCK_K):
        channel = first + tl.arange(0, BLOCK_K)
        mask = is_code[None, :]
        if WIDTH % BLOCK_K != 0:
            mask = mask & (channel < WIDTH)[:, None]
        normed = tl.load(normed_rows[:, None] + channel[None, :])
        weight = tl.load(code_rows[None, :] + channel[:, None], mask=mask, other=0.0)  # [BLOCK_K, CODES]
        acc = tl.dot(normed, weight, acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + first_code + code, mask=is_code, other=0.0).to(tl.float32)[None, :]
    return tl.where(is_code[None, :], acc, -float("inf"))
