"""Which tokens may be drawn, and the draw: top-k, temperature, top-p (in this order), Gumbel-max.

Source: top-k as DALLE-pytorch's `filter_thres`, but ties at the threshold are all kept; nucleus sampling (arXiv
1904.09751); the Gumbel-max trick: argmax(logits + gumbel) is a sample of softmax(logits).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Filters:
    """How one token is chosen from its logits.

    Args:
        temperature: divides the logits; 0 takes the most likely token, the lowest id among equals.
        top_k: how many of the most likely tokens stay, with all that equal the last of them; None keeps all.
        top_p: the most likely tokens stay until their probabilities reach this; None keeps all.
    Raises: ValueError (out of range), TypeError (top_k not an int).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"generate: temperature must be a number >= 0, got {self.temperature}. 0 takes the most likely token."
            )
        if self.top_k is not None and (isinstance(self.top_k, bool) or not isinstance(self.top_k, int)):
            raise TypeError(f"generate: top_k must be an int, got {self.top_k!r}.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"generate: top_k must be at least 1, got {self.top_k}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"generate: top_p must be in (0, 1], got {self.top_p}.")

    @classmethod
    def from_threshold(
        cls, filter_thres: float, vocabulary: int, *, temperature: float, top_k: int | None, top_p: float | None
    ) -> Filters:
        """`filter_thres` keeps that share less of the whole vocabulary (text and image), as the original.

        `top_k` replaces it.
        """
        if not 0 <= filter_thres <= 1:
            raise ValueError(
                f"generate: filter_thres must be in 0..1, got {filter_thres}. "
                "It is the share of the vocabulary to drop."
            )
        if top_k is None:
            top_k = max(int((1 - filter_thres) * vocabulary), 1)
        return cls(temperature, top_k, top_p)

    @property
    def needs_noise(self) -> bool:
        return self.temperature > 0 and self.top_k != 1

    def choose(self, logits: Tensor, noise: Tensor | None) -> Tensor:
        """Token ids [B] from logits [B, K]; `noise` [B, K] is Gumbel noise, None takes the most likely."""
        if noise is None:
            return logits.argmax(dim=-1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return (self.filtered(logits) + noise).argmax(dim=-1)

    def filtered(self, logits: Tensor) -> Tensor:
        """logits / temperature [B, K], -inf where the filters drop a token."""
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            threshold = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < threshold, -torch.inf)
        logits = logits / self.temperature
        if self.top_p is not None and self.top_p < 1:
            logits = _nucleus(logits, self.top_p)
        return logits


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    ordered = logits.sort(dim=-1, descending=True).values
    probability = ordered.softmax(dim=-1)
    before = probability.cumsum(dim=-1) - probability  # what the tokens above already hold
    n_kept = (before < top_p).sum(dim=-1, keepdim=True)
    threshold = ordered.gather(-1, n_kept - 1)
    return logits.masked_fill(logits < threshold, -torch.inf)
