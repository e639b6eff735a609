"""Which tokens may be drawn: top-k, temperature, top-p (in this order), as the op `choose_token` applies them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from dalle_fast import rng
from dalle_fast.ops.choose_token import check_filters, choose_token


@dataclass(frozen=True)
class Filters:
    """How one token is chosen from its logits.

    Args:
        temperature: divides the logits; 0 takes the most likely token, the lowest id among equals.
        top_k: how many of the most likely tokens stay, with all that equal the last of them; None keeps all.
        top_p: the most likely tokens stay until their probabilities reach this, with all that equal the last of them;
            None keeps all.
    Raises: ValueError (out of range), TypeError (top_k not an int).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        check_filters("generate", **asdict(self))

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

    def token(self, logits: Tensor, seeds: int | Sequence[int] | Tensor, position: int, stream: rng.Stream) -> Tensor:
        """Token ids [B] for `position`, from logits [B, K] and one seed each (see `dalle_fast.ops.choose_token`)."""
        return choose_token(logits, seeds=seeds, positions=position, stream=stream, **asdict(self))
