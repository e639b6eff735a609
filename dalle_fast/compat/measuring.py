"""How much is in a file or directory: its tensors, each once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from dalle_fast.compat.reading import Node, Stored, read

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl")


def tensors_in(stored: Stored) -> list[Tensor]:
    """Every tensor of a file, or of the files of weights in a directory; tied ones once.

    Raises: ValueError (a file of the directory that cannot be read).
    """
    if stored.container != "directory":
        return list(_different(_tensors(stored.data)))
    paths = sorted(path for path in stored.path.rglob("*") if path.is_file() and path.suffix in _SUFFIXES)
    return [tensor for path in paths for tensor in tensors_in(read(path))]


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
