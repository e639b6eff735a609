"""How much is in a file or directory: its tensors, tied ones once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from torch import Tensor

from dalle_fast.compat.formats.recognise import weights_of
from dalle_fast.compat.reading import Node, Stored, read

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl")


def tensors_in(stored: Stored) -> tuple[list[Tensor], list[Tensor]]:
    """The weights of a file, or of the files of weights in a directory; and the other tensors, of a trainer's state.

    Raises: ValueError (a file of the directory that cannot be read).
    """
    if stored.container != "directory":
        weights = list(_different(iter(weights_of(stored.data).values())))
        every = list(_different(chain(weights, _tensors(stored.data))))
        return (weights, every[len(weights) :]) if weights else (every, [])
    paths = sorted(path for path in stored.path.rglob("*") if path.is_file() and path.suffix in _SUFFIXES)
    parts = [tensors_in(read(path)) for path in paths]
    return [tensor for weights, _ in parts for tensor in weights], [tensor for _, more in parts for tensor in more]


def _different(tensors: Iterator[Tensor]) -> Iterator[Tensor]:
    seen = set()
    for tensor in tensors:
        identity = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else id(tensor)
        if identity not in seen:
            seen.add(identity)
            yield tensor


def _tensors(data: Any) -> Iterator[Tensor]:
    """Data that lead back to themselves are entered once."""
    todo, entered = [data], set()
    while todo:
        value = todo.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping | list | tuple | set | frozenset | Node) and id(value) not in entered:
            entered.add(id(value))
            if isinstance(value, Node):
                todo += [value.args, value.state]
            else:
                todo += list(value.values()) if isinstance(value, Mapping) else list(value)
