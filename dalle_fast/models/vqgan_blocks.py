"""The network of VQGAN: residual blocks, attention over the whole map, an encoder and a decoder of levels.

    encoder: [B, c, S, S] -> conv_in -> levels 0 .. L (residual blocks, attention where a level has it, halving; the
             last does not halve) -> middle (block, attention, block) -> norm_out, swish, conv_out: [B, z, S/2^L, S/2^L]
    decoder: the same backwards, one residual block more a level, and doubling: [B, z, h, w] -> [B, c, h 2^L, w 2^L]

Level 0 is the finest in both. Norms are of 32 groups, activations swish, and no picture meets another of its batch.
Source: VQGAN, arXiv 2012.09841; the network of DDPM, arXiv 2006.11239, without time steps.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 32  # of every norm: widths are multiples of it


class ResidualBlock(nn.Module):
    """x + two convolutions of x; where the width changes, x through a 1x1 convolution. [B, C, h, w] -> [B, C', h, w]"""

    def __init__(self, width_in: int, width_out: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, width_in, eps=eps)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(GROUPS, width_out, eps=eps)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.shortcut = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (x if self.shortcut is None else self.shortcut(x))


class MapAttention(nn.Module):
    """x + attention of every position of x to every one, in one head as wide as the map. [B, C, h, w] to the same.

    That head is 512 wide in the published models; on GPUs the kernels of `ops.sparse_attention` end at 128. Torch's own
    attention takes any width.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width, eps=eps)
        self.to_q = nn.Conv2d(width, width, 1)
        self.to_k = nn.Conv2d(width, width, 1)
        self.to_v = nn.Conv2d(width, width, 1)
        self.to_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (to(normed).flatten(2).mT[:, None] for to in (self.to_q, self.to_k, self.to_v))  # [B, 1, h w, C]
        seen = F.scaled_dot_product_attention(q, k, v)
        return x + self.to_out(seen[:, 0].mT.unflatten(2, x.shape[2:]))


class Halving(nn.Conv2d):
    """[B, C, h, w] -> [B, C, h/2, w/2]; the zeros that the stride needs stand right and below only."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Doubling(nn.Conv2d):
    """[B, C, h, w] -> [B, C, 2h, 2w]: every position four times, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where the level has it, and what leads on."""

    def __init__(
        self, widths: Sequence[int], eps: float, *, attention: bool, resample: Halving | Doubling | None
    ) -> None:
        """widths: before the first block, and after each."""
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(before, after, eps) for before, after in pairwise(widths))
        self.attentions = nn.ModuleList(MapAttention(width, eps) for width in widths[1:] if attention)
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x)
            if len(self.attentions):
                x = self.attentions[i](x)
        return x if self.resample is None else self.resample(x)


class Encoder(nn.Module):
    """Pictures [B, channels, h, w] in -1..1 -> [B, z_channels, h / 2^L, w / 2^L], of L + 1 levels.

    Args: first_width: of conv_in.   widths: of each level.   attention_levels: numbers of those that have attention.
    """

    def __init__(
        self,
        channels: int,
        z_channels: int,
        first_width: int,
        widths: Sequence[int],
        num_res_blocks: int,
        attention_levels: Collection[int],
        eps: float,
    ) -> None:
        super().__init__()
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(channels, first_width, 3, padding=1)
        self.levels = nn.ModuleList(
            Level(
                [widths[i - 1] if i else first_width, *[widths[i]] * num_res_blocks],
                eps,
                attention=i in attention_levels,
                resample=Halving(widths[i]) if i < last else None,
            )
            for i in range(len(widths))
        )
        self.middle = _middle(widths[last], eps)
        self.norm_out = nn.GroupNorm(GROUPS, widths[last], eps=eps)
        self.conv_out = nn.Conv2d(widths[last], z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class Decoder(nn.Module):
    """[B, z_channels, h, w] -> pictures [B, channels, h 2^L, w 2^L], not clamped to -1..1; arguments as `Encoder`."""

    def __init__(
        self,
        channels: int,
        z_channels: int,
        widths: Sequence[int],
        num_res_blocks: int,
        attention_levels: Collection[int],
        eps: float,
    ) -> None:
        super().__init__()
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(z_channels, widths[last], 3, padding=1)
        self.middle = _middle(widths[last], eps)
        self.levels = nn.ModuleList(
            Level(
                [widths[min(i + 1, last)], *[widths[i]] * (num_res_blocks + 1)],
                eps,
                attention=i in attention_levels,
                resample=Doubling(widths[i]) if i else None,
            )
            for i in range(len(widths))
        )
        self.norm_out = nn.GroupNorm(GROUPS, widths[0], eps=eps)
        self.conv_out = nn.Conv2d(widths[0], channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.conv_in(x))
        for level in reversed(self.levels):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


def _middle(width: int, eps: float) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            before=ResidualBlock(width, width, eps),
            attention=MapAttention(width, eps),
            after=ResidualBlock(width, width, eps),
        )
    )
