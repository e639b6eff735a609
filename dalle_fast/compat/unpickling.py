"""Pickles read as data: a machine for their opcodes that calls no function of theirs and counts what it builds.

Pickle is a program for a stack machine. The standard library's runs any function a file names, and asks for memory as
the file says; this one knows the same opcodes, but what a file names is looked up in `allowed.py`: there it is a
builder of tensors and plain values, or a name that stays a name (`Reference`), or the file is refused. REDUCE, NEWOBJ,
INST and OBJ on a name make a `Node`, BUILD stores a state; neither does anything else.

Source of the opcodes: the standard library's pickletools documents every one of them.
"""

from __future__ import annotations

import codecs
import mmap
import struct
from collections.abc import Callable, Mapping
from typing import Any

from dalle_fast.compat.nodes import LONGEST_KEY, MOST_TEXT, Budget, Damaged, Names, Node, Reference

_MOST_LINE = 1 << 16
_MOST_INTEGER = 1 << 10
_MOST_NAME = 1 << 10
_LARGEST_INT_KEY = 1 << 60  # up to here no two integers have one hash
_MOST_OPCODES = 20_000_000
_PROTOCOL = 5
_CONTAINER_BYTES = 260  # of an empty one, and of its note in `nesting.py`
_STORAGE_BYTES = 1200  # of an object, its values apart


def unpickle(
    buffer: bytes | mmap.mmap,
    start: int,
    end: int,
    *,
    names: Names,
    persistent: Callable[[Any], Any],
    budget: Budget,
) -> tuple[Any, int]:
    """What the pickle at `start` holds, and where it ends.

    Args: end: of the bytes that it may take.   persistent: what an object outside of it is, by its id.
    Raises: Damaged, Refused.
    """
    machine = _Machine(buffer, start, end, names, persistent, budget)
    try:
        return machine.run(), machine.position
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, RuntimeError, struct.error) as error:
        # An opcode that finds on the stack what it cannot take; RuntimeError: of torch, for a tensor.
        reason = str(error).partition("\n")[0]
        raise Damaged(
            f"breaks off at byte {machine.position} of its pickle ({type(error).__name__}: {reason})"
        ) from None


class _Machine:
    """The stack, the marked stacks below it, and the memo."""

    def __init__(
        self,
        buffer: bytes | mmap.mmap,
        start: int,
        end: int,
        names: Names,
        persistent: Callable[[Any], Any],
        budget: Budget,
    ) -> None:
        self.buffer, self.position, self.end = buffer, start, end
        self.names, self.persistent, self.budget = names, persistent, budget
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(_MOST_OPCODES):
            opcode = self.take(1)[0]
            if opcode == _STOP:
                return self.stack.pop()
            action = _ACTIONS.get(opcode)
            if action is None:
                raise Damaged(f"has an opcode {opcode:#04x} in its pickle, which weights do not need")
            action(self)
        raise Damaged("has a pickle of too many opcodes")

    # ---------------------------------------------------------------------------------------------------- the bytes

    def take(self, n: int) -> bytes:
        first, last = self.position, self.position + n
        if last > self.end:
            raise Damaged("ends in the middle of its pickle")
        self.position = last
        return self.buffer[first:last]

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def line(self) -> bytes:
        last = self.buffer.find(b"\n", self.position, min(self.end, self.position + _MOST_LINE))
        if last < 0:
            raise Damaged("has a line without an end in its pickle")
        self.budget.spend(last - self.position)
        line = self.take(last - self.position)
        self.position += 1
        return line

    def block(self, form: str) -> bytes:
        """Bytes behind their number."""
        n = self.number(form)
        if not 0 <= n <= MOST_TEXT:
            raise Damaged(f"has a text of {n} bytes in its pickle")
        self.budget.spend(n + 64)
        return self.take(n)

    # --------------------------------------------------------------------------------------------------- the stack

    def push(self, value: Any, n_bytes: int = 0) -> None:
        self.budget.spend(8 + n_bytes)
        self.stack.append(value)

    def marked(self) -> list[Any]:
        """The stack above the last mark; from now on the one below it is the stack."""
        items = self.stack
        self.stack = self.below.pop()
        return items

    def push_text(self, data: bytes) -> None:
        """Python 2 wrote names as bytes, mostly of ASCII."""
        if not data.isascii():
            self.budget.spend(4 * len(data))
        try:
            self.push(data.decode("utf-8", "surrogatepass"), 64)
        except UnicodeDecodeError:
            self.push(data.decode("latin-1"), 64)

    def push_text_line(self) -> None:
        line = self.line()
        self.push(line.decode("raw-unicode-escape"), 64 + 4 * len(line))

    def push_integer(self, n: int) -> None:
        if not 0 <= n <= _MOST_INTEGER:
            raise Damaged(f"has an integer of {n} bytes in its pickle")
        self.push(int.from_bytes(self.take(n), "little", signed=True), 32 + n)

    def push_line_integer(self, line: bytes) -> None:
        if len(line) > _MOST_INTEGER:
            raise Damaged("has a very long integer in its pickle")
        self.push({b"00": False, b"01": True}.get(line) if line in (b"00", b"01") else int(line.rstrip(b"L")), 64)

    def push_tuple(self, n: int) -> None:
        items = tuple(self.stack[len(self.stack) - n :])
        if len(items) < n:
            raise IndexError("an empty stack")
        del self.stack[len(self.stack) - n :]
        self.push(items, _CONTAINER_BYTES + 8 * n)

    def push_marked_tuple(self) -> None:
        items = tuple(self.marked())
        self.push(items, _CONTAINER_BYTES + 8 * len(items))

    def push_marked_list(self) -> None:
        items = self.marked()
        self.push(items, _CONTAINER_BYTES + 16 * len(items))

    def remember(self, key: int) -> None:
        self.budget.spend(0 if key in self.memo else 140)
        self.memo[key] = self.stack[-1]

    # ------------------------------------------------------------------------------------------- lists, dicts, sets

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        self.budget.spend(16 * len(items))
        if isinstance(target, Node):
            if target.state is None:
                object.__setattr__(target, "state", [])
            target = target.state
        if not isinstance(target, list):
            raise TypeError(f"items for a {type(target).__name__}")
        target.extend(items)

    def update(self, items: list[Any]) -> None:
        """The dict on the stack with further keys and values."""
        target = self.stack[-1]
        if isinstance(target, Node):
            if target.state is None:
                object.__setattr__(target, "state", {})
            target = target.state
        if not isinstance(target, dict) or len(items) % 2:
            raise TypeError(f"keys for a {type(target).__name__}")
        self.budget.spend(52 * len(items))
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[checked_key(key)] = value

    def push_dict(self, items: list[Any]) -> None:
        self.push({}, _CONTAINER_BYTES)
        self.update(items)

    def add(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, set):
            raise TypeError(f"members for a {type(target).__name__}")
        self.budget.spend(100 * len(items))
        target.update(map(checked_key, items))

    def push_frozenset(self, items: list[Any]) -> None:
        self.push(frozenset(map(checked_key, items)), 2 * _CONTAINER_BYTES + 100 * len(items))

    # --------------------------------------------------------------------------------------------- names and objects

    def push_named(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("a name that is no text")
        if len(module) + len(name) > _MOST_NAME:
            raise Damaged("has a very long name of a class in its pickle")
        self.push(self.names.find(f"{module}.{name}"), 200 + 4 * (len(module) + len(name)))

    def push_object(self, what: object, args: object) -> None:
        """What a call makes: by one of our builders, or a node."""
        if not isinstance(what, Reference) or not isinstance(args, tuple):
            raise TypeError(f"a call of a {type(what).__name__}")
        build = self.names.call(what.name)
        self.budget.spend(2 * _CONTAINER_BYTES + 8 * len(args))
        self.push(Node(what.name, args) if build is None else build(args, self.budget))

    def push_new(self) -> None:
        args = self.stack.pop()
        self.push_object(self.stack.pop(), args)

    def push_new_with_keywords(self) -> None:
        keywords, args = self.stack.pop(), self.stack.pop()
        if not isinstance(args, tuple) or not isinstance(keywords, dict):
            raise TypeError("arguments that are none")
        self.push_object(self.stack.pop(), (*args, keywords) if keywords else args)

    def push_instance(self) -> None:
        """INST: the name in the stream, arguments since the mark."""
        module, name = self.line().decode(), self.line().decode()
        items = self.marked()
        self.push_named(module, name)
        self.push_object(self.stack.pop(), tuple(items))

    def push_object_of_mark(self) -> None:
        """OBJ: the class and its arguments since the mark."""
        what, *args = self.marked()
        self.push_object(what, tuple(args))

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Node):
            self.budget.spend(_CONTAINER_BYTES)
            if isinstance(target.state, Mapping) and isinstance(state, Mapping):
                self.budget.spend(104 * (len(target.state) + len(state)))
            object.__setattr__(target, "state", _joined(target.state, state))
        elif target is None or isinstance(target, bool | int | float | str | bytes | tuple | Reference):
            raise TypeError(f"a state for a {type(target).__name__}")
        # What else a dict, a set or a tensor was given as attributes (a state dict's _metadata) says nothing about it.

    def push_global_of_stack(self) -> None:
        name = self.stack.pop()
        self.push_named(self.stack.pop(), name)

    def check_protocol(self) -> None:
        if (protocol := self.take(1)[0]) > _PROTOCOL:
            raise Damaged(f"has a pickle of protocol {protocol}, newer than {_PROTOCOL}")

    def skip_frame(self) -> None:
        self.take(8)

    def push_mark(self) -> None:
        self.budget.spend(_CONTAINER_BYTES)
        self.below.append(self.stack)
        self.stack = []

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.stack = self.below.pop()


def checked_key(key: Any) -> Any:
    """A key of a dict or member of a set, if hashing it is quick and tells it from others.

    Raises: Damaged, TypeError.
    """
    parts = key if type(key) is tuple and len(key) <= 16 else (key,)
    for part in parts:
        if (
            type(part) in (tuple, frozenset, complex)  # of which many have one hash
            or (type(part) is int and abs(part) >= _LARGEST_INT_KEY)
            or (type(part) in (str, bytes) and len(part) > LONGEST_KEY)
        ):
            raise Damaged(f"has a key of a dict that weights do not need, a {type(part).__name__}")
    hash(key)
    return key


def _joined(items: Any, state: Any) -> Any:
    """What a node keeps where it has items, being a kind of dict or list, and attributes."""
    if items is None:
        return state
    if isinstance(items, Mapping) and isinstance(state, Mapping):
        return {**items, **state}
    return (items, state)


def _unescaped(line: bytes) -> bytes:
    """The bytes of a Python 2 string literal."""
    if len(line) < 2 or line[:1] not in (b"'", b'"') or line[-1:] != line[:1]:
        raise Damaged("has a text without quotes in its pickle")
    return codecs.escape_decode(line[1:-1])[0]


_STOP = ord(".")
_ACTIONS: dict[int, Callable[[_Machine], None]] = {
    ord("("): _Machine.push_mark,
    ord("0"): _Machine.pop,
    ord("1"): lambda m: m.marked().clear(),
    ord("2"): lambda m: m.push(m.stack[-1]),
    # values
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("I"): lambda m: m.push_line_integer(m.line()),
    ord("L"): lambda m: m.push_line_integer(m.line()),
    ord("F"): lambda m: m.push(float(m.line()), 32),
    ord("J"): lambda m: m.push(m.number("<i"), 40),
    ord("K"): lambda m: m.push(m.take(1)[0]),
    ord("M"): lambda m: m.push(m.number("<H"), 40),
    0x8A: lambda m: m.push_integer(m.take(1)[0]),
    0x8B: lambda m: m.push_integer(m.number("<i")),
    ord("G"): lambda m: m.push(struct.unpack(">d", m.take(8))[0], 32),
    ord("S"): lambda m: m.push_text(_unescaped(m.line())),
    ord("V"): _Machine.push_text_line,
    ord("T"): lambda m: m.push_text(m.block("<i")),
    ord("U"): lambda m: m.push_text(m.block("<B")),
    ord("X"): lambda m: m.push_text(m.block("<I")),
    0x8C: lambda m: m.push_text(m.block("<B")),
    0x8D: lambda m: m.push_text(m.block("<Q")),
    ord("B"): lambda m: m.push(m.block("<I")),
    ord("C"): lambda m: m.push(m.block("<B")),
    0x8E: lambda m: m.push(m.block("<Q")),
    0x96: lambda m: m.push(m.block("<Q")),
    # containers
    ord(")"): lambda m: m.push(()),
    0x85: lambda m: m.push_tuple(1),
    0x86: lambda m: m.push_tuple(2),
    0x87: lambda m: m.push_tuple(3),
    ord("t"): _Machine.push_marked_tuple,
    ord("]"): lambda m: m.push([], _CONTAINER_BYTES),
    ord("l"): _Machine.push_marked_list,
    ord("a"): lambda m: m.extend([m.stack.pop()]),
    ord("e"): lambda m: m.extend(m.marked()),
    ord("}"): lambda m: m.push({}, _CONTAINER_BYTES),
    ord("d"): lambda m: m.push_dict(m.marked()),
    ord("s"): lambda m: m.update([m.stack.pop(-2), m.stack.pop()]),
    ord("u"): lambda m: m.update(m.marked()),
    0x8F: lambda m: m.push(set(), 2 * _CONTAINER_BYTES),
    0x90: lambda m: m.add(m.marked()),
    0x91: lambda m: m.push_frozenset(m.marked()),
    # names and objects
    ord("c"): lambda m: m.push_named(m.line().decode(), m.line().decode()),
    0x93: _Machine.push_global_of_stack,
    ord("R"): _Machine.push_new,
    0x81: _Machine.push_new,
    0x92: _Machine.push_new_with_keywords,
    ord("i"): _Machine.push_instance,
    ord("o"): _Machine.push_object_of_mark,
    ord("b"): _Machine.build,
    ord("Q"): lambda m: m.push(m.persistent(m.stack.pop()), _STORAGE_BYTES),
    # the memo
    ord("p"): lambda m: m.remember(int(m.line()[:20])),
    ord("q"): lambda m: m.remember(m.take(1)[0]),
    ord("r"): lambda m: m.remember(m.number("<I")),
    0x94: lambda m: m.remember(len(m.memo)),
    ord("g"): lambda m: m.push(m.memo[int(m.line()[:20])]),
    ord("h"): lambda m: m.push(m.memo[m.take(1)[0]]),
    ord("j"): lambda m: m.push(m.memo[m.number("<I")]),
    # the stream
    0x80: _Machine.check_protocol,
    0x95: _Machine.skip_frame,
}
