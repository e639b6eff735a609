"""Pictures of what was drawn: from model output to pixels, and labelled grids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_MARGIN = 8
_LABEL_HEIGHT = 22
_FONT_SIZE = 14


def to_pixels(vae: Any, images: Tensor) -> Tensor:
    """Undoes the normalisation that `vae.decode` leaves in: float [B, C, H, W] in 0..1.

    Args:
        vae: whose `normalization` is (means, stds) by channel, or None.
        images: [B, C, H, W], what it decoded.
    """
    normalization = getattr(vae, "normalization", None)
    if normalization is not None:
        mean, std = (
            torch.as_tensor(values, dtype=images.dtype, device=images.device)[: images.shape[1]]
            for values in normalization
        )
        images = images * std[:, None, None] + mean[:, None, None]
    return images.clamp(0, 1)


def to_pil(pixels: Tensor) -> Image.Image:
    """One picture [C, H, W] in 0..1, C = 1 or 3, as a PIL image."""
    if pixels.dim() != 3 or pixels.shape[0] not in (1, 3):
        raise ValueError(f"to_pil: pixels must be [1 or 3, height, width], got {list(pixels.shape)}.")
    levels = (pixels.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else levels)


def labelled_grid(rows: Sequence[tuple[str, Tensor]], *, scale: int = 1) -> Image.Image:
    """A sheet with one row a label: the label above its pictures.

    Args:
        rows: (label, pixels [n, C, H, W] in 0..1), n and sizes alike in all rows.
        scale: enlarges whole pixels.
    """
    if not rows or any(pixels.shape != rows[0][1].shape for _, pixels in rows):
        raise ValueError("labelled_grid: rows must be one or more, all with pictures of one shape and number.")
    n, _, height, width = rows[0][1].shape
    cell_w, cell_h = width * scale + _MARGIN, height * scale + _LABEL_HEIGHT + _MARGIN
    sheet = Image.new("RGB", (n * cell_w + _MARGIN, len(rows) * cell_h + _MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE)
    for r, (label, pixels) in enumerate(rows):
        top = _MARGIN + r * cell_h
        draw.text((_MARGIN, top), _shortened(label, draw, font, sheet.width - 2 * _MARGIN), fill="black", font=font)
        for c in range(n):
            picture = to_pil(pixels[c]).resize((width * scale, height * scale), Image.Resampling.NEAREST)
            sheet.paste(picture, (_MARGIN + c * cell_w, top + _LABEL_HEIGHT))
    return sheet


def _shortened(label: str, draw: ImageDraw.ImageDraw, font: Any, width: int) -> str:
    if draw.textlength(label, font=font) <= width:
        return label
    while label and draw.textlength(label + "...", font=font) > width:
        label = label[:-1]
    return label + "..."
