"""Muon in float32: momentum whose update is replaced by the nearest orthogonal matrix, for hidden weight matrices.

torch.optim.Muon iterates in bfloat16, which a CPU without AMX does slowly; this one stays in float32 and works on all
matrices of one shape at once. A matrix that stacks several maps (queries, keys and values; GEGLU's two halves) is
orthogonalised map by map. Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the
scale 0.2 * sqrt(max(rows, columns)) that lets it share AdamW's learning rate: Liu et al. 2025, arXiv 2502.16982.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
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


class Muon(torch.optim.Optimizer):
    """Args:
    params: (parameter, maps) pairs, 2-D parameters and the number of equal maps stacked in their rows.
    lr, momentum, weight_decay: of every parameter.
    parallel: runs a function over a list, as `map` does; an executor's `map` spreads the work over its threads.
    """

    def __init__(
        self,
        params: Iterable[tuple[Tensor, int]],
        lr: float,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        parallel: Callable[..., Iterable[Tensor]] = map,
    ) -> None:
        pairs = list(params)
        self._parallel = parallel
        for parameter, maps in pairs:
            if parameter.ndim != 2 or parameter.shape[0] % maps:
                raise ValueError(
                    f"Muon: a parameter must be 2-D with rows divisible by its maps, got {tuple(parameter.shape)} "
                    f"with {maps} maps. Give other parameters to AdamW."
                )
        self._maps = {id(parameter): maps for parameter, maps in pairs}
        super().__init__(
            [parameter for parameter, _ in pairs], {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; `closure` is not supported."""
        if closure is not None:
            raise TypeError("Muon: closure must be None, got one. Compute the gradients before step().")
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = self._momentum(parameter, group["momentum"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                rows = parameter.shape[0] // self._maps[id(parameter)]
                by_shape[rows, parameter.shape[1]] += zip(parameter.split(rows), update.split(rows), strict=True)
            for shape, pieces in by_shape.items():
                halves = torch.stack([update for _, update in pieces]).chunk(2)
                updates = [update for half in self._parallel(orthogonalise, halves) for update in half]
                for (piece, _), update in zip(pieces, updates, strict=True):
                    piece.add_(update, alpha=-0.2 * max(shape) ** 0.5 * group["lr"])

    def _momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        """The Nesterov-averaged gradient."""
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        gradient = parameter.grad
        assert gradient is not None
        state["momentum"].lerp_(gradient, 1 - momentum)
        return torch.lerp(gradient, state["momentum"], momentum)
