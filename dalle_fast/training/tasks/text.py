"""The tokenizers that a training can be told of, and how they are saved with what was trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers

from dalle_fast.tokenizers.base import BatchTokenizer
from dalle_fast.training.data.samples import Unusable
from dalle_fast.training.data.source import SampleSource

CLIP_NAME, CHINESE_NAME = "clip", "chinese"
_LOOKED_AT = 1000  # samples, spread over the data


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


def with_vocabulary(op: str, arguments: Mapping[str, Any], tokenizer: BatchTokenizer) -> dict[str, Any]:
    """The arguments of a model that reads this tokenizer's texts: num_text_tokens is its own where left out.

    Raises: ValueError (a smaller one).
    """
    least = int(tokenizer.vocab_size)  # type: ignore[attr-defined]
    given = arguments.get("num_text_tokens", least)
    if given < least:
        raise ValueError(
            f"{op}: model.num_text_tokens must be at least the {least} entries of the tokenizer, got {given}. Leave it "
            "out."
        )
    return {**arguments, "num_text_tokens": given}


def saved_tokenizer(name: str) -> Tokenizer | Path | None:
    """What `save_pretrained` takes as this tokenizer; None for "chinese", which is no tokenizer.json.

    CLIP's lower-cases, collapses spaces and marks ends of words by itself in a file, which holds the encoding alone.
    """
    if name == CHINESE_NAME:
        return None
    if name != CLIP_NAME:
        return Path(name)
    tokenizer = Tokenizer.from_str(load_tokenizer(name).tokenizer.to_str())  # type: ignore[attr-defined]
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(), normalizers.Lowercase()]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    return tokenizer


def mean_text_length(source: object) -> float:
    """Text positions of a caption, its end included, on average over samples spread over the data; 1 without captions.

    A function of the data alone.
    """
    if not isinstance(source, SampleSource) or source.captions is None:
        return 1.0
    captions = source.captions
    places = torch.linspace(0, source.n - 1, min(source.n, _LOOKED_AT)).round().long()
    lengths = []
    for index in source.trained[places].tolist():
        try:
            lines = source.samples.captions(index)
        except Unusable:
            continue
        tokens = (len(captions.tokenizer.encode(line)) for line in lines)
        lengths += [min(n + 1, captions.text_seq_len) for n in tokens]
    return sum(lengths) / len(lengths) if lengths else 1.0
