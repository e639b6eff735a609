"""The tokenizers that a training can be told of, and how they are saved with what was trained."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex, Tokenizer, normalizers

from dalle_fast.tokenizers.base import BatchTokenizer

CLIP_NAME, CHINESE_NAME = "clip", "chinese"


def load_tokenizer(name: str) -> BatchTokenizer:
    """The tokenizer of this name: "clip", "chinese", or the path of a tokenizer.json.

    Raises: FileNotFoundError, ValueError (no such file), with what to do.
    """
    # At call time: each of them imports libraries that the others do not need.
    if name == CLIP_NAME:
        from dalle_fast.tokenizers.clip_bpe import SimpleTokenizer

        return SimpleTokenizer()
    if name == CHINESE_NAME:
        from dalle_fast.tokenizers.chinese import ChineseTokenizer

        return ChineseTokenizer()
    from dalle_fast.tokenizers.hug import HugTokenizer

    return HugTokenizer(name)


def vocabulary(tokenizer: BatchTokenizer) -> int:
    """Entries of a tokenizer."""
    return int(tokenizer.vocab_size)  # type: ignore[attr-defined]


def saved_tokenizer(name: str) -> Tokenizer | Path | None:
    """What `save_pretrained` takes as this tokenizer; None for "chinese", which is no tokenizer.json.

    CLIP's lower-cases and collapses spaces by itself there: the file holds the encoding alone.
    """
    if name == CHINESE_NAME:
        return None
    if name != CLIP_NAME:
        return Path(name)
    tokenizer = Tokenizer.from_str(load_tokenizer(name).tokenizer.to_str())  # type: ignore[attr-defined]
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(), normalizers.Lowercase()]
    )
    return tokenizer
