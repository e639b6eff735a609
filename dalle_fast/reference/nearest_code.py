"""Oracle of vector quantisation's nearest code, in plain torch.

    index_m = argmin_k |x_m - c_k|^2        ties go to the lowest k

Distances are sums of squared differences, never |x|^2 - 2 x.c + |c|^2, whose cancellation can swap near codes and
whose blocked product can tell equal codes apart. Rows are taken a block at a time; no gradient passes.
Precision: at least float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS_AT_ONCE = 1024


@torch.no_grad()
def nearest_code(x: Tensor, codebook: Tensor, *, normalised: bool = False) -> Tensor:
    """Index of the nearest code; arguments were checked by the op.

    Args: x: [..., D].   codebook: [K, D].   normalised: compare directions (both scaled to length 1 first).
    Returns: int64 [...].
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        rows, codebook = x.reshape(-1, x.shape[-1]).to(dtype), codebook.to(dtype)
        if normalised:
            rows, codebook = F.normalize(rows, dim=-1), F.normalize(codebook, dim=-1)
        nearest = [
            torch.cdist(block, codebook, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=-1)
            for block in rows.split(ROWS_AT_ONCE)
        ]
    return torch.cat(nearest).view(x.shape[:-1])
