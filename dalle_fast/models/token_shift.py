"""Token shift: half of a text token's channels come from the token before, a quarter of an image token's from the token
above and a quarter from the token to the left.

Source: DALLE-pytorch's PreShiftToken. Chunk sizes are torch.chunk's: the first half is ceil(C / 2) channels, a quarter
ceil(C / 4).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_fast.layout import TokenLayout


def shift_tokens(x: Tensor, layout: TokenLayout) -> Tensor:
    """Shifts a sequence that starts at position 0.

    Args: x: [B, N, C], N <= layout.length.
    Returns: [B, N, C], a new tensor.
    """
    half, quarter = _chunks(x.shape[-1])
    text, image = x[:, : layout.text_len], x[:, layout.text_len :]
    before = F.pad(text[:, :-1, :half], (0, 0, 1, 0))[:, : text.shape[1]]
    shifted = torch.cat((before, text[..., half:]), dim=-1)
    if image.shape[1] == 0:
        return shifted
    above = F.pad(image[..., :quarter], (0, 0, layout.grid_cols, 0))[:, : image.shape[1]]
    left = F.pad(image[:, :-1, quarter : 2 * quarter], (0, 0, 1, 0))
    first_in_row = torch.arange(image.shape[1], device=x.device) % layout.grid_cols == 0
    left = left.masked_fill(first_in_row[:, None], 0.0)
    return torch.cat((shifted, torch.cat((above, left, image[..., 2 * quarter :]), dim=-1)), dim=1)


class ShiftCache:
    """What token shift must remember to go on behind a prefix: rings of normed, not yet shifted activations.

    Args:
        slack: steps a ring outlives what plain decoding needs: longest step - 1 + longest rollback.
    """

    def __init__(self, layout: TokenLayout, slack: int, like: Tensor) -> None:
        self.layout = layout
        batch, _, channels = like.shape
        of_text, of_image = shifted_channels(channels)
        ahead = 1 + slack  # a step is written before it is read
        self.before = like.new_zeros(batch, 1 + ahead, of_text)
        self.image = like.new_zeros(batch, layout.grid_cols + ahead, of_image)

    def write(self, x: Tensor, start: int) -> None:
        """Remembers x [B, M, C], the activations at positions start .. start + M - 1."""
        text_len, n = self.layout.text_len, x.shape[1]
        n_text = min(max(text_len - start, 0), n)
        if n_text:
            _write_ring(self.before, x[:, :n_text, : self.before.shape[2]], start)
        if n_text < n:
            _write_ring(self.image, x[:, n_text:, : self.image.shape[2]], start + n_text - text_len)

    def shift(self, x: Tensor, start: int) -> Tensor:
        """Shifts x [B, M, C] at positions start .. start + M - 1, which `write` has remembered with all before them."""
        return torch.cat([self._shift_one(x[:, i], start + i) for i in range(x.shape[1])], dim=1)

    def _shift_one(self, x: Tensor, position: int) -> Tensor:
        half, quarter = _chunks(x.shape[-1])
        p, cols = position - self.layout.text_len, self.layout.grid_cols
        if p < 0:
            before = self.before[:, (position - 1) % self.before.shape[1]]
            parts = [before if position > 0 else torch.zeros_like(before), x[:, half:]]
        else:
            slots = self.image.shape[1]
            above = self.image[:, (p - cols) % slots, :quarter]
            left = self.image[:, (p - 1) % slots, quarter:]
            parts = [
                above if p >= cols else torch.zeros_like(above),
                left if p % cols else torch.zeros_like(left),
                x[:, 2 * quarter :],
            ]
        return torch.cat(parts, dim=-1)[:, None]


def shifted_channels(channels: int) -> tuple[int, int]:
    """How many of a text token's and of an image token's channels come from other tokens."""
    half, quarter = _chunks(channels)
    return half, min(2 * quarter, channels)


def _chunks(channels: int) -> tuple[int, int]:
    return -(-channels // 2), -(-channels // 4)


def _write_ring(ring: Tensor, x: Tensor, start: int) -> None:
    n, slots = x.shape[1], ring.shape[1]
    if n == 1:
        ring[:, start % slots] = x[:, 0]
    else:
        kept = min(n, slots)
        slot = torch.arange(start + n - kept, start + n, device=x.device) % slots
        ring.index_copy_(1, slot, x[:, n - kept :])
