"""The folder of a training: its configuration, who writes there, and checkpoints that are whole or not there.

    config.yaml                     the training, resolved
    checkpoints/step-00000100/      Accelerate's state, trainer.json, ema.safetensors; done.json: all files, their sizes
    checkpoints/step-00000100.broken/   one that was found damaged
    .lock                           held by the process that writes

A checkpoint is written under a temporary name, brought to the disk and renamed; then older ones go. Files of all
processes lie in one folder: several machines need a file system that they share.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from dalle_fast.training.agreement import all_do, main_does
from dalle_fast.training.config import TrainConfig
from dalle_fast.whole_files import TEMPORARY, bring_to_disk, make_folder, write_whole

if TYPE_CHECKING:
    from accelerate import Accelerator

CONFIG, CHECKPOINTS = "config.yaml", "checkpoints"
# How torch begins to say that a process that reads has died. It does so wherever the main process happens to be.
DEAD_WORKER = "DataLoader worker"
_DONE, _FACTS, _LOCK = "done.json", "trainer.json", ".lock"
_NAME = re.compile(r"step-(\d{8,})")

_log = logging.getLogger(__name__)


def claim(out: Path, config: TrainConfig) -> IO[bytes]:
    """Makes the folder of a training, or goes on in it; the open file keeps other processes out.

    Raises: ValueError (the folder holds something else, or a training that differs), RuntimeError (another process
        writes there), OSError.
    """
    path = out / CONFIG
    if out.is_dir() and not path.is_file():
        others = sorted(e.name for e in os.scandir(out) if not e.name.startswith((TEMPORARY, _LOCK)))
        if others:
            raise ValueError(
                f"train: {out} must be new, empty or the folder of a training, got one that holds {others[0]!r} and "
                f"no {CONFIG}. Name another folder."
            )
    make_folder(out)
    lock = _lock(out)
    try:
        if path.is_file():
            stored = type(config).from_yaml(path.read_text(encoding="utf-8"), path)
            if differing := config.differences(stored):
                raise ValueError(
                    f"train: {out} must hold this training, got one that differs in {', '.join(differing)}. "
                    "Take the settings that it was started with, or name another folder."
                )
        write_whole(path, [config.to_yaml().encode()])
        make_folder(out / CHECKPOINTS)
    except BaseException:
        lock.close()
        raise
    return lock


def _lock(out: Path) -> IO[bytes]:
    file = open(out / _LOCK, "ab")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RuntimeError(
            f"train: {out} must be written by one training at a time, got another one at work there. "
            "Wait for it, or name another folder."
        ) from None
    return file


class Checkpoints:
    """The checkpoints of a training. All processes call its methods together.

    Args: folder: they lie in it.   keep: how many stay.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, keep: int) -> None:
        self._accelerator = accelerator
        self.folder = folder
        self._keep = keep
        self._whole_ones: list[str] = []

    def save(self, step: int, facts: dict[str, Any], write_more: Callable[[Path], None]) -> None:
        """Writes the state of `step` steps.

        Args: facts: for JSON.   write_more: adds files to the folder it is given; in the main process.
        Raises: RuntimeError (it could not be written; the ones before are as they were).
        """
        scratch = self.folder / f"{TEMPORARY}step-{step:08d}"

        def prepare() -> None:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()

        def finish() -> None:
            (scratch / _FACTS).write_text(json.dumps(facts), encoding="utf-8")
            write_more(scratch)
            _seal(scratch, step)
            path = self.folder / f"step-{step:08d}"
            if path.exists():
                _set_aside(path)
            os.replace(scratch, path)
            bring_to_disk(self.folder)

        try:
            main_does(self._accelerator, prepare)
            all_do(self._accelerator, lambda: _save_state(self._accelerator, scratch))
            main_does(self._accelerator, finish)
        except Exception as error:
            main_does(self._accelerator, lambda: shutil.rmtree(scratch, ignore_errors=True))
            if DEAD_WORKER in str(error):
                raise
            raise RuntimeError(self.sentence(f"the checkpoint of step {step} must be written", error)) from error
        self._whole_ones.append(f"step-{step:08d}")
        main_does(self._accelerator, self._remove_old)

    def load(self, read_more: Callable[[Path], None]) -> dict[str, Any] | None:
        """Reads the last good state; its facts, None where there is no checkpoint.

        Args: read_more: reads what `write_more` wrote; in all processes.
        Raises: RuntimeError (there are some, and none can be read).
        """
        found = main_does(self._accelerator, self._look)
        failed: list[tuple[Path, str]] = []

        def set_failed_aside() -> None:
            for path, why in failed:
                _warn_and_set_aside(path, why)

        for number, (name, complaint) in enumerate(found):
            path = self.folder / name
            if complaint:
                failed.append((path, complaint))
                continue
            try:
                all_do(self._accelerator, lambda path=path: self._read(path, read_more))  # type: ignore[misc]
            except Exception as error:
                failed.append((path, f"{type(error).__name__}: {' '.join(str(error).split())}"))
                continue
            main_does(self._accelerator, set_failed_aside)
            self._whole_ones = [name for name, complaint in reversed(found[number:]) if not complaint]
            return json.loads((path / _FACTS).read_text(encoding="utf-8"))
        if failed:
            path, why = failed[0]
            raise RuntimeError(
                f"train: {self.folder} must hold a checkpoint that can be read, got none: {path.name} cannot "
                f"({why:.300}). Start as it was started before, sharded or not; to begin anew, name another folder."
            )
        return None

    def _read(self, path: Path, read_more: Callable[[Path], None]) -> None:
        self._accelerator.load_state(str(path))
        # Micro-steps so far: another number of processes splits a step into another number of them.
        self._accelerator.step = 0
        read_more(path)

    @property
    def last_good(self) -> str:
        """Where the last one is, in words."""
        return str(self.folder / self._whole_ones[-1]) if self._whole_ones else "none yet"

    def sentence(self, what: str, error: Exception) -> str:
        """That something could not be written, and what is safe."""
        reason = (
            os.strerror(error.errno) if isinstance(error, OSError) and error.errno else " ".join(str(error).split())
        )
        free = shutil.disk_usage(self.folder).free / 2**20
        return (
            f"train: {what} to {self.folder.parent}, got {reason!r:.300} ({free:.0f} MiB are free there). "
            f"Last good checkpoint: {self.last_good}. Make room, and run the same command again."
        )

    def _look(self) -> list[tuple[str, str]]:
        """Names, the last first, and why each is not whole, "" if it is; what killed processes left goes."""
        names = []
        for entry in list(os.scandir(self.folder)):
            if entry.name.startswith(TEMPORARY):
                shutil.rmtree(entry.path, ignore_errors=True)
            elif _NAME.fullmatch(entry.name):
                names.append(entry.name)
        names.sort(key=lambda name: int(name.rpartition("-")[2]), reverse=True)
        return [(name, _complaint(self.folder / name)) for name in names]

    def _remove_old(self) -> None:
        while len(self._whole_ones) > self._keep:
            path = self.folder / self._whole_ones.pop(0)
            gone = path.with_name(f"{TEMPORARY}{path.name}")
            shutil.rmtree(gone, ignore_errors=True)
            os.replace(path, gone)
            shutil.rmtree(gone, ignore_errors=True)


def _save_state(accelerator: Accelerator, folder: Path) -> None:
    if not folder.is_dir():
        raise OSError("a machine that does not see the main one's folder; take a file system that all share")
    accelerator.save_state(str(folder))


def _seal(folder: Path, step: int) -> None:
    """Brings all files to the disk and writes down what they are."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in [*files, *(path for path in folder.rglob("*") if path.is_dir())]:
        bring_to_disk(path)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    write_whole(folder / _DONE, [json.dumps({"step": step, "files": sizes}, indent=1).encode()])


def _complaint(path: Path) -> str:
    """Why a checkpoint is not whole; "" if it is."""
    try:
        sizes = json.loads((path / _DONE).read_text(encoding="utf-8"))["files"]
        for name, size in sizes.items():
            if (found := (path / name).stat().st_size) != size:
                return f"{name} must have {size} bytes, got {found}"
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _warn_and_set_aside(path: Path, why: str) -> None:
    aside = _set_aside(path)
    _log.warning("train: checkpoint %s is damaged (%s). It is %s now; an older one is taken.", path, why, aside.name)


def _set_aside(path: Path) -> Path:
    aside = path.with_name(f"{path.name}.broken")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(path, aside)
    return aside
