"""Pictures become pixels: squares cut out, resized, flipped; what is random is drawn from the generator given.

Three ways to make a picture of side S out of one of any size, its short side being s:

- "upstream": torchvision's RandomResizedCrop with ratio 1, as the original's loader uses it: a square anywhere, of a
  share of the area uniform in [smallest_crop, 1], resized bilinearly. With smallest_crop 1 it is the largest square in
  the middle, as the original's dVAE trainer takes it.
- "paper": a square of side s, resized by area to t, of which a square of S anywhere is taken. For the dVAE the first
  square lies anywhere and t is uniform in [min(s, 9/8 S), min(s, 12/8 S)]; for the transformer, which has captions, the
  first square lies within 3/8 .. 5/8 of the slack and t is uniform in [S, min(s, 9/8 S)]. t is never below S.
  (DALL-E, arXiv 2102.12092, appendices A.2 and B.1.)
- "none": nothing is drawn: the largest square in the middle, averaged over areas; a picture of S x S stays as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

RESIZES = ("upstream", "paper", "none")
AUGMENTS = ("none", "emoji")
PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp"})
# What Pillow raises on broken files (UnidentifiedImageError is an OSError) and Python on text that is not UTF-8.
BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_MAX_SHIFT = 3
_WHITE = 255


@dataclass(frozen=True)
class Pixels:
    """How a picture becomes pixels.

    Args:
        size: side of the result.   channels: 1, 3 or 4 (grey, RGB, RGBA).
        resize, smallest_crop: see the module.   captioned: "paper" as for the transformer.
        flip: mirror half the pictures.
        augment: "emoji" flips rows, flips columns and transposes, each half the time, and half the time shifts by at
            most 3 pixels, white at the border.
    Raises: ValueError (a number of channels that no picture has).
    """

    size: int
    channels: int = 3
    resize: str = "none"
    smallest_crop: float = 0.75
    captioned: bool = False
    flip: bool = False
    augment: str = "none"

    def __post_init__(self) -> None:
        if self.channels not in _MODES:
            raise ValueError(
                f"train: channels must be 1, 3 or 4, got {self.channels}. Pictures are read as grey, RGB or RGBA."
            )

    @property
    def draws(self) -> bool:
        """Whether two readings of a picture can differ."""
        return self.resize != "none" or self.flip or self.augment != "none"

    def __call__(self, file: Path | BinaryIO, generator: torch.Generator | None) -> Tensor:
        """uint8 [channels, size, size] of a picture's file; without a generator as "none", nothing augmented.

        Raises: one of BROKEN.
        """
        with Image.open(file) as opened:
            picture = opened.convert(_MODES[self.channels])
        if generator is None:
            return to_tensor(self._middle(picture))
        if self.resize == "upstream":
            left, top, side = random_square(picture.width, picture.height, self.smallest_crop, generator)
            picture = _resized(picture, (left, top, left + side, top + side), self.size, Image.Resampling.BILINEAR)
        elif self.resize == "paper":
            picture = self._paper(picture, generator)
        else:
            picture = self._middle(picture)
        pixels = to_tensor(picture)
        if self.flip and _one_of(2, generator):
            pixels = pixels.flip(2)
        if self.augment == "emoji":
            pixels = turned_and_shifted(pixels, generator)
        return pixels.contiguous()

    def _middle(self, picture: Image.Image) -> Image.Image:
        left, top, side = middle_square(*picture.size)
        return _by_area(picture, (left, top, left + side, top + side), self.size)

    def _paper(self, picture: Image.Image, generator: torch.Generator) -> Image.Image:
        side = min(picture.size)
        if self.captioned:
            offsets = [
                slack * 3 // 8 + _one_of(slack * 5 // 8 - slack * 3 // 8 + 1, generator)
                for slack in (picture.width - side, picture.height - side)
            ]
            smallest, largest = self.size, min(side, self.size * 9 // 8)
        else:
            offsets = [_one_of(slack + 1, generator) for slack in (picture.width - side, picture.height - side)]
            smallest, largest = min(side, self.size * 9 // 8), min(side, self.size * 12 // 8)
        smallest, largest = max(smallest, self.size), max(largest, self.size)
        between = smallest + _one_of(largest - smallest + 1, generator)
        left, top = offsets
        picture = _by_area(picture, (left, top, left + side, top + side), between)
        left, top = (_one_of(between - self.size + 1, generator) for _ in range(2))
        return picture.crop((left, top, left + self.size, top + self.size))


def random_square(
    width: int, height: int, smallest_share: float, generator: torch.Generator | None = None
) -> tuple[int, int, int]:
    """A random square inside a picture, as torchvision's RandomResizedCrop with ratio 1 draws it.

    Its area is a share of the picture's, uniform in [smallest_share, 1]. In a picture so oblong that ten such squares
    do not fit, it is the largest one in the middle.

    Args: generator: None is torch's default one.
    Returns: left, top, side, in pixels.
    """
    for share in torch.empty(10).uniform_(smallest_share, 1.0, generator=generator).tolist():
        side = round(math.sqrt(width * height * share))
        if 0 < side <= min(width, height):
            left = _one_of(width - side + 1, generator)
            top = _one_of(height - side + 1, generator)
            return left, top, side
    return middle_square(width, height)


def middle_square(width: int, height: int) -> tuple[int, int, int]:
    """The largest square in the middle of a picture: left, top, side, in pixels."""
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side


def turned_and_shifted(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """A picture [C, S, S] flipped, transposed and shifted at random, as `Pixels` says of augment "emoji"."""
    flip_rows, flip_columns, transpose, shift = torch.rand(4, generator=generator).lt(0.5).tolist()
    if flip_rows:
        pixels = pixels.flip(1)
    if flip_columns:
        pixels = pixels.flip(2)
    if transpose:
        pixels = pixels.transpose(1, 2)
    if shift:
        down, right = torch.randint(0, 2 * _MAX_SHIFT + 1, (2,), generator=generator).tolist()
        rows, columns = pixels.shape[1:]
        pixels = torch.nn.functional.pad(pixels, (_MAX_SHIFT,) * 4, value=_WHITE)
        pixels = pixels[:, down : down + rows, right : right + columns]
    return pixels


def to_tensor(picture: Image.Image) -> Tensor:
    """uint8 [C, H, W] of a picture."""
    array = np.array(picture)
    if array.ndim == 2:
        array = array[:, :, None]
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def _one_of(n: int, generator: torch.Generator | None) -> int:
    return int(torch.randint(n, (), generator=generator))


def _by_area(picture: Image.Image, box: tuple[int, int, int, int], size: int) -> Image.Image:
    """A square of the picture at another size: averaged over areas where it shrinks, bilinear where it grows."""
    shrinks = box[2] - box[0] >= size
    return _resized(picture, box, size, Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR)


def _resized(picture: Image.Image, box: tuple[int, int, int, int], size: int, how: Image.Resampling) -> Image.Image:
    # Cropped first: a filter must not look at what is outside the square.
    return picture.crop(box).resize((size, size), how)
