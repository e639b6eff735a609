"""Drawing images: the loop from a text to codes to pixels. The public face is `DALLE.generate_images`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dalle_fast import rng
from dalle_fast.models.dalle import DALLE
from dalle_fast.ops.gumbel_noise import gumbel_noise
from dalle_fast.sampling.eager import EagerEngine, UncachedEngine
from dalle_fast.sampling.filters import Filters

OnTokens = Callable[[int, Tensor], None]
_PRIMED_SHARE = 0.4375  # 14 of 32 rows, as OpenAI's completions
_NOISE_VALUES = 1 << 24  # noise made at once, values: bounds its memory at 64 MiB


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
    text = text[:, : model.text_seq_len]
    prompt = model.padded_text(text)
    seeds = rng.resolve_seeds(seed, text.shape[0], generator)
    with evaluating(model, model.vae, clip):
        known = _primed(model, img, num_init_img_tokens, text) if img is not None else _known(model, known_tokens, text)
        engine = (
            EagerEngine(model, cond_scale=cond_scale) if use_cache else UncachedEngine(model, cond_scale=cond_scale)
        )
        codes = draw_codes(model, engine, prompt, known, filters, seeds, on_tokens)
        images = model.vae.decode(codes)
        results = [images]
        if clip is not None:
            results.append(clip(text, images, return_loss=False))
        if return_tokens:
            results.append(codes)
    return tuple(results) if len(results) > 1 else images


def draw_codes(
    model: DALLE,
    engine: EagerEngine | UncachedEngine,
    prompt: Tensor,
    known: Tensor,
    filters: Filters,
    seeds: list[int],
    on_tokens: OnTokens | None,
) -> Tensor:
    """Codes [B, R * C] after the prompt [B, T]: the known ones (not -1) kept, the others drawn in raster order."""
    layout, n_image = model.layout, model.image_seq_len
    codes = known.clone()
    first = _first_unknown(known)
    if prompt.shape[0] == 0 or first == n_image:
        return codes
    anything_known = (known[:, first:] >= 0).any(dim=0).tolist()
    noises = _noise(filters, seeds, first, model, prompt.device)
    logits = engine.prefill(prompt, codes[:, :first])
    reported = first
    for p in range(first, n_image):
        drawn = filters.choose(logits, next(noises))
        codes[:, p] = torch.where(known[:, p] >= 0, known[:, p], drawn) if anything_known[p - first] else drawn
        if on_tokens is not None and (p + 1) % layout.grid_cols == 0:
            on_tokens(reported, codes[:, reported : p + 1].clone())
            reported = p + 1
        if p + 1 < n_image:
            logits = engine.step(codes[:, p : p + 1])[:, 0]
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


def _noise(
    filters: Filters, seeds: list[int], first: int, model: DALLE, device: torch.device
) -> Iterator[Tensor | None]:
    """Gumbel noise [B, K] of image token first, first + 1, ...: a function of seed and token alone."""
    n_image, n_codes, batch = model.image_seq_len, model.num_image_tokens, len(seeds)
    if not filters.needs_noise:
        yield from (None for _ in range(first, n_image))
        return
    seed_of = rng.seeds_to_tensor(seeds, device)
    together = max(1, min(model.layout.grid_cols, _NOISE_VALUES // (batch * n_codes)))
    for start in range(first, n_image, together):
        position = torch.arange(start, min(start + together, n_image), device=device)
        grid = gumbel_noise(
            seed_of.repeat(len(position)), position.repeat_interleave(batch), rng.Stream.IMAGE_SAMPLING, n_codes
        )
        yield from grid.view(len(position), batch, n_codes)


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
