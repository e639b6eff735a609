"""The original's containers of (f, g) layer pairs, for code that builds its own transformer from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from dalle_fast.models.reversible import reversible

__all__ = ["ReversibleSequence", "SequentialSequence"]

Routes = Mapping[str, Sequence[tuple[bool, bool]]]


class _LayerPairs(nn.Module):
    """Layer pairs and, for each keyword argument, which of the pair's two functions gets it."""

    def __init__(self, layers: Iterable[Iterable[nn.Module]], args_route: Routes | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleList(pair) for pair in layers])
        self.args_route = dict(args_route or {})
        for name, route in self.args_route.items():
            if len(route) != len(self.layers):
                raise ValueError(
                    f"{type(self).__name__}: args_route[{name!r}] must have one entry a layer, {len(self.layers)}, "
                    f"got {len(route)}."
                )

    def _pairs(self, arguments: Mapping[str, Any]) -> list[tuple[partial, partial]]:
        """Every (f, g) with the keyword arguments that are routed to it; others are left out, as the original does."""
        pairs = []
        for i, pair in enumerate(self.layers):
            f, g = cast(nn.ModuleList, pair)
            routed: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
            for name in arguments.keys() & self.args_route.keys():
                for half, goes_there in zip(routed, self.args_route[name][i], strict=True):
                    if goes_there:
                        half[name] = arguments[name]
            pairs.append((partial(f, **routed[0]), partial(g, **routed[1])))
        return pairs


class SequentialSequence(_LayerPairs):
    """x <- x + f(x), x <- x + g(x), layer by layer.

    Args:
        layers: pairs of modules (f, g).
        args_route: keyword argument of `forward` -> for each layer, whether (f, g) get it.
    """

    def __init__(self, layers: Iterable[Iterable[nn.Module]], args_route: Routes | None = None) -> None:
        super().__init__(layers, args_route)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """x [B, N, C] -> [B, N, C]."""
        for f, g in self._pairs(kwargs):
            x = x + f(x)
            x = x + g(x)
        return x


class ReversibleSequence(_LayerPairs):
    """Reversible residual layers: the backward pass recomputes activations instead of storing them.

    Args:
        blocks: pairs of modules (f, g).
        args_route: keyword argument of `forward` -> for each layer, whether (f, g) get it.
    """

    def __init__(self, blocks: Iterable[Iterable[nn.Module]], args_route: Routes | None = None) -> None:
        super().__init__(blocks, args_route)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """x [B, N, C] -> [B, N, C], the mean of the two streams, which both start as x."""
        pairs = self._pairs(kwargs)
        if not torch.is_grad_enabled():
            x1 = x2 = x
            for f, g in pairs:
                x1 = x1 + f(x2)
                x2 = x2 + g(x1)
        else:
            x1, x2 = reversible(x, x, pairs, tuple(self.parameters()), random=self.training)
        return (x1 + x2) / 2
