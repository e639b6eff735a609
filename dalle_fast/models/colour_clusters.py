"""Colours as tokens, as in Image GPT: every pixel's code is the nearest of K colours. It needs no training.

    code_p = argmin_k |x_p - colour_k|^2        picture_p = colour_{code_p}         S^2 codes of a picture S x S

K-means (Lloyd's algorithm) makes the colours of pictures: each moves to the mean of the pixels whose nearest it is.
Source: Image GPT (Chen et al., Generative Pretraining from Pixels, 2020), section 3.1: 512 colours, 9 bits a pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_fast.models.quantiser import spread_sample
from dalle_fast.models.saving import Pretrained
from dalle_fast.models.vae_protocol import check_pictures, side_of_codes
from dalle_fast.ops.nearest_code import nearest_code

_NAME = "ColourClusterVAE"
_POOL = 2**14  # pixels that the first colours are drawn from
_PIXELS = 2**18  # that k-means sees; three numbers each


class ColourClusterVAE(Pretrained):
    """A tokenizer whose codes are colours: no layers, a code a pixel.

    `DALLE(vae=ColourClusterVAE(image_size=16), ...)` models 256 image tokens of 512 colours.

    Args:
        image_size: S, also the side of the grid of codes.   num_tokens: K; default that of `colours`, else 512.
        channels: c.
        colours: [K, c] in 0..1; None: a regular grid, whose levels of red, green and blue are as alike as the factors
            of K allow (8 x 8 x 8 of 512). `fit` makes better ones of pictures.
    Attributes: colours [K, c], frozen.   num_layers: 0.
    Raises: ValueError (an argument out of range, colours of another shape or outside 0..1).
    """

    num_layers = 0
    normalization = None  # `decode` gives pixels in 0..1

    def __init__(
        self,
        image_size: int = 32,
        num_tokens: int | None = None,
        channels: int = 3,
        *,
        colours: Tensor | Sequence[Sequence[float]] | None = None,
    ) -> None:
        super().__init__()
        given = None if colours is None else torch.as_tensor(colours, dtype=torch.float32)
        if num_tokens is None:
            num_tokens = 512 if given is None else len(given)
        for name, value in (("image_size", image_size), ("num_tokens", num_tokens), ("channels", channels)):
            if value < 1:
                raise ValueError(f"{_NAME}: {name} must be at least 1, got {value}.")
        if given is None:
            given = _even_colours(num_tokens, channels)
        elif given.shape != (num_tokens, channels):
            raise ValueError(
                f"{_NAME}: colours must be [num_tokens={num_tokens}, channels={channels}], got {list(given.shape)}."
            )
        elif not bool(((given >= 0) & (given <= 1)).all()):
            raise ValueError(f"{_NAME}: colours must be in 0..1, got others. Divide bytes by 255.")
        self.image_size = image_size
        self.num_tokens = num_tokens
        self.channels = channels
        self.colours = nn.Parameter(given.clone(), requires_grad=False)

    @classmethod
    def fit(
        cls, images: Tensor, n: int = 512, *, seed: int = 0, image_size: int | None = None, iterations: int = 50
    ) -> ColourClusterVAE:
        """The tokenizer whose n colours k-means makes of pictures.

        Args:
            images: [N, c, H, W] in 0..1, of any height and width; pixels are drawn from them where there are many.
            seed: of these draws and of the first colours; the same pictures and seed give the same colours.
            image_size: of the tokenizer; None: H, which must then be W.   iterations: at most so many moves.
        Raises: ValueError (shape, range, fewer pixels than colours), TypeError (dtype).
        """
        if image_size is None:
            if images.dim() != 4 or images.shape[2] != images.shape[3]:
                raise ValueError(
                    f"{_NAME}.fit: images must be [N, c, S, S] where image_size is None, got {list(images.shape)}."
                )
            image_size = images.shape[2]
        pixels, generator = _pixels_of(images, n), torch.Generator().manual_seed(seed)
        if len(pixels) > _PIXELS:
            pixels = pixels[torch.randperm(len(pixels), generator=generator)[:_PIXELS].to(pixels.device)]
        pool = torch.randperm(len(pixels), generator=generator)[: max(_POOL, n)].to(pixels.device)
        colours = spread_sample(pixels[pool], n, generator)
        return cls(image_size, n, pixels.shape[1], colours=_lloyd(pixels, colours, iterations).clamp(0, 1).cpu())

    @property
    def config(self) -> dict[str, Any]:
        """Arguments that build this tokenizer again; the colours lie beside."""
        return {"image_size": self.image_size, "num_tokens": self.num_tokens, "channels": self.channels}

    @torch.no_grad()
    def get_codebook_indices(self, images: Tensor) -> Tensor:
        """The nearest colour of every pixel: images [B, c, S, S] in 0..1 -> int64 [B, S^2], raster order.

        Raises: ValueError (shape), TypeError (dtype).
        """
        check_pictures(_NAME, images, self.channels, self.image_size)
        return nearest_code(images.permute(0, 2, 3, 1).to(self.colours.dtype), self.colours).flatten(1)

    def decode(self, img_seq: Tensor) -> Tensor:
        """Codes [B, n], n a square number -> pictures [B, c, sqrt(n), sqrt(n)] in 0..1.

        Raises: TypeError (dtype, axes), ValueError (n, an id out of range).
        """
        side = side_of_codes(_NAME, img_seq, self.num_tokens)
        return F.embedding(img_seq, self.colours).unflatten(1, (side, side)).permute(0, 3, 1, 2).contiguous()


def _pixels_of(images: Tensor, n: int) -> Tensor:
    """[N, c, H, W] -> float32 [N H W, c], checked."""
    if images.dim() != 4:
        raise ValueError(f"{_NAME}.fit: images must be [N, c, H, W], got {list(images.shape)}.")
    if not images.dtype.is_floating_point:
        raise TypeError(f"{_NAME}.fit: images must be floating, in 0..1, got {images.dtype}. Divide bytes by 255.")
    pixels = images.detach().permute(0, 2, 3, 1).reshape(-1, images.shape[1]).float()
    if n < 1 or len(pixels) < n:
        raise ValueError(f"{_NAME}.fit: n must be in 1..{len(pixels)}, the number of pixels, got {n}.")
    if not bool(((pixels >= 0) & (pixels <= 1)).all()):
        raise ValueError(f"{_NAME}.fit: images must be in 0..1, got others. Divide bytes by 255.")
    return pixels


def _lloyd(pixels: Tensor, colours: Tensor, iterations: int) -> Tensor:
    """Colours [K, c] moved to the means of their pixels [M, c] until none changes; those without pixels stay."""
    before = None
    for _ in range(iterations):
        codes = nearest_code(pixels, colours)
        if before is not None and torch.equal(codes, before):
            break
        before = codes
        counts = torch.bincount(codes, minlength=len(colours))[:, None]
        # In float32 a sum over very many pixels of one colour is no longer a multiple of it.
        sums = torch.zeros(colours.shape, dtype=torch.float64, device=pixels.device)
        sums.index_add_(0, codes, pixels.double())
        colours = torch.where(counts > 0, (sums / counts.clamp_min(1)).float(), colours)
    return colours


def _even_colours(n: int, channels: int) -> Tensor:
    """[n, channels]: a grid of levels from 0 to 1, or 0.5 where a channel has one."""
    levels = [1] * channels
    for factor in sorted(_prime_factors(n), reverse=True):
        levels[levels.index(min(levels))] *= factor
    axes = [torch.linspace(0, 1, count) if count > 1 else torch.full((1,), 0.5) for count in levels]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(n, channels)


def _prime_factors(n: int) -> list[int]:
    factors, divisor = [], 2
    while divisor * divisor <= n:
        while n % divisor == 0:
            factors.append(divisor)
            n //= divisor
        divisor += 1
    return factors + [n] * (n > 1)
