"""Attention patterns and sequence lengths that tests of sparse_attention run over: small, non-square, odd lengths."""

import torch

from dalle_fast import patterns
from dalle_fast.patterns import AttentionPattern

TEXT_LEN, GRID = 5, (3, 4)

PATTERNS: dict[str, AttentionPattern] = {
    label: patterns.make(name, text_len=TEXT_LEN, grid=GRID, **options)
    for label, name, options in [
        ("full", "full", {}),
        ("axial_row", "axial_row", {}),
        ("axial_col", "axial_col", {}),
        ("conv_like_3", "conv_like", {"kernel": 3}),
        ("conv_like_3_dilated", "conv_like", {"kernel": 3, "dilation": 2}),
        ("conv_like_larger_than_grid", "conv_like", {"kernel": 9}),
        ("paper_row", "paper_row", {}),
        ("paper_col", "paper_col", {}),
        ("paper_conv_raster", "paper_conv", {"kernel": 3}),
        ("paper_conv_clipped", "paper_conv", {"kernel": 3, "wrap": "none"}),
        ("paper_conv_torus", "paper_conv", {"kernel": 3, "wrap": "torus"}),
        ("block_sparse", "block_sparse", {"block": 2, "num_random_blocks": 1}),
        ("bidirectional", "bidirectional", {}),
    ]
}
LENGTH = TEXT_LEN + GRID[0] * GRID[1]

# The original's split, written out again here: these take a mask over all keys for every query.
FULL_KEY_MASK = ("full", "block_sparse", "bidirectional")


def make_qkv(batch: int, heads: int, n: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    """Three tensors [B, H, N, D] of about unit variance, times 2 so that the softmax is not flat."""
    generator = torch.Generator().manual_seed(seed)
    return tuple((2 * torch.randn(batch, heads, n, width, generator=generator)).to(dtype) for _ in range(3))


def make_angles(n: int, rot: int, seed: int = 0) -> torch.Tensor:
    """Raw angles [N, rot], equal within a pair, up to thousands of radians."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(n, rot // 2, generator=generator) * 8192).repeat_interleave(2, dim=-1)


def make_key_mask(label: str, batch: int, seed: int = 0) -> torch.Tensor:
    """A key mask of the shape the pattern takes; some queries of sample 0 keep no legal key at all."""
    every_query = PATTERNS[label].name in FULL_KEY_MASK
    length = LENGTH if every_query else TEXT_LEN
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) > 0.4
    mask[0, :3] = False
    return mask
