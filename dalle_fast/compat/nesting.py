"""How deep data are nested, and how long written out: a few bytes of a pickle can mean 2 ** 100 values."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

from dalle_fast.compat.nodes import Damaged, Node

_DEEPEST = 256
_LONGEST = 1_000_000  # values
_TEXT = 32  # characters of a text that count as one value more
_WAY_BACK = 250  # values that a way back to a node counts as: it hides what a walk may meet again


def check_nesting(root: Any) -> None:
    """Refuses what a walk or a repr of the data could not come through.

    Nodes may lead back to themselves, as omegaconf's do to their parents: no repr enters them. Lists and dicts may not:
    through twenty that each hold the others lead 10 ** 18 ways.

    Raises: Damaged.
    """
    done: dict[int, tuple[int, int]] = {}
    entered = {id(root)}
    frames = [_Frame(root)]
    while frames:
        frame = frames[-1]
        child = next(frame.children, frame)
        if child is frame:
            frames.pop()
            done[id(frame.value)] = frame.depth, frame.size
            if frames:
                frames[-1].take(frame.depth, frame.size)
        elif not isinstance(child, _CONTAINERS):
            frame.size += 1 + (len(child) // _TEXT if isinstance(child, str | bytes) else 0)
        elif id(child) in done:
            frame.take(*done[id(child)])
        elif id(child) not in entered:
            entered.add(id(child))
            frames.append(_Frame(child))
        elif isinstance(child, Node):
            frame.size += _WAY_BACK
        else:
            raise Damaged("has a list or dict that contains itself")
        if len(frames) > _DEEPEST or frame.depth > _DEEPEST or frame.size > _LONGEST:
            raise Damaged("nests its data deeper, or repeats them more often, than weights need")


_CONTAINERS = (dict, list, tuple, set, frozenset, Node)


class _Frame:
    """A container on the way down: what is still to be seen in it, and what it has come to.

    Attributes: depth: levels in it, with its own.   size: values written out, keys too.
    """

    __slots__ = ("children", "depth", "size", "value")

    def __init__(self, value: Any) -> None:
        self.value, self.depth, self.size = value, 1, 1
        self.children: Iterator[Any] = iter(())
        if isinstance(value, Node):
            self.children = iter((value.args, value.state))
        elif isinstance(value, dict):
            self.children = chain(value, value.values())
        elif isinstance(value, list | tuple | set | frozenset):
            self.children = iter(value)

    def take(self, depth: int, size: int) -> None:
        self.depth, self.size = max(self.depth, depth + 1), self.size + size
