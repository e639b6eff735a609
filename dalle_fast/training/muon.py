"""Muon in float32: momentum whose update is replaced by the nearest orthogonal matrix, for hidden weight matrices.

torch.optim.Muon iterates in bfloat16, which a CPU without AMX does slowly; `optimisers.MuonAndAdamW` stays in float32
and works on all matrices of one shape at once. A matrix that stacks several maps (queries, keys and values; GEGLU's two
halves) is orthogonalised map by map.

Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the scale
0.2 * sqrt(max(rows, columns)) that lets it share AdamW's learning rate: Liu et al. 2025, arXiv 2502.16982.
"""

from __future__ import annotations

from torch import Tensor

# Quintic Newton-Schulz coefficients of Jordan et al.: steepest at zero, singular values end between about 0.7 and 1.2.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """[n, rows, columns] -> the same with all singular values near 1."""
    a, b, c = _QUINTIC
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
