"""Codes that are given, not drawn: the first rows of a picture (priming), or all but what a mask marks (in-painting).

A picture of any size is cropped to its middle square and resized to what the VAE reads; a transparent one lies on
white.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from dalle_fast.models.alone import each_alone
from dalle_fast.models.dalle import DALLE

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # of Pillow, by channels
_WHITE = 128  # of a mask: from here on a pixel is drawn anew


def primed_codes(model: DALLE, image: Path, rows: int | None) -> Tensor:
    """The codes of a picture's first rows.

    Args:
        model: on any device, its VAE in float32.
        rows: of the grid of codes; None: 7/16 of the codes, as `DALLE.generate_images`.
    Returns: int64 [image_seq_len] on the CPU, -1 where a code is to be drawn.
    Raises: ValueError (an unreadable picture, rows out of range).
    """
    n, grid = model.image_seq_len, model.layout
    if rows is not None and not 0 < rows < grid.grid_rows:
        raise ValueError(
            f"sample: prime_rows must be in 1..{grid.grid_rows - 1}, of {grid.grid_rows} rows of codes, got {rows}. "
            "At least one row must be drawn."
        )
    known = _codes(model, _read(image, "the picture to go on from"))
    known[7 * n // 16 if rows is None else rows * grid.grid_cols :] = -1
    return known


def inpainted_codes(model: DALLE, image: Path, mask: Path) -> Tensor:
    """The codes of a picture, but for those that a mask marks.

    Args:
        model: on any device, its VAE in float32.
        mask: as large as the picture, white where it is drawn anew: a code is where any pixel of its cell is >= 128.
    Returns: int64 [image_seq_len] on the CPU, -1 where a code is to be drawn.
    Raises: ValueError (an unreadable picture or mask, of different sizes, a mask that marks nothing).
    """
    picture, marked = _read(image, "the picture to paint in"), _read(mask, "the mask", background="black")
    if picture.size != marked.size:
        raise ValueError(
            f"sample: the mask must be as large as its picture, {_sides(picture)} pixels, got {_sides(marked)} in "
            f"{mask}. Save it in that size."
        )
    anew = torch.from_numpy(np.array(_middle_square(marked).convert("L")) >= _WHITE)
    # Cells are those of the picture before it is resized, with all pixels that they touch: a thin line stays one.
    grid = model.layout.grid_rows, model.layout.grid_cols
    cells = F.adaptive_max_pool2d(anew[None].float(), grid).flatten() > 0
    if not cells.any():
        raise ValueError(
            f"sample: the mask must be white where the picture is drawn anew, got none of it in {mask}. "
            "Black is kept; what the crop to the middle square leaves out does not count."
        )
    return _codes(model, picture).masked_fill(cells, -1)


def _read(path: Path, what: str, background: str = "white") -> Image.Image:
    """A picture, upright, transparent parts on the background; `what` names it in errors."""
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.has_transparency_data:
                below = Image.new("RGBA", picture.size, background)
                picture = Image.alpha_composite(below, picture.convert("RGBA"))
            return picture.convert("RGB")
    except Exception as error:  # Pillow raises what its decoders raise, of many classes
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueError(f"sample: {what} must be an image file that can be read, got {path} ({reason}).") from None


def _middle_square(picture: Image.Image) -> Image.Image:
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))


def _codes(model: DALLE, picture: Image.Image) -> Tensor:
    """All codes of a picture, int64 [image_seq_len], whatever the number of threads."""
    vae: Any = model.vae
    if vae.channels not in _MODES:
        known = ", ".join(map(str, _MODES))
        raise ValueError(f"sample: the model's pictures must have {known} channels to be read, got {vae.channels}.")
    square = _middle_square(picture).resize((vae.image_size, vae.image_size), Image.Resampling.LANCZOS)
    levels = np.atleast_3d(np.array(square.convert(_MODES[vae.channels])))  # [S, S, C]
    pixels = torch.from_numpy(levels).permute(2, 0, 1)[None].to(model.to_logits.weight.device, torch.float32) / 255
    (codes,) = each_alone(lambda _: vae.get_codebook_indices(pixels), 1)
    return codes[0].cpu()


def _sides(picture: Image.Image) -> str:
    return f"{picture.width} x {picture.height}"
