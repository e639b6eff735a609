"""Counter-based random numbers: every number is a function of (seed, position, stream, code), of nothing else.

Philox4x32-10 with key = (low, high) half of the 64-bit seed and counter = (code // 4, position, stream, 0); code v
takes lane v % 4. A sample therefore depends on no batch, neighbour, order of drawing or thread count.
Words are uint32 kept in int64 tensors.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Iterable

import torch
from torch import Tensor

SEEDS = 2**64  # seeds are 0 .. SEEDS - 1
POSITIONS = 2**32  # positions are 0 .. POSITIONS - 1

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF


class Stream(enum.IntEnum):
    """Who draws: different streams never meet the same counter. A number once given stays: seeds would mean others."""

    IMAGE_SAMPLING = 0  # position = image token index, code = image code
    TEXT_SAMPLING = 1  # position = text position, code = text id
    VAE = 2  # position = row over the global batch (batch * h * w), code = codebook entry


def philox4x32(counter: Tensor, key: tuple[int | Tensor, int | Tensor]) -> Tensor:
    """Philox4x32-10: four random words for each counter.

    Args:
        counter: int64 [..., 4], words.   key: (low, high), each a word or an int64 tensor that broadcasts with [...].
    Returns: int64 [..., 4], words.
    """
    x0, x1, x2, x3 = (word & _WORD for word in counter.unbind(-1))
    key0, key1 = key
    for _ in range(_ROUNDS):
        low0, high0 = _multiply(x0, _MULTIPLIERS[0])
        low1, high1 = _multiply(x2, _MULTIPLIERS[1])
        x0, x1, x2, x3 = high1 ^ x1 ^ key0, low1, high0 ^ x3 ^ key1, low0
        key0 = (key0 + _KEY_STEPS[0]) & _WORD
        key1 = (key1 + _KEY_STEPS[1]) & _WORD
    return torch.stack(torch.broadcast_tensors(x0, x1, x2, x3), dim=-1)


def uniform(words: Tensor) -> Tensor:
    """u = ((word >> 9) + 0.5) * 2**-23, exact in float32, strictly between 0 and 1 (24 bits would round to 1)."""
    return ((words >> 9).to(torch.float32) + 0.5) * 2.0**-23


def gumbel(words: Tensor) -> Tensor:
    """-log(-log(u)), computed in float64 and rounded once to float32. Always finite: u is never 0 or 1."""
    return (-torch.log(-torch.log(uniform(words).double()))).to(torch.float32)


def resolve_seeds(
    seed: int | Iterable[int] | Tensor | None, batch: int, generator: torch.Generator | None = None
) -> list[int]:
    """One 64-bit seed for each of `batch` samples.

    Args:
        seed: None draws one number s from `generator`, or from torch's default generator, and goes on as for s: a
            second call differs, `torch.manual_seed` repeats it. An int s gives sample i the seed (s + i) mod 2**64. A
            list or an integer tensor [batch] gives one each.
    Returns: list of `batch` ints in 0 .. 2**64 - 1.
    Raises: TypeError (a float, a string, ...), ValueError (negative, 2**64 or more, wrong count, seed and generator).
    """
    if seed is None:
        seed = int(torch.empty((), dtype=torch.int64, device=_device(generator)).random_(generator=generator))
    elif generator is not None:
        raise ValueError("resolve_seeds: seed and generator must not both be given, got both. Leave one of them out.")
    if isinstance(seed, Tensor):
        seed = seed.tolist()
    if isinstance(seed, Iterable) and not isinstance(seed, (str, bytes)):
        seeds = [_checked_seed(one) for one in seed]
        if len(seeds) != batch:
            raise ValueError(
                f"resolve_seeds: a list of seeds must have one for each of the {batch} samples, got {len(seeds)}."
                " Give one int to number them from it."
            )
        return seeds
    first = _checked_seed(seed)
    return [(first + i) % SEEDS for i in range(batch)]


def seeds_to_tensor(
    seeds: int | Iterable[int], device: torch.device | str | None = None, *, op: str | None = None
) -> Tensor:
    """Seeds as int64 [count]: the same 64 bits, 2**63 and more read as negative (torch has no uint64 arithmetic).

    Args: op: who speaks where a seed is refused.
    """
    numbers = [seeds] if isinstance(seeds, int) else seeds
    values = [_checked_seed(one, op) for one in numbers]
    return torch.tensor([s - SEEDS if s >= SEEDS // 2 else s for s in values], dtype=torch.int64, device=device)


def draw_seed(device: torch.device | str | None = None) -> Tensor:
    """A fresh seed from torch's default generator, as int64 [1].

    It is never read by the host: torch.compile keeps it a tensor, a GPU does not wait.
    """
    return torch.randint(2**63 - 1, (1,)).to(device, non_blocking=True)


def first_row_of_rank(rows: int) -> int:
    """Where this process numbers its rows from, so that processes that share a seed never meet the same counter.

    Args: rows: how many this process draws for at once.
    Returns: rank * (2**32 // world_size) where torch.distributed is initialised, otherwise 0.
    Raises: ValueError where the rows run into those of the next rank.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, ranks = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    span = POSITIONS // ranks
    if rows > span:
        raise ValueError(
            f"first_row_of_rank: rows must be at most {span}, the share of one of {ranks} ranks, got {rows}."
            " Split the batch."
        )
    return rank * span


def _multiply(words: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """(low, high) word of the 64-bit products; the signed product wraps to the same 64 bits."""
    product = words * multiplier
    return product & _WORD, (product >> 32) & _WORD


def _device(generator: torch.Generator | None) -> torch.device | str:
    return "cpu" if generator is None else generator.device


def _checked_seed(seed: object, op: str | None = None) -> int:
    speaker = f"{op}: " if op else ""
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise TypeError(
            f"{speaker}seed must be a whole number, got {seed!r} ({type(seed).__name__})."
            " Give an int in 0 .. 2**64 - 1, or None."
        )
    value = operator.index(seed)
    if not 0 <= value < SEEDS:
        raise ValueError(
            f"{speaker}seed must be in 0 .. 2**64 - 1, got {value}. Take it modulo 2**64 if that is what you mean."
        )
    return value
