"""What every kernel of gumbel_codebook does with a tile: load channels of rows and codes, form logits, draw noise.

Rows are the B h w positions, codes the K entries of the codebook. A block of codes is walked as four lanes: lane r
holds the codes 4 q + r of the quads q of the block, since one Philox call is the noise of one quad. Beyond the last row
or code tiles hold zeros, and logits LOWEST.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
import triton
import triton.language as tl
from dalle_fast.kernels.philox import gumbel, words

STREAM: tl.constexpr = tl.constexpr(2)  # rng.Stream.VAE
# Below every logit; finite, so that differences and their products with a probability of 0 stay numbers.
LOWEST: tl.constexpr = tl.constexpr(-1.0e30)
NO_CODE: tl.constexpr = tl.constexpr(2**31 - 1)
# Rows of the statistics [7, M]; see gumbel_codebook.py.
NOISY_MAX: tl.constexpr = tl.constexpr(0)
NOISY_SUM: tl.constexpr = tl.constexpr(1)
PLAIN_MAX: tl.constexpr = tl.constexpr(2)
PLAIN_SUM: tl.constexpr = tl.constexpr(3)
WARM_SUM: tl.constexpr = tl.constexpr(4)
EXPECTED: tl.constexpr = tl.constexpr(5)
DIVERGENCE: tl.constexpr = tl.constexpr(6)
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def row_offsets(row, strides, pixels, width):
    """int64, shape of row: where row (b, y, x) of a tensor [B, C, h, w] starts. pixels = h w."""
    # remainders, not differences: of those the compiler knows that neighbouring rows lie side by side
    sample, y, x = row // pixels, row % pixels // width, row % width
    return sample.to(tl.int64) * strides[0] + y.to(tl.int64) * strides[2] + x.to(tl.int64) * strides[3]


@triton.jit
def load_rows(x_ptr, offsets, stride_c, first, in_rows, N_CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """[ROWS, BLOCK_C]: channels from `first`, a multiple of BLOCK_C, on of the rows that start at `offsets`."""
    channel = first + tl.arange(0, BLOCK_C)
    pointers = x_ptr + offsets[:, None] + channel[None, :].to(tl.int64) * stride_c
    mask = in_rows[:, None]
    if N_CHANNELS % BLOCK_C != 0:
        mask = mask & (channel < N_CHANNELS)[None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def load_codes(table_ptr, code, first, N_CODES: tl.constexpr, N_CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """[CODES, BLOCK_C]: channels from `first`, a multiple of BLOCK_C, on of the rows `code` of a table [K, C]."""
    channel = first + tl.arange(0, BLOCK_C)
    pointers = table_ptr + code[:, None].to(tl.int64) * N_CHANNELS + channel[None, :]
    n_blocks = N_CODES // (4 * code.shape[0])
    if n_blocks * 4 * code.shape[0] == N_CODES and N_CHANNELS % BLOCK_C == 0:
        table = tl.load(pointers)
    else:
        table = tl.load(pointers, mask=(code < N_CODES)[:, None] & (channel < N_CHANNELS)[None, :], other=0.0)
    return table


@triton.jit
def products(
    x,
    table_t,
    x_ptr,
    offsets,
    stride_c,
    in_rows,
    table_ptr,
    code,
    N_CODES: tl.constexpr,
    N_CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """float32 [ROWS, CODES]: inner products of rows and of codes in a table over all channels.

    x [ROWS, BLOCK_C], table_t [BLOCK_C, CODES]: the first channels, which may be all of them.
    """
    result = tl.dot(x, table_t, input_precision="ieee")
    if BLOCK_C < N_CHANNELS:
        for first in range(BLOCK_C, N_CHANNELS, BLOCK_C):
            x_chunk = load_rows(x_ptr, offsets, stride_c, first, in_rows, N_CHANNELS, BLOCK_C)
            table_chunk = load_codes(table_ptr, code, first, N_CODES, N_CHANNELS, BLOCK_C)
            result = tl.dot(x_chunk, tl.trans(table_chunk), result, input_precision="ieee")
    return result


@triton.jit
def entry_products(
    do_ptr,
    offsets,
    stride_c,
    in_rows,
    codebook_ptr,
    quad,
    N_CODES: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """g, the products of dO and the entries of the codes, in four lanes, float32 [BLOCK_M, QUADS] each.

    Read anew for every block: held, dO or the entries would take the registers or the shared memory of a block.
    """
    zero = tl.zeros([BLOCK_M, quad.shape[0]], tl.float32)
    lanes = (zero, zero, zero, zero)
    for first in range(0, DIM, BLOCK_D):
        do = load_rows(do_ptr, offsets, stride_c, first, in_rows, DIM, BLOCK_D)
        for lane in tl.static_range(4):
            entries = load_codes(codebook_ptr, 4 * quad + lane, first, N_CODES, DIM, BLOCK_D)
            lanes = with_lane(lanes, lane, tl.dot(do, tl.trans(entries), lanes[lane], input_precision="ieee"))
    return lanes


@triton.jit
def load_bias(bias_ptr, code, N_CODES: tl.constexpr, HAS_BIAS: tl.constexpr):
    """float32, shape of code: what is added to a product to make a logit; LOWEST beyond the last code."""
    if HAS_BIAS:
        bias = tl.load(bias_ptr + code, mask=code < N_CODES, other=0.0).to(tl.float32)
    else:
        bias = tl.zeros(code.shape, tl.float32)
    return tl.where(code < N_CODES, bias, LOWEST)


@triton.jit
def draw(noise_ptr, seed, offsets, stride_k, position, quad, in_rows, N_CODES: tl.constexpr, HAS_NOISE: tl.constexpr):
    """The noise of the four lanes of a block, float32 [ROWS, QUADS] each.

    HAS_NOISE: read from a tensor whose rows start at `offsets` [ROWS]; else drawn at `position` [ROWS], int64.
    """
    if HAS_NOISE:
        lanes = (0.0, 0.0, 0.0, 0.0)
        for lane in tl.static_range(4):
            noise = _lane_noise(noise_ptr, offsets, stride_k, 4 * quad + lane, in_rows, N_CODES)
            lanes = with_lane(lanes, lane, noise)
    else:
        lanes = words(seed, quad[None, :], position[:, None], STREAM)
        for lane in tl.static_range(4):
            lanes = with_lane(lanes, lane, gumbel(lanes[lane]))
    return lanes


@triton.jit
def _lane_noise(noise_ptr, offsets, stride_k, code, in_rows, N_CODES: tl.constexpr):
    pointers = noise_ptr + offsets[:, None] + code[None, :].to(tl.int64) * stride_k
    return tl.load(pointers, mask=in_rows[:, None] & (code < N_CODES)[None, :], other=0.0).to(tl.float32)


@triton.jit
def load_statistic(statistics_ptr, which: tl.constexpr, row, n_rows, beyond):
    """float32, shape of row; `beyond` for rows from n_rows on."""
    return tl.load(statistics_ptr + which * tl.cast(n_rows, tl.int64) + row, mask=row < n_rows, other=beyond)


@triton.jit
def load_softmaxes(statistics_ptr, row, n_rows, REINMAX: tl.constexpr, WITH_KL: tl.constexpr):
    """(largest, total) of p, or t if REINMAX, and of q; the mean of l - largest under q; [ROWS] each.

    Rows beyond the last have probabilities of 0, as far as they are read.
    """
    huge: tl.constexpr = -LOWEST
    if REINMAX or WITH_KL:
        plain_max = load_statistic(statistics_ptr, PLAIN_MAX, row, n_rows, huge)
        plain_sum = load_statistic(statistics_ptr, PLAIN_SUM, row, n_rows, 1.0)
    else:
        plain_max = tl.full(row.shape, huge, tl.float32)
        plain_sum = tl.full(row.shape, 1.0, tl.float32)
    if REINMAX:
        main_max = plain_max
        main_sum = load_statistic(statistics_ptr, WARM_SUM, row, n_rows, 1.0)
    else:
        main_max = load_statistic(statistics_ptr, NOISY_MAX, row, n_rows, huge)
        main_sum = load_statistic(statistics_ptr, NOISY_SUM, row, n_rows, 1.0)
    expected = load_statistic(statistics_ptr, EXPECTED, row, n_rows, 0.0) if WITH_KL else plain_sum
    return main_max, main_sum, plain_max, plain_sum, expected


@triton.jit
def largest(lanes):
    """[ROWS]: the maximum over four lanes [ROWS, QUADS]."""
    return tl.max(tl.maximum(tl.maximum(lanes[0], lanes[1]), tl.maximum(lanes[2], lanes[3])), axis=1)


@triton.jit
def first_code_at(lanes, value, quad):
    """int32 [ROWS]: the lowest code of a block whose number in its lane is `value` [ROWS]; NO_CODE without one."""
    code = tl.full(lanes[0].shape, NO_CODE, tl.int32)
    for back in tl.static_range(4):
        code = tl.where(lanes[3 - back] == value[:, None], 4 * quad[None, :] + (3 - back), code)
    return tl.min(code, axis=1)


@triton.jit
def with_lane(lanes, lane: tl.constexpr, value):
    """The four values of `lanes`, of which that of `lane` is another one."""
    value_0, value_1, value_2, value_3 = lanes
    if lane == 0:
        value_0 = value
    elif lane == 1:
        value_1 = value
    elif lane == 2:
        value_2 = value
    else:
        value_3 = value
    return value_0, value_1, value_2, value_3


@triton.jit
def store_statistic(statistics_ptr, which: tl.constexpr, row, n_rows, value):
    """Writes value [ROWS] where `load_statistic` finds it."""
    tl.store(statistics_ptr + which * tl.cast(n_rows, tl.int64) + row, value, mask=row < n_rows)
