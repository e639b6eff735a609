"""Which samples a step takes, and what their random draws come from: functions of the seed and of the place alone.

All samples ever trained on are numbered 0, 1, 2, ...: step s of a global batch of B takes the positions s B .. (s + 1)
B - 1. Position p is place p mod n of epoch p // n, whose order is a permutation drawn from (seed, epoch). Nothing has a
state, so a run resumes at any step, and processes and workers change no sample and no draw.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Sampler

_WORD = 0xFFFFFFFF


class Stream(enum.IntEnum):
    """Who draws: the draws of one do not depend on how much another drew before."""

    STEP = 0  # what a task draws in a step
    PICTURE = 1  # crops, flips
    CAPTION = 2  # choice of a line, dropout
    ORDER = 3  # of an epoch


@dataclass(frozen=True)
class Draw:
    """Sample `index` of the data, as number `position` of all samples ever trained on."""

    index: int
    position: int


def generator(seed: int, position: int, stream: Stream = Stream.STEP) -> torch.Generator:
    """The generator of one position's (or step's, or epoch's) random draws.

    torch's CPU generator starts from 32 bits: for one seed and stream, positions below 2**32 never share them.
    """
    key = hashlib.blake2b(f"{seed} {int(stream)}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(_mix(position ^ int.from_bytes(key, "little")))


def _mix(word: int) -> int:
    """A permutation of the 32-bit words that leaves neighbours unlike each other (MurmurHash3's last lines)."""
    word &= _WORD
    word = (word ^ word >> 16) * 0x85EBCA6B & _WORD
    word = (word ^ word >> 13) * 0xC2B2AE35 & _WORD
    return word ^ word >> 16


def hash_fraction(text: str) -> float:
    """A number in [0, 1) from the SHA-256 of `text`: the same everywhere, unrelated to any order."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def is_held_out(key: str, share: float) -> bool:
    """Whether the sample of this key is kept from training where `share` of them are; more come with a larger share."""
    return hash_fraction(f"held out {key}") < share


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The order of `n` samples in one epoch, long [n]."""
    return torch.randperm(n, generator=generator(seed, epoch, Stream.ORDER))


class StepOrder(Sampler[list[Draw]]):
    """The micro-batches of one process, in order; a `batch_sampler` of a DataLoader.

    A step takes `batch` positions, the same whatever `world` and `micro_batch`: micro-step a of rank r takes
    `micro_batch` of them from (a world + r) micro_batch on. A batch may straddle epochs.

    Args:
        n: samples of the data.   batch: of a step, all processes together.   micro_batch: of one process and forward.
        rank, world: this process, of how many.   first_step: where to go on.   steps: how many.
    Raises: ValueError (no samples, a batch that does not split).
    """

    def __init__(
        self,
        n: int,
        *,
        batch: int,
        micro_batch: int,
        rank: int,
        world: int,
        seed: int,
        first_step: int,
        steps: int,
    ) -> None:
        if n < 1:
            raise ValueError("train: the data must hold at least one sample, got none. Name another folder.")
        if micro_batch < 1 or batch < 1 or batch % (micro_batch * world):
            raise ValueError(
                f"train: batch must be a multiple of micro_batch times the processes, got {batch} for {micro_batch} x "
                f"{world}. Change one of them."
            )
        self.n, self.batch, self.micro_batch = n, batch, micro_batch
        self.rank, self.world, self.seed = rank, world, seed
        self.first_step, self.steps = first_step, steps

    def __len__(self) -> int:
        return self.steps * (self.batch // (self.micro_batch * self.world))

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch, order = -1, torch.empty(0, dtype=torch.long)
        stride = self.micro_batch * self.world
        first = self.first_step * self.batch + self.rank * self.micro_batch
        for number in range(len(self)):
            draws = []
            for position in range(first + number * stride, first + number * stride + self.micro_batch):
                if position // self.n != epoch:
                    epoch = position // self.n
                    order = epoch_order(self.n, self.seed, epoch)
                draws.append(Draw(int(order[position % self.n]), position))
            yield draws
