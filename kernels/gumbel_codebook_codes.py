"""The code-outer kernels of gumbel_codebook's backward; formulas and precision are in gumbel_codebook.py.

One forms dweight and dbias, one dcodebook of the soft mode, a product with probabilities, and one that of the others,
a sum over the rows that chose a code.

A tile of codes walks all rows. With few tiles, rows are cut into slices, each a program's, that leave parts in float32.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import torch
import triton
import triton.language as tl
from dalle_fast.kernels.attention_blocks import unspecialised
from dalle_fast.kernels.gumbel_codebook_arguments import Call, cdiv, strides
from dalle_fast.kernels.gumbel_codebook_blocks import (
    LOG2_E,
    draw,
    entry_products,
    load_bias,
    load_codes,
    load_rows,
    load_softmaxes,
    products,
    row_offsets,
    with_lane,
)
from dalle_fast.kernels.gumbel_codebook_sizes import Sizes
from torch import Tensor

PROGRAMS = 128  # that slices may add up to: about a GPU's multiprocessors; parts of them all take 20 MB at D = 512


@triton.jit
def _lane_gradients(
    logits,
    g,
    noise,
    code,
    chosen,
    main_max,
    main_sum,
    plain_max,
    plain_sum,
    expected,
    dkl,
    centre,
    main_mean,
    plain_mean,
    rate,
    per_temperature,
    REINMAX: tl.constexpr,
    WITH_KL: tl.constexpr,
):
    """dl of one lane of codes [QUADS], float32 [BLOCK_M, QUADS], from the means that `launch_rows` left."""
    d = g - centre[:, None]
    if REINMAX:
        is_chosen = code[None, :] == chosen[:, None]
        d = tl.where(is_chosen, 0.0, d)
        main = tl.exp2((logits - main_max[:, None]) * rate) / main_sum[:, None]
        plain = tl.exp2((logits - plain_max[:, None]) * LOG2_E) / plain_sum[:, None]
        dlogits = (main + tl.where(is_chosen, 1.0, 0.0)) * (d - main_mean[:, None])
        dlogits -= 0.5 * plain * (d - plain_mean[:, None])
    else:
        main = tl.exp2((logits + noise - main_max[:, None]) * rate) / main_sum[:, None]
        dlogits = main * (d - main_mean[:, None]) * per_temperature
    if WITH_KL:
        above = logits - plain_max[:, None]
        dlogits += dkl * tl.exp2(above * LOG2_E) / plain_sum[:, None] * (above - expected[:, None])
    return dlogits


@unspecialised("first_row", "n_rows", "slice_rows")
@triton.jit
def _gumbel_codebook_bwd_weight(
    features_ptr,
    weight_ptr,
    bias_ptr,
    codebook_ptr,
    noise_ptr,
    seed_ptr,
    do_ptr,
    chosen_ptr,
    statistics_ptr,
    means_ptr,
    dkl_ptr,
    dweight_ptr,
    dbias_ptr,
    features_strides,
    noise_strides,
    do_strides,
    pixels,
    width,
    rate,
    per_temperature,
    first_row,
    n_rows,
    slice_rows,
    REINMAX: tl.constexpr,
    WITH_KL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    N_CODES: tl.constexpr,
    N_FEATURES: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dweight [BLOCK_N, BLOCK_F] and dbias [BLOCK_N] of a tile of codes over a slice of rows: parts [slices, K, *]."""
    QUADS: tl.constexpr = BLOCK_N // 4
    quad = tl.program_id(0) * QUADS + tl.arange(0, QUADS)
    n_slice = tl.program_id(1).to(tl.int64)
    first_f = tl.program_id(2) * BLOCK_F
    seed = 0 if HAS_NOISE or REINMAX else tl.load(seed_ptr)
    dkl = tl.load(dkl_ptr) if WITH_KL else 0.0

    zero_weight = tl.zeros([BLOCK_F, QUADS], tl.float32)
    dweights = (zero_weight, zero_weight, zero_weight, zero_weight)
    zero_bias = tl.zeros([QUADS], tl.float32)
    dbiases = (zero_bias, zero_bias, zero_bias, zero_bias)
    weights, biases = (0.0, 0.0, 0.0, 0.0), dbiases
    # transposed here: what is transposed in the loop is copied into shared memory there, too
    for lane in tl.static_range(4):
        code = 4 * quad + lane
        weight = load_codes(weight_ptr, code, 0, N_CODES, N_FEATURES, BLOCK_F)
        weights = with_lane(weights, lane, tl.trans(weight))
        biases = with_lane(biases, lane, load_bias(bias_ptr, code, N_CODES, HAS_BIAS))

    begin = tl.program_id(1) * slice_rows
    for first in range(begin, tl.minimum(n_rows, begin + slice_rows), BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        in_rows = row < n_rows
        x_offsets = row_offsets(row, features_strides, pixels, width)
        do_offsets = row_offsets(row, do_strides, pixels, width)
        x = load_rows(features_ptr, x_offsets, features_strides[1], 0, in_rows, N_FEATURES, BLOCK_F)
        gs = entry_products(
            do_ptr, do_offsets, do_strides[1], in_rows, codebook_ptr, quad, N_CODES, DIM, BLOCK_M, BLOCK_D
        )
        main_max, main_sum, plain_max, plain_sum, expected = load_softmaxes(
            statistics_ptr, row, n_rows, REINMAX, WITH_KL
        )
        centre = tl.load(means_ptr + row, mask=in_rows, other=0.0)
        main_mean = tl.load(means_ptr + n_rows + row, mask=in_rows, other=0.0)
        plain_mean = tl.load(means_ptr + 2 * n_rows + row, mask=in_rows, other=0.0)
        chosen = tl.load(chosen_ptr + row, mask=in_rows, other=0).to(tl.int32)
        noises = (0.0, 0.0, 0.0, 0.0)
        if not REINMAX:
            noise_offsets = row_offsets(row, noise_strides, pixels, width) if HAS_NOISE else x_offsets
            position = first_row + row.to(tl.int64)
            noises = draw(noise_ptr, seed, noise_offsets, noise_strides[1], position, quad, in_rows, N_CODES, HAS_NOISE)
        x_there = x
        if BLOCK_F < N_FEATURES:
            x_there = load_rows(features_ptr, x_offsets, features_strides[1], first_f, in_rows, N_FEATURES, BLOCK_F)
        for lane in tl.static_range(4):
            code = 4 * quad + lane
            logits = products(
                x, weights[lane], features_ptr, x_offsets, features_strides[1], in_rows, weight_ptr, code,
                N_CODES, N_FEATURES, BLOCK_F,
            )  # fmt: skip
            logits += biases[lane][None, :]
            dlogits = _lane_gradients(
                logits, gs[lane], noises[lane], code, chosen, main_max, main_sum, plain_max, plain_sum, expected, dkl,
                centre, main_mean, plain_mean, rate, per_temperature, REINMAX, WITH_KL,
            )  # fmt: skip
            dweight = tl.dot(tl.trans(x_there), dlogits.to(x.dtype), dweights[lane], input_precision="ieee")
            dweights = with_lane(dweights, lane, dweight)
            dbiases = with_lane(dbiases, lane, dbiases[lane] + tl.sum(dlogits, axis=0))

    feature = first_f + tl.arange(0, BLOCK_F)
    dweight_ptr += n_slice * N_CODES * N_FEATURES
    dbias_ptr += n_slice * N_CODES
    for lane in tl.static_range(4):
        code = 4 * quad + lane
        pointers = dweight_ptr + code[None, :].to(tl.int64) * N_FEATURES + feature[:, None]
        mask = (feature < N_FEATURES)[:, None] & (code < N_CODES)[None, :]
        tl.store(pointers, dweights[lane].to(dweight_ptr.dtype.element_ty), mask=mask)
        if first_f == 0:
            tl.store(dbias_ptr + code, dbiases[lane].to(dbias_ptr.dtype.element_ty), mask=code < N_CODES)


@unspecialised("first_row", "n_rows", "slice_rows")
@triton.jit
def _gumbel_codebook_bwd_mixture(
    features_ptr,
    weight_ptr,
    bias_ptr,
    noise_ptr,
    seed_ptr,
    do_ptr,
    statistics_ptr,
    dcodebook_ptr,
    features_strides,
    noise_strides,
    do_strides,
    pixels,
    width,
    rate,
    first_row,
    n_rows,
    slice_rows,
    HAS_BIAS: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    N_CODES: tl.constexpr,
    N_FEATURES: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dcodebook [BLOCK_N, BLOCK_D] of a tile of codes over a slice of rows, soft mode: parts [slices, K, D]."""
    QUADS: tl.constexpr = BLOCK_N // 4
    quad = tl.program_id(0) * QUADS + tl.arange(0, QUADS)
    n_slice = tl.program_id(1).to(tl.int64)
    first_d = tl.program_id(2) * BLOCK_D
    seed = 0 if HAS_NOISE else tl.load(seed_ptr)

    zero_entry = tl.zeros([BLOCK_D, QUADS], tl.float32)
    dentries = (zero_entry, zero_entry, zero_entry, zero_entry)
    weights = (0.0, 0.0, 0.0, 0.0)
    zero_bias = tl.zeros([QUADS], tl.float32)
    biases = (zero_bias, zero_bias, zero_bias, zero_bias)
    # transposed here: what is transposed in the loop is copied into shared memory there, too
    for lane in tl.static_range(4):
        code = 4 * quad + lane
        weight = load_codes(weight_ptr, code, 0, N_CODES, N_FEATURES, BLOCK_F)
        weights = with_lane(weights, lane, tl.trans(weight))
        biases = with_lane(biases, lane, load_bias(bias_ptr, code, N_CODES, HAS_BIAS))

    begin = tl.program_id(1) * slice_rows
    for first in range(begin, tl.minimum(n_rows, begin + slice_rows), BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        in_rows = row < n_rows
        x_offsets = row_offsets(row, features_strides, pixels, width)
        do_offsets = row_offsets(row, do_strides, pixels, width)
        noise_offsets = row_offsets(row, noise_strides, pixels, width) if HAS_NOISE else x_offsets
        x = load_rows(features_ptr, x_offsets, features_strides[1], 0, in_rows, N_FEATURES, BLOCK_F)
        do = load_rows(do_ptr, do_offsets, do_strides[1], first_d, in_rows, DIM, BLOCK_D)
        main_max, main_sum, _, _, _ = load_softmaxes(statistics_ptr, row, n_rows, False, False)
        position = first_row + row.to(tl.int64)
        noises = draw(noise_ptr, seed, noise_offsets, noise_strides[1], position, quad, in_rows, N_CODES, HAS_NOISE)
        for lane in tl.static_range(4):
            logits = products(
                x, weights[lane], features_ptr, x_offsets, features_strides[1], in_rows, weight_ptr, 4 * quad + lane,
                N_CODES, N_FEATURES, BLOCK_F,
            )  # fmt: skip
            logits += biases[lane][None, :]
            p = tl.exp2((logits + noises[lane] - main_max[:, None]) * rate) / main_sum[:, None]
            dentry = tl.dot(tl.trans(do), p.to(do.dtype), dentries[lane], input_precision="ieee")
            dentries = with_lane(dentries, lane, dentry)

    channel = first_d + tl.arange(0, BLOCK_D)
    dcodebook_ptr += n_slice * N_CODES * DIM
    for lane in tl.static_range(4):
        code = 4 * quad + lane
        pointers = dcodebook_ptr + code[None, :].to(tl.int64) * DIM + channel[:, None]
        mask = (channel < DIM)[:, None] & (code < N_CODES)[None, :]
        tl.store(pointers, dentries[lane].to(dcodebook_ptr.dtype.element_ty), mask=mask)


@unspecialised("n_rows")
@triton.jit
def _gumbel_codebook_bwd_chosen(
    do_ptr,
    sorted_ptr,
    order_ptr,
    bounds_ptr,
    dcodebook_ptr,
    do_strides,
    pixels,
    width,
    n_rows,
    N_CODES: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dcodebook [BLOCK_N, BLOCK_D] of a tile of codes, hard modes: the sum of dO over the rows that chose each.

    order_ptr [M]: the rows, sorted by their code; sorted_ptr [M]: those codes; bounds_ptr: where the tiles begin there.
    """
    tile = tl.program_id(0)
    code = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    first_d = tl.program_id(1) * BLOCK_D
    dentries = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    end = tl.load(bounds_ptr + tile + 1)
    for first in range(tl.load(bounds_ptr + tile), end, BLOCK_M):
        place = first + tl.arange(0, BLOCK_M)
        present = place < end
        row = tl.load(order_ptr + place, mask=present, other=0).to(tl.int32)
        chosen = tl.load(sorted_ptr + place, mask=present, other=-1)
        do_offsets = row_offsets(row, do_strides, pixels, width)
        do = load_rows(do_ptr, do_offsets, do_strides[1], first_d, present, DIM, BLOCK_D)
        one_hot = (chosen[:, None] == code[None, :]).to(do.dtype)
        dentries = tl.dot(tl.trans(do), one_hot, dentries, input_precision="ieee")
    channel = first_d + tl.arange(0, BLOCK_D)
    pointers = dcodebook_ptr + code[None, :].to(tl.int64) * DIM + channel[:, None]
    mask = (channel < DIM)[:, None] & (code < N_CODES)[None, :]
    tl.store(pointers, dentries.to(dcodebook_ptr.dtype.element_ty), mask=mask)


def launch_weight(
    dembeds: Tensor,
    dkl: Tensor | None,
    noisy_codes: Tensor,
    statistics: Tensor,
    means: Tensor,
    call: Call,
    sizes: Sizes,
) -> tuple[Tensor, Tensor]:
    """dweight [K, F] and dbias [K], [0] where there is no bias; means: from `launch_rows`."""
    n_features, blocks = call.weight.shape[1], call.blocks(sizes)
    n_tiles, n_splits = cdiv(call.n_codes, sizes.block_n), cdiv(n_features, blocks["BLOCK_F"])
    n_slices, slice_rows = _slices(call.n_rows, n_tiles * n_splits, sizes.block_m)
    dweight = _parts(call.weight, n_slices, n_features)
    dbias = _parts(call.weight, n_slices)
    _gumbel_codebook_bwd_weight[(n_tiles, n_slices, n_splits)](
        call.features, call.weight, call.bias, call.codebook, call.noise, call.seed, dembeds, noisy_codes, statistics,
        means, dkl, dweight, dbias, strides(call.features), strides(call.noise), strides(dembeds), *call.grid,
        call.rate, 1 / call.temperature, call.first_row, call.n_rows, slice_rows, REINMAX=call.mode == "reinmax",
        WITH_KL=dkl is not None, **call.constants, **blocks, BLOCK_M=sizes.block_m, BLOCK_N=sizes.block_n,
        num_warps=sizes.num_warps, num_stages=sizes.num_stages,
    )  # fmt: skip
    dbias = _sum(dbias, call.weight.dtype)
    return _sum(dweight, call.weight.dtype), dbias[:0] if call.bias is None else dbias


def launch_codebook(dembeds: Tensor, noisy_codes: Tensor, statistics: Tensor, call: Call, sizes: Sizes) -> Tensor:
    """dcodebook [K, D]."""
    dim, blocks = call.codebook.shape[1], call.blocks(sizes)
    n_tiles, n_splits = cdiv(call.n_codes, sizes.block_n), cdiv(dim, blocks["BLOCK_D"])
    options = {"BLOCK_M": sizes.block_m, "BLOCK_N": sizes.block_n, "num_warps": sizes.num_warps}
    if call.mode != "soft":
        codes, order = torch.sort(noisy_codes.flatten(), stable=True)
        starts = torch.arange(0, (n_tiles + 1) * sizes.block_n, sizes.block_n, device=codes.device)
        bounds = torch.searchsorted(codes, starts)
        dcodebook = call.codebook.new_empty(call.n_codes, dim)
        _gumbel_codebook_bwd_chosen[(n_tiles, n_splits)](
            dembeds, codes, order, bounds, dcodebook, strides(dembeds), *call.grid, call.n_rows,
            N_CODES=call.n_codes, DIM=dim, BLOCK_D=blocks["BLOCK_D"], **options, num_stages=sizes.num_stages,
        )  # fmt: skip
        return dcodebook
    n_slices, slice_rows = _slices(call.n_rows, n_tiles * n_splits, sizes.block_m)
    dcodebook = _parts(call.codebook, n_slices, dim)
    _gumbel_codebook_bwd_mixture[(n_tiles, n_slices, n_splits)](
        call.features, call.weight, call.bias, call.noise, call.seed, dembeds, statistics, dcodebook,
        strides(call.features), strides(call.noise), strides(dembeds), *call.grid, call.rate,
        call.first_row, call.n_rows, slice_rows, **call.constants, **blocks, **options, num_stages=sizes.num_stages,
    )  # fmt: skip
    return _sum(dcodebook, call.codebook.dtype)


def _slices(n_rows: int, n_programs: int, block_m: int) -> tuple[int, int]:
    """Into how many slices rows are cut where each takes n_programs, and their length: what the shape alone decides."""
    n_blocks = cdiv(n_rows, block_m)
    blocks_each = cdiv(n_blocks, min(n_blocks, max(1, PROGRAMS // n_programs)))
    return cdiv(n_blocks, blocks_each), blocks_each * block_m


def _parts(table: Tensor, n_slices: int, *channels: int) -> Tensor:
    """Uninitialised [n_slices, K, *channels]: float32, but the result itself, of the table's dtype, in one slice."""
    return table.new_empty(n_slices, len(table), *channels, dtype=torch.float32 if n_slices > 1 else table.dtype)


def _sum(parts: Tensor, dtype: torch.dtype) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0).to(dtype)
