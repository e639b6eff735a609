"""The row-outer kernel of gumbel_codebook's backward: dfeatures; formulas and precision are in gumbel_codebook.py.

The means of g are not known before all codes are seen, but need no sweep of their own: with c = dO . embeds (in mode
soft the mean, but for the rounding of embeds; in the others g at noisy_codes), d = g - c and e = sum_k p_k d_k,

    sum_k p_k (g_k - sum p g) w_k = sum_k p_k d_k w_k - e sum_k p_k w_k,

all of whose sums grow in one sweep; reinmax likewise, with two means. The kernel leaves them for the code-outer kernel.
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
)
from dalle_fast.kernels.gumbel_codebook_sizes import Sizes
from torch import Tensor


@triton.jit
def _visit_lane(
    code,
    noise,
    g,
    x,
    chosen,
    centre,
    main_max,
    main_sum,
    plain_max,
    plain_sum,
    expected,
    dkl,
    dx,
    main_w,
    plain_w,
    main_mean,
    plain_mean,
    features_ptr,
    weight_ptr,
    bias_ptr,
    x_offsets,
    in_rows,
    stride_x_c,
    first_f,
    rate,
    per_temperature,
    REINMAX: tl.constexpr,
    WITH_KL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    N_CODES: tl.constexpr,
    N_FEATURES: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """One lane of codes [QUADS] joins the sums over codes: see `_gumbel_codebook_bwd_rows`."""
    weight = load_codes(weight_ptr, code, 0, N_CODES, N_FEATURES, BLOCK_F)
    logits = products(
        x, tl.trans(weight), features_ptr, x_offsets, stride_x_c, in_rows, weight_ptr, code, N_CODES,
        N_FEATURES, BLOCK_F,
    )  # fmt: skip
    logits += load_bias(bias_ptr, code, N_CODES, HAS_BIAS)[None, :]  # [BLOCK_M, QUADS]
    g -= centre[:, None]
    if BLOCK_F < N_FEATURES:  # the features whose gradient this program forms
        weight = load_codes(weight_ptr, code, first_f, N_CODES, N_FEATURES, BLOCK_F)
    if REINMAX:
        main = tl.exp2((logits - main_max[:, None]) * rate) / main_sum[:, None]
        # exactly 0 where rounding would leave a little
        g = tl.where(code[None, :] == chosen[:, None], 0.0, g)
        plain = tl.exp2((logits - plain_max[:, None]) * LOG2_E) / plain_sum[:, None]
        plain_mean += tl.sum(plain * g, axis=1)
        plain_w = tl.dot(plain.to(weight.dtype), weight, plain_w, input_precision="ieee")
        dlogits = (main - 0.5 * plain) * g
    else:
        main = tl.exp2((logits + noise - main_max[:, None]) * rate) / main_sum[:, None]
        dlogits = main * g * per_temperature
    main_mean += tl.sum(main * g, axis=1)
    main_w = tl.dot(main.to(weight.dtype), weight, main_w, input_precision="ieee")
    if WITH_KL:
        above = logits - plain_max[:, None]
        dlogits += dkl * tl.exp2(above * LOG2_E) / plain_sum[:, None] * (above - expected[:, None])
    dx = tl.dot(dlogits.to(weight.dtype), weight, dx, input_precision="ieee")
    return dx, main_w, plain_w, main_mean, plain_mean


@unspecialised("first_row", "n_rows")
@triton.jit
def _gumbel_codebook_bwd_rows(
    features_ptr,
    weight_ptr,
    bias_ptr,
    codebook_ptr,
    noise_ptr,
    seed_ptr,
    do_ptr,
    embeds_ptr,
    chosen_ptr,
    statistics_ptr,
    dkl_ptr,
    dfeatures_ptr,
    means_ptr,
    features_strides,
    noise_strides,
    do_strides,
    embeds_strides,
    pixels,
    width,
    rate,
    per_temperature,
    first_row,
    n_rows,
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
    """dfeatures [BLOCK_M, BLOCK_F] of a tile of rows; means [3, M]: c, and the means of d under the softmaxes.

    Strides are those of [B, C, h, w]; pixels = h w.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_f = tl.program_id(1) * BLOCK_F
    in_rows = row < n_rows
    x_offsets = row_offsets(row, features_strides, pixels, width)
    do_offsets = row_offsets(row, do_strides, pixels, width)
    embeds_offsets = row_offsets(row, embeds_strides, pixels, width)
    noise_offsets = row_offsets(row, noise_strides, pixels, width) if HAS_NOISE else x_offsets
    position = first_row + row.to(tl.int64)
    seed = 0 if HAS_NOISE or REINMAX else tl.load(seed_ptr)

    x = load_rows(features_ptr, x_offsets, features_strides[1], 0, in_rows, N_FEATURES, BLOCK_F)
    centre = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, DIM, BLOCK_D):
        do = load_rows(do_ptr, do_offsets, do_strides[1], first, in_rows, DIM, BLOCK_D)
        embeds = load_rows(embeds_ptr, embeds_offsets, embeds_strides[1], first, in_rows, DIM, BLOCK_D)
        centre += tl.sum(do.to(tl.float32) * embeds.to(tl.float32), axis=1)
    main_max, main_sum, plain_max, plain_sum, expected = load_softmaxes(statistics_ptr, row, n_rows, REINMAX, WITH_KL)
    dkl = tl.load(dkl_ptr) if WITH_KL else 0.0
    chosen = tl.load(chosen_ptr + row, mask=in_rows, other=0).to(tl.int32)

    dx = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
    main_w, plain_w = dx, dx
    main_mean = tl.zeros([BLOCK_M], tl.float32)
    plain_mean = main_mean
    for block in range(0, N_CODES, BLOCK_N):
        quad = block // 4 + tl.arange(0, BLOCK_N // 4)
        noises = (0.0, 0.0, 0.0, 0.0)
        if not REINMAX:
            noises = draw(noise_ptr, seed, noise_offsets, noise_strides[1], position, quad, in_rows, N_CODES, HAS_NOISE)
        gs = entry_products(
            do_ptr, do_offsets, do_strides[1], in_rows, codebook_ptr, quad, N_CODES, DIM, BLOCK_M, BLOCK_D
        )
        for lane in tl.static_range(4):
            dx, main_w, plain_w, main_mean, plain_mean = _visit_lane(
                4 * quad + lane, noises[lane], gs[lane], x, chosen, centre, main_max, main_sum, plain_max, plain_sum,
                expected, dkl, dx, main_w, plain_w, main_mean, plain_mean, features_ptr, weight_ptr, bias_ptr,
                x_offsets, in_rows, features_strides[1], first_f, rate, per_temperature, REINMAX, WITH_KL, HAS_BIAS,
                N_CODES, N_FEATURES, BLOCK_F,
            )  # fmt: skip

    if REINMAX:
        # of the chosen code, whose d is 0, only the mean of d counts
        main_mean = 0.5 * main_mean
        chosen_w = load_codes(weight_ptr, chosen, first_f, N_CODES, N_FEATURES, BLOCK_F)
        dx -= main_mean[:, None] * (main_w + chosen_w.to(tl.float32))
        dx += 0.5 * plain_mean[:, None] * plain_w
    else:
        dx -= (per_temperature * main_mean)[:, None] * main_w
    feature = first_f + tl.arange(0, BLOCK_F)
    pointers = dfeatures_ptr + row[:, None].to(tl.int64) * N_FEATURES + feature[None, :]
    mask = in_rows[:, None] & (feature < N_FEATURES)[None, :]
    tl.store(pointers, dx.to(dfeatures_ptr.dtype.element_ty), mask=mask)
    if first_f == 0:
        tl.store(means_ptr + row, centre, mask=in_rows)
        tl.store(means_ptr + n_rows + row, main_mean, mask=in_rows)
        tl.store(means_ptr + 2 * n_rows + row, plain_mean, mask=in_rows)


def launch_rows(
    dembeds: Tensor,
    dkl: Tensor | None,
    embeds: Tensor,
    noisy_codes: Tensor,
    statistics: Tensor,
    call: Call,
    sizes: Sizes,
) -> tuple[Tensor, Tensor]:
    """dfeatures [B, F, h, w], a view of memory laid out [B, h, w, F], and the means that `launch_codes` takes."""
    features = call.features
    batch, n_features, height, width = features.shape
    dfeatures = features.new_empty(batch, height, width, n_features)
    means = features.new_empty(3, call.n_rows, dtype=torch.float32)
    blocks = call.blocks(sizes)
    _gumbel_codebook_bwd_rows[(cdiv(call.n_rows, sizes.block_m), cdiv(n_features, blocks["BLOCK_F"]))](
        features, call.weight, call.bias, call.codebook, call.noise, call.seed, dembeds, embeds, noisy_codes,
        statistics, dkl, dfeatures, means, strides(features), strides(call.noise), strides(dembeds),
        strides(embeds), *call.grid, call.rate, 1 / call.temperature, call.first_row, call.n_rows,
        REINMAX=call.mode == "reinmax", WITH_KL=dkl is not None, **call.constants, **blocks, BLOCK_M=sizes.block_m,
        BLOCK_N=sizes.block_n, num_warps=sizes.num_warps, num_stages=sizes.num_stages,
    )  # fmt: skip
    return dfeatures.permute(0, 3, 1, 2), means
