"""What a step of a DALLE's training draws for each sample: empty captions, codes that are replaced.

Every draw comes from (seed, position of the sample): it depends on no neighbour, process or step size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_fast.training.config import CodeNoise
from dalle_fast.training.order import generator


def drawn_in_step(
    text: Tensor,
    codes: Tensor,
    positions: Tensor,
    pool: Tensor | None,
    noise: CodeNoise,
    *,
    null_cond_prob: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Text with some samples left empty, and codes with some replaced: new tensors, or the ones given.

    Args:
        text: ids [B, T].   codes: int64 [B, n].   positions: int64 [B].   pool: codes [P, n] to replace with.
        null_cond_prob: of an empty text.   seed: of the run.
    """
    if not null_cond_prob and not noise.share:
        return text, codes
    empty, read = [], []
    for position, own in zip(positions.tolist(), codes.cpu() if noise.share else codes, strict=True):
        draws = generator(seed, position)
        empty.append(bool(torch.rand((), generator=draws) < null_cond_prob))
        if noise.share and pool is not None:
            read.append(replaced(own, pool, noise, draws))
    text = text.masked_fill(torch.tensor(empty, device=text.device)[:, None], 0)
    return text, torch.stack(read).to(codes.device) if read else codes


def replaced(codes: Tensor, pool: Tensor, noise: CodeNoise, draws: torch.Generator) -> Tensor:
    """Codes [n] of one sample, with probability `noise.share` some of them replaced: a new tensor, or the one given.

    Each is then replaced with a probability that is drawn from 0..noise.rate, half the time by the code at its place
    in one other picture of `pool` [P, n], otherwise by any code of any of them.
    """
    touched, rate = torch.rand(2, generator=draws).tolist()
    if touched >= noise.share:
        return codes
    n = len(codes)
    chosen = torch.rand(n, generator=draws) < rate * noise.rate
    other = pool[int(torch.randint(len(pool), (), generator=draws))]
    anywhere = pool.flatten()[torch.randint(pool.numel(), (n,), generator=draws)]
    at_its_place = torch.rand(n, generator=draws) < 0.5
    return torch.where(chosen, torch.where(at_its_place, other, anywhere), codes)
