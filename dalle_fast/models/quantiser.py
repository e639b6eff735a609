"""Vector quantisation with a codebook that follows its vectors (VQ-VAE, arXiv 1711.00937, appendix A.1).

    vectors z [M, D]    codes j_m = argmin_k |z_m - c_k|^2    output c_j, gradient straight through to z
    commitment = mean over M and D of (z - c_j)^2, whose gradient reaches z alone
    n_k = vectors of a batch with code k, s_k = their sum     counts_k <- decay counts_k + (1 - decay) n_k
    c_k <- c_k + (1 - decay) (s_k - n_k c_k) / counts_k       the moving average of sums over that of counts

A batch moves the codebook when the next one arrives, before that is quantised: until then a forward pass repeated by
activation checkpointing meets the codes it met at first, and adds nothing. Everything that has been learnt, the batch
still to come in included, is in buffers: a resumed run continues bit for bit.
Where torch.distributed is initialised, counts, sums and drawn rows are those of the batch of all ranks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

# What waits for values and draws is no part of a graph. torch.compiler.disable would import torch._dynamo, and Triton
# with it, where this module is imported; this does at the first call, as torch's optimisers do.
from torch._compile import _disable_dynamo as _not_compiled

from dalle_fast.ops.nearest_code import nearest_code

_START_POOL = 8192  # vectors that the first codes are drawn from
_START_ROUNDS = 512
_REVIVE_EVERY = 10  # updates: looking for dead codes waits for the device
_TINY = 1e-12


class VectorQuantiser(nn.Module):
    """Puts the nearest of K codes in the place of every vector of [B, D, h, w].

    In training every forward pass teaches the codebook. The first one places the codes on vectors of its batch, far
    from each other; codes that nobody uses are later moved to vectors that are badly quantised. With torch.distributed
    all ranks must make the same number of training passes: each sums over all of them.

    Attributes:
        weight: [K, D], the codes.   counts: [K], average number of vectors an update.
        updates, revived: int64 scalars: updates made, codes moved so far.   started: bool scalar: codes were placed.
        batches_per_update: training passes whose vectors make one update together: set it to the number of
            accumulation steps, and the codebook is that of the whole batch.

    Args:
        num_codes: K.   dim: D.
        decay: of the moving averages, 0 to below 1.
        revive_below: a code whose average count falls below this is moved; 0 never moves one.
        normalised: vectors and codes of length 1, so that the largest cosine wins (arXiv 2110.04627).
        seed: of the draws (first codes, revival), together with the number of updates.
    Raises: ValueError (an argument out of range).
    """

    weight: Tensor
    counts: Tensor
    new_counts: Tensor
    new_sums: Tensor
    collected: Tensor
    updates: Tensor
    revived: Tensor
    started: Tensor

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        decay: float = 0.99,
        revive_below: float = 0.05,
        normalised: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if num_codes < 1 or dim < 1:
            raise ValueError(f"VectorQuantiser: num_codes and dim must be at least 1, got {num_codes} and {dim}.")
        if not 0 <= decay < 1:
            raise ValueError(f"VectorQuantiser: decay must be in 0 .. below 1, got {decay}. 0.99 is usual.")
        if not revive_below >= 0:
            raise ValueError(f"VectorQuantiser: revive_below must be 0 or more, got {revive_below}. 0 revives nothing.")
        self.decay = decay
        self.revive_below = revive_below
        self.normalised = normalised
        self.seed = seed
        self.batches_per_update = 1
        weight = torch.randn(num_codes, dim)
        self.register_buffer("weight", F.normalize(weight, dim=1) if normalised else weight)
        self.register_buffer("counts", torch.ones(num_codes))
        self.register_buffer("new_counts", torch.zeros(num_codes))
        self.register_buffer("new_sums", torch.zeros(num_codes, dim))
        for name in ("collected", "updates", "revived"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        self.register_buffer("started", torch.tensor(False))

    def nearest(self, z: Tensor) -> Tensor:
        """z [B, D, h, w] -> int64 codes [B, h, w]; teaches the codebook nothing."""
        return self._nearest(self._vectors(z.detach())).view(z.shape[0], *z.shape[2:])

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantises z [B, D, h, w]; in training, teaches the codebook.

        Returns: the chosen codes as [B, D, h, w] in the dtype of the codebook, with the gradient straight through;
            their numbers, int64 [B, h, w]; the commitment loss.
        Raises: TypeError (training in 16 bits), ValueError (a wrong shape; training on what is not finite, after which
            the codebook is as it was).
        """
        learns = self.training and not _is_recomputed()
        vectors = self._vectors(z)
        seen = vectors.detach()
        if learns:
            self._prepare(seen)
        codes = self._nearest(seen)
        picked = F.embedding(codes, self.weight)
        if learns:
            self._collect(seen, codes)
        commitment = F.mse_loss(vectors, picked)
        # The difference is exactly zero, so that what is decoded is exactly what the codes stand for.
        quantised = (picked + (vectors - seen)).view(z.shape[0], *z.shape[2:], z.shape[1])
        return quantised.permute(0, 3, 1, 2), codes.view(z.shape[0], *z.shape[2:]), commitment

    @torch.no_grad()
    def start(self, z: Tensor) -> None:
        """Places the codes on vectors of a batch [B, D, h, w], as the first forward pass in training does."""
        self._start(self._vectors(z))

    @torch.no_grad()
    def update(self) -> None:
        """Moves the codebook by what was collected since the last update; nothing happens where that is nothing."""
        if not self.collected:
            return
        self.counts.lerp_(self.new_counts, 1 - self.decay)
        share = (1 - self.decay) / self.counts.clamp_min(_TINY)  # of codes without vectors: times zero below
        self.weight.addcmul_(share[:, None], self.new_sums - self.new_counts[:, None] * self.weight)
        if self.normalised:
            used = self.new_counts[:, None] > 0
            self.weight.copy_(torch.where(used, F.normalize(self.weight, dim=1), self.weight))
        for buffer in (self.new_counts, self.new_sums, self.collected):
            buffer.zero_()
        self.updates += 1

    def _vectors(self, z: Tensor) -> Tensor:
        """[M, D] in the dtype of the codebook, whatever autocast made of z."""
        if z.dim() != 4 or z.shape[1] != self.weight.shape[1]:
            raise ValueError(
                f"VectorQuantiser: z must be [B, D={self.weight.shape[1]}, h, w], got {list(z.shape)}."
                " Give the encoder's maps, not rows."
            )
        vectors = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]).to(self.weight.dtype)
        return F.normalize(vectors, dim=1) if self.normalised else vectors

    def _nearest(self, vectors: Tensor) -> Tensor:
        return nearest_code(vectors, self.weight, normalised=self.normalised)

    @_not_compiled
    @torch.no_grad()
    def _prepare(self, vectors: Tensor) -> None:
        """What is due before a batch is quantised in training."""
        if self.weight.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"VectorQuantiser: the codebook must be float32 or float64 in training, got {self.weight.dtype}."
                " Moving averages need it: keep the model in float32 and train under torch.autocast."
            )
        _check_finite(vectors)
        if not self.started:
            self._start(vectors)
            return
        if self.collected >= self.batches_per_update:
            self.update()
        updates = int(self.updates)
        if self.revive_below > 0 and updates and updates % _REVIVE_EVERY == 0 and not self.collected:
            self._revive(vectors)

    @_not_compiled
    @torch.no_grad()
    def _collect(self, vectors: Tensor, codes: Tensor) -> None:
        counts = torch.bincount(codes, minlength=len(self.weight)).to(self.weight.dtype)
        sums = _sum_by_code(vectors, codes, len(self.weight))
        if _several_ranks():
            distributed.all_reduce(counts)
            distributed.all_reduce(sums)
        self.new_counts += counts
        self.new_sums += sums
        self.collected += counts.any()  # an empty batch is none

    def _start(self, vectors: Tensor) -> None:
        generator = self._generator()
        pool = _draw_rows(vectors, vectors.new_ones(len(vectors)), _START_POOL, generator)
        if len(pool):
            self._place(
                torch.arange(len(self.weight), device=pool.device), spread_sample(pool, len(self.weight), generator)
            )
            self.started.fill_(True)

    def _revive(self, vectors: Tensor) -> None:
        dead = (self.counts < self.revive_below).nonzero().flatten()
        if not len(dead):
            return
        error = (vectors - F.embedding(self._nearest(vectors), self.weight)).square().sum(1)
        places = _draw_rows(vectors, error + _TINY, len(dead), self._generator())
        self._place(dead[: len(places)], places)
        self.revived += len(places)

    def _place(self, codes: Tensor, vectors: Tensor) -> None:
        """Puts `codes` on `vectors`, with a count that lasts some updates; rank 0 has the last word on rounding."""
        if _several_ranks():
            distributed.broadcast(vectors, 0)
        self.weight[codes] = vectors
        self.counts[codes] = max(1.0, 2 * self.revive_below)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + int(self.updates)) % 2**63)


def spread_sample(vectors: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` rows of `vectors` [n, D], each drawn with the squared distance to those drawn before (k-means++).

    In at most 512 rounds of several rows, drawn together, where `count` is larger. Needs n >= 1.
    Args: generator: of the CPU, wherever the vectors are, so that every device draws alike.
    """
    at_once = min(-(-count // _START_ROUNDS), len(vectors))
    # |v - r|^2 through a matrix product, which loses digits far from the origin: differences, row by row, take minutes
    # at 8192 codes 512 wide.
    centred = vectors - vectors.mean(0)
    squares = centred.square().sum(1)
    distance = vectors.new_ones(len(vectors))
    chosen: list[Tensor] = []
    for drawn in range(0, count, at_once):
        score = _race(distance + _TINY, generator)
        rows = score.topk(min(at_once, count - drawn)).indices
        with torch.autocast(vectors.device.type, enabled=False):
            products = centred @ centred[rows].T
        to_these = (squares[:, None] + squares[rows] - 2 * products).amin(1).clamp_min_(0)
        distance = torch.minimum(distance, to_these) if chosen else to_these
        chosen.append(rows)
    return vectors[torch.cat(chosen)]


def _race(chances: Tensor, generator: torch.Generator, first: int = 0, total: int | None = None) -> Tensor:
    """Scores [n] whose k largest are a draw of k of n rows, without replacement, in proportion to `chances` [n].

    Exponential times with rates `chances`, inverted. first, total: where these n rows are among those of all ranks.
    """
    times = torch.empty(len(chances) if total is None else total).exponential_(generator=generator)
    return chances / times[first : first + len(chances)].to(chances)


def _draw_rows(vectors: Tensor, chances: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """At most `count` rows of the vectors [n, D] of all ranks, without replacement, in proportion to `chances` [n].

    Every rank gets the rows that one process with the batch of all of them would draw.
    """
    if not _several_ranks():
        score = _race(chances, generator)
        return vectors[score.topk(min(count, len(vectors))).indices]
    sizes = _gathered(torch.tensor([len(vectors)], device=vectors.device)).tolist()
    first, total = sum(sizes[: distributed.get_rank()]), sum(sizes)
    count = min(count, total)
    score = _race(chances, generator, first, total)
    best = score.topk(min(count, len(vectors))).indices
    missing = count - len(best)  # ranks gather as many rows each
    scores = _gathered(F.pad(score[best], (0, missing), value=-1.0))
    rows = _gathered(F.pad(vectors[best], (0, 0, 0, missing)))
    return rows[scores.topk(count).indices]


def _check_finite(vectors: Tensor) -> None:
    """Raises ValueError, on all ranks, where a vector [M, D] of any rank is not finite: waits for the device."""
    wrong = (~vectors.isfinite().all(1)).sum()
    if _several_ranks():
        distributed.all_reduce(wrong)
    if wrong:
        raise ValueError(
            f"VectorQuantiser: vectors must be finite in training, got nan or infinity in {int(wrong)}."
            " Lower the learning rate, or clip gradients."
        )


def _sum_by_code(vectors: Tensor, codes: Tensor, num_codes: int) -> Tensor:
    """[M, D] summed by code to [K, D], in a fixed order on every device."""
    sums = vectors.new_zeros(num_codes, vectors.shape[1])
    if vectors.is_cuda:  # there index_add_ adds in any order; this sorts first
        return sums.index_put_((codes,), vectors, accumulate=True)
    return sums.index_add_(0, codes, vectors)


def _several_ranks() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _gathered(rows: Tensor) -> Tensor:
    """The rows of all ranks, one rank after the other; every rank has as many."""
    every = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
    distributed.all_gather(every, rows.contiguous())
    return torch.cat(every)


@_not_compiled
def _is_recomputed() -> bool:
    """Whether this forward pass is part of a backward pass: activation checkpointing repeats it."""
    return torch._C._current_graph_task_id() != -1
