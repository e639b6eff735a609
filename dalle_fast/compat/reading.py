"""Files of weights, read without running anything that they hold.

`read` takes what torch.save wrote (zip and, before 1.6, the legacy container), TorchScript archives, Lightning's
checkpoints, and safetensors; a directory is only named, its format looks into it. Objects of unknown make come as
`Node`s: a name and what was stored. A file that names what no file of weights needs (`os.system`) is refused.

Memory: tensors are views of the mapped file where alignment, byte order and compression allow, and are copied once
where not; everything else is counted while it is built, and refused beyond a bound
(docs/decisions/0006-one-own-reader.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dalle_fast.compat.nodes import Node, Reference, UnreadableFile, UnsafeFile

_MOST_NAMES = 1 << 22  # characters of all names together, and 100 for every attribute

__all__ = ["Node", "Reference", "Stored", "UnreadableFile", "UnsafeFile", "read", "state_dict_of"]


@dataclass(frozen=True)
class Stored:
    """What a file or folder holds.

    Attributes:
        container: "zip", "legacy", "torchscript", "safetensors" or "directory".
        data: dict, list, tuple, set, str, bytes, int, float, complex, bool, None, Tensor, torch.dtype, torch.device,
            `Node`, `Reference` (a class that is only named). Of a directory: {}.
    """

    path: Path
    container: str
    data: Any


def read(path: str | Path) -> Stored:
    """What a file holds; nothing of it is run, nothing is written.

    Tensors are on the CPU, require no gradient, and share storages as they did when they were saved. Writing to one
    does not change the file.

    Raises: FileNotFoundError, UnsafeFile (it names what no file of weights needs), UnreadableFile (another kind of
        file, damaged, or more than its bytes should hold); both are ValueErrors.
    """
    from dalle_fast.compat import containers

    where = Path(path)
    if where.is_dir():
        return Stored(where, "directory", {})
    if not where.is_file():
        raise FileNotFoundError(f"read: path must be a file or directory of weights, got {where}, which is not there.")
    container, data = containers.open_file(where)
    return Stored(where, container, data)


def state_dict_of(data: Any) -> dict[str, Tensor]:
    """Name -> tensor of a flat dict of tensors, or of a module that was saved whole.

    A module is a `Node` whose state has `_parameters`, `_buffers` and `_modules`; one of TorchScript has its tensors
    and submodules as attributes. What is neither tensor nor module is left out, as are non-persistent buffers.

    Raises: ValueError (neither of them, or names that come to far more than weights have).
    """
    if isinstance(data, Mapping):
        if data and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in data.items()):
            return dict(data)
        raise ValueError("state_dict_of: data must map names to tensors, got a dict of something else.")
    if not isinstance(data, Node):
        raise ValueError(f"state_dict_of: data must be a dict or a module, got {type(data).__name__}.")
    return dict(_tensors_of(data))


def _tensors_of(root: Node) -> Iterator[tuple[str, Tensor]]:
    """Depth first; a module that is in several places has all its names, one inside itself is entered once."""
    todo: list[tuple[str, Node, tuple[int, ...]]] = [("", root, ())]
    left = _MOST_NAMES
    while todo:
        prefix, node, above = todo.pop()
        if id(node) in above or not isinstance(node.state, Mapping):
            continue
        children = []
        for name, value in _attributes(node.state):
            is_named = isinstance(value, Tensor | Node)
            left -= 100 + is_named * (len(prefix) + len(name))
            if left < 0:
                raise UnreadableFile("state_dict_of: the names of a module must be of weights, got far longer ones.")
            if isinstance(value, Tensor):
                yield prefix + name, value
            elif is_named:
                children.append((f"{prefix}{name}.", value, (*above, id(node))))
        todo += reversed(children)


def _attributes(state: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    groups = [state.get(group) for group in ("_parameters", "_buffers", "_modules")]
    found = [group for group in groups if isinstance(group, Mapping)]
    unsaved = state.get("_non_persistent_buffers_set")
    left_out = unsaved if isinstance(unsaved, set) else set()
    for group in found or [state]:
        yield from ((name, value) for name, value in group.items() if isinstance(name, str) and name not in left_out)
