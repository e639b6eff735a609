"""Oracle of the discrete VAE's codes, in plain torch: argmax over k of x . weight_k + bias_k, ties to the lowest."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_fast.reference.gumbel_codebook import code_logits


@torch.no_grad()
def codebook_indices(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The code of each position; arguments were checked by the op.

    Args: features: [B, F, h, w].   weight: [K, F].   bias: [K] or None.
    Returns: int64 [B, h, w].
    """
    batch, _, height, width = features.shape
    with torch.autocast(features.device.type, enabled=False):
        return code_logits(features, weight, bias).argmax(dim=-1).view(batch, height, width)
