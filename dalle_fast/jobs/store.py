"""The folder of a job on disk: nothing that was drawn is lost, whenever it is killed, and only one process writes.

    config.yaml                 the job
    tokens-000007.safetensors   a chunk, committed by the rename that puts it there
    known.safetensors           codes that were given, not drawn
    images/, galleries/         a PNG a kept sample, a page a prompt
    manifest.jsonl              one line a sample; a prompt is finished when all of its lines are there
    index.html                  links to the pages
    .lock, .lock-I-of-N         held by who writes: everything, or a shard

Pictures, pages and manifest follow from configuration and chunks alone; no times or machines are in any file.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path

from torch import Tensor

from dalle_fast.jobs.job import DrawnChunk, JobConfig, Sample
from dalle_fast.jobs.manifest import MANIFEST, Record, best_first
from dalle_fast.jobs.pages import Picture, PromptOnIndex, gallery_page, index_page
from dalle_fast.jobs.pictures import is_whole_png, to_png
from dalle_fast.jobs.token_files import (
    KNOWN,
    check_chunk,
    chunk_name,
    chunk_to_bytes,
    known_to_bytes,
    read_chunk,
    read_known,
)
from dalle_fast.whole_files import (
    TEMPORARY,
    bring_to_disk,
    make_folder,
    remove_temporary,
    write_from,
    write_whole,
)

CONFIG, INDEX, IMAGES, GALLERIES = "config.yaml", "index.html", "images", "galleries"
_LOCK = ".lock"
_CHUNK_FILE = re.compile(r"tokens-(\d{6,})\.safetensors")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_ON_INDEX = 6  # pictures of a prompt

_log = logging.getLogger(__name__)


class OutOfSpace(OSError):
    """The disk is full, or its quota used up; what was committed stays."""


class JobFolder:
    """A job's folder, held by this process until `close`, or until a with-statement ends. Made by `open`."""

    def __init__(self, path: Path, config: JobConfig, shard: tuple[int, int] | None) -> None:
        self.path = path
        self._config = config
        self._shard = shard
        self._tag = "" if shard is None else f"{shard[0]}-of-{shard[1]}-"
        self._locks = ExitStack()
        self._done: set[int] = set()
        self._finished = 0  # prompts
        self._manifest_bytes = 0  # of their lines

    @classmethod
    def open(
        cls, path: Path, config: JobConfig, *, known: Tensor | None = None, shard: tuple[int, int] | None = None
    ) -> JobFolder:
        """Makes the folder of a job, or goes on in it.

        Args:
            known: the codes [image_seq_len] that `config.known_hash` is of.
            shard: (i, n): this process commits those chunks k alone for which k % n == i, while others do theirs.
        Raises: ValueError (the folder holds another job, or something else), RuntimeError (another process writes
            there), OutOfSpace, OSError.
        """
        folder = cls(path, config, shard)
        try:
            with folder._telling_what_is_safe():
                folder._start(known)
        except BaseException:
            folder.close()
            raise
        return folder

    @staticmethod
    def stored_config(path: Path) -> JobConfig | None:
        """The job in a folder; None where there is none. Raises: ValueError, TypeError (a config.yaml that is none)."""
        file = path / CONFIG
        if not file.is_file():
            return None
        try:
            return JobConfig.from_yaml(file.read_text(encoding="utf-8"), file)
        except UnicodeDecodeError as error:
            raise ValueError(f"sample: {file} must be YAML in UTF-8, got something else ({error}).") from None

    @staticmethod
    def stored_known(path: Path) -> Tensor | None:
        """The known codes of the job in a folder, int64 [image_seq_len]; None where all are drawn."""
        return read_known(path)

    def close(self) -> None:
        """Lets other processes write."""
        self._locks.close()

    def __enter__(self) -> JobFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------------- opening

    def _start(self, known: Tensor | None) -> None:
        if self.path.is_dir() and not (self.path / CONFIG).is_file() and (others := self._other_files()):
            raise ValueError(
                f"sample: {self.path} must be new, empty or the folder of a job, got one that holds {others[0]!r} "
                f"and no {CONFIG}. Name another folder."
            )
        make_folder(self.path)
        self._lock()
        stored = self.stored_config(self.path)
        if stored is not None and (differing := self._config.differences(stored)):
            raise ValueError(
                f"sample: {self.path} must hold this job, got one that differs in {', '.join(differing)}. "
                "Give the options that it was started with, or name another folder."
            )
        folders = [self.path / IMAGES, self.path / GALLERIES]
        for folder in [self.path, *folders]:
            remove_temporary(folder, self._tag)
        if known is not None:
            self._write_if_other(KNOWN, known_to_bytes(known))
        if stored is None:
            self._write(self.path / CONFIG, [self._config.to_yaml().encode()])
        if self._shard is None:
            for folder in folders:
                make_folder(folder)
        self.chunks_done()

    def _other_files(self) -> list[str]:
        """What is there and was not left by a job that was killed before it had said what it is."""
        own = (TEMPORARY, _LOCK, KNOWN)
        return sorted(entry.name for entry in os.scandir(self.path) if not entry.name.startswith(own))

    def _lock(self) -> None:
        # Shards hold the first lock together, and each one of its own; who writes everything holds the first alone.
        locks = [(_LOCK, fcntl.LOCK_EX if self._shard is None else fcntl.LOCK_SH)]
        if self._shard is not None:
            locks.append((f"{_LOCK}-{self._shard[0]}-of-{self._shard[1]}", fcntl.LOCK_EX))
        for name, kind in locks:
            file = self._locks.enter_context(open(self.path / name, "ab"))  # noqa: SIM115
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RuntimeError(
                    f"sample: {self.path} must be written by one process at a time, got another one at work there. "
                    "Wait for it, or name another folder."
                ) from None

    # --------------------------------------------------------------------------------------------------------- chunks

    def chunks_done(self) -> set[int]:
        """The chunks that are there and whole; a file that is not whole gets another name, with a warning."""
        done = set()
        for entry in sorted(os.scandir(self.path), key=lambda entry: entry.name):
            match = _CHUNK_FILE.fullmatch(entry.name)
            if match is None or int(match[1]) >= self._config.n_chunks:
                continue
            chunk, path = int(match[1]), Path(entry.path)
            try:
                check_chunk(path, len(self._config.samples_of(chunk)), self._config.rank is not None)
            except ValueError as error:
                broken = path.with_name(f"{path.name}.broken")
                os.replace(path, broken)
                _log.warning("%s It is %s now; its samples are drawn again.", error, broken.name)
            else:
                done.add(chunk)
        self._done = done
        return set(done)

    def commit(self, drawn: DrawnChunk) -> None:
        """Stores a chunk; once this returns, nothing can take it. Raises: OutOfSpace."""
        with self._telling_what_is_safe():
            self._write(self.path / chunk_name(drawn.chunk), [chunk_to_bytes(drawn)])
        self._done.add(drawn.chunk)

    def read(self, chunk: int) -> DrawnChunk:
        """A chunk that is done, without pixels. Raises: FileNotFoundError, ValueError (not whole)."""
        return read_chunk(self.path / chunk_name(chunk), chunk)

    # ------------------------------------------------------------------------------------------------------- pictures

    def has_image(self, sample: Sample) -> bool:
        """Whether the picture of a sample is there and whole."""
        try:
            with open(self._image(sample), "rb") as file:
                file.seek(-12, os.SEEK_END)
                return is_whole_png(file.read())
        except OSError:  # not there, or shorter than that
            return False

    def write_image(self, sample: Sample, pixels: Tensor, score: float | None) -> None:
        """Writes the PNG of a sample: pixels uint8 [1 or 3, H, W]. Raises: OutOfSpace."""
        c = self._config
        png = to_png(pixels, sample, score, model_hash=c.model_hash, settings=c.settings)
        with self._telling_what_is_safe():
            self._write(self._image(sample), [png], durable=False)  # `finish_prompt` makes them so

    # -------------------------------------------------------------------------------------------------------- prompts

    def finished_prompts(self) -> int:
        """How many prompts are finished. What the manifest holds behind their lines is cut off.

        Raises: ValueError (a line that is not of this job, with its number).
        """
        path, n = self.path / MANIFEST, self._config.images_per_prompt
        self._finished = self._manifest_bytes = 0
        if not path.exists():
            return 0
        with open(path, "rb") as file:
            while lines := list(islice(file, n)):
                if len(lines) < n or not lines[-1].endswith(b"\n"):
                    break
                self._check_lines(lines, path)
                self._finished += 1
                self._manifest_bytes += sum(map(len, lines))
        if path.stat().st_size != self._manifest_bytes:
            with self._telling_what_is_safe():
                write_from(path, self._manifest_bytes, b"")
        return self._finished

    def _check_lines(self, lines: list[bytes], path: Path) -> None:
        """Checks the lines of the next prompt."""
        first = self._finished * len(lines)
        for index, line in enumerate(lines, start=first):
            where = f"{path}, line {index + 1},"
            record = Record.from_line(line, where)
            sample = self._config.sample(index) if index < self._config.n_samples else None
            if sample is None or (record.index, record.prompt, record.seed) != (index, sample.prompt, sample.seed):
                got = f"index {record.index}, seed {record.seed}, prompt {record.prompt!r:.80}"
                raise ValueError(
                    f"sample: {where} must be sample {index} of the job, got {got}. "
                    "Remove the file: the same command writes it again, and draws nothing anew."
                )

    def finish_prompt(
        self,
        prompt_index: int,
        kept: list[tuple[Sample, float | None]],
        everything: list[tuple[Sample, float | None]],
        backend_of: Callable[[Sample], str],
    ) -> None:
        """Writes the page of a prompt, then its lines in the manifest; once this returns, nothing can take them.

        Args:
            prompt_index: prompts are finished in their order.
            kept: samples and scores, best first; their pictures are there.   everything: of the prompt, by index.
            backend_of: what `DrawnChunk.backend` of a sample's chunk was.
        Raises: ValueError (another prompt's turn, a picture that is not there), OutOfSpace.
        """
        if prompt_index != self._finished:
            raise ValueError(f"finish_prompt: prompt_index must be {self._finished}, got {prompt_index}.")
        if absent := [sample.name for sample, _ in kept if not self.has_image(sample)]:
            raise ValueError(f"finish_prompt: kept samples must have pictures, got none of {absent[0]}.")
        names = {sample.name for sample, _ in kept}
        records = [
            self._record(sample, score, sample.name in names, backend_of(sample)) for sample, score in everything
        ]
        lines = "".join(record.to_line() for record in records).encode()
        with self._telling_what_is_safe():
            for sample, _ in everything:
                if sample.name not in names:
                    self._image(sample).unlink(missing_ok=True)
            for sample, _ in kept:
                bring_to_disk(self._image(sample))
            bring_to_disk(self.path / IMAGES)
            self._write(self.path / GALLERIES / _page_name(prompt_index), self._page(kept, records))
            write_from(self.path / MANIFEST, self._manifest_bytes, lines)
        self._manifest_bytes += len(lines)
        self._finished += 1

    def write_index(self) -> None:
        """Writes the page that links to those of the finished prompts. Raises: OutOfSpace."""
        if self._finished == 0:
            return
        c = self._config
        first_image = next(path for prompt in self._prompts_on_index() for path in prompt.images)
        page = index_page(
            self._prompts_on_index(), n_prompts=self._finished, n_drawn=c.images_per_prompt,
            first_image=self.path / first_image,
        )  # fmt: skip
        with self._telling_what_is_safe():
            self._write(self.path / INDEX, page)

    def _prompts_on_index(self) -> Iterator[PromptOnIndex]:
        with open(self.path / MANIFEST, "rb") as file:
            for prompt_index in range(self._finished):
                lines = islice(file, self._config.images_per_prompt)
                records = best_first(record for record in map(_parsed, lines) if record.kept)
                images = tuple(str(record.image) for record in records[:_ON_INDEX])
                page = f"{GALLERIES}/{_page_name(prompt_index)}"
                yield PromptOnIndex(self._config.prompts[prompt_index], page, images)

    def _record(self, sample: Sample, score: float | None, kept: bool, backend: str) -> Record:
        image = f"{IMAGES}/{self._image(sample).name}" if kept else None
        return Record.of(self._config, sample, score=score, image=image, backend=backend)

    def _page(self, kept: list[tuple[Sample, float | None]], records: list[Record]) -> Iterator[bytes]:
        c = self._config
        pictures = [Picture(s.name, s.index, s.seed, score, self._image(s)) for s, score in kept]
        backends = "; ".join(dict.fromkeys(record.backend for record in records))
        facts = {"model": c.model, **vars(c.companions), "model_hash": c.model_hash}
        facts |= {"drawn by": backends, "rank": c.rank, **c.settings}
        said = {name: value for name, value in facts.items() if value is not None}
        return gallery_page(kept[0][0].prompt, pictures, n_drawn=len(records), ranked=c.rank is not None, facts=said)

    # -------------------------------------------------------------------------------------------------------- writing

    def _image(self, sample: Sample) -> Path:
        return self.path / IMAGES / f"{sample.name}.png"

    def _write(self, path: Path, pieces: Iterable[bytes], durable: bool = True) -> None:
        write_whole(path, pieces, tag=self._tag, durable=durable)

    def _write_if_other(self, name: str, data: bytes) -> None:
        path = self.path / name
        if not path.is_file() or path.read_bytes() != data:
            self._write(path, [data])

    @contextmanager
    def _telling_what_is_safe(self) -> Iterator[None]:
        """Says in words that there is no room."""
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL:
                raise
            safe = sum(len(self._config.samples_of(chunk)) for chunk in self._done)
            raise OutOfSpace(
                f"sample: {self.path} must have room for what is drawn, got {os.strerror(error.errno)!r}. "
                f"{safe} of {self._config.n_samples} samples are safe there; make room, and run the same command again."
            ) from error


def _page_name(prompt_index: int) -> str:
    return f"{prompt_index:06d}.html"


def _parsed(line: bytes) -> Record:
    return Record.from_line(line, MANIFEST)
