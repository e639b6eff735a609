"""A Hugging Face `tokenizer.json`, for instance one trained on your captions."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.processors import ByteLevel

from dalle_fast.tokenizers.base import BatchTokenizer, checked_text, id_list


class HugTokenizer(BatchTokenizer):
    """A byte-level tokenizer read from `tokenizer.json`; id 0 is padding.

    Args:
        bpe_path: the file.
    Raises: TypeError (no path), FileNotFoundError (no file), ValueError (not such a file).
    """

    def __init__(self, bpe_path: str | Path | None = None) -> None:
        if bpe_path is None:
            raise TypeError("HugTokenizer: bpe_path must be the path of a tokenizer.json, got None.")
        path = Path(bpe_path)
        if not path.is_file():
            raise FileNotFoundError(
                f"HugTokenizer: bpe_path must be a tokenizer.json file, found none at {path}. "
                "Train one with the tokenizers library, or pass the file's own path, not its folder's."
            )
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no narrower class
            raise ValueError(
                f"HugTokenizer: bpe_path must be a tokenizer.json of the tokenizers library, got {path} ({error}). "
                "Save one with `tokenizer.save(path)`."
            ) from error
        # As in the original: special tokens that the file's own post-processor would add are not added.
        self.tokenizer.post_processor = ByteLevel(trim_offsets=True)
        self.vocab_size = self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """The ids of one text.

        Raises: TypeError (not text).
        """
        return self.tokenizer.encode(checked_text(text, "encode")).ids

    def decode(self, tokens: torch.Tensor | Iterable[int], pad_tokens: Collection[int] = frozenset()) -> str:
        """The text of ids [n] without padding (0 and `pad_tokens`) and special tokens.

        Ids that the file does not hold are left out, as in the original: a model's vocabulary may be larger.
        """
        kept = [token for token in id_list(tokens, "decode") if token != 0 and token not in pad_tokens]
        return self.tokenizer.decode(kept, skip_special_tokens=True)
