"""The quality figures of the demo, measured on a saved model as it is shipped.

- psnr: hard reconstructions of the held-out pictures, in dB, from the squared error over all their pixels in 0..1.
- codes_used, perplexity: of the codes of all pictures without skin tone.
- nearest_best_of: share of the captions in a list for which at least one of n samples has the captioned picture as its
  nearest one (mean squared error at 64x64, over all pictures without skin tone).
- nearest_single: the same share over single samples.   nearest_ranked: over the sample of each caption that the
  model's own CLIP ranks first.
- recall: share of the held-out pictures' captions whose own picture the CLIP puts first among the held-out ones, and of
  the pictures whose own caption it does.
Two lists: 64 captions by a fixed rule, and held-out captions, names of pictures that no text of the training held.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_fast.jobs.ranking import Ranker, scores_of
from dalle_fast.models.clip import CLIP
from dalle_fast.models.dalle import DALLE
from dalle_fast.sampling.gallery import to_pixels
from dalle_fast.training.codebook_usage import CodebookUsage
from dalle_fast.training.emoji_data import EmojiData

_BATCH = 64
_SIDE = 64  # at which pictures are compared


@dataclass(frozen=True)
class VaeFigures:
    """Of a discrete VAE; psnr in dB."""

    psnr: float
    codes_used: int
    num_codes: int
    share_used: float
    perplexity: float


@dataclass(frozen=True)
class DrawingFigures:
    """Of a DALLE; `hit_captions` and `missed_captions` say which captions count in nearest_best_of.

    nearest_ranked: None without a CLIP.
    """

    captions: int
    samples: int
    nearest_best_of: float
    nearest_single: float
    nearest_ranked: float | None
    hit_captions: list[str]
    missed_captions: list[str]


@dataclass(frozen=True)
class ClipFigures:
    """Of a CLIP, over the held-out pictures: recall@1 both ways."""

    pairs: int
    text_to_picture: float
    picture_to_text: float


@torch.no_grad()
def clip_figures(clip: CLIP, tokenizer: Any, data: EmojiData) -> ClipFigures:
    """Of the main captions of the held-out pictures; equal captions or pictures count as one another's."""
    places = data.held_out.nonzero().flatten().tolist()
    texts = tokenizer.tokenize([data.entries[i].caption for i in places], clip.text_seq_len, truncate_text=True)
    images = data.pictures[places].float() / 255
    # [texts, pictures]
    scores = torch.stack([clip(text[None], images, text_mask=text[None] != 0) for text in texts])
    own = scores.diagonal()
    by_text, by_picture = scores.amax(1) <= own, scores.amax(0) <= own
    return ClipFigures(len(places), by_text.double().mean().item(), by_picture.double().mean().item())


@torch.no_grad()
def vae_figures(vae: Any, pictures: Tensor, held_out: Tensor) -> VaeFigures:
    """Of a DiscreteVAE, for uint8 pictures [n, 3, H, W] and bool [n], which of them count for psnr."""
    usage, squared = CodebookUsage(vae.num_tokens), 0.0
    for batch, counts in zip(pictures.split(_BATCH), held_out.split(_BATCH), strict=True):
        pixels = batch.float() / 255
        codes = vae.get_codebook_indices(pixels)
        usage.add(codes)
        if counts.any():
            decoded = to_pixels(vae, vae.decode(codes[counts]))
            squared += (decoded - pixels[counts]).square().double().sum().item()
    if not held_out.any():
        raise ValueError("vae_figures: held_out must mark at least one picture, got none. Write the whole data set.")
    psnr = -10 * torch.tensor(squared / pictures[held_out].numel()).log10().item()
    return VaeFigures(psnr, usage.used, vae.num_tokens, usage.used / vae.num_tokens, usage.perplexity)


def nearest_pictures(pixels: Tensor, pictures: Tensor) -> Tensor:
    """Mean squared errors at 64x64, float64 [m, n], of pixels [m, 3, S, S] in 0..1 to uint8 pictures [n, 3, S, S].

    S: a multiple of 64; larger pictures are averaged over areas.
    """
    a = _at_64(pixels).flatten(1)
    b = torch.cat([_at_64(part.double() / 255) for part in pictures.split(_BATCH)]).flatten(1)
    squares = a.square().sum(1)[:, None] + b.square().sum(1)[None, :] - 2 * a @ b.t()
    return squares / a.shape[1]


def _at_64(pixels: Tensor) -> Tensor:
    return F.avg_pool2d(pixels.double(), pixels.shape[-1] // _SIDE)


def drawing_figures(
    dalle: DALLE,
    tokenizer: Any,
    data: EmojiData,
    captions: Sequence[str],
    *,
    samples: int = 4,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
    ranker: Ranker | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> DrawingFigures:
    """Draw every caption `samples` times and look for the nearest picture.

    Args:
        tokenizer: with `tokenize(texts, context_length)`.
        captions: main captions, or held-out ones, of pictures of `data`; none twice.
        settings: keyword arguments of generate_images.   ranker: chooses among the samples of a caption.
        on_batch: called with the number of pictures drawn.
    Raises: ValueError (a caption that no picture has).
    """
    place = {entry.held_out_alias: index for index, entry in enumerate(data.entries) if entry.held_out_alias}
    place |= {entry.caption: index for index, entry in enumerate(data.entries)}
    if unknown := [caption for caption in captions if caption not in place]:
        raise ValueError(f"drawing_figures: captions must name pictures of the data, got {unknown[:3]}.")
    hits: dict[str, int] = {}
    ranked_hits = 0
    per_batch = max(1, _BATCH // samples)
    for start in range(0, len(captions), per_batch):
        part = list(captions[start : start + per_batch])
        text = tokenizer.tokenize(part, dalle.text_seq_len).repeat_interleave(samples, dim=0)
        images = dalle.generate_images(text, seed=seed + start * samples, **(settings or {}))
        assert isinstance(images, Tensor)
        pixels = to_pixels(dalle.vae, images)
        errors = nearest_pictures(pixels, data.pictures)
        wanted = torch.tensor([place[caption] for caption in part]).repeat_interleave(samples)
        # Some pictures are equal (flags of territories): as near as the nearest counts.
        own = errors.gather(1, wanted[:, None]).squeeze(1)
        hit = (own <= errors.amin(1) + 1e-12).view(len(part), samples)
        hits.update(zip(part, hit.sum(1).tolist(), strict=True))
        if ranker is not None:
            prompts = [caption for caption in part for _ in range(samples)]
            best = scores_of(ranker, prompts, pixels.float()).view(len(part), samples).argmax(1)
            ranked_hits += int(hit.gather(1, best[:, None]).sum())
        if on_batch is not None:
            on_batch(len(part) * samples)
    found = [caption for caption in captions if hits[caption]]
    missed = [caption for caption in captions if not hits[caption]]
    single = sum(hits.values()) / (samples * len(captions))
    ranked = None if ranker is None else ranked_hits / len(captions)
    return DrawingFigures(len(captions), samples, len(found) / len(captions), single, ranked, found, missed)


def write_figures(
    path: Path,
    vae: VaeFigures,
    drawing: DrawingFigures | None,
    settings: dict[str, Any],
    *,
    held_out: DrawingFigures | None = None,
    clip: ClipFigures | None = None,
) -> None:
    """All figures as JSON, with the sampling settings they hold for; `held_out` are those of held-out captions."""
    found = {"vae": vae, "drawing": drawing, "drawing_held_out": held_out, "clip": clip}
    record = {name: asdict(figures) if figures else None for name, figures in found.items()} | {"settings": settings}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
