"""A VQ codebook for training, and its exact folding into a DiscreteVAE.

Training: z = P h + b_P per position (P: [D, F], h: the encoder's features); the code is the nearest of the K rows c_k
of the codebook; the gradient passes straight through; rows are exponential moving averages of their vectors; rows that
nobody uses are put where the quantisation error is large.

Folding: |z - c_k|^2 = |z|^2 - 2 (c_k . z - |c_k|^2 / 2), so the nearest row is the argmax over k of
(P^T c_k) . h + c_k . b_P - |c_k|^2 / 2: a 1x1 convolution with weight [K, F] and bias [K], a DiscreteVAE's last layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_SPREAD_CANDIDATES = 8192


def spread_sample(vectors: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` rows of `vectors` [n, D], each drawn with the squared distance to those drawn before (k-means++)."""
    if len(vectors) > _SPREAD_CANDIDATES:
        vectors = vectors[torch.randperm(len(vectors), generator=generator)[:_SPREAD_CANDIDATES]]
    chosen = [vectors[torch.randint(len(vectors), (), generator=generator)]]
    distance = torch.full((len(vectors),), torch.inf)
    for _ in range(count - 1):
        distance = torch.minimum(distance, (vectors - chosen[-1]).square().sum(1))
        chosen.append(vectors[torch.multinomial(distance + 1e-12, 1, generator=generator)[0]])
    return torch.stack(chosen)


class VectorQuantiser(nn.Module):
    """Nearest-row quantiser of [B, D, h, w] with a codebook that follows its vectors.

    Args:
        num_codes, dim: rows and width of the codebook.
        decay: of the moving averages.
        revive_below: a row whose average count per batch falls below this is moved.
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor
    ready: Tensor

    def __init__(self, num_codes: int, dim: int, *, decay: float = 0.98, revive_below: float = 0.5) -> None:
        super().__init__()
        self.decay = decay
        self.revive_below = revive_below
        self.register_buffer("codebook", torch.zeros(num_codes, dim))
        self.register_buffer("counts", torch.ones(num_codes))
        self.register_buffer("sums", torch.zeros(num_codes, dim))
        self.register_buffer("ready", torch.tensor(False))

    def nearest(self, vectors: Tensor) -> Tensor:
        """[n, D] -> [n] codes; ties go to the lowest index."""
        scores = torch.addmm(-0.5 * self.codebook.square().sum(1), vectors, self.codebook.t())
        return scores.argmax(1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z [B, D, h, w] -> quantised [B, D, h, w] (gradient straight through), codes [B, h, w], commitment loss."""
        vectors = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        codes = self.nearest(vectors.detach())
        picked = self.codebook[codes]
        commitment = F.mse_loss(vectors, picked)
        quantised = (vectors + (picked - vectors).detach()).view(z.shape[0], *z.shape[2:], z.shape[1])
        return quantised.permute(0, 3, 1, 2), codes.view(z.shape[0], *z.shape[2:]), commitment

    @torch.no_grad()
    def start(self, z: Tensor, generator: torch.Generator) -> None:
        """Place the codebook on vectors of the first batch."""
        vectors = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        self.codebook.copy_(spread_sample(vectors, len(self.codebook), generator))
        self.sums.copy_(self.codebook)
        self.ready.fill_(True)

    @torch.no_grad()
    def update(self, z: Tensor, codes: Tensor, generator: torch.Generator, *, revive: bool) -> int:
        """Move the averages by one batch; returns how many rows were revived."""
        vectors = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        codes = codes.reshape(-1)
        counts = torch.bincount(codes, minlength=len(self.codebook)).to(vectors.dtype)
        sums = torch.zeros_like(self.sums).index_add_(0, codes, vectors)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        self.codebook.copy_(self.sums / self.counts.clamp_min(1e-5)[:, None])
        dead = (self.counts < self.revive_below).nonzero().flatten()
        if not revive or len(dead) == 0:
            return 0
        error = (vectors - self.codebook[codes]).square().sum(1)
        places = vectors[torch.multinomial(error + 1e-12, len(dead), replacement=True, generator=generator)]
        self.codebook[dead] = places
        self.counts[dead] = 1.0
        self.sums[dead] = places
        return len(dead)


@torch.no_grad()
def fold(codebook: Tensor, projection: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """(weight [K, F, 1, 1], bias [K]) of the convolution whose argmax over features is the nearest row of `codebook`.

    `projection` is the 1x1 convolution [D, F] in front of the quantiser. Computed in float64, returned in float32.
    """
    rows = codebook.double()
    matrix = projection.weight.double().flatten(1)
    weight = rows @ matrix
    bias = -0.5 * rows.square().sum(1)
    if projection.bias is not None:
        bias = bias + rows @ projection.bias.double()
    return weight.float()[:, :, None, None], bias.float()
