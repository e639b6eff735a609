"""The gumbel-softmax bottleneck of the discrete VAE on NVIDIA GPUs: one kernel forward, three backward.

Forward, for M = B h w rows x of F features, K codes with weight w_k, bias b_k and entry c_k of D channels, noise n:

    l = x . w^T + b,   codes = argmax l,   noisy_codes = j = argmax (l + n)        ties go to the lowest code
    soft:                        embeds = sum_k p_k c_k,  p = softmax((l + n) / tau)
    straight_through, reinmax:   embeds = c_j
    kl = sum over rows of  sum_k q_k (l_k - max l) - log sum exp(l - max l) + log K,   q = softmax(l)

Backward, with g_k = c_k . dO of a row, t = softmax(l / tau):

    soft, straight_through:  dl = p (g - sum_k p_k g_k) / tau
    reinmax:                 dl = 2 pi (g - sum pi g) - q (g - sum q g) / 2,   pi = (onehot_j + t) / 2
    kl:                      dl += dkl q (l - sum_k q_k l_k)
    dx = dl . w,   dw = dl^T . x,   db = sum over rows of dl,   dc = p^T . dO (soft),  dc_j += dO (the others)

Saved: inputs, noise or its seed, embeds, noisy_codes and statistics [7, M]: of each softmax its maximum and the sum of
exponentials less that maximum, apart, since their logarithm would be too coarse beside logits of 1e4. Recomputed:
logits, noise, probabilities. Nothing of size M K is stored. Logits, noise, sums and gradients are float32; 16-bit
products have 16-bit operands (p and dl rounded once), float32 products are float32, never TF32.

Work: forward 2 (F + D) FLOPs a (row, code), backward 2 (2 F + D) for dfeatures, 2 (2 F + D) for dweight, 2 (F + D) for
dcodebook (soft; a segmented sum in the other modes), and each time the noise: a Philox call of ten rounds a quad of
codes and two logarithms a code, as much work for a GPU as the products at D = 512. So D is split over programs, which
draw it anew, only where registers are short. Floor in bytes: inputs, outputs and gradients once; weight and codebook
are read by every tile of rows, from the L2 cache. No atomics: the order of every sum depends on the shape alone.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import torch
import triton
import triton.language as tl
from dalle_fast.kernels.attention_blocks import unspecialised
from dalle_fast.kernels.gumbel_codebook_arguments import Call, cdiv, prepare, strides
from dalle_fast.kernels.gumbel_codebook_blocks import (
    DIVERGENCE,
    EXPECTED,
    LOG2_E,
    LOWEST,
    NOISY_MAX,
    NOISY_SUM,
    PLAIN_MAX,
    PLAIN_SUM,
    WARM_SUM,
    draw,
    first_code_at,
    largest,
    load_bias,
    load_codes,
    load_rows,
    products,
    row_offsets,
    store_statistic,
    with_lane,
)
from dalle_fast.kernels.gumbel_codebook_codes import launch_codebook, launch_weight
from dalle_fast.kernels.gumbel_codebook_rows import launch_rows
from dalle_fast.kernels.gumbel_codebook_sizes import Launch, Sizes, pick_gumbel_codebook
from dalle_fast.kernels.sparse_attention_arguments import architecture, launching_on
from torch import Tensor

__all__ = ["backward", "codes", "forward", "launch_backward", "launch_forward", "pick_gumbel_codebook"]

_STATISTICS = 7


@triton.jit
def _logits(
    x,
    features_ptr,
    weight_ptr,
    bias_ptr,
    x_offsets,
    stride_x_c,
    in_rows,
    quad,
    N_CODES: tl.constexpr,
    N_FEATURES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """The noiseless logits of the four lanes of a block, float32 [BLOCK_M, QUADS] each; LOWEST beyond the last code."""
    lanes = (0.0, 0.0, 0.0, 0.0)
    for lane in tl.static_range(4):
        code = 4 * quad + lane
        weight = load_codes(weight_ptr, code, 0, N_CODES, N_FEATURES, BLOCK_F)
        logits = products(
            x, tl.trans(weight), features_ptr, x_offsets, stride_x_c, in_rows, weight_ptr, code, N_CODES,
            N_FEATURES, BLOCK_F,
        )  # fmt: skip
        logits += load_bias(bias_ptr, code, N_CODES, HAS_BIAS)[None, :]
        lanes = with_lane(lanes, lane, logits)
    return lanes


@triton.jit
def _best(lanes, quad, row_max, code):
    """The running maximum and the code it belongs to, [BLOCK_M] both, after one more block; the lowest wins a tie."""
    block_max = largest(lanes)
    code = tl.where(block_max > row_max, first_code_at(lanes, block_max, quad), code)
    return tl.maximum(row_max, block_max), code


@unspecialised("first_row", "n_rows")
@triton.jit
def _gumbel_codebook_fwd(
    features_ptr,
    weight_ptr,
    bias_ptr,
    codebook_ptr,
    noise_ptr,
    seed_ptr,
    embeds_ptr,
    codes_ptr,
    noisy_codes_ptr,
    statistics_ptr,
    features_strides,
    noise_strides,
    pixels,
    width,
    rate,
    first_row,
    n_rows,
    MODE: tl.constexpr,
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
    """A tile of rows: codes, noisy codes and statistics [BLOCK_M]; in mode soft embeds [BLOCK_M, BLOCK_D].

    MODE "codes": codes alone. Strides are those of [B, C, h, w]; pixels = h w.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_d = tl.program_id(1) * BLOCK_D
    in_rows = row < n_rows
    x_offsets = row_offsets(row, features_strides, pixels, width)
    noise_offsets = row_offsets(row, noise_strides, pixels, width) if HAS_NOISE else x_offsets
    position = first_row + row.to(tl.int64)
    seed = 0 if HAS_NOISE or MODE == "codes" else tl.load(seed_ptr)
    x = load_rows(features_ptr, x_offsets, features_strides[1], 0, in_rows, N_FEATURES, BLOCK_F)

    plain_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    plain_sum = tl.zeros([BLOCK_M], tl.float32)
    plain_code = tl.zeros([BLOCK_M], tl.int32)
    noisy_max, noisy_sum, noisy_code = plain_max, plain_sum, plain_code
    warm_sum, expected = plain_sum, plain_sum
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for block in range(0, N_CODES, BLOCK_N):
        quad = block // 4 + tl.arange(0, BLOCK_N // 4)
        logits = _logits(
            x, features_ptr, weight_ptr, bias_ptr, x_offsets, features_strides[1], in_rows, quad, N_CODES,
            N_FEATURES, HAS_BIAS, BLOCK_F,
        )  # fmt: skip
        new_max, plain_code = _best(logits, quad, plain_max, plain_code)
        below = plain_max - new_max
        plain_max = new_max
        if WITH_KL:
            # sum of e^(l - max) (l - max): the maximum moves in both factors
            expected = tl.exp2(below * LOG2_E) * (expected + plain_sum * below)
        if WITH_KL or MODE == "reinmax":
            plain_sum *= tl.exp2(below * LOG2_E)
            for lane in tl.static_range(4):
                above = logits[lane] - plain_max[:, None]
                power = tl.exp2(above * LOG2_E)
                plain_sum += tl.sum(power, axis=1)
                if WITH_KL:
                    expected += tl.sum(power * above, axis=1)
        if MODE == "reinmax":
            warm_sum *= tl.exp2(below * rate)
            for lane in tl.static_range(4):
                warm_sum += tl.sum(tl.exp2((logits[lane] - plain_max[:, None]) * rate), axis=1)
        if MODE != "codes":
            noisy = draw(noise_ptr, seed, noise_offsets, noise_strides[1], position, quad, in_rows, N_CODES, HAS_NOISE)
            for lane in tl.static_range(4):
                noisy = with_lane(noisy, lane, logits[lane] + noisy[lane])
            new_max, noisy_code = _best(noisy, quad, noisy_max, noisy_code)
            fade = tl.exp2((noisy_max - new_max) * rate)
            noisy_max = new_max
            if MODE == "soft":
                acc *= fade[:, None]
            if MODE != "reinmax":
                noisy_sum *= fade
                for lane in tl.static_range(4):
                    p = tl.exp2((noisy[lane] - noisy_max[:, None]) * rate)
                    noisy_sum += tl.sum(p, axis=1)
                    if MODE == "soft":
                        entries = load_codes(codebook_ptr, 4 * quad + lane, first_d, N_CODES, DIM, BLOCK_D)
                        acc = tl.dot(p.to(entries.dtype), entries, acc, input_precision="ieee")

    if MODE == "soft":
        channel = first_d + tl.arange(0, BLOCK_D)
        pointers = embeds_ptr + row[:, None].to(tl.int64) * DIM + channel[None, :]
        mask = in_rows[:, None] & (channel < DIM)[None, :]
        tl.store(pointers, (acc / noisy_sum[:, None]).to(embeds_ptr.dtype.element_ty), mask=mask)
    if first_d == 0:
        tl.store(codes_ptr + row, plain_code.to(tl.int64), mask=in_rows)
        if MODE != "codes":
            tl.store(noisy_codes_ptr + row, noisy_code.to(tl.int64), mask=in_rows)
        if MODE == "soft" or MODE == "straight_through":
            store_statistic(statistics_ptr, NOISY_MAX, row, n_rows, noisy_max)
            store_statistic(statistics_ptr, NOISY_SUM, row, n_rows, noisy_sum)
        if MODE == "reinmax" or WITH_KL:
            store_statistic(statistics_ptr, PLAIN_MAX, row, n_rows, plain_max)
            store_statistic(statistics_ptr, PLAIN_SUM, row, n_rows, plain_sum)
        if MODE == "reinmax":
            store_statistic(statistics_ptr, WARM_SUM, row, n_rows, warm_sum)
        if WITH_KL:
            expected = expected / plain_sum
            divergence = expected - tl.log(plain_sum) + tl.log(tl.full([1], N_CODES, tl.float32))
            store_statistic(statistics_ptr, EXPECTED, row, n_rows, expected)
            store_statistic(statistics_ptr, DIVERGENCE, row, n_rows, divergence)


def forward(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    codebook: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    *,
    first_row: int,
    temperature: float,
    mode: str,
    with_kl: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launches the forward kernel; the arguments were checked by the op.

    Args:
        features: [B, F, h, w], any strides.   weight: [K, F].   bias: [K] or None.   codebook: [K, D].   float32,
            bfloat16 or float16.
        noise: [B, K, h, w], any strides, any floating dtype; or None, and seed, int64 [1], 64 bits.
        first_row: the position of the first row in the noise of `seed`.
        mode: "soft", "straight_through" or "reinmax".
    Returns: embeds [B, D, h, w], a view of memory laid out [B, h, w, D], dtype of features; codes and noisy_codes,
        int64 [B, h, w]; kl, float32 scalar, 0 unless with_kl; statistics for `backward`, float32 [7, B h w].
    """
    launch = pick_gumbel_codebook(features.dtype, architecture(features.device))
    call = prepare(
        features, weight, bias, codebook, noise, seed, first_row=first_row, temperature=temperature, mode=mode
    )
    return launch_forward(call, with_kl=with_kl, launch=launch)


def launch_forward(call: Call, *, with_kl: bool, launch: Launch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`forward` with launch sizes of the caller's choice."""
    features, codebook = call.features, call.codebook
    batch, _, height, width = features.shape
    found = features.new_empty(batch, height, width, dtype=torch.int64)
    noisy_codes = torch.empty_like(found)
    statistics = features.new_empty(_STATISTICS, call.n_rows, dtype=torch.float32)
    soft = call.mode == "soft"
    embeds = features.new_empty(batch, height, width, codebook.shape[1]) if soft else None
    sizes = launch.forward if soft else launch.search
    if call.noise is not None:  # where to read it takes the registers of half of the channels
        sizes = sizes._replace(block_c=sizes.block_c // 2)
    with launching_on(features.device):
        _launch(call, embeds, found, noisy_codes, statistics, with_kl, sizes)
    if embeds is None:
        embeds = codebook[noisy_codes]
    kl = statistics[DIVERGENCE.value].sum() if with_kl else statistics.new_zeros(())
    return embeds.permute(0, 3, 1, 2), found, noisy_codes, kl, statistics


def codes(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """int64 [B, h, w]: argmax of the noiseless logits, the very one of `forward`. Arguments as there."""
    launch = pick_gumbel_codebook(features.dtype, architecture(features.device))
    return launch_codes(features, weight, bias, launch=launch)


def launch_codes(features: Tensor, weight: Tensor, bias: Tensor | None, *, launch: Launch) -> Tensor:
    """`codes` with launch sizes of the caller's choice."""
    call = prepare(features, weight, bias, weight, None, None, first_row=0, temperature=1.0, mode="codes")
    batch, _, height, width = features.shape
    found = features.new_empty(batch, height, width, dtype=torch.int64)
    with launching_on(features.device):
        _launch(call, None, found, None, None, False, launch.search)
    return found


def _launch(
    call: Call,
    embeds: Tensor | None,
    found: Tensor,
    noisy_codes: Tensor | None,
    statistics: Tensor | None,
    with_kl: bool,
    sizes: Sizes,
) -> None:
    blocks = call.blocks(sizes)
    n_splits = 1 if embeds is None else cdiv(embeds.shape[-1], blocks["BLOCK_D"])
    _gumbel_codebook_fwd[(cdiv(call.n_rows, sizes.block_m), n_splits)](
        call.features, call.weight, call.bias, call.codebook, call.noise, call.seed, embeds, found, noisy_codes,
        statistics, strides(call.features), strides(call.noise), *call.grid, call.rate,
        call.first_row, call.n_rows, MODE=call.mode, WITH_KL=with_kl, **call.constants, **blocks, BLOCK_M=sizes.block_m,
        BLOCK_N=sizes.block_n, num_warps=sizes.num_warps, num_stages=sizes.num_stages,
    )  # fmt: skip


def backward(
    dembeds: Tensor,
    dkl: Tensor | None,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    codebook: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    embeds: Tensor,
    noisy_codes: Tensor,
    statistics: Tensor,
    *,
    first_row: int,
    temperature: float,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches the backward kernels for dembeds [B, D, h, w], any strides, dkl, float32 scalar or None (no gradient
    through the KL), and what `forward` took and returned.

    Returns: dfeatures [B, F, h, w], a view of memory laid out [B, h, w, F]; dweight [K, F]; dbias [K], [0] without
        bias; dcodebook [K, D]; in the dtype of the inputs.
    """
    launch = pick_gumbel_codebook(features.dtype, architecture(features.device))
    call = prepare(
        features, weight, bias, codebook, noise, seed, first_row=first_row, temperature=temperature, mode=mode
    )
    return launch_backward(dembeds, dkl, embeds, noisy_codes, statistics, call, launch=launch)


def launch_backward(
    dembeds: Tensor,
    dkl: Tensor | None,
    embeds: Tensor,
    noisy_codes: Tensor,
    statistics: Tensor,
    call: Call,
    *,
    launch: Launch,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`backward` with launch sizes of the caller's choice."""
    with launching_on(dembeds.device):
        dfeatures, means = launch_rows(dembeds, dkl, embeds, noisy_codes, statistics, call, launch.rows)
        dweight, dbias = launch_weight(dembeds, dkl, noisy_codes, statistics, means, call, launch.weight)
        dcodebook = launch_codebook(dembeds, noisy_codes, statistics, call, launch.codebook)
    return dfeatures, dweight, dbias, dcodebook
