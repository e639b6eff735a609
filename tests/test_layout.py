"""TokenLayout: positions, rows and columns, and what it refuses."""

import pytest
import torch

from dalle_fast.layout import TokenLayout, as_grid


def test_counts():
    layout = TokenLayout(5, (3, 4))
    assert (layout.grid_rows, layout.grid_cols, layout.n_image, layout.length, layout.max_inputs) == (3, 4, 12, 17, 16)


def test_rows_and_columns_run_in_raster_order():
    layout = TokenLayout(2, (3, 4))
    position = torch.arange(2, layout.length)
    assert layout.row_of(position).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert layout.col_of(position).tolist() == [0, 1, 2, 3] * 3


@pytest.mark.parametrize(("text_len", "grid"), [(0, (2, 2)), (3, (0, 2)), (3, (2, -1))])
def test_sizes_below_one_are_refused(text_len, grid):
    with pytest.raises(ValueError, match="at least 1"):
        TokenLayout(text_len, grid)


@pytest.mark.parametrize(
    ("text_len", "grid"), [(2.0, (2, 2)), (True, (2, 2)), (3, [2, 2]), (3, (2, 2.0)), (3, (2, 2, 2))]
)
def test_what_is_no_size_is_refused(text_len, grid):
    with pytest.raises(TypeError):
        TokenLayout(text_len, grid)


def test_a_grid_may_be_a_list_of_two():
    assert as_grid([3, 4]) == (3, 4)
    with pytest.raises(TypeError, match=r"must be \(rows, columns\), got \(2, 2, 2\)"):
        as_grid((2, 2, 2))
