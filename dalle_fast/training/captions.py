"""The demo's caption tokenizer and its random captions.

A byte-level BPE trained on the captions, saved as `tokenizer.json` in the form `HugTokenizer` reads. Id 0 is the
padding entry (the original reads a 0 as padding at its position), so no caption contains it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

PADDING = "[PAD]"
VOCABULARY = 1500


def train_tokenizer(captions: Sequence[str], vocabulary: int = VOCABULARY) -> Tokenizer:
    """A lower-casing byte-level BPE of at most `vocabulary` entries; deterministic for given captions."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer


def encode_captions(tokenizer: Tokenizer, captions: Sequence[str], text_seq_len: int) -> Tensor:
    """long [n, text_seq_len], padded with 0; longer captions lose their end."""
    tokens = torch.zeros(len(captions), text_seq_len, dtype=torch.long)
    for row, caption in enumerate(captions):
        ids = tokenizer.encode(caption).ids[:text_seq_len]
        tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
    return tokens


def draw_caption(lines: Sequence[str], generator: torch.Generator, *, plain: float, word_dropout: float) -> str:
    """One of a picture's caption lines: the first with probability `plain`, else any other.

    With probability `word_dropout` one word of a caption of at least three words is dropped.
    """
    draws = torch.rand(3, generator=generator).tolist()
    line = lines[0]
    if len(lines) > 1 and draws[0] >= plain:
        line = lines[1 + int(draws[1] * (len(lines) - 1))]
    words = line.split()
    if len(words) >= 3 and draws[2] < word_dropout:
        del words[int(draws[2] / word_dropout * len(words))]
    return " ".join(words)
