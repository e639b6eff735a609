"""Which layout a file is of, and what the nearest one is where it is of none."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dalle_fast.compat.formats import Format, known_formats
from dalle_fast.compat.nodes import printable
from dalle_fast.compat.reading import Node, Stored, state_dict_of
from dalle_fast.models.state_dicts import some

# Where trainers put the state dict.
_INSIDE = ("state_dict", "weights", "module", "model", "ema", "model_state_dict")
_DEEPEST = 3  # of dicts in dicts
_PREFIX = "module."


class UnknownLayout(ValueError):
    """A file was read and is of no layout that we know."""


def recognise(stored: Stored) -> Format:
    """The layout of a file or directory.

    Raises: UnknownLayout (its first unmatched keys and the nearest known layout).
    """
    for known in known_formats():
        if known.matches(stored):
            return known
    raise UnknownLayout(_told(stored))


def keys_of(data: Any) -> list[str]:
    """Names of the tensors in a file, of the state dict where there are several dicts; its other keys where none."""
    tensors = list(weights_of(data))
    if tensors or not isinstance(data, Mapping):
        return tensors
    return [str(key) for key in data if isinstance(key, str | int)]


def pattern_of(key: str) -> str:
    """A key with every number replaced by N, without the prefix of a parallel training."""
    return re.sub(r"(?<![A-Za-z0-9_])\d+(?![A-Za-z0-9_])", "N", key.removeprefix(_PREFIX))


def nearest(keys: list[str]) -> tuple[Format | None, list[str]]:
    """The layout that has most of these keys, None where none has any; and the keys that it has not."""
    patterns = {key: pattern_of(key) for key in keys}

    def shared(known: Format) -> int:
        return sum(pattern in known.keys for pattern in patterns.values())

    best = max(known_formats(), key=shared, default=None)
    if best is None or not shared(best):
        return None, keys
    return best, [key for key, pattern in patterns.items() if pattern not in best.keys]


def weights_of(data: Any) -> dict[str, Tensor]:
    """The state dict in a file's data, wherever trainers put it; empty where there is none."""
    for _ in range(_DEEPEST):
        if isinstance(data, Node):
            return state_dict_of(data)
        if not isinstance(data, Mapping):
            break
        inner = next((data[name] for name in _INSIDE if isinstance(data.get(name), Mapping | Node)), None)
        if inner is None:
            return {key: value for key, value in data.items() if isinstance(key, str) and isinstance(value, Tensor)}
        data = inner
    return {}


def _told(stored: Stored) -> str:
    if stored.container == "directory":
        names = sorted(entry.name for entry in stored.path.iterdir())
        return (
            f"read: {stored.path} must be a directory of weights that we know, got one with {some(names)}. Name the "
            "file of weights in it."
        )
    keys = keys_of(stored.data)
    if not keys:
        return (
            f"read: {stored.path} must hold tensors by name, got {type(stored.data).__name__} without any. Save the "
            "model's state dict."
        )
    known, unmatched = nearest(keys)
    unmatched = [printable(key, 120) for key in unmatched]
    if known is None:
        begun = f"none of its {len(keys)} keys is of a layout that we know: {some(unmatched)}"
    elif unmatched:
        begun = f"the nearest layout is {known.name}, which has no {some(unmatched)}"
    else:
        begun = (
            f"the nearest layout is {known.name}; all {len(keys)} keys are of it, and others or their shapes are not"
        )
    return (
        f"read: {stored.path} must be of a layout that we know, got another: {begun}. docs/old-weights.md lists them."
    )
