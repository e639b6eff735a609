"""Token shift: half of a text token's channels come from the token before, a quarter of an image token's from the token
above and a quarter from the token to the left.

Source: DALLE-pytorch's PreShiftToken. Chunk sizes are torch.chunk's: the first half is ceil(C / 2) channels, a quarter
ceil(C / 4).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dalle_fast.layout import TokenLayout


def shift_tokens(x: Tensor, layout: TokenLayout) -> Tensor:
    """Shifts a sequence that starts at position 0.

    Args: x: [B, N, C], N <= layout.length.
    Returns: [B, N, C], a new tensor.
    """
    shifted: Tensor = _Shift.apply(x, layout.text_len, layout.grid_cols, False)
    return shifted


class _Shift(torch.autograd.Function):
    """Every channel is written once, forward and backward: autograd of slices fills a tensor of zeros for each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, text_len: int, cols: int, back: bool) -> Tensor:
        ctx.arguments = text_len, cols, not back
        return _moved(x, text_len, cols, back)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _Shift.apply(gradient, *ctx.arguments), None, None, None


def _moved(x: Tensor, text_len: int, cols: int, back: bool) -> Tensor:
    """x [B, N, C] shifted, or what was shifted back where it came from."""
    n, channels = x.shape[1:]
    half, quarter = _chunks(channels)
    start = min(text_len, n)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    # positions first..last, channels from..to, by how many positions
    parts = (
        (0, start, 0, half, 1),
        (0, start, half, channels, 0),
        (start, n, 0, quarter, cols),
        (start, n, quarter, 2 * quarter, 1),
        (start, n, 2 * quarter, channels, 0),
    )
    for first, last, low, high, distance in parts:
        by = min(distance, last - first)
        later, earlier = slice(first + by, last), slice(first, last - by)
        to, source = (earlier, later) if back else (later, earlier)
        out[:, to, low:high] = x[:, source, low:high]
        out[:, (slice(last - by, last) if back else slice(first, first + by)), low:high] = 0.0
    # Nothing is to the left of a row's first token.
    out[:, start + (cols - 1 if back else 0) :: cols, quarter : 2 * quarter] = 0.0
    return out


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
