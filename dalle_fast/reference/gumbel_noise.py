"""Gumbel noise in plain torch: the specification of the op, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_fast import rng


def gumbel_noise(seeds: Tensor, positions: Tensor, stream: int, n_codes: int) -> Tensor:
    """Noise of code k at positions[n]: -log(-log(u)) of lane k % 4 of Philox(seed, (k // 4, position, stream, 0)).

    Args:
        seeds: int64 [n] or [1], the 64 bits of each seed (`rng.seeds_to_tensor`).   positions: int64 [n].
    Returns: float32 [n, n_codes].
    """
    return rng.gumbel(words(seeds, positions, stream, n_codes))


def words(seeds: Tensor, positions: Tensor, stream: int, n_codes: int) -> Tensor:
    """The random words behind the noise, int64 [n, n_codes]."""
    n = positions.shape[0]
    blocks = torch.arange((n_codes + 3) // 4, device=positions.device)
    counter = torch.stack(
        torch.broadcast_tensors(blocks, positions[:, None], blocks.new_full((), stream), blocks.new_zeros(())), dim=-1
    )  # [n, blocks, 4]
    low, high = seeds & 0xFFFFFFFF, (seeds >> 32) & 0xFFFFFFFF
    lanes = rng.philox4x32(counter, (low[:, None], high[:, None]))  # [n, blocks, 4]
    return lanes.reshape(n, 4 * blocks.shape[0])[:, :n_codes]
