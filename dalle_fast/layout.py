"""Where every token of a text + image sequence stands: text with `<bos>` first, then the image in raster order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLayout:
    """T text positions (`<bos>` at 0), then an R x C grid of image tokens in raster order.

    Args:
        text_len: T, text positions with `<bos>`; 1 when there is no text.
        grid: (R, C), rows and columns of image tokens.
    Raises: TypeError, ValueError (not integers of at least 1).

    Image token p stands at row p // C, column p % C, position T + p. Position i predicts token i + 1, so positions
    0..T-2 predict text, T-1.. predict image codes, and the last position is never an input.
    """

    text_len: int
    grid: tuple[int, int]

    def __post_init__(self) -> None:
        if not (isinstance(self.grid, tuple) and len(self.grid) == 2):
            raise TypeError(f"TokenLayout: grid must be (rows, columns), got {self.grid!r}.")
        for name, value in (("text_len", self.text_len), ("grid rows", self.grid[0]), ("grid columns", self.grid[1])):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"TokenLayout: {name} must be an int, got {value!r}.")
            if value < 1:
                raise ValueError(f"TokenLayout: {name} must be at least 1, got {value}. text_len counts <bos>.")

    @property
    def grid_rows(self) -> int:
        return self.grid[0]

    @property
    def grid_cols(self) -> int:
        return self.grid[1]

    @property
    def n_image(self) -> int:
        """Image tokens, R * C."""
        return self.grid[0] * self.grid[1]

    @property
    def length(self) -> int:
        """All positions, T + R * C."""
        return self.text_len + self.n_image

    @property
    def max_inputs(self) -> int:
        """Longest input: the last image token is predicted, never read."""
        return self.length - 1

    def row_of(self, position: Tensor) -> Tensor:
        """Grid row of image positions (int64 tensor); meaningless for text positions."""
        return torch.div(position - self.text_len, self.grid_cols, rounding_mode="floor")

    def col_of(self, position: Tensor) -> Tensor:
        """Grid column of image positions (int64 tensor); meaningless for text positions."""
        return (position - self.text_len) % self.grid_cols


def as_grid(sizes: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) from a tuple, or a list as JSON holds it. Raises TypeError where there are not two."""
    if len(sizes) != 2:
        raise TypeError(f"TokenLayout: grid must be (rows, columns), got {tuple(sizes)!r}.")
    return sizes[0], sizes[1]
