"""Modules whose parameters wait for their values: a model that is loaded anyway need not draw them first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

_DRAWS = frozenset(
    ("normal_", "uniform_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_", "xavier_normal_", "xavier_uniform_",
     "orthogonal_", "sparse_")
)  # fmt: skip

_one_at_a_time = threading.RLock()  # torch's hooks and random state are those of all threads


@contextmanager
def unfilled() -> Iterator[None]:
    """Inside, this thread builds modules whose parameters have shapes and no values (torch's meta device).

    Buffers and whatever else a constructor computes are as always, so `load_state_dict(weights, assign=True)` completes
    the model, and memory is what the weights take. `torch.device("meta")` would empty those, too. Torch's random state
    is untouched.
    """
    here = threading.get_ident()

    def emptied(module: nn.Module, name: str, parameter: Tensor | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != here:
            return None
        return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)

    with _one_at_a_time, torch.random.fork_rng(devices=[]), _Undrawn():
        handle = register_module_parameter_registration_hook(emptied)  # type: ignore[arg-type]
        try:
            yield
        finally:
            handle.remove()


class _Undrawn(TorchFunctionMode):
    """Leaves out the drawing of what has no values: torch would import its compiler for it, which takes seconds."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")
        if getattr(func, "__name__", "") in _DRAWS and isinstance(tensor, Tensor) and tensor.is_meta:
            return tensor
        return func(*args, **kwargs)
