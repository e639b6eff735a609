"""Chinese text, one token a character, through the BERT vocabulary of the `transformers` library."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from importlib import import_module
from pathlib import Path

import torch

from dalle_fast.tokenizers.base import BatchTokenizer, checked_text, id_list


class ChineseTokenizer(BatchTokenizer):
    """The `bert-base-chinese` tokenizer.

    Args:
        vocabulary: a folder with the vocabulary (vocab.txt), or a name that the local cache of transformers holds.
            Nothing is downloaded.
    Raises: RuntimeError (transformers is not installed), FileNotFoundError (no vocabulary on this machine).
    """

    def __init__(self, vocabulary: str | Path = "bert-base-chinese") -> None:
        try:
            transformers = import_module("transformers")
        except ModuleNotFoundError as error:
            if error.name != "transformers":
                raise
            raise RuntimeError(
                "ChineseTokenizer: needs the transformers library, which is not installed. "
                "Install it with `pip install transformers`."
            ) from error
        try:
            # Asked for first: from_pretrained of transformers 5 makes an empty vocabulary where it finds none.
            transformers.utils.cached_file(str(vocabulary), "vocab.txt", local_files_only=True)
            self.tokenizer = transformers.BertTokenizer.from_pretrained(str(vocabulary), local_files_only=True)
        except OSError as error:
            raise FileNotFoundError(
                f"ChineseTokenizer: vocabulary must be on this machine already, found no {str(vocabulary)!r}. "
                "Pass a folder that holds vocab.txt of bert-base-chinese, or fetch it into the local cache first."
            ) from error
        self.vocab_size = self.tokenizer.vocab_size

    def encode(self, text: str) -> torch.Tensor:
        """The ids of one text, long [n], without special tokens.

        Raises: TypeError (not text).
        """
        ids = self.tokenizer.encode(checked_text(text, "encode"), add_special_tokens=False)
        return torch.tensor(ids, dtype=torch.long)

    def decode(self, tokens: torch.Tensor | Iterable[int], pad_tokens: Collection[int] = frozenset()) -> str:
        """The text of ids [n] without padding (0 and `pad_tokens`)."""
        kept = [token for token in id_list(tokens, "decode") if token != 0 and token not in pad_tokens]
        return self.tokenizer.decode(kept)
