"""The VAE inside a DALLE: float32 whatever the transformer is.

In 16 bits the codes of a picture would change, and pixels have half their levels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Change = Callable[[Tensor], Tensor]


@contextmanager
def without_vae(model: nn.Module) -> Iterator[nn.Module | None]:
    """Inside, `model` has no module of the name vae; gives that module, None where there is none."""
    vae = model._modules.get("vae")
    if vae is not None:
        model._modules["vae"] = None
    try:
        yield vae
    finally:
        if vae is not None:
            model._modules["vae"] = vae


def not_narrowed(change: Change) -> Change:
    """What `change` does to tensors, but for float32 that it would make 16 bits of: that is moved alone."""

    def changed(tensor: Tensor) -> Tensor:
        after = change(tensor)
        narrowed = tensor.dtype == torch.float32 and after.is_floating_point() and after.dtype.itemsize == 2
        return tensor.to(after.device) if narrowed else after

    return changed


def pixels_for(vae: object, pixels: Tensor) -> Tensor:
    """Floating pixels in the dtype of the VAE's weights."""
    weight = next(vae.parameters(), None) if isinstance(vae, nn.Module) else None
    return pixels if weight is None or not pixels.is_floating_point() else pixels.to(weight.dtype)
