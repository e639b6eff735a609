"""The nearest code of a codebook in C++ (csrc/cpu/nearest_code*), in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_fast import _extension


@torch.no_grad()
def nearest_code(x: Tensor, codebook: Tensor, *, normalised: bool) -> Tensor:
    """int64 [...]: arguments as `dalle_fast.ops.nearest_code`, checked there; 16-bit inputs are converted first."""
    n, width = x.shape[:-1].numel(), x.shape[-1]
    with torch.autocast("cpu", enabled=False):
        rows, codes = x.reshape(n, width).float(), codebook.float()
        if normalised:
            rows, codes = F.normalize(rows, dim=-1), F.normalize(codes, dim=-1)
    rows, codes = rows.contiguous(), codes.contiguous()
    nearest = torch.empty(x.shape[:-1], dtype=torch.int64)
    function = _extension.library().dalle_fast_nearest_code
    status = function(rows.data_ptr(), n, width, codes.data_ptr(), len(codes), nearest.data_ptr())
    _extension.check(status, "nearest_code")
    return nearest
