"""What the tests of the C++ engine share: models of every option and any grid, one pass, steps of an engine."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from small_models import prompts, small_dalle
from torch import Tensor, nn

from dalle_fast import patterns
from dalle_fast.layout import TokenLayout
from dalle_fast.models.dalle import DALLE
from dalle_fast.models.transformer import Transformer
from dalle_fast.sampling.cpu import CpuEngine
from dalle_fast.sampling.eager import embedded, guided, with_null_text

CPU_TYPES = ("full", "axial_row", "axial_col", "conv_like", "paper_row", "paper_col", "paper_conv")

OPTIONS: dict[str, dict[str, object]] = {
    "cycle": {},
    **{name: {"attn_types": name, "depth": 2} for name in CPU_TYPES},
    "no_rotary": {"rotary_emb": False},
    "no_shift": {"shift_tokens": False},
    "plain": {"shift_tokens": False, "rotary_emb": False},
    "reversible": {"reversible": True},
    "stable": {"stable": True},
    "sandwich": {"sandwich_norm": True},
    "reversible_sandwich": {"reversible": True, "sandwich_norm": True},
    "shared": {"attn_types": ("full", "axial_row"), "shared_attn_ids": (0, 1, 0, 1), "shared_ff_ids": (0, 0, 1, 1)},
    "tied": {"share_input_output_emb": True, "rotary_emb": False},
    "odd_sizes": {"dim": 37, "heads": 3, "dim_head": 7},
    "dim_head_40": {"dim": 24, "heads": 1, "dim_head": 40},
    "dim_head_64": {"dim": 72, "heads": 2, "dim_head": 64},
    "dim_head_100": {"dim": 130, "heads": 1, "dim_head": 100, "depth": 2},
}


def text_of(model: DALLE, batch: int = 3) -> Tensor:
    """Prompts [batch, T], the first and the last alike where there are three or more."""
    text = prompts(batch)
    if batch > 2:
        text[0] = text[-1]
    return model.padded_text(text)


def random_codes(model: DALLE, batch: int = 3, seed: int = 0) -> Tensor:
    shape = batch, model.layout.n_image
    return torch.randint(model.num_image_tokens, shape, generator=torch.Generator().manual_seed(seed))


def on_grid(grid: tuple[int, int], types: Sequence[str] = CPU_TYPES, **options: object) -> DALLE:
    """A small float32 model over a grid that no VAE of ours makes; the last layer a convolution of dilation 2."""
    model = small_dalle(torch.float32, attn_types=types[0], depth=1, **options)
    model.layout = TokenLayout(model.layout.text_len, grid)
    model.image_seq_len, model.total_seq_len = model.layout.n_image, model.layout.max_inputs
    torch.manual_seed(1)
    settings = {"dim": 32, "heads": 2, "dim_head": 16, "shift_tokens": True, **options}
    model.transformer = Transformer(
        depth=len(types) + 1, seq_len=model.total_seq_len, attn_types=(*types, "conv_like"), image_fmap_size=grid,
        **settings,
    )  # fmt: skip
    for block in model.transformer.blocks:
        for branch in (block.attn, block.ff):
            nn.init.uniform_(branch.scale, 0.3, 0.8)
    last = model.transformer.blocks[-1].attn.fn
    last.pattern = patterns.make("conv_like", text_len=model.layout.text_len, grid=grid, kernel=3, dilation=2)
    return model.eval()


def held_as(model: DALLE, dtype: torch.dtype) -> DALLE:
    """A copy of the model whose matrices are what the engine holds in this dtype."""
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.startswith("vae."):
            module.weight.data = _rounded(module.weight.data, dtype)
    return model


def _rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype != torch.int8:
        return weight.to(dtype).to(weight.dtype)
    depth = weight.shape[1]
    chunks = F.pad(weight, (0, -depth % 128)).unflatten(1, (-1, 128))
    scales = chunks.abs().amax(dim=2, keepdim=True) / 127
    return ((chunks / scales).nan_to_num().round() * scales).flatten(1)[:, :depth]


@torch.no_grad()
def one_pass(model: DALLE, text: Tensor, codes: Tensor, cond_scale: float = 1.0) -> Tensor:
    """Logits [B, m + 1, K] behind a text and each of m codes, from one pass without a cache."""
    text, codes = with_null_text(model, text, codes, cond_scale)
    hidden = model.transformer(embedded(model, text, codes))
    return guided(model.image_logits(hidden[:, model.layout.text_len - 1 :]), cond_scale)


@torch.no_grad()
def stepped(engine: CpuEngine, text: Tensor, codes: Tensor, sizes: Iterable[int] = (1,), first: int = 0) -> Tensor:
    """Logits [B, m + 1 - first, K] behind the first `first` codes and each later one, read in steps of these sizes."""
    logits = [engine.prefill(text, codes[:, :first])[:, None]]
    at, sizes = first, itertools.cycle(sizes)
    while at < codes.shape[1]:
        some = codes[:, at : at + next(sizes)]
        logits.append(engine.step(some))
        at += some.shape[1]
    return torch.cat(logits, dim=1)


def drawn(model: DALLE, text: Tensor, **settings: object) -> Tensor:
    """Codes [B, R * C] of prompts [B, T - 1], drawn on the C++ engine."""
    return model.generate_images(
        text, return_tokens=True, **{"seed": 11, "filter_thres": 0.0, "engine": "cpu", **settings}
    )[1]
