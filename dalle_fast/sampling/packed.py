"""A DALLE as the C++ engine holds it: weights packed once for each content, sizes of what it remembers.

The key is a digest of every parameter's bytes, read at the speed of memory: an optimizer's step, an edit through
`.data` or another state dict is seen by the next prefill, whatever it left of versions and addresses.
"""

from __future__ import annotations

import ctypes
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dalle_fast.models.cache import ring_slots, window_runs
from dalle_fast.models.dalle import DALLE
from dalle_fast.models.token_shift import shifted_channels
from dalle_fast.models.transformer import Branch, DivideMax
from dalle_fast.native import decode
from dalle_fast.native.decode import CacheSizes, DecodeBranch, DecodeLayer, DecodeModel, DecodeTable, DecodeWindows
from dalle_fast.native.packing import ELEMENTS, Arena, Packed, PackedMatrix, in_arena, pack, pack_gated
from dalle_fast.native.sparse_attention import turns_of_channels

WEIGHT_DTYPES = tuple(ELEMENTS)


def weight_dtype_of(model: DALLE, weight_dtype: torch.dtype | None) -> torch.dtype:
    """What weights are held as: what was asked for, else bfloat16 for a model in bfloat16, float32 for any other."""
    if weight_dtype is not None:
        return weight_dtype
    return torch.bfloat16 if model.to_logits.weight.dtype == torch.bfloat16 else torch.float32


@dataclass(frozen=True)
class ReadPrompt:
    """What is remembered of one prompt behind its last token."""

    keys: Tensor  # [layers, ...] as `CacheSizes.text`
    values: Tensor
    logits: Tensor  # float32 [K]


class PackedDALLE:
    """Copies of a model's weights in one arena, in the order in which a step reads them.

    Args:
        model: one that `dalle_fast.sampling.engine` finds nothing against.
        dtype: of the matrices: float32, bfloat16 or int8.
        arena: for all of it; one that only counts makes a model of sizes without weights.
    """

    def __init__(self, model: DALLE, dtype: torch.dtype, arena: Arena) -> None:
        self.layout, self.dtype = model.layout, dtype
        self.prompts: dict[bytes, ReadPrompt] = {}  # kept as long as the weights: the empty one that guidance reads
        self._arena = arena
        self._kept: list[object] = []  # what structures point into
        self._linears: dict[int, Packed] = {}  # by id: blocks may share modules
        self._structures: dict[int, DecodeModel] = {}
        blocks = _blocks(model)
        attention, feed_forward = blocks[0].attn.fn, blocks[0].ff.fn
        self.patterns = [block.attn.fn.pattern for block in blocks]
        self._base = DecodeModel(
            dim=model.to_logits.in_features, heads=attention.heads, dim_head=attention.dim_head,
            inner_ff=feed_forward.w_out.in_features, depth=len(blocks),
            text_len=model.layout.text_len, grid_rows=model.layout.grid_rows, grid_cols=model.layout.grid_cols,
            weights=ELEMENTS[dtype], cache=decode.CACHE_ELEMENTS[self.cache_dtype],
            shift=blocks[0].attn.layout is not None, reversible=model.transformer.reversible,
            stable=isinstance(model.divide_max, DivideMax), epsilon=model.logits_norm.eps,
        )  # fmt: skip
        self._embeddings(model)
        self._layers = [self._layer(block) for block in blocks]
        self._base.head_norm_weight, self._base.head_norm_bias = self._norm(model.logits_norm)
        n_text, head = model.num_text_tokens, model.to_logits
        self._base.image_head = self._keep(pack(head.weight[n_text:], head.bias[n_text:], dtype, arena))
        self.n_codes, self.n_text_ids = head.out_features - n_text, n_text

    @property
    def nbytes(self) -> int:
        return self._arena.used

    @property
    def cache_dtype(self) -> torch.dtype:
        """Of keys and values."""
        return torch.float32 if self.dtype == torch.float32 else torch.bfloat16

    def sizes(self, slack: int) -> CacheSizes:
        """Sizes of caches; slack: longest call - 1 + longest rollback, in image tokens."""
        base = self._base
        slots = tuple(ring_slots(pattern, slack) for pattern in self.patterns)
        shift = shifted_channels(base.dim) if base.shift else None
        return CacheSizes(base.heads, base.dim_head, base.text_len, slots, self.cache_dtype, shift)

    def structure(self, slack: int) -> DecodeModel:
        """What the C++ engine reads, with windows over rings of this slack."""
        if slack not in self._structures:
            layers = (DecodeLayer * len(self._layers))(*self._layers)
            for layer, pattern in zip(layers, self.patterns, strict=True):
                windows = window_runs(pattern, slack)
                self._kept.append(windows)
                layer.windows = DecodeWindows(windows.slots, *(part.data_ptr() for part in windows[1:]))
            made = DecodeModel.from_buffer_copy(self._base)
            made.layers = ctypes.cast(layers, ctypes.POINTER(DecodeLayer))
            self._kept.append(layers)
            self._structures[slack] = made
        return self._structures[slack]

    def pack_text_head(self, model: DALLE) -> None:
        """Packs the rows of the head that write text, which drawing images has no use for."""
        if self._base.text_head.panels is not None:
            return
        weight, bias = (part[: model.num_text_tokens] for part in (model.to_logits.weight, model.to_logits.bias))
        head, _ = in_arena(lambda arena: pack(weight, bias, self.dtype, arena))
        self._base.text_head = self._keep(head)
        self._structures.clear()

    # -------------------------------------------------------------------------------------------- parts

    def _embeddings(self, model: DALLE) -> None:
        base, n_text = self._base, model.num_text_tokens
        if model.share_input_output_emb:
            tables = model.to_logits.weight.split((n_text, model.num_image_tokens))
        else:
            tables = model.text_emb.weight, model.image_emb.weight
        base.text_table, base.image_table = (self._table(table) for table in tables)
        if not model.rotary_emb:
            places = model.text_pos_emb.weight, model.image_row_emb, model.image_col_emb
            base.text_places, base.row_places, base.col_places = (self._put(part) for part in places)
        if model.transformer.angles is not None:
            turns = turns_of_channels(model.transformer.angles, base.dim_head)
            base.cosines, base.sines = (self._put(part) for part in turns)

    def _layer(self, block: Any) -> DecodeLayer:
        attention, feed_forward = block.attn.fn, block.ff.fn
        layer = DecodeLayer(attention=self._branch(block.attn))
        layer.qkv, layer.out = self._linear(attention.to_qkv), self._linear(attention.to_out)
        layer.feed_forward = self._branch(block.ff)
        layer.widen, layer.narrow = self._linear(feed_forward.w_in, gated=True), self._linear(feed_forward.w_out)
        return layer

    def _branch(self, branch: Branch) -> DecodeBranch:
        norm_out = self._norm(branch.norm_out) if isinstance(branch.norm_out, nn.LayerNorm) else (None, None)
        return DecodeBranch(*self._norm(branch.norm), *norm_out, self._put(branch.scale.flatten()))

    def _norm(self, norm: nn.LayerNorm) -> tuple[int, int]:
        return self._put(norm.weight), self._put(norm.bias)

    def _linear(self, linear: nn.Linear, *, gated: bool = False) -> PackedMatrix:
        if id(linear) not in self._linears:
            packer = pack_gated if gated else pack
            self._linears[id(linear)] = packer(linear.weight, linear.bias, self.dtype, self._arena)
        return self._keep(self._linears[id(linear)])

    def _table(self, table: Tensor) -> DecodeTable:
        copy = self._arena.take(table.dtype, *table.shape)
        if not self._arena.counts:
            copy.copy_(table.detach())
        self._kept.append(copy)
        return DecodeTable(copy.data_ptr(), decode.CACHE_ELEMENTS[table.dtype])

    def _put(self, values: Tensor) -> int:
        copy = self._arena.put(values)
        self._kept.append(copy)
        return copy.data_ptr()

    def _keep(self, packed: Packed) -> PackedMatrix:
        self._kept.append(packed)
        return packed.structure()


def measured(model: DALLE, dtype: torch.dtype) -> PackedDALLE:
    """The sizes of a packed model: nothing is packed."""
    return PackedDALLE(model, dtype, Arena(None))


def packed(model: DALLE, dtype: torch.dtype) -> PackedDALLE:
    """The model's weights of now, packed: those of the last call where no byte has changed since."""
    key = (dtype, _facts(model), _content(model))
    known = _PACKED.get(model)
    if known is not None and known[0] == key:
        return known[1]
    _PACKED.pop(model, None)  # before its successor takes its memory
    made, _ = in_arena(lambda arena: PackedDALLE(model, dtype, arena))
    _PACKED[model] = key, made
    return made


# Beside the models, not in them: a copied or pickled model takes none of it along.
_PACKED: WeakKeyDictionary[DALLE, tuple[Hashable, PackedDALLE]] = WeakKeyDictionary()


def _content(model: DALLE) -> Hashable:
    """Every parameter's name, dtype, shape and digest."""
    return tuple(
        (name, parameter.dtype, parameter.shape, decode.digest(parameter))
        for name, parameter in model.named_parameters()
        if not name.startswith("vae.")
    )


def _facts(model: DALLE) -> Hashable:
    """What else decides how the weights are used, all of it attributes that somebody may set."""
    blocks = _blocks(model)
    layers = tuple((block.attn.fn.pattern, block.attn.layout, type(block.attn.norm_out)) for block in blocks)
    heads = blocks[0].attn.fn.heads, model.logits_norm.eps
    return layers, heads, model.transformer.reversible, type(model.divide_max), model.num_text_tokens


def _blocks(model: DALLE) -> list[Any]:
    return list(model.transformer.blocks)
