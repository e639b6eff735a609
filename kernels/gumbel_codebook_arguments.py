"""What the launchers of gumbel_codebook hand to every kernel: tensors, strides and sizes of one call."""

from __future__ import annotations

import math
from typing import NamedTuple

from dalle_fast.kernels.gumbel_codebook_sizes import Sizes
from torch import Tensor

FEATURES_AT_ONCE = 64  # of a row or a code in one block; wider ones are taken in several
_LEAST_BLOCK = 16  # of a product


class Call(NamedTuple):
    """One call, as its kernels see it."""

    features: Tensor  # [B, F, h, w]
    weight: Tensor  # [K, F], contiguous as the two below
    bias: Tensor | None  # [K]
    codebook: Tensor  # [K, D]
    noise: Tensor | None  # [B, K, h, w]
    seed: Tensor | None  # int64 [1], on the device
    first_row: int
    temperature: float
    mode: str

    @property
    def n_rows(self) -> int:
        """B h w."""
        batch, _, height, width = self.features.shape
        return batch * height * width

    @property
    def n_codes(self) -> int:
        """K."""
        return len(self.codebook)

    @property
    def grid(self) -> tuple[int, int]:
        """How rows are counted: h w, w."""
        _, _, height, width = self.features.shape
        return (height * width, width)

    @property
    def rate(self) -> float:
        """What a difference of logits is multiplied by to be an exponent of 2."""
        return math.log2(math.e) / self.temperature

    @property
    def constants(self) -> dict[str, int]:
        """Constants of every kernel: sizes of the model, and which of the optional tensors there are."""
        return {
            "N_CODES": self.n_codes,
            "N_FEATURES": self.weight.shape[1],
            "DIM": self.codebook.shape[1],
            "HAS_BIAS": self.bias is not None,
            "HAS_NOISE": self.noise is not None,
        }

    def blocks(self, sizes: Sizes) -> dict[str, int]:
        """Constants of every kernel: features and channels of a block; there may be several."""
        n_features, dim = self.weight.shape[1], self.codebook.shape[1]
        return {"BLOCK_F": block_of(n_features, FEATURES_AT_ONCE), "BLOCK_D": block_of(dim, sizes.block_c)}


def prepare(
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
) -> Call:
    """The call of these arguments; see `gumbel_codebook.forward`."""
    return Call(
        features=features,
        weight=weight.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        codebook=codebook.contiguous(),
        noise=noise,
        seed=None if seed is None else seed.to(features.device, non_blocking=True),
        first_row=first_row,
        temperature=temperature,
        mode=mode,
    )


def block_of(n_channels: int, at_most: int) -> int:
    """The power of two that holds n_channels, within what a product takes and `at_most`."""
    return min(max(_LEAST_BLOCK, 1 << (n_channels - 1).bit_length()), at_most)


def strides(x: Tensor | None) -> tuple[int, ...]:
    """Strides of x [B, C, h, w]; zeros without one."""
    return (0, 0, 0, 0) if x is None else x.stride()


def cdiv(n: int, block: int) -> int:
    """How many blocks hold n."""
    return -(-n // block)
