"""Train a byte-level BPE on captions: `dalle-fast tokenizer train`. Saved, it is a tokenizer.json for `HugTokenizer`.

Id 0 is the padding entry (the original reads a 0 as padding at its position), so no caption contains it.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

PADDING = "[PAD]"
LEAST = 257  # the bytes and the padding
PAPER_VOCABULARY = 16384


def train_tokenizer(captions: Iterable[str], vocabulary: int = PAPER_VOCABULARY) -> Tokenizer:
    """A lower-casing byte-level BPE of at most `vocabulary` entries; deterministic for given captions.

    Raises: ValueError (less than the bytes need).
    """
    if vocabulary < LEAST:
        raise ValueError(
            f"tokenizer: vocab_size must be at least {LEAST}, got {vocabulary}. Each byte and the padding has one."
        )
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
