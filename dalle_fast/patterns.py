"""Attention patterns as data: one predicate `allowed(query, key)` from which masks, rings and decode windows follow.

Text attends causally to text and an image token sees all text (`block_sparse` and `bidirectional` aside); which image
tokens an image token sees is the pattern. Adding a pattern is adding a predicate to `_PREDICATES`.

Source: DALLE-pytorch (full, axial_row, axial_col, conv_like, block_sparse), the DALL-E paper, section 2.2 and figure 11
(paper_row, paper_col, paper_conv), ruDALL-E (the wrap variants of paper_conv).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from dalle_fast.layout import TokenLayout, as_grid

PAPER_CONV_WRAPS = ("raster", "none", "torus")
_BLOCK_SPARSE_LOCAL_BLOCKS = 4  # DeepSpeed's VariableSparsityConfig default, which the original relies on


@dataclass(frozen=True)
class AttentionPattern:
    """Which keys each query may attend to, over a `TokenLayout`. Made by `make`; hashable, so usable as a cache key.

    Attributes:
        name: one of `NAMES`.
        layout: the token layout.
        options: the pattern's own options, as sorted pairs.
        spec: the pattern as one string, which `from_spec` reads: what a custom op can take.
    """

    name: str
    layout: TokenLayout
    options: tuple[tuple[str, object], ...] = ()
    spec: str = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", _write_spec(self))  # now: torch.compile traces reading it, not making it

    def __hash__(self) -> int:
        return hash(self.spec)  # a string keeps its hash, a block_sparse layout of 70,000 cells does not

    @property
    def length(self) -> int:
        """Positions of the layout; the longest N an op may be given."""
        return self.layout.length

    @property
    def causal(self) -> bool:
        """False only for `bidirectional`."""
        return self.name != "bidirectional"

    @property
    def masks_every_query(self) -> bool:
        """Whether a key mask covers all N keys for every query.

        Otherwise it covers the T text keys, for image queries only (upstream's rule).
        """
        return self.name in ("full", "bidirectional", "block_sparse")

    def allowed(self, query: Tensor, key: Tensor) -> Tensor:
        """bool, broadcast shape of `query` and `key` (int64 positions): whether the query may attend to the key."""
        return _PREDICATES[self.name](self, query, key)

    def dense(self, n: int | None = None) -> Tensor:
        """bool [n, n], True = may attend, for the first n positions (default: all of the layout)."""
        n = self.length if n is None else n
        if not 0 <= n <= self.length:
            raise ValueError(f"AttentionPattern.dense: n must be in 0..{self.length}, got {n}.")
        position = torch.arange(n)
        return self.allowed(position[:, None], position[None, :])

    def window(self, position: int) -> Tensor:
        """int64 [W]: every key position that the query at `position` may attend to, ascending."""
        self._check_position(position)
        keys = torch.arange(self.length if not self.causal else position + 1)
        return keys[self.allowed(torch.tensor(position), keys)]

    def image_window(self, position: int) -> Tensor:
        """int64 [W]: the image keys in `window(position)`."""
        keys = self.window(position)
        return keys[keys >= self.layout.text_len]

    def max_image_distance(self) -> int:
        """Largest raster distance from an image query back to an image key it may attend to: what a ring must hold."""
        return _max_image_distance(self)

    def _check_position(self, position: int) -> None:
        if not 0 <= position < self.length:
            raise ValueError(f"{self.name}: position must be in 0..{self.length - 1}, got {position}.")


@cache
def _max_image_distance(pattern: AttentionPattern) -> int:
    if not pattern.causal:
        raise ValueError("bidirectional: has no decode window, every token sees every other. Encode it in one pass.")
    layout, largest = pattern.layout, 0
    key = torch.arange(layout.text_len, layout.length)
    for row in range(layout.grid_rows):  # one grid row of queries at a time: memory is C x R*C, not (R*C)^2
        query = key[row * layout.grid_cols : (row + 1) * layout.grid_cols, None]
        distance = (query - key) * pattern.allowed(query, key)
        largest = max(largest, int(distance.max()))
    return largest


# ------------------------------------------------------------------------------------------------ predicates


Rule = Callable[[AttentionPattern, Tensor, Tensor], Tensor]


def _with_text(image_rule: Rule) -> Rule:
    """Joins a rule between image tokens with the common one: text is causal, image tokens see all text."""

    def predicate(pattern: AttentionPattern, query: Tensor, key: Tensor) -> Tensor:
        text_len = pattern.layout.text_len
        to_image = (query >= text_len) & (key >= text_len) & (key <= query) & image_rule(pattern, query, key)
        return ((key < text_len) & (key <= query)) | to_image

    return predicate


def _steps_back(pattern: AttentionPattern, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    layout = pattern.layout
    return layout.row_of(query) - layout.row_of(key), layout.col_of(query) - layout.col_of(key)


def _number(pattern: AttentionPattern, option: str) -> int:
    value = dict(pattern.options)[option]
    if not isinstance(value, int):
        raise TypeError(f"{pattern.name}: {option} must be an int, got {value!r}. Use patterns.make.")
    return value


def _full(pattern: AttentionPattern, query: Tensor, key: Tensor) -> Tensor:
    return torch.ones_like(query >= key)


def _axial_row(pattern: AttentionPattern, query: Tensor, key: Tensor) -> Tensor:
    return _steps_back(pattern, query, key)[0] == 0


def _axial_col(pattern: AttentionPattern, query: Tensor, key: Tensor) -> Tensor:
    return _steps_back(pattern, query, key)[1] == 0


def _conv_like(pattern: AttentionPattern, query: Tensor, key: Tensor) -> Tensor:
    kernel, dilation = _number(pattern, "kernel"), _number(pattern, "dilation")
    rows, cols = _steps_back(pattern, query, key)
    inside = (rows >= 0) & (cols >= 0) & (rows <= (kernel - 1) * dilation) & (cols <= (kernel - 1) * dilation)
    return inside & (rows % dilation == 0) & (cols % dilation == 0)


def _paper_row(pattern: AttentionPattern, query: Tensor, key: Tensor) -> Tensor:
    return query - key <= pattern.layout.grid_cols


def _paper_conv(pattern: AttentionPattern, query: Tensor, key: Tensor) -> Tensor:
    layout, wrap = pattern.layout, dict(pattern.options)["wrap"]
    half = _number(pattern, "kernel") // 2
    rows, cols = _steps_back(pattern, query, key)
    if wrap == "none":  # ruDALL-E v3
        return (rows.abs() <= half) & (cols.abs() <= half)
    if wrap == "torus":  # ruDALL-E v2: rows and columns modulo the grid
        return ((half - rows) % layout.grid_rows <= 2 * half) & ((half - cols) % layout.grid_cols <= 2 * half)
    # "raster", the plain reading of the paper: offsets dr * C + dc in raster order, running over row ends
    distance = query - key
    near = torch.zeros_like(distance, dtype=torch.bool)
    for row in range(half + 1):
        near |= (distance - row * layout.grid_cols).abs() <= half
    return near


def _block_sparse(pattern: AttentionPattern, query: Tensor, key: Tensor) -> Tensor:
    blocks = _block_layout(pattern).to(query.device)
    block = _number(pattern, "block")
    # the layout covers the inputs; the last position, never an input, counts to the last block
    query_block, key_block = (torch.clamp(p // block, max=len(blocks) - 1) for p in (query, key))
    return (key <= query) & blocks[query_block, key_block]


@lru_cache(maxsize=64)
def _block_layout(pattern: AttentionPattern) -> Tensor:
    """bool [n_blocks, n_blocks]; kept, since a predicate is asked once a tile."""
    return torch.tensor(dict(pattern.options)["layout"], dtype=torch.bool)


_PREDICATES: dict[str, Rule] = {
    "full": _with_text(_full),
    "axial_row": _with_text(_axial_row),
    "axial_col": _with_text(_axial_col),
    "conv_like": _with_text(_conv_like),
    "paper_row": _with_text(_paper_row),
    "paper_col": _with_text(_axial_col),
    "paper_conv": _with_text(_paper_conv),
    "block_sparse": _block_sparse,
    "bidirectional": _full,
}
NAMES = tuple(_PREDICATES)


# ------------------------------------------------------------------------------------------------ specs


def _write_spec(pattern: AttentionPattern) -> str:
    """`conv_like text_len=257 grid=32x32 dilation=1 kernel=5`; a block layout's cells as one hexadecimal number."""
    rows, cols = pattern.layout.grid
    parts = [pattern.name, f"text_len={pattern.layout.text_len}", f"grid={rows}x{cols}"]
    for option, value in pattern.options:
        if isinstance(value, tuple):
            value = hex(int("".join("1" if cell else "0" for row in value for cell in row), base=2))
        parts.append(f"{option}={value}")
    return " ".join(parts)


@lru_cache(maxsize=256)
def from_spec(spec: str) -> AttentionPattern:
    """The pattern whose `spec` this is; equal to it, and one object for equal strings.

    Raises: ValueError (not a spec).
    """
    name, *pairs = spec.split(" ")
    values = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    if len(values) != len(pairs) or not {"text_len", "grid"} <= values.keys():
        raise ValueError(f"patterns.from_spec: spec must be the spec of an AttentionPattern, got {spec!r}.")
    rows, cols = values.pop("grid").split("x")
    tokens = TokenLayout(int(values.pop("text_len")), (int(rows), int(cols)))
    options: dict[str, Any] = {o: value if o in ("wrap", "layout") else int(value) for o, value in values.items()}
    if "layout" in options:
        side = _n_blocks(tokens, options["block"])
        cells = f"{int(options['layout'], base=16):0{side * side}b}"
        options["layout"] = [[cell == "1" for cell in cells[i * side : (i + 1) * side]] for i in range(side)]
    return make(name, text_len=tokens.text_len, grid=tokens.grid, **options)


# ------------------------------------------------------------------------------------------------ construction


def make(
    name: str,
    *,
    text_len: int,
    grid: tuple[int, int],
    kernel: int | None = None,
    dilation: int | None = None,
    wrap: str | None = None,
    block: int | None = None,
    layout: Sequence[Sequence[bool]] | Tensor | None = None,
    num_random_blocks: int | None = None,
    seed: int | None = None,
) -> AttentionPattern:
    """An attention pattern over text of `text_len` positions (with `<bos>`) and an image grid of (rows, columns).

    Args:
        name: one of `NAMES`.
        kernel: side of the window; odd; conv_like (default 5) and paper_conv (default 11).
        dilation: step between the window's cells; conv_like (default 1).
        wrap: paper_conv: "raster" (default; offsets run over row ends), "none" (clipped at the grid, ruDALL-E v3) or
            "torus" (rows and columns modulo the grid, ruDALL-E v2).
        block, layout, num_random_blocks, seed: block_sparse: positions a block (default 16) and either an explicit bool
            layout [n_blocks, n_blocks] or text blocks + local windows + `num_random_blocks` (default n_blocks // 4, as
            the original's) drawn from `seed` (default 0).
    Raises: ValueError (unknown name, option of another pattern, value out of range).
    """
    tokens = TokenLayout(text_len, as_grid(grid))
    every_option: dict[str, object] = {
        "kernel": kernel,
        "dilation": dilation,
        "wrap": wrap,
        "block": block,
        "layout": layout,
        "num_random_blocks": num_random_blocks,
        "seed": seed,
    }
    given = {option: value for option, value in every_option.items() if value is not None}
    if name not in _PREDICATES:
        raise ValueError(f"patterns.make: name must be one of {', '.join(NAMES)}, got {name!r}.")
    takes = _TAKES.get(name, ())
    for option in given:
        if option not in takes:
            raise ValueError(f"patterns.make: {name} takes {', '.join(takes) or 'no options'}, got {option}.")
    if name == "block_sparse":
        options = _block_sparse_options(
            tokens, 16 if block is None else block, layout, num_random_blocks, 0 if seed is None else seed
        )
    elif name == "conv_like":
        options = {"kernel": 5, "dilation": 1, **given}
    elif name == "paper_conv":
        options = {"kernel": 11, "wrap": "raster", **given}
    else:
        options = given
    _check_options(name, options)
    return AttentionPattern(name, tokens, tuple(sorted(options.items())))


_TAKES = {
    "conv_like": ("kernel", "dilation"),
    "paper_conv": ("kernel", "wrap"),
    "block_sparse": ("block", "layout", "num_random_blocks", "seed"),
}


def _check_options(name: str, options: dict[str, object]) -> None:
    kernel = options.get("kernel", 1)
    if not isinstance(kernel, int) or kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"{name}: kernel must be an odd int of at least 1, got {kernel!r}.")
    dilation = options.get("dilation", 1)
    if not isinstance(dilation, int) or dilation < 1:
        raise ValueError(f"{name}: dilation must be an int of at least 1, got {dilation!r}.")
    if options.get("wrap", "none") not in PAPER_CONV_WRAPS:
        raise ValueError(f"{name}: wrap must be one of {', '.join(PAPER_CONV_WRAPS)}, got {options['wrap']!r}.")


def _block_sparse_options(
    tokens: TokenLayout,
    block: int,
    layout: Sequence[Sequence[bool]] | Tensor | None,
    num_random_blocks: int | None,
    seed: int,
) -> dict[str, object]:
    if not isinstance(block, int) or block < 1:
        raise ValueError(f"block_sparse: block must be an int of at least 1, got {block!r}.")
    n_blocks = _n_blocks(tokens, block)
    if layout is None:
        layout = _random_block_layout(tokens, block, n_blocks, num_random_blocks, seed)
    elif num_random_blocks is not None:
        raise ValueError("block_sparse: an explicit layout has its random blocks already. Leave num_random_blocks out.")
    grid = torch.as_tensor(layout).bool()
    if tuple(grid.shape) != (n_blocks, n_blocks):
        raise ValueError(
            f"block_sparse: layout must be [{n_blocks}, {n_blocks}] for {tokens.max_inputs} inputs in blocks of "
            f"{block}, got {list(grid.shape)}."
        )
    if not bool(grid.diagonal().all()):
        raise ValueError("block_sparse: every diagonal block of layout must be True, so that each token sees itself.")
    return {"block": block, "layout": tuple(tuple(row) for row in grid.tolist())}


def _n_blocks(tokens: TokenLayout, block: int) -> int:
    return -(-tokens.max_inputs // block)


def _random_block_layout(
    tokens: TokenLayout, block: int, n_blocks: int, num_random_blocks: int | None, seed: int
) -> Tensor:
    """Text blocks for everyone from their own block on, windows of 4 blocks, random blocks: the original's layers."""
    n_random = n_blocks // 4 if num_random_blocks is None else num_random_blocks
    if not 0 <= n_random <= n_blocks:
        raise ValueError(f"block_sparse: num_random_blocks must be in 0..{n_blocks}, got {n_random}.")
    draw = random.Random(seed)
    row, col = torch.arange(n_blocks)[:, None], torch.arange(n_blocks)[None, :]
    local = (row // _BLOCK_SPARSE_LOCAL_BLOCKS == col // _BLOCK_SPARSE_LOCAL_BLOCKS) & (col <= row)
    n_text_blocks = -(-(tokens.text_len - 1) // block)
    allowed = local | ((col < n_text_blocks) & (col <= row))
    for i in range(n_blocks):
        allowed[i, draw.sample(range(n_blocks), n_random)] = True
    return allowed
