"""gumbel_codebook by its Triton launchers, with launch sizes of the test's choice, as a differentiable function."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from dalle_fast.kernels.gumbel_codebook_arguments import prepare
from dalle_fast.kernels.gumbel_codebook_blocks import STREAM
from dalle_fast.kernels.gumbel_codebook_sizes import Launch, Sizes
from dalle_fast.kernels.philox import gumbel, words
from gumbel_codebook_cases import MODES
from tolerance import check_against_oracle
from torch import Tensor

from dalle_fast.kernels import gumbel_codebook as kernels
from dalle_fast.reference.gumbel_codebook import gumbel_codebook as oracle

# Blocks so small that a few rows, codes and channels have several of each.
_SIZES = Sizes(16, 64, 16, 4, 1)
SMALL = Launch(_SIZES, _SIZES, _SIZES, _SIZES, _SIZES)

Function = Callable[..., tuple[Tensor, ...]]


class _GumbelCodebook(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, weight, bias, codebook, options, with_kl, launch):
        call = prepare(features, weight, bias, codebook, **options)
        embeds, codes, noisy_codes, kl, statistics = kernels.launch_forward(call, with_kl=with_kl, launch=launch)
        ctx.save_for_backward(features, weight, bias, codebook, embeds, noisy_codes, statistics)
        ctx.options, ctx.with_kl, ctx.launch = options, with_kl, launch
        ctx.mark_non_differentiable(codes, noisy_codes)
        return embeds, codes, noisy_codes, kl

    @staticmethod
    def backward(ctx, dembeds, _codes, _noisy_codes, dkl):
        *inputs, embeds, noisy_codes, statistics = ctx.saved_tensors
        gradients = kernels.launch_backward(
            dembeds,
            dkl if ctx.with_kl else None,
            embeds,
            noisy_codes,
            statistics,
            prepare(*inputs, **ctx.options),
            launch=ctx.launch,
        )
        dfeatures, dweight, dbias, dcodebook = gradients
        return dfeatures, dweight, None if inputs[2] is None else dbias, dcodebook, None, None, None


def bottleneck(
    *,
    mode: str,
    temperature: float = 0.9,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    first_row: int = 0,
    with_kl: bool = False,
    launch: Launch | None = SMALL,
) -> Function:
    """features, weight, bias, codebook -> embeds, codes, noisy_codes, kl. launch None: as the table says."""
    options = {"noise": noise, "seed": seed, "first_row": first_row, "temperature": temperature, "mode": mode}

    def run(features: Tensor, weight: Tensor, bias: Tensor | None, codebook: Tensor) -> tuple[Tensor, ...]:
        chosen = launch
        if chosen is None:
            chosen = kernels.pick_gumbel_codebook(features.dtype, kernels.architecture(features.device))
        return _GumbelCodebook.apply(features, weight, bias, codebook, options, with_kl, chosen)

    return run


def reference(*, mode: str, temperature: float, noise: Tensor, with_kl: bool) -> Function:
    """The same of the oracle."""

    def run(features: Tensor, weight: Tensor, bias: Tensor | None, codebook: Tensor) -> tuple[Tensor, ...]:
        embeds, codes, noisy_codes, kl = oracle(
            features,
            weight,
            bias,
            codebook,
            temperature=temperature,
            noise=noise,
            with_kl=with_kl,
            **MODES[mode],
        )
        return embeds, codes, noisy_codes, embeds.new_zeros(()) if kl is None else kl

    return run


def check(
    inputs: tuple[Tensor | None, ...],
    dtype: torch.dtype,
    *,
    mode: str,
    noise: Tensor,
    temperature: float = 0.9,
    with_kl: bool = False,
    run: Function | None = None,
    launch: Launch | None = SMALL,
) -> None:
    """Outputs and gradients of the kernels (or of `run`) are within the budget of the oracle, indices equal.

    The KL counts by its gradients: a scalar can be right by luck.
    """
    options = {"mode": mode, "temperature": temperature, "noise": noise, "with_kl": with_kl}
    check_against_oracle(
        _without_value_of_kl(run or bottleneck(**options, launch=launch), with_kl),
        _without_value_of_kl(reference(**options), with_kl),
        inputs,
        dtype,
    )


def _without_value_of_kl(function: Function, with_kl: bool) -> Function:
    def run(*inputs: Tensor | None) -> tuple[Tensor, ...]:
        *others, kl = function(*inputs)
        return (*others, kl - kl.detach()) if with_kl else tuple(others)

    return run


@triton.jit
def _draw(seed_ptr, words_ptr, noise_ptr, first_row, n_rows, n_codes, BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Words, int64, and noise, float32, of every row and code: [n_rows, n_codes], n_codes a multiple of 4."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    quad = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    lanes = words(tl.load(seed_ptr), quad[None, :], first_row + row[:, None].to(tl.int64), STREAM)
    for lane in tl.static_range(4):
        code = 4 * quad + lane
        offsets = row[:, None].to(tl.int64) * n_codes + code[None, :]
        mask = (row < n_rows)[:, None] & (code < n_codes)[None, :]
        tl.store(words_ptr + offsets, lanes[lane].to(tl.int64), mask=mask)
        tl.store(noise_ptr + offsets, gumbel(lanes[lane]), mask=mask)


def drawn(seed: Tensor, first_row: int, n_rows: int, n_codes: int) -> tuple[Tensor, Tensor]:
    """The words [n_rows, n_codes] that kernels draw, and their noise."""
    width = 4 * triton.cdiv(n_codes, 4)
    found = seed.new_empty(n_rows, width)
    noise = torch.empty_like(found, dtype=torch.float32)
    _draw[(triton.cdiv(n_rows, 16), triton.cdiv(width, 64))](
        seed, found, noise, first_row, n_rows, width, BLOCK_M=16, BLOCK_Q=16
    )
    return found[:, :n_codes], noise[:, :n_codes]
