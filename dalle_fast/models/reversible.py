"""Reversible residual blocks: activations are recomputed from the output in the backward pass instead of stored.

    y1 = x1 + f(x2)   y2 = x2 + g(y1)        x2 = y2 - g(y1)   x1 = y1 - f(x2)

Memory is that of one block, whatever the depth, for one more forward pass of work.

Source: RevNet (arXiv 1707.04585); the original's ReversibleSequence, whose backward failed in eval mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Half = Callable[[Tensor], Tensor]
RngState = tuple[Tensor, Tensor | None]  # of the CPU, and of the device where it is a GPU


def reversible(
    x1: Tensor, x2: Tensor, blocks: Sequence[tuple[Half, Half]], parameters: Sequence[nn.Parameter], *, random: bool
) -> tuple[Tensor, Tensor]:
    """Runs the blocks (f, g) one after the other.

    Args:
        x1, x2: [B, N, C].
        parameters: every parameter the blocks use, each once; their gradients are returned.
        random: whether f or g draw random numbers (dropout), which the backward pass must draw again.
    Returns: (y1, y2), each [B, N, C].
    """
    return _Reversible.apply(x1, x2, blocks, tuple(parameters), random, *parameters)


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x1: Tensor,
        x2: Tensor,
        blocks: Sequence[tuple[Half, Half]],
        parameters: tuple[nn.Parameter, ...],
        random: bool,
        *_: nn.Parameter,
    ) -> tuple[Tensor, Tensor]:
        ctx.blocks, ctx.parameters = blocks, parameters
        ctx.autocast = _autocast_state(x1.device.type)
        ctx.states = []
        for f, g in blocks:
            before_f = _rng_state(x1.device) if random else None
            x1 = x1 + f(x2)
            before_g = _rng_state(x1.device) if random else None
            x2 = x2 + g(x1)
            ctx.states.append((before_f, before_g))
        ctx.save_for_backward(x1.detach(), x2.detach())
        return x1, x2

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        dy1, dy2 = d_outputs
        y1, y2 = ctx.saved_tensors
        totals: dict[nn.Parameter, Tensor] = {}
        with ctx.autocast():
            for (f, g), (before_f, before_g) in zip(reversed(ctx.blocks), reversed(ctx.states), strict=True):
                x2, dx1 = _undo(g, y1, y2, dy1, dy2, ctx.parameters, totals, before_g)
                x1, dx2 = _undo(f, x2, y1, dy2, dx1, ctx.parameters, totals, before_f)
                y1, y2, dy1, dy2 = x1, x2, dx1, dx2
        return dy1, dy2, None, None, None, *(totals.get(p) for p in ctx.parameters)


def _undo(
    half: Half,
    source: Tensor,
    target: Tensor,
    d_source: Tensor,
    d_target: Tensor,
    parameters: Sequence[nn.Parameter],
    totals: dict[nn.Parameter, Tensor],
    state: RngState | None,
) -> tuple[Tensor, Tensor]:
    """Undoes target = other + half(source): returns other and the gradient of source, adds parameter gradients."""
    wanted = [p for p in parameters if p.requires_grad]
    with torch.enable_grad(), _replayed(state, source.device):
        source = source.detach().requires_grad_()
        out = half(source)
    gradients = torch.autograd.grad(out, (source, *wanted), d_target.to(out.dtype), allow_unused=True)
    for parameter, gradient in zip(wanted, gradients[1:], strict=True):
        if gradient is not None:
            totals[parameter] = totals[parameter] + gradient if parameter in totals else gradient
    return target - out.detach(), d_source + gradients[0]


def _rng_state(device: torch.device) -> RngState:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def _replayed(state: RngState | None, device: torch.device) -> Iterator[None]:
    """Draws again what was drawn from `state` on, leaving the generators as they are."""
    if state is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
        yield


def _autocast_state(device_type: str) -> Callable[[], torch.autocast]:
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype=dtype, enabled=enabled)
