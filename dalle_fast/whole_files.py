"""Files that are there whole or not at all, whenever a process is killed or the power goes.

A file is written beside its place under a temporary name, brought to the disk, renamed, and then its folder is brought
to the disk. What a killed process leaves is a temporary file, which the next one removes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

TEMPORARY = ".tmp-"  # how temporary names begin


def write_whole(path: Path, pieces: Iterable[bytes], *, tag: str = "", durable: bool = True) -> None:
    """Puts a file in its place, over the one that was there.

    Args:
        pieces: its content.
        tag: who writes, for temporary names that no other process uses.
        durable: False leaves it to `bring_to_disk`, until when a loss of power can take the file or cut it short.
    Raises: OSError; then the place is as it was.
    """
    scratch = path.with_name(f"{TEMPORARY}{tag}{path.name}")
    try:
        with open(scratch, "wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(scratch)
        raise
    if durable:
        bring_to_disk(path.parent)


def write_from(path: Path, start: int, data: bytes) -> None:
    """Makes `data` all that a file holds from byte `start` on, and brings it to the disk; a kill can cut it short.

    Args: start: at most the file's size; 0 where there is none.
    """
    with open(path, "ab") as file:
        file.truncate(start)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if start == 0:
        bring_to_disk(path.parent)  # the file may be new


def bring_to_disk(path: Path) -> None:
    """A file's content or a folder's names: from here on they outlive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that knows no such thing for folders
            raise
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """A folder, and those above it; they outlive a loss of power."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        bring_to_disk(path.parent)


def remove_temporary(folder: Path, tag: str = "") -> None:
    """Removes the temporary files of killed processes with this tag; without one those of all."""
    if folder.is_dir():
        for entry in list(os.scandir(folder)):
            if entry.name.startswith(TEMPORARY + tag):
                os.unlink(entry.path)
