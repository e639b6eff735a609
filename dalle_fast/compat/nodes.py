"""What pickles become where they name classes that we do not build, and the words with which they are refused."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LONGEST_KEY = 1 << 10  # of a dict, a storage or a tensor: equal texts are compared wherever one is looked up
MOST_TEXT = 1 << 24  # of one string or bytes: a file of weights has its numbers in storages


class UnsafeFile(ValueError):
    """A file names something that no file of weights needs; it was not run."""


class UnreadableFile(ValueError):
    """A file is of another kind, damaged, or would be more than its bytes should be."""


class Damaged(Exception):
    """Why a pickle cannot be read: what follows "got one that"."""


class Refused(Exception):
    """The name of what a pickle asked for."""


@dataclass(frozen=True, eq=False)
class Reference:
    """A class or function that is only named."""

    name: str


@dataclass(frozen=True, eq=False, repr=False)
class Node:
    """An object of a class that we do not build: no behaviour.

    Attributes:
        name: of its class: "dall_e.encoder.Encoder", "__torch__.clip.model.CLIP".
        args: that it was made with.
        state: its attributes, mostly a dict; of a kind of dict or list, its items.
    """

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None

    def __repr__(self) -> str:
        return f"Node({self.name!r})"  # its state may be large, and lead back here


class Budget:
    """Bytes that objects may take, estimated from above."""

    def __init__(self, n_bytes: int) -> None:
        self.left = n_bytes

    def spend(self, n_bytes: int) -> None:
        """Raises: Damaged (all is spent)."""
        self.left -= n_bytes
        if self.left < 0:
            raise Damaged("builds far more objects than weights need")


@dataclass(frozen=True)
class Names:
    """What a pickle may name.

    Attributes:
        find: a name -> a value, or a `Reference` to what is called or stays a name. Raises Refused.
        call: of a reference with arguments; None: it makes a `Node`.
    """

    find: Callable[[str], Any]
    call: Callable[[str], Callable[[tuple[Any, ...], Budget], Any] | None]


def printable(text: str, most: int = 300) -> str:
    """A file's words as a sentence may say them: no control characters for the terminal, no pages."""
    shown = "".join(character if character.isprintable() else "?" for character in text[:most])
    return shown + ("..." if len(text) > most else "")


def shortened(value: object) -> str:
    """A file's value as a sentence may say it; its repr may have a million times its bytes."""
    return printable(reprlib.repr(value), 60)
