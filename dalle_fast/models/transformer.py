"""The transformer of DALL-E: blocks of attention and feed-forward, each normed, shifted, scaled and added.

    x <- x + scale * norm_out(fn(shift(norm(x))))        norm_out only with sandwich_norm, shift only with shift_tokens

Source: DALLE-pytorch's Transformer, PreNorm, LayerScale, PreShiftToken (here one `Branch`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import cycle, islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dalle_fast import patterns
from dalle_fast.layout import TokenLayout, as_grid
from dalle_fast.models.attention import Attention, FeedForward
from dalle_fast.models.cache import DecodeCache, LayerCache
from dalle_fast.models.reversible import reversible
from dalle_fast.models.rotary import rotary_angles
from dalle_fast.models.saving import Pretrained
from dalle_fast.models.token_shift import shift_tokens
from dalle_fast.patterns import AttentionPattern

ATTENTION_TYPES = ("full", "axial_row", "axial_col", "conv_like", "sparse", "paper_row", "paper_col", "paper_conv")
ROTARY_DTYPES = ("float32", "float16", "bfloat16")

Kind = TypeVar("Kind", str, None)  # by which layers that share a module must agree


class Branch(nn.Module):
    """One residual branch: norm, token shift, function, second norm, LayerScale.

    Args:
        dim: C.
        fn: the function, [B, N, C] -> [B, N, C].
        depth: place of the block, from 1, which sets the initial scale.
        sandwich_norm: norm the function's output too.
        shift: the layout to shift tokens over, None for no shift.
    """

    def __init__(
        self, dim: int, fn: nn.Module, *, depth: int, sandwich_norm: bool = False, shift: TokenLayout | None = None
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = fn
        self.norm_out = nn.LayerNorm(dim) if sandwich_norm else nn.Identity()
        self.scale = nn.Parameter(torch.full((1, 1, dim), _initial_scale(depth)))
        self.layout = shift

    def forward(self, x: Tensor, *, cache: LayerCache | None = None, **kwargs: Tensor | LayerCache | None) -> Tensor:
        """x [B, N, C] -> [B, N, C], to be added to x; further arguments go to the function."""
        normed = self.norm(x)
        if self.layout is not None:
            normed = _shifted(normed, self.layout, cache)
        if cache is not None and isinstance(self.fn, Attention):
            kwargs["cache"] = cache
        return self.norm_out(self.fn(normed, **kwargs)) * self.scale


def _shifted(normed: Tensor, layout: TokenLayout, cache: LayerCache | None) -> Tensor:
    if cache is None:
        # Weights were trained with this: a text that is not complete is not shifted.
        return normed if normed.shape[1] < layout.text_len else shift_tokens(normed, layout)
    memory = cache.shift(normed)
    memory.write(normed, cache.offset)
    if cache.offset == 0:
        return shift_tokens(normed, layout)
    return memory.shift(normed, cache.offset)


class Block(nn.Module):
    """Attention and feed-forward branch of one layer."""

    def __init__(self, attn: Branch, ff: Branch) -> None:
        super().__init__()
        self.attn = attn
        self.ff = ff


class Transformer(Pretrained):
    """Blocks of attention and feed-forward over text and image tokens.

    Args:
        dim: C.
        depth: blocks.
        seq_len: longest input, text_len - 1 + image tokens.
        heads, dim_head: H, D.
        reversible: recompute activations in the backward pass instead of storing them.
        causal: False attends everywhere (CLIP); `attn_types` is then ignored but for `full`.
        attn_types: a name or names, cycled over the blocks, out of `ATTENTION_TYPES`; default `full`. Options of
            `patterns.make` may follow a name: "conv_like kernel=7", "sparse block=16 layout=0x8cef".
        image_fmap_size: side of the token grid, or (rows, columns); None without an image.
        stable, sandwich_norm, shift_tokens, rotary_emb, shared_attn_ids, shared_ff_ids: as the original.
        rotary_dtype: "float16", "bfloat16": rotary angles are rounded to it once, as those were of a model that the
            original trained in 16 bits; they are float32 all the same.
        sparse_attn, optimize_for_inference: accepted for old code, without effect: `attn_types` says which layers are
            sparse, and every layer decodes from its own cache.
    Attributes:
        checkpointing: False; True stores the inputs of blocks alone and computes a block again in the backward pass
            (torch.utils.checkpoint), with the same bits. Without effect on `reversible` models, which store less.
    Raises: ValueError (unknown type, sizes that do not fit, shared ids whose types differ).
    """

    angles: Tensor | None  # a buffer

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        seq_len: int,
        reversible: bool = False,
        causal: bool = True,
        heads: int = 8,
        dim_head: int = 64,
        ff_mult: int = 4,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        attn_types: str | Sequence[str] | None = None,
        image_fmap_size: int | tuple[int, int] | None = None,
        sparse_attn: bool = False,
        stable: bool = False,
        sandwich_norm: bool = False,
        shift_tokens: bool = False,
        rotary_emb: bool = True,
        rotary_dtype: str = "float32",
        shared_attn_ids: Sequence[object] | None = None,
        shared_ff_ids: Sequence[object] | None = None,
        optimize_for_inference: bool = False,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"Transformer: depth must be at least 1, got {depth}.")
        if image_fmap_size is None and (rotary_emb or shift_tokens):
            raise ValueError(
                "Transformer: rotary_emb and shift_tokens need image_fmap_size. Pass it, or set both to False."
            )
        self.seq_len = seq_len
        self.reversible = reversible
        self.checkpointing = False
        self.layout = _layout(seq_len, image_fmap_size)
        self._random = attn_dropout > 0 or ff_dropout > 0
        types = attention_types(attn_types, depth)
        make_attention = partial(Attention, dim, heads=heads, dim_head=dim_head, dropout=attn_dropout, stable=stable)
        attentions = _shared(types, shared_attn_ids, lambda name: make_attention(pattern=self._pattern(name, causal)))
        feed_forwards = _shared(
            [None] * depth, shared_ff_ids, lambda _: FeedForward(dim, mult=ff_mult, dropout=ff_dropout)
        )
        shift = self.layout if shift_tokens else None
        branch = partial(Branch, dim, sandwich_norm=sandwich_norm, shift=shift)
        self.blocks = nn.ModuleList(
            Block(branch(attn, depth=i), branch(ff, depth=i))
            for i, (attn, ff) in enumerate(zip(attentions, feed_forwards, strict=True), start=1)
        )
        self._dim_head = dim_head
        self._rotary_dtype = _rotary_dtype(rotary_dtype)
        self.register_buffer("angles", self._angles() if rotary_emb else None, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Transformer:
        super()._apply(fn, recurse)
        if self.angles is not None:  # moved with the module, never rounded with it
            self.angles = self._angles().to(self.angles.device)
        return self

    def _angles(self) -> Tensor:
        """On torch's default device; real also under `torch.device("meta")`: nobody loads angles."""
        with torch.device("cpu"):
            angles = rotary_angles(self.layout, self._dim_head).to(self._rotary_dtype).float()
        device = torch.get_default_device()
        return angles if device.type == "meta" else angles.to(device)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: DecodeCache | None = None) -> Tensor:
        """x [B, N, C] -> [B, N, C].

        Args:
            mask: bool key mask, [B, N] for `full` layers and CLIP, [B, T] for the sparse ones; not with a cache.
            cache: state behind a prefix; x then holds the positions that follow it, and the cache grows by them.
        """
        if cache is not None:
            if mask is not None:
                raise ValueError("Transformer: mask and cache cannot be combined. Decode without a key mask.")
            cache.check_step(x.shape[1], self.layout.length)
        elif x.shape[1] > self.layout.length:
            raise ValueError(f"Transformer: N must be at most {self.layout.length}, got {x.shape[1]}.")
        halves = self._halves(mask, cache)
        if not self.reversible:
            again = self.checkpointing and torch.is_grad_enabled() and cache is None
            for pair in halves:
                x = _recomputed(x, *pair, random=self.training and self._random) if again else _block(x, *pair)
        elif torch.is_grad_enabled():
            random = self.training and self._random
            x1, x2 = reversible(x, x, halves, tuple(self.blocks.parameters()), random=random)
            x = (x1 + x2) / 2
        else:
            x1 = x2 = x
            for attn, ff in halves:
                x1 = x1 + attn(x2)
                x2 = x2 + ff(x1)
            x = (x1 + x2) / 2
        if cache is not None:
            cache.advance(x.shape[1])
        return x

    def _halves(
        self, mask: Tensor | None, cache: DecodeCache | None
    ) -> list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]:
        def part(i: int, name: str) -> LayerCache | None:
            return None if cache is None else cache.layer(i, name)

        blocks: Iterable[Any] = self.blocks  # of Block, or of what an adapter put in its place
        return [
            (
                partial(block.attn, cache=part(i, "attn"), mask=mask, rotary=self.angles),
                partial(block.ff, cache=part(i, "ff")),
            )
            for i, block in enumerate(blocks)
        ]

    def _pattern(self, kind: str, causal: bool) -> AttentionPattern:
        name, *options = kind.split(" ") if causal else ("bidirectional",)
        rows, cols = self.layout.grid
        spec = [{"sparse": "block_sparse"}.get(name, name), f"text_len={self.layout.text_len}", f"grid={rows}x{cols}"]
        with torch.device("cpu"):  # a pattern is computed with, also where the model is built on the meta device
            return patterns.from_spec(" ".join([*spec, *options]))


def _block(x: Tensor, attn: Callable[[Tensor], Tensor], ff: Callable[[Tensor], Tensor]) -> Tensor:
    x = x + attn(x)
    return x + ff(x)


def _recomputed(x: Tensor, attn: Callable[[Tensor], Tensor], ff: Callable[[Tensor], Tensor], *, random: bool) -> Tensor:
    return checkpoint(_block, x, attn, ff, use_reentrant=False, preserve_rng_state=random)


class DivideMax(nn.Module):
    """x / max(x) over `dim`; the maximum keeps its sign and gets no gradient (PB-relax, as the original)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return x / x.amax(dim=self.dim, keepdim=True).detach()


def attention_types(attn_types: str | Sequence[str] | None, depth: int) -> list[str]:
    """The attention type of each of `depth` blocks: the names given, cycled."""
    names = ("full",) if attn_types is None else (attn_types,) if isinstance(attn_types, str) else tuple(attn_types)
    if not names:
        raise ValueError("attn_types: must name at least one type, got none.")
    for name in names:
        if name.partition(" ")[0] not in ATTENTION_TYPES:
            raise ValueError(f"attn_types: each must be one of {', '.join(ATTENTION_TYPES)}, got {name!r}.")
    return list(islice(cycle(names), depth))


def _shared(kinds: Sequence[Kind], ids: Sequence[object] | None, make: Callable[[Kind], nn.Module]) -> list[nn.Module]:
    """One module for each layer; layers of one id share theirs, which must then be of one kind."""
    keys: Sequence[object] = range(len(kinds)) if ids is None else list(islice(cycle(ids), len(kinds)))
    if len(keys) != len(kinds):
        raise ValueError("shared_attn_ids, shared_ff_ids: must name at least one id, got none. None shares nothing.")
    made: dict[object, tuple[object, nn.Module]] = {}
    for layer, (key, kind) in enumerate(zip(keys, kinds, strict=True)):
        if key not in made:
            made[key] = (kind, make(kind))
        elif made[key][0] != kind:
            raise ValueError(
                f"shared_attn_ids: layers that share {key!r} must have one attention type, "
                f"got {made[key][0]!r} and {kind!r} (layer {layer})."
            )
    return [made[key][1] for key in keys]


def _layout(seq_len: int, image_fmap_size: int | tuple[int, int] | None) -> TokenLayout:
    if image_fmap_size is None:
        return TokenLayout(seq_len, (1, 1))  # text alone: the one image position stays unused
    grid = (image_fmap_size, image_fmap_size) if isinstance(image_fmap_size, int) else as_grid(image_fmap_size)
    text_len = seq_len + 1 - grid[0] * grid[1]
    if text_len < 1:
        raise ValueError(
            f"Transformer: seq_len must be at least {grid[0] * grid[1]} for a grid of {grid[0]} x {grid[1]}, "
            f"got {seq_len}. seq_len is text tokens + image tokens."
        )
    return TokenLayout(text_len, grid)


def _rotary_dtype(name: str) -> torch.dtype:
    if name not in ROTARY_DTYPES:
        raise ValueError(f"Transformer: rotary_dtype must be one of {', '.join(ROTARY_DTYPES)}, got {name!r}.")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _initial_scale(depth: int) -> float:
    return 0.1 if depth <= 18 else 1e-5 if depth <= 24 else 1e-6
