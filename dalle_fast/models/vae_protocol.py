"""What DALLE asks of a VAE, and what VAEs ask of their inputs.

Any object with these four numbers and two methods is one: it need not be an nn.Module, and nothing is inherited.
A grid of codes has image_size / 2^num_layers a side; num_layers is 0 where every pixel has a code.
"""

from __future__ import annotations

from math import isqrt
from numbers import Integral
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from dalle_fast.models.saving import PathLike, Pretrained

_NUMBERS = {"image_size": 1, "num_tokens": 1, "num_layers": 0, "channels": 1}  # attribute -> its least value
_METHODS = ("get_codebook_indices", "decode")
ATTRIBUTES = (*_NUMBERS, *_METHODS)


@runtime_checkable
class ImageTokenizer(Protocol):
    """A VAE, as DALLE sees it.

    Attributes:
        image_size: S, side of the square pictures.   num_tokens: K, codes.   channels: c, of a picture.
        num_layers: L, halvings of S: the grid of codes is S / 2^L a side.
    """

    image_size: int
    num_tokens: int
    num_layers: int
    channels: int

    def get_codebook_indices(self, images: Tensor) -> Tensor:
        """Pictures [B, c, S, S] in 0..1 -> int64 codes [B, (S / 2^L)^2] in 0..K-1, raster order; always the same."""

    def decode(self, img_seq: Tensor) -> Tensor:
        """int64 codes [B, (S / 2^L)^2] -> pictures [B, c, S, S].

        In 0..1, or normalised by an attribute `normalization` = (means, stds) of the VAE.
        """


def check_vae(vae: object, op: str = "DALLE") -> None:
    """Raises TypeError where `vae` lacks something of ImageTokenizer, or has something else under its name; ValueError
    where its numbers make no grid. The sentence names what.
    """
    name = type(vae).__name__
    if missing := [attribute for attribute in ATTRIBUTES if not hasattr(vae, attribute)]:
        raise TypeError(
            f"{op}: vae must have {', '.join(ATTRIBUTES)}, got {name} without {', '.join(missing)}.{_advice(vae)}"
        )
    for attribute in _METHODS:
        if not callable(value := getattr(vae, attribute)):
            raise TypeError(f"{op}: vae.{attribute} must be a method, got {type(value).__name__} in {name}.")
    for attribute, least in _NUMBERS.items():
        value = getattr(vae, attribute)
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{op}: vae.{attribute} must be a whole number, got {value!r:.60} in {name}.")
        if value < least:
            raise ValueError(f"{op}: vae.{attribute} must be at least {least}, got {value} in {name}.")
    numbers: Any = vae
    if numbers.image_size % 2**numbers.num_layers:
        raise ValueError(
            f"{op}: vae.image_size must be a multiple of 2^num_layers = {2**numbers.num_layers}, got "
            f"{numbers.image_size} in {name}. Codes form a square grid."
        )


def _advice(vae: object) -> str:
    if isinstance(vae, type):
        return " Pass an instance, not the class."
    return " Of DistributedDataParallel and its like pass the module inside." if hasattr(vae, "module") else ""


def saved_vae(
    path: PathLike, *, op: str, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Any:
    """The VAE in a directory that `save_pretrained` wrote, of whichever class; arguments as `from_pretrained`.

    Raises: FileNotFoundError, ValueError, as there; TypeError (the model there is no VAE); `op` begins that sentence.
    """
    model = Pretrained.from_pretrained(path, dtype=dtype, device=device)
    check_vae(model, op)
    return model


def check_pictures(name: str, img: Tensor, channels: int, image_size: int) -> None:
    """Raises ValueError, TypeError where `img` is not floating [B, channels, image_size, image_size].

    Args: name: of the VAE's class, for the sentence.
    """
    wanted = (channels, image_size, image_size)
    if img.dim() != 4 or tuple(img.shape[1:]) != wanted:
        raise ValueError(
            f"{name}: img must be [B, {', '.join(map(str, wanted))}] (channels, then image_size twice), got"
            f" {list(img.shape)}. Resize or convert the pictures, or build the VAE with their channels and size."
        )
    if not img.dtype.is_floating_point:
        raise TypeError(f"{name}: img must be floating, in 0..1, got {img.dtype}. Divide bytes by 255.")


def side_of_codes(name: str, img_seq: Tensor, num_tokens: int) -> int:
    """The side of square grids of codes [B, n], ids below num_tokens.

    Raises: TypeError (dtype, axes), ValueError (n is no square number, an id out of range).
    """
    if img_seq.dtype not in (torch.int32, torch.int64) or img_seq.dim() != 2:
        raise TypeError(
            f"{name}.decode: img_seq must be int64 [B, n], got {img_seq.dtype} {list(img_seq.shape)}."
            " Give the ids that get_codebook_indices returns."
        )
    n = img_seq.shape[1]
    side = isqrt(n)
    if side * side != n or n == 0:
        raise ValueError(f"{name}.decode: n must be a square number, got {n}. Give whole square grids of codes.")
    if img_seq.numel() and not 0 <= int(img_seq.min()) <= int(img_seq.max()) < num_tokens:
        raise ValueError(
            f"{name}.decode: ids must be in 0..{num_tokens - 1}, got"
            f" {int(img_seq.min())}..{int(img_seq.max())}. Leave out text ids, padding and -1 for unknown."
        )
    return side
