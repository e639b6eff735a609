"""Write a trained demo model as it is shipped: weights, tokenizer, card, licence, captions, settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from dalle_fast.models.clip import CLIP
from dalle_fast.models.dalle import DALLE
from dalle_fast.training.emoji import fixed_captions, licence_text
from dalle_fast.training.emoji_data import EmojiData

CAPTIONS, EXAMPLES, SETTINGS, FIXED_LIST = "captions.txt", "examples.txt", "sampling.json", "quality_captions.txt"


def pack(
    dalle: DALLE,
    tokenizer: Path,
    data: EmojiData,
    out: Path,
    *,
    settings: dict[str, float],
    examples: Sequence[str],
    card: str,
    clip: CLIP | None = None,
    dtype: torch.dtype | None = None,
) -> int:
    """Save `dalle` to `out` with everything `dalle-fast draw` and `evaluate` read; returns the bytes written.

    Args:
        tokenizer: path of tokenizer.json.   settings: sampling defaults (temperature, top_k, cond_scale).
        examples: prompts drawn when none is given.   card: text of README.md.   clip: of the same tokenizer, ranks
            what is drawn.   dtype: of the stored weights.
    """
    dalle.save_pretrained(out, dtype=dtype, tokenizer=tokenizer, clip=clip, card=card)
    captions = sorted({entry.caption for entry in data.entries})
    _write_lines(out / CAPTIONS, captions)
    _write_lines(out / EXAMPLES, examples)
    _write_lines(out / FIXED_LIST, [entry.caption for entry in fixed_captions(data.entries)])
    (out / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (out / "LICENSE").write_text(licence_text(), encoding="utf-8")
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
