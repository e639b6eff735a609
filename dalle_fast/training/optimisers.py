"""The optimiser of a training: AdamW, Adam, or Muon with AdamW beside it, as one object with one state.

Weight decay is for weight matrices and kernels of convolutions. Norms, biases, scales, embeddings (names that end in
"_emb", "_emb.weight") and codebooks have none, whichever optimiser it is. Muon (muon.py) takes the matrices of
transformers; the rest is AdamW's, at the same learning rate.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dalle_fast.training.config import OptimiserConfig
from dalle_fast.training.muon import orthogonalise

_NOT_DECAYED = re.compile(r"(_emb|_emb\.weight|codebook\.weight)$")
_MOMENTUM = 0.95


def make_optimiser(config: OptimiserConfig, named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """Of these parameters, in groups; every group's `lr` is for the loop to set.

    Raises: ValueError (no parameters).
    """
    groups: dict[tuple[float, int], list[Tensor]] = defaultdict(list)
    for name, parameter in named:
        decay = config.weight_decay if is_decayed(name, parameter) else 0.0
        groups[decay, stacked_maps(name, parameter) if config.name == "muon" else 0].append(parameter)
    if not groups:
        raise ValueError("train: a task must have parameters to train, got none.")
    settings: list[dict[str, Any]] = [
        {"params": params, "weight_decay": decay} | ({"maps": maps} if config.name == "muon" else {})
        for (decay, maps), params in groups.items()
    ]
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "muon": MuonAndAdamW}[config.name]
    return kind(settings, lr=config.learning_rate, betas=config.betas)


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Whether weight decay is for this one."""
    return sum(size > 1 for size in parameter.shape) >= 2 and not _NOT_DECAYED.search(name)


def stacked_maps(name: str, parameter: Tensor) -> int:
    """How many equal maps a transformer's matrix stacks in its rows; 0: none of Muon's."""
    if "transformer." not in name or parameter.ndim != 2:
        return 0
    return 3 if name.endswith("to_qkv.weight") else 2 if name.endswith("w_in.weight") else 1


class MuonAndAdamW(torch.optim.AdamW):
    """AdamW whose groups with "maps" > 0 are Muon's: matrices that stack as many equal maps in their rows."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; `closure` is not supported."""
        if closure is not None:
            raise TypeError("Muon: closure must be None, got one. Compute the gradients before step().")
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["maps"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["maps"]:
                self._orthogonal_step(group)

    def _orthogonal_step(self, group: dict[str, Any]) -> None:
        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            update = self._momentum(parameter)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            rows = parameter.shape[0] // group["maps"]
            by_shape[rows, parameter.shape[1]] += zip(parameter.split(rows), update.split(rows), strict=True)
        for shape, pieces in by_shape.items():
            updates = orthogonalise(torch.stack([update for _, update in pieces]))
            for (piece, _), update in zip(pieces, updates, strict=True):
                piece.add_(update, alpha=-0.2 * max(shape) ** 0.5 * group["lr"])

    def _momentum(self, parameter: Tensor) -> Tensor:
        """Nesterov's look ahead, after adding the gradient to the average."""
        state = self.state[parameter]
        if "momentum" not in state:
            # AdamW looks for a step, too, in every state that it loads.
            state["step"], state["momentum"] = torch.zeros(()), torch.zeros_like(parameter)
        assert parameter.grad is not None
        average = state["momentum"].lerp_(parameter.grad, 1 - _MOMENTUM)
        return parameter.grad.lerp(average, _MOMENTUM)
