"""Tiles cover every position once, and their partner lists are the pattern."""

import pytest
import torch
from attention_cases import PATTERNS

from dalle_fast import patterns
from dalle_fast.tiles import partners, tile_positions


@pytest.mark.parametrize("size", [1, 3, 4, 64])
@pytest.mark.parametrize("label", PATTERNS)
def test_tiles_hold_every_position_once_and_never_mix_text_with_image(label, size):
    pattern = PATTERNS[label]
    tiles = tile_positions(pattern, size)
    assert sorted(tiles[tiles >= 0].tolist()) == list(range(pattern.length))
    for tile in tiles:
        is_text = tile[tile >= 0] < pattern.layout.text_len
        assert is_text.all() or not is_text.any()


@pytest.mark.parametrize("of", ["queries", "keys"])
@pytest.mark.parametrize("label", PATTERNS)
def test_partners_are_the_dense_pattern(label, of):
    pattern = PATTERNS[label]
    dense = pattern.dense() if of == "queries" else pattern.dense().T
    rebuilt = torch.zeros_like(dense)
    for tile in tile_positions(pattern, 4):
        met, meets = partners(pattern, tile, of=of)
        assert met.tolist() == sorted(set(met.tolist()))
        assert meets.any(dim=0).all()
        assert not meets[tile < 0].any()
        for position, row in zip(tile.tolist(), meets, strict=True):
            if position >= 0:
                rebuilt[position, met] = row
    assert torch.equal(rebuilt, dense)


@pytest.mark.parametrize(
    ("name", "options", "most"),
    [
        ("axial_row", {}, 64),
        ("axial_col", {}, 64),
        ("conv_like", {"kernel": 5}, 12 * 12),
        ("conv_like", {"kernel": 5, "dilation": 2}, 12 * 12),
    ],
)
def test_tiles_of_64_queries_share_their_image_keys(name, options, most):
    pattern = patterns.make(name, text_len=9, grid=(64, 64), **options)
    for tile in tile_positions(pattern, 64)[1:]:
        met, _ = partners(pattern, tile)
        assert (met >= pattern.layout.text_len).sum() <= most
