"""A disk on which one step fails: full, the process killed, or the power gone and what was not yet on the disk.

Steps are what `dalle_fast.whole_files` and the store do to files: open for writing, write, fsync, rename,
remove, make a folder.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from dalle_fast import whole_files
from dalle_fast.jobs import store

_NEVER = 10**9


class Killed(BaseException):
    """The process is no more: nothing catches it, and nothing is done after it."""


class FailingDisk:
    """Counts steps; the one of number `at` fails with `error`, half a write done. After Killed, all later ones do."""

    def __init__(self, monkeypatch, folder: Path, at: int = _NEVER, error: BaseException | None = None) -> None:
        self.steps = 0
        self._at, self._error, self._folder = at, error, folder
        self._content: dict[int, bytes] = {}  # inode -> what of it is on the disk
        self._names: dict[Path, dict[str, int]] = {}  # folder -> name -> inode, as they are on the disk
        for name in ("replace", "unlink", "mkdir", "fsync"):
            monkeypatch.setattr(os, name, self._stepping(name, getattr(os, name)))
        for module in (whole_files, store):
            monkeypatch.setattr(module, "open", self._open, raising=False)

    def step(self) -> bool:
        """Whether this one fails."""
        self.steps += 1
        return self.steps == self._at or (self.steps > self._at and isinstance(self._error, Killed))

    def _stepping(self, name, function):
        def stepping(*args, **options):
            if self.step():
                raise self._error
            result = function(*args, **options)
            if name == "fsync":
                self._brought(args[0])
            return result

        return stepping

    def _open(self, path, mode="r", **options):
        if mode == "rb":
            return open(path, mode, **options)
        if self.step():
            raise self._error
        file = open(path, mode, **options)  # noqa: SIM115
        if "w" in mode:
            self._content.pop(os.fstat(file.fileno()).st_ino, None)
        return _FailingFile(file, self)

    def _brought(self, descriptor: int) -> None:
        inode = os.fstat(descriptor).st_ino
        path = next((p for p in [self._folder, *self._folder.rglob("*")] if p.stat().st_ino == inode), None)
        if path is None:  # above the folder
            return
        if path.is_dir():
            self._names[path] = {entry.name: entry.inode() for entry in os.scandir(path)}
        else:
            self._content[inode] = path.read_bytes()

    def after_kill(self, target: Path) -> None:
        """What a new start finds after a kill: everything that was written."""
        shutil.copytree(self._folder, target)

    def after_power_loss(self, target: Path, *, names: bool) -> None:
        """What a new start finds: file contents and names that were brought to the disk; all names, if `names`."""
        self._copy(self._folder, target, names)

    def _copy(self, folder: Path, target: Path, names: bool) -> None:
        there = {entry.name: entry.inode() for entry in os.scandir(folder)} if names else self._names.get(folder, {})
        target.mkdir()
        for name, inode in there.items():
            if (folder / name).is_dir():
                self._copy(folder / name, target / name, names)
            else:
                (target / name).write_bytes(self._content.get(inode, b""))


class _FailingFile:
    def __init__(self, file, disk: FailingDisk) -> None:
        self._file, self._disk = file, disk

    def write(self, data: bytes) -> int:
        if self._disk.step():
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            raise self._disk._error
        return self._file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)
