"""What every sparse attention kernel does with a block: load rows, turn pairs by rotary angles, ask the pattern.

Positions are int32, -1 where a tile or block is not full: such rows load as zeros and meet nobody.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from collections.abc import Callable

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


def unspecialised(*names: str) -> Callable:
    """Above @triton.jit: the same code for every value of these arguments. Triton would compile anew for each length,
    batch or table that is 1 or starts being a multiple of 16.
    """
    return lambda kernel: triton.jit(kernel.fn, do_not_specialize=names)


@triton.jit
def allowed(query, key, geometry, blocks_ptr, PATTERN: tl.constexpr):
    """bool, broadcast shape of positions `query` and `key`: the twin of `AttentionPattern.allowed` in a kernel.

    geometry: (text_len, grid_rows, grid_cols, and three options of the pattern: see `pattern_arguments`).
    blocks_ptr: int8 [n_blocks, n_blocks], block_sparse only.
    """
    text_len, grid_rows, grid_cols, option_a, option_b, option_c = geometry
    real = (query >= 0) & (key >= 0)
    if PATTERN == "bidirectional":
        result = real
    elif PATTERN == "full":
        result = real & (key <= query)
    elif PATTERN == "block_sparse":
        causal = real & (key <= query)
        query_block = tl.minimum(query // option_a, option_b - 1)
        key_block = tl.minimum(key // option_a, option_b - 1)
        result = causal & (tl.load(blocks_ptr + query_block * option_b + key_block, mask=causal, other=0) != 0)
    else:
        near = _near(query - text_len, key - text_len, grid_rows, grid_cols, option_a, option_b, option_c, PATTERN)
        # key <= query: an image key has an image query
        result = real & (key <= query) & ((key < text_len) | near)
    return result


@triton.jit
def _near(query, key, grid_rows, grid_cols, option_a, option_b, option_c, PATTERN: tl.constexpr):
    """The rule between image tokens at raster indices `query` >= `key` >= 0; anything for others."""
    query_row, key_row = query // grid_cols, key // grid_cols
    query_col, key_col = query - query_row * grid_cols, key - key_row * grid_cols
    rows, cols = query_row - key_row, query_col - key_col
    if PATTERN == "axial_row":
        near = rows == 0
    elif PATTERN == "axial_col":
        near = cols == 0
    elif PATTERN == "paper_row":
        near = query - key <= grid_cols
    elif PATTERN == "conv_like":  # reach, dilation
        near = (rows <= option_a) & (cols >= 0) & (cols <= option_a)
        # remainders of rows and columns, not of [M, N] differences: few divisions
        near = near & (query_row % option_b == key_row % option_b) & (query_col % option_b == key_col % option_b)
    elif PATTERN == "paper_conv_none":  # half of the window
        near = (rows <= option_a) & (cols >= -option_a) & (cols <= option_a)
    elif PATTERN == "paper_conv_torus":  # half, clipped to rows, to columns
        row_inside = _wrapped(option_b - rows, grid_rows) <= 2 * option_b
        near = row_inside & (_wrapped(option_c - cols, grid_cols) <= 2 * option_c)
    else:  # paper_conv_raster: offsets row * C + col with row, col within half of 0, running over row ends
        tl.static_assert(PATTERN == "paper_conv_raster")
        near = query - key <= option_a * grid_cols + option_a
        near = near & (_wrapped(option_c + cols, grid_cols) <= 2 * option_c)
    return near


@triton.jit
def _wrapped(x, size):
    """x modulo size for -size <= x < 2 * size, without a division."""
    x = tl.where(x < 0, x + size, x)
    return tl.where(x >= size, x - size, x)


@triton.jit
def load_rows(x_ptr, positions, stride_n, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr):
    """[ROWS, HEAD_DIM]: rows of x at `positions`; zeros for -1, which occurs only where PADDED."""
    offs_d = tl.arange(0, HEAD_DIM)
    pointers = x_ptr + positions[:, None].to(tl.int64) * stride_n + offs_d[None, :]
    return tl.load(pointers, mask=positions[:, None] >= 0, other=0.0) if PADDED else tl.load(pointers)


@triton.jit
def load_turns(turn_ptr, positions, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr, PADDED: tl.constexpr):
    """float32 [ROWS, HEAD_DIM]: cosine and sine of each pair of channels; nothing to speak of without rotary."""
    return load_rows(turn_ptr, positions, HEAD_DIM, HEAD_DIM, PADDED) if ROTARY else 0.0


@triton.jit
def turn(x, turns, ROTARY: tl.constexpr, BACK: tl.constexpr):
    """x [ROWS, HEAD_DIM] with its channel pairs (2i, 2i + 1) turned by `load_turns`, or turned back; dtype of x."""
    if ROTARY:
        even, odd = tl.split(tl.reshape(x.to(tl.float32), (x.shape[0], x.shape[1] // 2, 2)))
        cos, sin = tl.split(tl.reshape(turns, (x.shape[0], x.shape[1] // 2, 2)))
        if BACK:
            sin = -sin
        pairs = tl.join(even * cos - odd * sin, even * sin + odd * cos)
        x = tl.reshape(pairs, (x.shape[0], x.shape[1])).to(x.dtype)
    return x


@triton.jit
def may_attend(query, key, mask_ptr, n_masked, text_len, MASK: tl.constexpr):
    """bool, broadcast shape: what the key mask of this sample says. MASK: "none", "image_queries" or "every_query".

    mask_ptr: int8 [n_masked]; keys from n_masked on may be attended to.
    """
    in_mask = (key >= 0) & (key < n_masked)
    may = tl.load(mask_ptr + key, mask=in_mask, other=1) != 0
    if MASK == "image_queries":
        may = may | (query < text_len)
    return may


@triton.jit
def legal(
    query,
    key,
    geometry,
    blocks_ptr,
    mask_ptr,
    n_masked,
    PATTERN: tl.constexpr,
    MASK: tl.constexpr,
    GATHERED: tl.constexpr,
):
    """bool, broadcast shape: whether query may attend to key. A block that is not GATHERED the pattern allows whole."""
    if GATHERED:
        result = allowed(query, key, geometry, blocks_ptr, PATTERN)
        if MASK != "none":
            result = result & may_attend(query, key, mask_ptr, n_masked, geometry[0], MASK)
    else:
        result = may_attend(query, key, mask_ptr, n_masked, geometry[0], MASK)
    return result


@triton.jit
def in_exponent(x, dtype: tl.constexpr):
    """x, which adds up to an exponent of e, in the unit that `power` takes for inputs of dtype.

    16 bits: base 2, the hardware's, at no product a score. float32: base e, since lse in another base is rounded once
    more, and an error of lse is one of every probability.
    """
    if dtype != tl.float32:
        x = x * LOG2_E
    return x


@triton.jit
def power(x, dtype: tl.constexpr):
    """e to the x, where x is in the unit of `in_exponent`."""
    return tl.exp(x) if dtype == tl.float32 else tl.exp2(x)


@triton.jit
def log_sum(largest, total, dtype: tl.constexpr):
    """Natural logarithm of `total` (> 0) times e to the `largest`, which is in the unit of `in_exponent`."""
    return largest + tl.log(total) if dtype == tl.float32 else (largest + tl.log2(total)) * LN_2
