"""Oracle of the gated feed-forward's activation, in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def geglu(x: Tensor) -> Tensor:
    """x [..., 2 W] -> value * GELU(gate) [..., W], of its two halves; the exact GELU."""
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)
