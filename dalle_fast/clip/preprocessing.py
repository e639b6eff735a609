"""Pictures as OpenAI's CLIP reads them: the short side to S by a bicubic filter, the centre S x S, normalised.

    x = (level / 255 - mean) / std, channel by channel

A PIL picture goes through PIL's own resize, in its own mode, and becomes RGB at the end, in that order, as OpenAI's
does: the same numbers. A tensor goes through torch's resize, which has the same filter but does not round to a level
between: the numbers differ by up to about a level, where the picture is not S x S already.

Source: OpenAI CLIP's preprocessing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dalle_fast.models.alone import computed_alone, each_alone

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def preprocess(
    pictures: Image.Image | Sequence[Image.Image] | Tensor,
    size: int = 224,
    *,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> Tensor:
    """Pictures as `encode_image` takes them.

    Args:
        pictures: a PIL picture, several, or floating pixels in 0..1, [C, H, W] or [B, C, H, W]; of one channel or
            three.
        size: S, of the model.   mean, std: of each channel.
    Returns: float32 [3, S, S] for one picture, [B, 3, S, S] for several; float64 for float64 pixels.
    Raises: TypeError (neither), ValueError (shape, values outside 0..1).
    """
    if isinstance(pictures, Image.Image):
        return _normalised(_from_pil(pictures, size), mean, std)
    if isinstance(pictures, Tensor):
        pixels = _checked(pictures)
        if pixels.dim() == 3:
            return _normalised(_resized(pixels[None], size), mean, std)[0]
        if not computed_alone(pixels):
            return _normalised(_resized(pixels, size), mean, std)
        rows = each_alone(lambda row: _resized(pixels[row : row + 1], size), len(pixels))
        return _normalised(torch.cat(rows), mean, std)
    if not all(isinstance(picture, Image.Image) for picture in pictures):  # a str's letters, too
        raise TypeError(
            f"clip.preprocess: pictures must be PIL pictures or a tensor in 0..1, got {type(pictures).__name__}. "
            "Open a file with PIL.Image.open."
        )
    rows = [_from_pil(picture, size) for picture in pictures]
    return _normalised(torch.stack(rows) if rows else torch.zeros(0, 3, size, size), mean, std)


def resized_sides(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) once the short side is `size`; the long one is cut to a whole number, not rounded."""
    return (size, size * width // height) if height <= width else (size * height // width, size)


def centre(height: int, width: int, size: int) -> tuple[int, int]:
    """(top, left) of the `size` x `size` pixels in the middle; halves go to the even number."""
    return round((height - size) / 2), round((width - size) / 2)


def _from_pil(picture: Image.Image, size: int) -> Tensor:
    """float32 [3, S, S] in 0..1."""
    height, width = resized_sides(picture.height, picture.width, size)
    if (picture.height, picture.width) != (height, width):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    top, left = centre(height, width, size)
    levels = np.array(picture.crop((left, top, left + size, top + size)).convert("RGB"))
    return torch.from_numpy(levels).permute(2, 0, 1).contiguous().to(torch.float32).div(255)


def _resized(pixels: Tensor, size: int) -> Tensor:
    """[B, 3, H, W] -> [B, 3, S, S], in 0..1."""
    height, width = resized_sides(pixels.shape[-2], pixels.shape[-1], size)
    if pixels.shape[-2:] != (height, width):
        # With antialias the filter is PIL's; it overshoots at edges, and PIL clips after rows and after columns.
        for sides in ((pixels.shape[-2], width), (height, width)):
            pixels = F.interpolate(pixels, size=sides, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = centre(height, width, size)
    return pixels[..., top : top + size, left : left + size]


def _normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    shift, scale = (torch.tensor(values, dtype=pixels.dtype, device=pixels.device) for values in (mean, std))
    return pixels.sub(shift[:, None, None]).div(scale[:, None, None])


def _checked(pixels: Tensor) -> Tensor:
    """[..., 3, H, W], float32 or float64."""
    if not pixels.is_floating_point():
        raise TypeError(f"clip.preprocess: pixels must be floating, got {pixels.dtype}. Divide levels by 255.")
    if pixels.dim() not in (3, 4) or pixels.shape[-3] not in (1, 3) or 0 in pixels.shape[-3:]:
        raise ValueError(
            f"clip.preprocess: pixels must be [B, C, H, W] or [C, H, W] with 1 or 3 channels, got "
            f"{list(pixels.shape)}. Leave out what is no colour."
        )
    if pixels.device.type == "cpu" and pixels.numel() and not 0 <= float(pixels.amin()) <= float(pixels.amax()) <= 1:
        raise ValueError(
            f"clip.preprocess: pixels must be in 0..1, got {float(pixels.amin()):.3g}..{float(pixels.amax()):.3g}. "
            "Are they normalised already?"
        )
    pixels = pixels if pixels.dtype == torch.float64 else pixels.to(torch.float32)
    return pixels.expand(*pixels.shape[:-3], 3, -1, -1)
