"""Ranking: what scores pictures, and the best of those that come by."""

from __future__ import annotations

import heapq
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_fast.clip import loading
from dalle_fast.clip.model import PretrainedCLIP
from dalle_fast.clip.text import ClipTokenizer
from dalle_fast.jobs.drawing_model import DrawingModel
from dalle_fast.jobs.job import Sample
from dalle_fast.models.clip import CLIP
from dalle_fast.tokenizers.base import BatchTokenizer
from dalle_fast.tokenizers.hug import HugTokenizer

# (prompts, images [B, C, H, W], float32 in 0..1) -> scores [B], higher is better; C as the model draws, mostly 3
Ranker = Callable[[list[str], Tensor], Tensor]


class ClipRanker:
    """Scores by the similarities of a CLIP of this package; a text that is too long for it is cut.

    Padding is masked out, as `dalle-fast train-clip` does and the original's README.

    Args: clip: in evaluation mode.   tokenizer: of its texts, which are lower-cased.
    """

    def __init__(self, clip: CLIP, tokenizer: BatchTokenizer) -> None:
        self.clip, self.tokenizer = clip, tokenizer

    @torch.no_grad()
    def __call__(self, prompts: list[str], images: Tensor) -> Tensor:
        """Similarities [B]."""
        lower = [prompt.lower() for prompt in prompts]
        text = self.tokenizer.tokenize(lower, self.clip.text_seq_len, truncate_text=True)
        mask = text != 0
        mask[:, 0] = True  # a prompt without a known word has a token, too
        return self.clip(text.to(images.device), images, text_mask=mask.to(images.device))


class PretrainedRanker:
    """Scores by the logits of a CLIP of OpenAI's architecture; a text that is too long for it is cut.

    A text is read once, however many batches of its pictures come.

    Args: clip: in evaluation mode.   tokenizer: of its texts.
    """

    def __init__(self, clip: PretrainedCLIP, tokenizer: ClipTokenizer) -> None:
        self.clip, self.tokenizer = clip, tokenizer
        self._read: dict[str, Tensor] = {}  # a text's feature [1, embed_dim], of those of the last batch

    @torch.no_grad()
    def __call__(self, prompts: list[str], images: Tensor) -> Tensor:
        """Logits [B]."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._read]
        if new:
            ids = self.tokenizer.tokenize(new, self.clip.context_length, truncate=True).to(images.device)
            self._read |= zip(new, self.clip.encode_text(ids).split(1), strict=True)
        self._read = {prompt: self._read[prompt] for prompt in prompts}
        pictures = self.clip.encode_image(self.clip.preprocess(images)).split(1)
        pairs = zip((self._read[prompt] for prompt in prompts), pictures, strict=True)
        # pair by pair: the bits of a score depend on its own text and picture alone
        scores = [(F.normalize(text, dim=-1) * F.normalize(picture, dim=-1)).sum(-1) for text, picture in pairs]
        return torch.cat(scores) * self.clip.logit_scale.exp()


def load_ranker(rank: str, model: DrawingModel) -> Ranker:
    """The ranker of this name, for pictures of this model and on its device.

    Args: rank: directory of a saved `CLIP`, which reads with its own tokenizer.json or, without one, with the model's;
        a file or directory that `dalle_fast.clip.load` reads; or "module:function", a `Ranker` that Python finds.
    Raises: ValueError, FileNotFoundError (nothing of this name, a CLIP that does not fit the model, no merges file).
    """
    path = Path(rank)
    if path.is_file() or (path.is_dir() and loading.holds_clip(path)):
        return _load_pretrained(path, model)
    if path.is_dir():
        return _load_clip(path, model)
    if not re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", rank):
        raise ValueError(
            f"sample: rank must be a CLIP's directory or file, or module:function, got {rank!r}, which is neither."
        )
    module_name, _, names = rank.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"sample: rank must name a module that Python can import, got {rank!r} ({error}). "
            "Is its folder on PYTHONPATH?"
        ) from None
    for name in names.split("."):
        found = getattr(found, name, None)
    if not callable(found):
        raise ValueError(f"sample: rank must name a function of {module_name}, got {rank!r}, which is none.")
    return found


def scores_of(ranker: Ranker, prompts: list[str], images: Tensor) -> Tensor:
    """What a ranker says, checked.

    Args: images: [B, C, H, W], float32 in 0..1.
    Returns: float32 [B], on the CPU.
    Raises: ValueError (other than one finite number a picture), and what the ranker raises.
    """
    said = ranker(prompts, images)
    try:
        scores = torch.as_tensor(said)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(_must_score(ranker, len(images), f"{type(said).__name__} ({error})")) from None
    if scores.dtype == torch.bool or scores.is_complex() or list(scores.shape) != [len(images)]:
        kind = str(scores.dtype).removeprefix("torch.")
        raise ValueError(_must_score(ranker, len(images), f"{kind} {list(scores.shape)}"))
    scores = scores.detach().to("cpu", torch.float32)
    if not scores.isfinite().all():
        worst = int((~scores.isfinite()).nonzero()[0])
        raise ValueError(_must_score(ranker, len(images), f"{scores[worst].item()} for {prompts[worst]!r:.60}"))
    return scores


class TopK:
    """The best of the samples that are offered, in any order: by score, equal ones by index.

    Args: keep: how many; None: all.
    """

    def __init__(self, keep: int | None) -> None:
        self._keep = keep
        self._heap: list[tuple[float, int, Sample, float | None, Tensor | None]] = []  # the worst first

    def offer(self, sample: Sample, score: float | None, pixels: Tensor | None) -> None:
        """Takes a sample, or leaves it; of samples without scores the first are the best.

        Args: pixels: copied if they are taken: they may be a part of a batch that goes.
        """
        rank = (0.0 if score is None else score, -sample.index)
        full = self._keep is not None and len(self._heap) == self._keep
        if full and rank < self._heap[0][:2]:
            return
        taken = (*rank, sample, score, None if pixels is None else pixels.clone())
        if full:
            heapq.heapreplace(self._heap, taken)
        else:
            heapq.heappush(self._heap, taken)

    def kept(self) -> list[tuple[Sample, float | None, Tensor | None]]:
        """(sample, score, pixels), the best first."""
        best = sorted(self._heap, key=lambda item: item[:2], reverse=True)
        return [(sample, score, pixels) for _, _, sample, score, pixels in best]


def _load_clip(directory: Path, model: DrawingModel) -> ClipRanker:
    own = directory / "tokenizer.json"
    clip = CLIP.from_pretrained(directory, device=model.device)
    tokenizer = HugTokenizer(own) if own.is_file() else model.tokenizer
    vae, most = model.dalle.vae, model.dalle.text_seq_len
    side, sides = clip.visual_image_size, vae.image_size
    if (side, clip.channels) != (sides, vae.channels):
        raise ValueError(
            f"sample: the CLIP in {directory} must score what the model draws, pictures {sides} x {sides} with "
            f"{vae.channels} channels, got one for {side} x {side} with {clip.channels}. Rank with one that fits."
        )
    if clip.num_text_tokens < tokenizer.vocab_size:
        raise ValueError(
            f"sample: the CLIP in {directory} must know the {tokenizer.vocab_size} tokens of its tokenizer, got "
            f"{clip.num_text_tokens}. Put the tokenizer.json that it was trained with beside it."
        )
    if clip.text_seq_len < most:
        raise ValueError(
            f"sample: the CLIP in {directory} must read texts of {most} tokens, as the model does, got at most "
            f"{clip.text_seq_len}. Rank with one that fits."
        )
    return ClipRanker(clip, tokenizer)


def _load_pretrained(path: Path, model: DrawingModel) -> PretrainedRanker:
    clip = loading.load(path, device=model.device)
    channels = model.dalle.vae.channels
    if channels not in (1, 3):
        raise ValueError(
            f"sample: the CLIP in {path} scores pictures of 3 channels, or of 1 as grey, and the model draws "
            f"{channels}. Rank with one that fits."
        )
    if clip.vocab_size != ClipTokenizer.vocab_size:
        raise ValueError(
            f"sample: the CLIP in {path} must read the {ClipTokenizer.vocab_size} tokens of OpenAI's tokenizer, got "
            f"one of {clip.vocab_size}. Rank with one that does."
        )
    merges = (path if path.is_dir() else path.parent) / "merges.txt"
    return PretrainedRanker(clip, ClipTokenizer(merges if merges.is_file() else None))


def _must_score(ranker: Ranker, n: int, got: str) -> str:
    name = getattr(ranker, "__qualname__", type(ranker).__name__)
    return f"sample: the ranker {name} must give one finite number a picture, [{n}], got {got}."
