"""Gumbel noise from counters: the contract of its arguments, the choice of implementation, the registration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dalle_fast import _extension, dispatch, rng
from dalle_fast.ops.checks import dtype_name
from dalle_fast.ops.support import why_not_cpu
from dalle_fast.reference import gumbel_noise as reference

OP = "gumbel_noise"


def _cpu(seeds: Tensor, positions: Tensor, stream: int, n_codes: int) -> Tensor:
    seeds, positions = seeds.contiguous(), positions.contiguous()
    n = positions.shape[0]
    out = torch.empty(n, n_codes, dtype=torch.float32)
    function = _extension.library().dalle_fast_gumbel_noise
    status = function(seeds.data_ptr(), seeds.shape[0], positions.data_ptr(), n, stream, n_codes, out.data_ptr())
    _extension.check(status, OP)
    return out


def _supports_cpu(*, device: str = "cpu") -> str | None:
    return why_not_cpu(device)


dispatch.register(OP, "reference", reference.gumbel_noise)
dispatch.register(OP, "cpu", _cpu, supports=_supports_cpu, rank=1)


def gumbel_noise(
    seed: int | Sequence[int] | Tensor,
    positions: Tensor,
    stream: rng.Stream,
    n_codes: int,
    *,
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
) -> Tensor:
    """Gumbel noise that depends on (seed, position, stream, code) alone: never on the batch, the order or the threads.

    Args:
        seed: an int in 0 .. 2**64 - 1, or one for each position; or int64 [1] or [n] on the device of positions,
            holding the 64 bits of each (`rng.seeds_to_tensor`).
        positions: integers [n] on the device where the noise is wanted, taken modulo 2**32.
        stream: who draws (`rng.Stream`).   n_codes: how many codes, from code 0 on.
        dtype: of the result; the noise itself is float32, other types convert it.
        impl: "auto", or the name of one implementation.
    Returns: [n, n_codes] on the device of positions.
    Raises: TypeError (dtypes, a float seed), ValueError (range, count, device), RuntimeError (no extension),
        NotImplementedError (impl cannot run on this device).
    Numerics: words and u are bit-equal everywhere, the noise is within 2 ulp (float32) of its exact value.
    Source: the Gumbel-max trick over Philox4x32-10; DESIGN section 4.6.
    """
    positions = check_positions(OP, positions)
    seeds = check_seeds(OP, seed, positions)
    if n_codes < 0:
        raise ValueError(f"{OP}: n_codes must be 0 or more, got {n_codes}.")
    noise = _gumbel_noise(seeds, positions, int(rng.Stream(stream)), n_codes, impl)
    return noise if dtype == torch.float32 else noise.to(dtype)


def facts(positions: Tensor) -> dict[str, object]:
    """What decides which implementation runs: `dalle_fast.explain("gumbel_noise", **facts(positions))`."""
    return {"device": positions.device.type}


@torch.library.custom_op("dalle_fast::gumbel_noise", mutates_args=())
def _gumbel_noise(seeds: Tensor, positions: Tensor, stream: int, n_codes: int, impl: str) -> Tensor:
    return dispatch.choose(OP, impl, **facts(positions)).function(seeds, positions, stream, n_codes)


@_gumbel_noise.register_fake
def _(seeds: Tensor, positions: Tensor, stream: int, n_codes: int, impl: str) -> Tensor:
    return positions.new_empty((positions.shape[0], n_codes), dtype=torch.float32)


def check_positions(op: str, positions: Tensor) -> Tensor:
    """int64 [n]. Raises: TypeError."""
    if positions.dtype not in (torch.int64, torch.int32) or positions.dim() != 1:
        raise TypeError(
            f"{op}: positions must be int64 [n], got {dtype_name(positions)} {list(positions.shape)}."
            " Give one index for each row of noise."
        )
    return positions.to(torch.int64)


def check_seeds(op: str, seed: int | Sequence[int] | Tensor, positions: Tensor) -> Tensor:
    """int64 [1] or [n]: the 64 bits of each, on the device of positions [n]. Raises: TypeError, ValueError."""
    n = positions.shape[0]
    seeds = seed if isinstance(seed, Tensor) else rng.seeds_to_tensor(seed, positions.device, op=op)
    if seeds.dtype != torch.int64 or seeds.dim() != 1 or seeds.device != positions.device:
        raise TypeError(
            f"{op}: a seed tensor must be int64 [1] or [n={n}] on {positions.device},"
            f" got {dtype_name(seeds)} {list(seeds.shape)} on {seeds.device}."
            " Make it with rng.seeds_to_tensor."
        )
    if seeds.shape[0] not in (1, n):
        raise ValueError(
            f"{op}: seed must be one number or one for each of the {n} positions, got {seeds.shape[0]}."
            " Give as many seeds as positions."
        )
    return seeds
