"""The directory of a zip file: which records it has and where their bytes lie. Nothing is unpacked to a disk.

A name like "../../x" is a key of a dict here and no path. zipfile would do for good files; it makes an object for every
entry before it can be asked how many there are.

Source: PKWARE's APPNOTE.TXT 6.3, sections 4.3 and 4.5.3.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle_fast.compat.nodes import Budget, Damaged

_END, _END64, _LOCATOR64, _ENTRY, _LOCAL = b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\1\2", b"PK\3\4"
_MOST_COMMENT = 1 << 16
_MOST_NAME = 1 << 10
_ENTRY_BYTES = 600  # of its object, estimated from above
_FULL, _FULL_SHORT = 0xFFFFFFFF, 0xFFFF
_STORED, _DEFLATED = 0, 8
_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Record:
    """Where the bytes of a file in the archive lie.

    Attributes: first: of its bytes.   packed: how many there are.   size: how many they unpack to.
    """

    first: int
    packed: int
    size: int
    deflated: bool


def records_of(buffer: mmap.mmap, budget: Budget) -> dict[str, Record]:
    """Name -> record.

    Raises: Damaged (no directory, one that contradicts the file, encryption, an unknown compression, a name twice).
    """
    n_bytes = len(buffer)
    try:
        position, end, n = _directory(buffer)
        records: dict[str, Record] = {}
        for _ in range(n):
            name, record, position = _entry(buffer, position)
            budget.spend(_ENTRY_BYTES + 4 * len(name))
            if name in records:
                raise Damaged(f"has two records of one name, {name[:80]!r}")
            if record.first + record.packed > n_bytes or (not record.deflated and record.packed != record.size):
                raise Damaged(f"has a record outside of its bytes, {name[:80]!r}")
            records[name] = record
    except struct.error:
        raise Damaged("has a directory that breaks off") from None
    if position > end:
        raise Damaged("has a directory longer than it says")
    return records


def inflated(buffer: mmap.mmap, record: Record) -> Tensor:
    """The bytes of a compressed record, uint8 [size].

    Raises: Damaged (they are more or fewer than it says).
    """
    whole = torch.empty(record.size, dtype=torch.uint8)
    target, written = whole.numpy().data, 0
    for piece in _pieces(buffer, record):
        if written + len(piece) > record.size:
            raise Damaged("has a record that unpacks to more than it says")
        target[written : written + len(piece)] = piece
        written += len(piece)
    if written != record.size:
        raise Damaged("has a record that unpacks to less than it says")
    return whole


def _pieces(buffer: mmap.mmap, record: Record) -> Iterator[bytes]:
    engine, last = zlib.decompressobj(-zlib.MAX_WBITS), record.first + record.packed
    try:
        for first in range(record.first, last, _AT_ONCE):
            pending = buffer[first : min(first + _AT_ONCE, last)]
            while pending and not engine.eof:
                yield engine.decompress(pending, _AT_ONCE)
                pending = engine.unconsumed_tail
        yield engine.flush()
    except zlib.error as error:
        raise Damaged(f"has a record that does not unpack ({error})") from None


def _directory(buffer: mmap.mmap) -> tuple[int, int, int]:
    """Where the directory begins and ends, and how many entries it has."""
    n_bytes = len(buffer)
    at = buffer.rfind(_END, max(0, n_bytes - _MOST_COMMENT - 22))
    if at < 0:
        raise Damaged("ends before the directory of its archive")
    n, size, first = struct.unpack_from("<10xHII", buffer, at)
    if at >= 20 and buffer[at - 20 : at - 16] == _LOCATOR64 and (n == _FULL_SHORT or _FULL in (size, first)):
        (at,) = struct.unpack_from("<8xQ", buffer, at - 20)
        if buffer[at : at + 4] != _END64:
            raise Damaged("has no directory where it says")
        n, size, first = struct.unpack_from("<32xQQQ", buffer, at)
    if first + size > at or n * 46 > size:
        raise Damaged("has a directory outside of its bytes")
    return first, first + size, n


def _entry(buffer: mmap.mmap, at: int) -> tuple[str, Record, int]:
    """The entry of the directory at a byte, and where the next one begins."""
    if buffer[at : at + 4] != _ENTRY:
        raise Damaged("has a directory with an entry that is none")
    flags, method, packed, size = struct.unpack_from("<8xHH8xII", buffer, at)
    n_name, n_extra, n_comment, local = struct.unpack_from("<28xHHH8xI", buffer, at)
    if n_name > _MOST_NAME or n_extra > _MOST_NAME:
        raise Damaged("has a record of a very long name, or of many fields")
    name = buffer[at + 46 : at + 46 + n_name].decode("utf-8", "replace")
    extra = buffer[at + 46 + n_name : at + 46 + n_name + n_extra]
    size, packed, local = _large(extra, [size, packed, local])
    if flags & 1 or method not in (_STORED, _DEFLATED):
        raise Damaged(f"has an encrypted record, or one of an unknown compression, {name[:80]!r}")
    if buffer[local : local + 4] != _LOCAL:
        raise Damaged(f"has no record where it says, {name[:80]!r}")
    n_local_name, n_local_extra = struct.unpack_from("<26xHH", buffer, local)
    record = Record(local + 30 + n_local_name + n_local_extra, packed, size, method == _DEFLATED)
    return name, record, at + 46 + n_name + n_extra + n_comment


def _large(extra: bytes, values: list[int]) -> list[int]:
    """Those of the values that need 64 bits, from the field that has them."""
    at = 0
    while at + 4 <= len(extra):
        kind, n = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            field = extra[at + 4 : at + 4 + n]
            for i, value in enumerate(values):
                if value == _FULL:
                    (values[i],) = struct.unpack_from("<Q", field)
                    field = field[8:]
            break
        at += 4 + n
    return values
