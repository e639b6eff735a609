"""Drawing images: the loop from a text to codes to pixels. The public face is `DALLE.generate_images`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dalle_fast import rng
from dalle_fast.layout import TokenLayout
from dalle_fast.models.dalle import DALLE
from dalle_fast.sampling.eager import UncachedEngine
from dalle_fast.sampling.engine import Engine, choose_engine, make_engine
from dalle_fast.sampling.filters import Filters
from dalle_fast.sampling.plan import plan_drawing

OnTokens = Callable[[int, Tensor], None]
Samples = Tensor | slice  # which of a batch
_PRIMED_SHARE = 0.4375  # 14 of 32 rows, as OpenAI's completions


@torch.no_grad()
def generate_images(
    model: DALLE,
    text: Tensor,
    *,
    clip: nn.Module | None,
    filter_thres: float,
    temperature: float,
    img: Tensor | None,
    num_init_img_tokens: int | None,
    cond_scale: float,
    use_cache: bool,
    engine: str,
    weight_dtype: torch.dtype | None,
    max_memory: int | None,
    seed: int | Sequence[int] | Tensor | None,
    generator: torch.Generator | None,
    top_k: int | None,
    top_p: float | None,
    known_tokens: Tensor | None,
    return_tokens: bool,
    on_tokens: OnTokens | None,
) -> Tensor | tuple[Tensor, ...]:
    """See `DALLE.generate_images`."""
    filters = Filters.from_threshold(
        filter_thres, model.total_tokens, temperature=temperature, top_k=top_k, top_p=top_p
    )
    if img is not None and known_tokens is not None:
        raise ValueError(
            "generate_images: img and known_tokens must not both be given, got both. "
            "Encode img and mark its codes instead."
        )
    if img is None and num_init_img_tokens is not None:
        raise ValueError("generate_images: num_init_img_tokens needs img, the image whose codes are kept, got none.")
    if cond_scale != cond_scale or abs(cond_scale) == float("inf"):
        raise ValueError(f"generate_images: cond_scale must be a finite number, got {cond_scale}.")
    name = choose_engine(model, engine, weight_dtype=weight_dtype, max_memory=max_memory)
    if not use_cache and (engine, weight_dtype, max_memory) != ("auto", None, None):
        raise ValueError(
            "generate_images: use_cache=False recomputes everything in torch, so engine, weight_dtype and max_memory "
            f"must be left out, got {engine!r}, {weight_dtype} and {max_memory}."
        )
    text = text[:, : model.text_seq_len]
    prompt = model.padded_text(text)
    seeds = rng.resolve_seeds(seed, text.shape[0], generator)
    with evaluating(model, model.vae, clip):
        known = _primed(model, img, num_init_img_tokens, text) if img is not None else _known(model, known_tokens, text)
        first = _first_unknown(known)
        drawing: Engine = UncachedEngine(model, cond_scale=cond_scale)
        batches: Sequence[Samples] = [slice(None)]
        if use_cache:
            drawing = make_engine(name, model, cond_scale=cond_scale, weight_dtype=weight_dtype)
            if name == "cpu" and len(prompt):
                distinct, which = prompt.unique(dim=0, return_inverse=True)
                plan = plan_drawing(
                    model, len(prompt), prompts=len(distinct), cond_scale=cond_scale, weight_dtype=weight_dtype,
                    max_memory=max_memory, primed=first > 0,
                )  # fmt: skip
                batches = _micro_batches(which, plan.micro_batches)
        codes = draw_codes(drawing, model.layout, prompt, known, first, filters, seeds, batches, on_tokens)
        images = model.vae.decode(codes)
        results = [images]
        if clip is not None:
            results.append(clip(text, images, return_loss=False))
        if return_tokens:
            results.append(codes)
    return tuple(results) if len(results) > 1 else images


def draw_codes(
    engine: Engine,
    layout: TokenLayout,
    prompt: Tensor,
    known: Tensor,
    first: int,
    filters: Filters,
    seeds: list[int],
    batches: Sequence[Samples],
    on_tokens: OnTokens | None,
) -> Tensor:
    """Codes [B, R * C] behind the prompts [B, T]: known ones (not -1) kept, others drawn, micro-batch by micro-batch.

    Args: first: how many leading codes every sample knows.   batches: the samples of each micro-batch.
    """
    codes = known.clone()
    if len(prompt) == 0 or first == layout.n_image:
        return codes
    seed_of = rng.seeds_to_tensor(seeds, prompt.device)
    for samples in batches:
        some = codes[samples]
        engine.prefill(prompt[samples], some[:, :first])
        start = first
        while start < layout.n_image:
            end = start - start % layout.grid_cols + layout.grid_cols
            engine.draw(some, start, end - start, filters, seed_of[samples])
            if on_tokens is not None:
                row = torch.full_like(codes[:, start:end], -1)
                row[samples] = some[:, start:end]
                on_tokens(start, row)
            start = end
        codes[samples] = some
    return codes


@contextmanager
def evaluating(*modules: nn.Module | None) -> Iterator[None]:
    """Evaluation mode inside; outside, every submodule's training flag as it was, also after an error."""
    flags = {m: m.training for module in modules if isinstance(module, nn.Module) for m in module.modules()}
    for module in modules:
        if isinstance(module, nn.Module):
            module.eval()
    try:
        yield
    finally:
        for module, training in flags.items():
            module.training = training


def _micro_batches(prompt_of: Tensor, sizes: Sequence[int]) -> Sequence[Samples]:
    """The samples of each micro-batch, those of one prompt together."""
    return [slice(None)] if len(sizes) == 1 else prompt_of.argsort(stable=True).split(list(sizes))


def _first_unknown(known: Tensor) -> int:
    """How many leading codes every sample knows."""
    complete = (known >= 0).all(dim=0)
    return int(complete.long().cumprod(dim=0).sum())


def _primed(model: DALLE, img: Tensor, num_init_img_tokens: int | None, text: Tensor) -> Tensor:
    vae, n_image = model.vae, model.image_seq_len
    expected = [text.shape[0], vae.channels, vae.image_size, vae.image_size]
    if list(img.shape) != expected:
        raise ValueError(
            f"generate_images: img must be {expected}, got {list(img.shape)}. Give one image a text, of the VAE's size."
        )
    n = int(_PRIMED_SHARE * n_image) if num_init_img_tokens is None else num_init_img_tokens
    if not 0 <= n < n_image:
        raise ValueError(
            f"generate_images: num_init_img_tokens must be in 0..{n_image - 1}, got {n}. "
            "At least one code must be drawn."
        )
    known = vae.get_codebook_indices(img).clone()
    known[:, n:] = -1
    return known


def _known(model: DALLE, known_tokens: Tensor | None, text: Tensor) -> Tensor:
    """Codes [B, R * C] with -1 where they are to be drawn."""
    batch, n_image = text.shape[0], model.image_seq_len
    known = torch.full((batch, n_image), -1, dtype=torch.long, device=text.device)
    if known_tokens is None:
        return known
    if known_tokens.dim() != 2 or known_tokens.shape[0] != batch or known_tokens.shape[1] > n_image:
        raise ValueError(
            f"generate_images: known_tokens must be [B={batch}, at most {n_image}], got {list(known_tokens.shape)}."
        )
    if known_tokens.is_floating_point() or known_tokens.dtype == torch.bool:
        raise TypeError(
            f"generate_images: known_tokens must be integers, got {known_tokens.dtype}. -1 marks a code to draw."
        )
    if known_tokens.numel() and not -1 <= int(known_tokens.min()) <= int(known_tokens.max()) < model.num_image_tokens:
        raise ValueError(
            f"generate_images: known_tokens must be -1 or codes in 0..{model.num_image_tokens - 1}, "
            f"got {int(known_tokens.min())}..{int(known_tokens.max())}. -1 marks a code to draw."
        )
    known[:, : known_tokens.shape[1]] = known_tokens.to(known)
    return known
