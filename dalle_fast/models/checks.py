"""What DALLE refuses before it runs, in words: texts and images that do not fit the model."""

from __future__ import annotations

import torch
from torch import Tensor


def checked_text(text: Tensor, text_seq_len: int, num_text_tokens: int) -> Tensor:
    """Text ids [B, text_seq_len] as int64. Raises ValueError (shape, range), TypeError (dtype)."""
    if text.dim() != 2 or text.shape[1] != text_seq_len:
        raise ValueError(
            f"DALLE: text must be [B, text_seq_len={text_seq_len}], got {list(text.shape)}. "
            "Tokenize with context_length=text_seq_len; <bos> is added here."
        )
    return checked_ids(text, num_text_tokens, "text ids")


def check_image_shape(image: Tensor, n_texts: int, image_seq_len: int, pixels: list[int]) -> None:
    """Raises ValueError where `image` is neither codes [n_texts, <= image_seq_len] nor [n_texts, *pixels]."""
    if image.shape[0] != n_texts:
        raise ValueError(f"DALLE: text and image must be one batch, got {n_texts} texts and {image.shape[0]} images.")
    if image.dim() == 4:
        if list(image.shape[1:]) != pixels:
            raise ValueError(
                f"DALLE: pixels must be {['B', *pixels]}, got {list(image.shape)}. Resize them as the VAE was trained."
            )
    elif image.dim() != 2 or image.shape[1] > image_seq_len:
        raise ValueError(
            f"DALLE: image must be codes [B, at most {image_seq_len}] or pixels [B, channels, height, width], "
            f"got {list(image.shape)}."
        )


def checked_labels(labels: Tensor, codes: Tensor, num_image_tokens: int) -> Tensor:
    """Codes to predict, int64 like `codes` [B, n]. Raises ValueError (shape, range), TypeError (dtype)."""
    if labels.shape != codes.shape:
        raise ValueError(
            f"DALLE: labels must be {list(codes.shape)}, one for each code of image, got {list(labels.shape)}."
        )
    return checked_ids(labels, num_image_tokens, "labels")


def checked_ids(ids: Tensor, limit: int, what: str) -> Tensor:
    """Token ids as int64. Raises TypeError (dtype), ValueError (not in 0..limit - 1)."""
    if ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise TypeError(
            f"DALLE: {what} must be integers, got {ids.dtype}. Pass token ids, not embeddings or one-hot rows."
        )
    # on an accelerator the check would wait for the device; there the embedding itself refuses
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or highest >= limit:
            raise ValueError(
                f"DALLE: {what} must be in 0..{limit - 1}, got {lowest if lowest < 0 else highest}. "
                "Does the tokenizer fit the model?"
            )
    return ids.long()
