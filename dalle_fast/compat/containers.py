"""The containers that weights come in, and where the bytes of their storages lie.

    zip          torch.save since 1.6: <name>/data.pkl, <name>/data/<key>, <name>/byteorder
    torchscript  torch.jit.save: the same, with <name>/constants.pkl and <name>/code/, which is never looked at
    legacy       torch.save before: pickles of a magic number, a version, the machine, the data and the storages' keys;
                 then for every storage the number of its values and its bytes
    safetensors  by the safetensors library

The file is mapped privately: a storage is a view of the map where it may be one, and is read once where not.
"""

from __future__ import annotations

import mmap
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dalle_fast.compat.allowed import NAMES, Storage, StorageType
from dalle_fast.compat.archives import Record, inflated, records_of
from dalle_fast.compat.nesting import check_nesting
from dalle_fast.compat.nodes import (
    LONGEST_KEY,
    Budget,
    Damaged,
    Reference,
    Refused,
    UnreadableFile,
    UnsafeFile,
    printable,
)
from dalle_fast.compat.unpickling import unpickle

_MOST_OBJECTS = 112 << 20  # bytes of what is not in storages
_MOST_COPIED = 64 << 20  # more than the file's own bytes
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY = re.compile(rb"\x80.(?:\x95.{8})?\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19", re.DOTALL)
_MOST_HEADER = 4 << 20  # of safetensors, JSON
# What people take for weights: how it begins -> what it is and what to do.
_OTHERS = (
    (rb"version https://git-lfs", "a pointer of git-lfs in its place. Run `git lfs pull` where it came from."),
    (rb"(?i)\s*<(!doctype|html)", "a web page. Download the file itself."),
    (rb"\x1f\x8b", "a gzip archive. Unpack it and name the file of weights in it."),
    (rb".{257}ustar", "a tar archive. Unpack it and name a file in it; if torch 0.1 wrote it, save it again."),
    (rb"\x89HDF", "an HDF5 file, of Keras maybe. It holds no model that we know."),
    (rb"GGUF", "a GGUF file. It holds no model that we know."),
    (rb"\x80[\x00-\x05]", "a pickle that torch did not save. Save the state dict with torch.save or as safetensors."),
)  # fmt: skip


def open_file(path: Path) -> tuple[str, Any]:
    """The container and the data of a file.

    Raises: UnsafeFile, UnreadableFile, OSError.
    """
    try:
        with path.open("rb") as file:
            container, data = _opened(path, file.fileno())
        check_nesting(data)
    except Refused as error:
        raise UnsafeFile(
            f"read: {path} must hold weights alone, got a file that asks for {printable(str(error))}. Nothing of it "
            "was run. If you trust who made it, have them save its state dict."
        ) from None
    except Damaged as error:
        raise UnreadableFile(
            f"read: {path} must be a whole file of weights, got one that {printable(str(error))}. Copy it again; it "
            "may be damaged or made to harm."
        ) from None
    except MemoryError:
        raise UnreadableFile(
            f"read: {path} must fit in memory, got more than there is. Close other programs."
        ) from None
    return container, data


def _opened(path: Path, descriptor: int) -> tuple[str, Any]:
    if not os.fstat(descriptor).st_size:
        raise UnreadableFile(f"read: {path} must be a file of weights, got an empty one. Copy it again.")
    # Copy on write: torch takes the map as writable, and nothing reaches the file.
    buffer = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    head = buffer[:512]
    if head.startswith(b"PK\3\4"):
        return _Zip(buffer, descriptor, path).read()
    if _LEGACY.match(head):
        return "legacy", _Legacy(buffer, descriptor).read()
    if len(buffer) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= len(buffer) - 8:
        return "safetensors", _safetensors(path, int.from_bytes(head[:8], "little"))
    found = next((told for begin, told in _OTHERS if re.match(begin, head, re.DOTALL)), None)
    if found is None:
        found = "something else. Name a .pt, .pth, .ckpt, .bin or .safetensors file."
    raise UnreadableFile(f"read: {path} must be a file of weights, got {found}")


class _Bytes:
    """The bytes of a file, as tensors."""

    def __init__(self, buffer: mmap.mmap, descriptor: int) -> None:
        self.buffer, self.descriptor = buffer, descriptor
        self.budget = Budget(_MOST_OBJECTS)
        self._may_copy = len(buffer) + _MOST_COPIED

    def tensor(self, first: int, n_bytes: int, dtype: torch.dtype, *, swapped: bool = False) -> Tensor:
        """A storage [n_bytes / itemsize]: a view of the map where its place and byte order allow it."""
        if not swapped and first % max(dtype.itemsize, 8) == 0:
            if not n_bytes:
                return torch.empty(0, dtype=dtype)
            # A storage each, no part of one: what shares a storage is saved as a whole by some, and once by others.
            return torch.frombuffer(self.buffer, dtype=dtype, count=n_bytes // dtype.itemsize, offset=first)
        self.count_copy(n_bytes)
        copied = torch.empty(n_bytes, dtype=torch.uint8)
        target, done = copied.numpy().data, 0
        while done < n_bytes:  # from the file, not the map: its pages would count twice
            n = os.preadv(self.descriptor, [target[done : done + (1 << 28)]], first + done)
            if n == 0:
                raise Damaged("became shorter while it was read")
            done += n
        return _swapped(copied, dtype) if swapped else copied.view(dtype)

    def count_copy(self, n_bytes: int) -> None:
        """Raises: Damaged (all copies together are far more than the file)."""
        self._may_copy -= n_bytes
        if self._may_copy < 0:
            raise Damaged("unpacks to far more than its bytes")


class _Zip(_Bytes):
    """An archive of torch.save or torch.jit.save."""

    def __init__(self, buffer: mmap.mmap, descriptor: int, path: Path) -> None:
        super().__init__(buffer, descriptor)
        self.path = path
        self.records = records_of(buffer, self.budget)
        self.storages: dict[tuple[str, torch.dtype], Storage] = {}
        roots = [name[: -len("data.pkl")] for name in self.records if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(roots) != 1:
            names = printable(", ".join(sorted(self.records)[:4])) or "nothing"
            raise UnreadableFile(
                f"read: {path} must be an archive of torch.save, got a zip file of other things ({names}). "
                "Unpack it and name the file of weights in it."
            )
        self.root = roots[0]
        order = self.records.get(f"{self.root}byteorder")
        self.swapped = order is not None and self.bytes_of(order).strip() not in (b"", sys.byteorder.encode())

    def read(self) -> tuple[str, Any]:
        record = self.records[f"{self.root}data.pkl"]
        buffer: bytes | mmap.mmap = self.buffer
        first, last = record.first, record.first + record.packed
        if record.deflated:
            buffer, first, last = self.bytes_of(record), 0, record.size
        data, _ = unpickle(buffer, first, last, names=NAMES, persistent=self.persistent, budget=self.budget)
        return ("torchscript" if f"{self.root}constants.pkl" in self.records else "zip"), data

    def bytes_of(self, record: Record) -> bytes:
        self.count_copy(2 * record.size)
        if record.deflated:
            return inflated(self.buffer, record).numpy().tobytes()
        return self.buffer[record.first : record.first + record.size]

    def persistent(self, pid: Any) -> Storage:
        """("storage", class of storages, key, device, number of values)."""
        dtype, key, n = _checked_pid(pid)
        if (key, dtype) not in self.storages:
            record = self.records.get(f"{self.root}data/{key}")
            n_bytes = n * dtype.itemsize
            if record is None or record.size < n_bytes:
                raise Damaged(f"has no {n_bytes} bytes of a storage {key[:40]!r}")
            self.storages[key, dtype] = Storage(self.storage(record, n_bytes, dtype))
        return self.storages[key, dtype]

    def storage(self, record: Record, n_bytes: int, dtype: torch.dtype) -> Tensor:
        if not record.deflated:
            return self.tensor(record.first, n_bytes, dtype, swapped=self.swapped)
        self.count_copy(record.size)
        flat = inflated(self.buffer, record)[:n_bytes]
        return _swapped(flat, dtype) if self.swapped else flat.view(dtype)


class _Legacy(_Bytes):
    """Pickles one behind the other, then storages. Where these lie is known when the pickles have been read."""

    def read(self) -> Any:
        position, header = 0, []
        for _ in range(3):
            value, position = self.unpickled(position, _no_storage, self.budget)
            header.append(value)
        if header[0] != _LEGACY_MAGIC or header[1] != 1001:
            raise Damaged("is of an unknown version of torch.save")
        noted: dict[str, Tensor] = {}
        # The data are read twice, and exist once at a time.
        after = self.unpickled(position, self.without_bytes(noted), Budget(self.budget.left))[1]
        keys, end = self.unpickled(after, _no_storage, self.budget)
        if not isinstance(keys, list) or not all(isinstance(key, str) and key in noted for key in keys):
            raise Damaged("lists storages that it does not have")
        storages = {}
        for key in keys:
            self.budget.spend(1000)
            dtype, n = noted[key].dtype, noted[key].numel()
            if int.from_bytes(self.buffer[end : end + 8], "little") != n or end + 8 + n * dtype.itemsize > len(
                self.buffer
            ):
                raise Damaged(f"ends before its storage {key[:40]!r}, or has one of another size")
            storages[key] = self.tensor(end + 8, n * dtype.itemsize, dtype, swapped=sys.byteorder == "big")
            end += 8 + n * dtype.itemsize
        data, _ = self.unpickled(position, _persistent(lambda key, dtype, n: storages[key]), self.budget)
        return data

    def unpickled(self, position: int, persistent: Callable[[Any], Any], budget: Budget) -> tuple[Any, int]:
        return unpickle(self.buffer, position, len(self.buffer), names=NAMES, persistent=persistent, budget=budget)

    def without_bytes(self, noted: dict[str, Tensor]) -> Callable[[Any], Any]:
        """Storages without bytes, which are written down."""

        def flat(key: str, dtype: torch.dtype, n: int) -> Tensor:
            if n * dtype.itemsize > len(self.buffer):
                raise Damaged(f"has a storage of {n} values, more than its bytes hold")
            if key not in noted:
                noted[key] = torch.empty(n, dtype=dtype, device="meta")
            if (noted[key].dtype, noted[key].numel()) != (dtype, n):
                raise Damaged(f"has two storages of one name, {key[:40]!r}")
            return noted[key]

        return _persistent(flat)


def _persistent(flat: Callable[[str, torch.dtype, int], Tensor]) -> Callable[[Any], Any]:
    """A legacy file's ids: ("storage", class, key, device, values, part of it or None), ("module", class, source)."""

    def found(pid: Any) -> Storage | Reference:
        if isinstance(pid, tuple) and len(pid) >= 2 and pid[0] == "module" and isinstance(pid[1], Reference):
            return pid[1]
        dtype, key, n = _checked_pid(pid)
        whole = flat(key, dtype, n)
        part = pid[5] if len(pid) > 5 else None
        if part is None:
            return Storage(whole)
        _, first, length = part
        if type(first) is not int or type(length) is not int or first < 0 or length < 0 or first + length > n:
            raise Damaged(f"has a part outside of its storage {key[:40]!r}")
        return Storage(whole[first : first + length])

    return found


def _no_storage(pid: Any) -> Any:
    raise Damaged("has a storage where none belongs")


def _checked_pid(pid: Any) -> tuple[torch.dtype, str, int]:
    """Dtype, key, number of values."""
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
        raise Damaged("refers to something outside that is no storage")
    _, kind, key, _, n = pid[:5]
    named = isinstance(kind, StorageType) and isinstance(key, str) and len(key) <= LONGEST_KEY
    if not named or type(n) is not int or n < 0:
        raise Damaged("has a storage of no type, name or size")
    return kind.dtype, key, n


def _swapped(flat: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes of the other byte order, uint8 [n], as values; they are turned in place."""
    width = dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize
    flat.numpy().view(f"u{width}").byteswap(inplace=True)
    return flat.view(dtype)


def _safetensors(path: Path, n_header: int) -> dict[str, Tensor]:
    if n_header > _MOST_HEADER:
        raise Damaged(f"has a header of {n_header} bytes")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            if any(len(name) > LONGEST_KEY for name in file.keys()):  # noqa: SIM118 (no mapping)
                raise Damaged("has a tensor of a very long name")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise Damaged(f"is no safetensors file ({error})") from None
