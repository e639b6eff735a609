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
    weights: list[Tensor] = []
    others: list[Tensor] = []
    for part in _files_of(stored):
        held = list(_different(iter(weights_of(part.data).values())))
        every = list(_different(chain(held, _tensors(part.data))))
        weights += held
        others += every[len(held) :]
    return (weights, others) if weights else (others, [])


def _files_of(stored: Stored) -> Iterator[Stored]:
    if stored.container != "directory":
        yield stored
        return
    for path in sorted(stored.path.rglob("*")):
        if path.is_file() and path.suffix in _SUFFIXES:
            yield read(path)


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
