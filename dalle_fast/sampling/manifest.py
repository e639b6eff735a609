"""manifest.jsonl: one line a sample of a job, with all that is needed to draw it again; and drawing it again."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dalle_fast import rng
from dalle_fast.sampling.job import JobConfig, Sample
from dalle_fast.sampling.token_files import chunk_name

MANIFEST = "manifest.jsonl"


@dataclass(frozen=True)
class Record:
    """A line of a manifest.

    Attributes:
        index, prompt_index, number, prompt, seed: as in `Sample`.
        score: None without a ranker.   kept: whether it has a picture.
        image, tokens: its files, from the manifest's folder on; None without a picture.   row: in the tokens.
        settings: `JobConfig.settings`.   model, model_hash, device, dtype, engine: as in `JobConfig`.
        backend: as in `DrawnChunk`.
        batch: (first, count), the samples that were drawn at a time.
    """

    index: int
    prompt_index: int
    number: int
    prompt: str
    seed: int
    score: float | None
    kept: bool
    image: str | None
    tokens: str
    row: int
    settings: dict[str, Any]
    model: str
    model_hash: str
    device: str
    dtype: str
    engine: str
    backend: str
    batch: tuple[int, int]

    @classmethod
    def of(
        cls, config: JobConfig, sample: Sample, *, score: float | None, image: str | None, backend: str
    ) -> Record:
        """The record of a sample of a job."""
        chunk, row = config.place_of(sample)
        return cls(
            index=sample.index, prompt_index=sample.prompt_index, number=sample.number, prompt=sample.prompt,
            seed=sample.seed, score=score, kept=image is not None, image=image, tokens=chunk_name(chunk), row=row,
            settings=config.settings, model=config.model, model_hash=config.model_hash, device=config.device,
            dtype=config.dtype, engine=config.engine, backend=backend,
            batch=(chunk * config.batch_size, len(config.samples_of(chunk))),
        )  # fmt: skip

    def to_line(self) -> str:
        """JSON and the end of the line."""
        stored = {field.name: getattr(self, field.name) for field in fields(self)}
        return json.dumps(stored, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_line(cls, line: bytes, where: str) -> Record:
        """What `to_line` made.

        Args: where: the file and the line's number, for errors.
        Raises: ValueError (no such line).
        """
        try:
            stored = json.loads(line.decode("utf-8"), parse_constant=_refuse)
        except (ValueError, RecursionError) as error:  # ValueError: JSONDecodeError and UnicodeDecodeError too
            raise _corrupt(where, f"{_shown(line)} ({error})") from None
        if not isinstance(stored, dict) or set(stored) != set(_HINTS):
            raise _corrupt(where, _shown(line))
        for key, value in stored.items():
            if not _is_a(value, _HINTS[key]):
                raise _corrupt(where, f"{key} {value!r:.80}")
        record = cls(**stored | {"batch": tuple(stored["batch"])})
        first, count = record.batch
        if not (0 <= first <= record.index == first + record.row < first + count):
            raise _corrupt(where, f"index {record.index} at row {record.row} of batch {stored['batch']}")
        if not 0 <= record.seed < rng.SEEDS:
            raise _corrupt(where, f"seed {record.seed}")
        if record.kept != (record.image is not None):
            raise _corrupt(where, f"kept {record.kept} and image {record.image!r}")
        return record


_HINTS = typing.get_type_hints(Record)


def read_manifest(path: Path) -> Iterator[Record]:
    """The records of a manifest, each checked when its turn comes.

    Raises: FileNotFoundError, ValueError (a line that is no record, with the file and its number).
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            yield Record.from_line(line, f"{path}, line {number},")


def best_first(records: Iterable[Record]) -> list[Record]:
    """By score, highest first, then by index."""
    return sorted(records, key=lambda record: (-(record.score or 0.0), record.index))


def _is_a(value: Any, hint: Any) -> bool:
    """Whether JSON gave a value of this type."""
    if typing.get_origin(hint) is tuple:
        return isinstance(value, list) and len(value) == 2 and all(type(item) is int for item in value)
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (typing.get_origin(hint) or hint,)
    return type(value) in allowed


def _refuse(constant: str) -> None:
    """NaN and Infinity, which Python reads and JSON has not."""
    raise ValueError(f"{constant} is not JSON")


def _shown(line: bytes) -> str:
    return repr(line[:60].decode("utf-8", "replace")) + ("..." if len(line) > 60 else "")


def _corrupt(where: str, got: str) -> ValueError:
    return ValueError(f"sample: {where} must be a record of the job, got {got}. Run the job again without this file.")
