"""Rotary angles of the original: one text axis and two image axes, for queries, keys and values alike.

Of the D channels of a head the first 3 * 2 * (D // 6) are turned in interleaved pairs: a third by the text position
(image tokens all stand at 8192), a third by the grid row, a third by the grid column (rows and columns run from -1 to
1, text stands at -10).

Source: DALLE-pytorch's Transformer; rotary-embedding-torch 0.2.3 for the frequencies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dalle_fast.layout import TokenLayout

_THETA = 10_000.0
_HIGHEST_PIXEL_FREQUENCY = 5.0  # half of the original's max_freq of 10
_IMAGE_AT = 8192.0  # where the text axis places every image token
_TEXT_AT = -10.0  # where the image axes place every text token


def rotary_angles(layout: TokenLayout, dim_head: int) -> Tensor:
    """Raw angles in radians, float32 [T + R * C, 3 * 2 * (dim_head // 6)], both channels of a pair alike.

    They reach 8192 radians, so they stay float32 whatever the dtype of the model: 16 bits would be off by half a turn.
    """
    axis = dim_head // 3
    n_pairs = axis // 2
    text_frequency = 1.0 / _THETA ** (torch.arange(0, axis, 2)[:n_pairs].float() / axis) if n_pairs else torch.empty(0)
    pixel_frequency = torch.linspace(1.0, _HIGHEST_PIXEL_FREQUENCY, n_pairs) * math.pi

    text_axis = torch.cat((torch.arange(layout.text_len).float(), torch.full((layout.n_image,), _IMAGE_AT)))
    rows, cols = (torch.linspace(-1.0, 1.0, n) for n in layout.grid)
    text_part = torch.full((layout.text_len,), _TEXT_AT)
    row_axis = torch.cat((text_part, rows.repeat_interleave(layout.grid_cols)))
    col_axis = torch.cat((text_part, cols.repeat(layout.grid_rows)))

    angles = torch.cat(
        (text_axis[:, None] * text_frequency, row_axis[:, None] * pixel_frequency, col_axis[:, None] * pixel_frequency),
        dim=1,
    )
    return angles.repeat_interleave(2, dim=1)
