"""Rows of a batch that must not know of each other, on CPUs: each is computed alone, on one thread, several at a time.

oneDNN and MKL choose an algorithm, and with it the order of its sums, by the whole shape of a problem and by the number
of threads: in float32 a convolution of one picture differs from the same one in a batch, and with two threads from
three. Problems of one shape on one thread have one order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor, nn

_REDUCED = (torch.bfloat16, torch.float16)
_Module = TypeVar("_Module", bound=nn.Module)


def computed_alone(rows: Tensor) -> bool:
    """Whether these rows are computed alone: there are some, on a CPU, and no graph of the whole batch is traced."""
    return rows.device.type == "cpu" and len(rows) > 0 and not torch.compiler.is_compiling()


def each_alone(function: Callable[[int], Tensor], count: int) -> list[Tensor]:
    """[function(0), ..., function(count - 1)], each on one thread; as many of them at once as torch has threads.

    Gradients, inference mode and autocast are as in the calling thread. What `function` raises, this raises.
    """
    threads = torch.get_num_threads()
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    # A context manager keeps what it found: every row enters a copy.
    autocast = torch.autocast("cpu", torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu"))

    def run(row: int) -> Tensor:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad), copy.copy(autocast):
            return function(row)

    at_once = max(1, min(threads, count))
    try:
        with ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(run, range(count)))
    finally:
        # The setting of a worker is also that of threads yet to come.
        torch.set_num_threads(threads)


def in_float32(module: _Module) -> _Module:
    """A twin of `module` whose bfloat16 and float16 parameters are float32; the others, hooks and state are shared.

    Gradients reach the parameters of `module`. Few CPUs multiply 16-bit numbers; torch is slow on the others.
    """
    twin = copy.copy(module)
    state = twin.__dict__
    state["_parameters"] = {name: widened(parameter) for name, parameter in module._parameters.items()}
    state["_buffers"] = {name: widened(buffer) for name, buffer in module._buffers.items()}
    state["_modules"] = {name: child and in_float32(child) for name, child in module._modules.items()}
    return twin


def rounded(twin: nn.Module, x: Tensor) -> Tensor:
    """twin(x) of a twin in float32, in the dtype of a 16-bit x."""
    y: Tensor = twin(widened(x))
    return y.to(x.dtype) if x.dtype in _REDUCED else y


def widened(x: Tensor | None) -> Tensor | None:
    """x in float32 if it is bfloat16 or float16, else x itself."""
    return x.float() if x is not None and x.dtype in _REDUCED else x
