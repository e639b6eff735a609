"""manifest.jsonl: one line a sample of a job, with all that is needed to draw it again; and drawing it again."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dalle_fast import rng
from dalle_fast.compat.formats.base import Companions
from dalle_fast.jobs.job import JobConfig, Sample, hash_codes
from dalle_fast.jobs.stream import Drawer
from dalle_fast.jobs.token_files import KNOWN, chunk_name, read_chunk, read_known

MANIFEST = "manifest.jsonl"


@dataclass(frozen=True)
class Record:
    """A line of a manifest.

    Attributes:
        index, prompt_index, number, prompt, seed: as in `Sample`.
        score: None without a ranker.   kept: whether it has a picture.
        image, tokens: its files, from the manifest's folder on; None without a picture.   row: in the tokens.
        settings: `JobConfig.settings`.
        model, tokenizer, vae, yaml, model_hash, device, dtype, engine: as in `JobConfig`.
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
    tokenizer: str | None
    vae: str | None
    yaml: str | None
    model_hash: str
    device: str
    dtype: str
    engine: str
    backend: str
    batch: tuple[int, int]

    @classmethod
    def of(cls, config: JobConfig, sample: Sample, *, score: float | None, image: str | None, backend: str) -> Record:
        """The record of a sample of a job."""
        chunk, row = config.place_of(sample)
        return cls(
            index=sample.index, prompt_index=sample.prompt_index, number=sample.number, prompt=sample.prompt,
            seed=sample.seed, score=score, kept=image is not None, image=image, tokens=chunk_name(chunk), row=row,
            settings=config.settings, model=config.model, tokenizer=config.tokenizer, vae=config.vae, yaml=config.yaml,
            model_hash=config.model_hash, device=config.device, dtype=config.dtype, engine=config.engine,
            backend=backend,
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
        if not isinstance(stored, dict) or stored.keys() != _TYPES.keys():
            raise _corrupt(where, _shown(line))
        for key, value in stored.items():
            if type(value) not in _TYPES[key]:
                raise _corrupt(where, f"{key} {value!r:.80}")
        if [type(number) for number in stored["batch"]] != [int, int]:
            raise _corrupt(where, f"batch {stored['batch']!r:.80}")
        record = cls(**stored | {"batch": tuple(stored["batch"])})
        first, count = record.batch
        if not (0 <= first <= record.index == first + record.row < first + count):
            raise _corrupt(where, f"index {record.index} at row {record.row} of batch {stored['batch']}")
        if not 0 <= record.seed < rng.SEEDS:
            raise _corrupt(where, f"seed {record.seed}")
        if record.kept != (record.image is not None):
            raise _corrupt(where, f"kept {record.kept} and image {record.image!r}")
        try:
            stands_for = _job_of([record]).settings
        except (TypeError, ValueError) as error:
            raise _corrupt(where, f"{_shown(line)} ({error})") from None
        if stands_for != record.settings or any(type(stands_for[key]) not in _JOB_TYPES[key] for key in stands_for):
            raise _corrupt(where, f"settings {record.settings!r:.200}")
        return record

    @property
    def sample(self) -> Sample:
        """The sample that this is the record of."""
        return Sample(self.index, self.prompt_index, self.number, self.prompt, self.seed)


@dataclass(frozen=True)
class _ListedJob(JobConfig):
    """A job of one chunk, with these samples."""

    listed: tuple[Sample, ...] = ()

    def samples_of(self, chunk: int) -> list[Sample]:
        return list(self.listed)


def _job_of(records: Sequence[Record]) -> JobConfig:
    """The job that draws these samples at a time, and scores none."""
    one = records[0]
    return _ListedJob(
        prompts=tuple(record.prompt for record in records), model=one.model, tokenizer=one.tokenizer, vae=one.vae,
        yaml=one.yaml, model_hash=one.model_hash,
        images_per_prompt=1, seed=0, batch_size=len(records), device=one.device, dtype=one.dtype, engine=one.engine,
        listed=tuple(record.sample for record in records), **one.settings,
    )  # fmt: skip


def _types_of(fields_of: type) -> dict[str, tuple[type, ...]]:
    """Field -> types that JSON may give its value."""
    types_of = {}
    for name, hint in typing.get_type_hints(fields_of).items():
        allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (typing.get_origin(hint) or hint,)
        more = (int,) if float in allowed else (list,) if tuple in allowed else ()  # JSON has neither of them apart
        types_of[name] = (*allowed, *more)
    return types_of


_TYPES, _JOB_TYPES = _types_of(Record), _types_of(JobConfig)


def read_manifest(path: Path) -> Iterator[Record]:
    """The records of a manifest, each checked when its turn comes.

    Raises: FileNotFoundError, ValueError (a line that is no record, with the file and its number).
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            yield Record.from_line(line, f"{path}, line {number},")


def redraw(
    path: Path, index: int, *, model_dir: Path | None = None, companions: Companions | None = None
) -> tuple[Tensor, Record, list[str]]:
    """Draws a sample of a manifest once more.

    On the `cpu` engine it is drawn alone, which changes no bit; on `eager` with those that it was drawn with.

    Args:
        index: of the sample.   model_dir, companions: where the model and its companions are now; None: where they
            were.
    Returns: pixels uint8 [C, H, W]; its record; and in words what may be, or is, other than it was: the backend, the
        stored codes. No words: the codes are those that are stored.
    Raises: FileNotFoundError (no manifest, no model), ValueError (a corrupt manifest, no such sample, another model
        than it was drawn with, known codes that are gone), and what drawing raises.
    """
    records, said = _drawn_with(path, index)
    at = next(row for row, record in enumerate(records) if record.index == index)
    record = records[at]
    directory = Path(record.model) if model_dir is None else model_dir
    if not directory.exists():
        raise FileNotFoundError(
            f"sample: the model of sample {index} must be there, found none at {directory}. Name it with --model."
        )
    moved: dict[str, Any] = {
        name: str(now) for name, now in vars(companions or Companions()).items() if now is not None
    }
    job = replace(_job_of(records), model=str(directory), **moved)
    drawn = Drawer(job, known=_known_of(record, path)).draw(0)
    assert drawn.pixels is not None
    if drawn.backend != record.backend:
        said.append(
            f"sample {index} was drawn by {record.backend}; this is {drawn.backend}, which may round otherwise."
        )
    said += _compared(drawn.tokens[at], record, path)
    return drawn.pixels[at], record, said


def _drawn_with(path: Path, index: int) -> tuple[list[Record], list[str]]:
    """The records of the samples to draw with this one, itself among them, by index; what is to be said of them."""
    record = next((record for record in read_manifest(path) if record.index == index), None)
    if record is None:
        raise ValueError(f"sample: {path} must hold the sample {index}, got no line of it. The first one has index 0.")
    if record.engine == "cpu":
        return [record], []
    first, count = record.batch
    batch = range(first, first + count)
    found = {other.index: other for other in read_manifest(path) if other.index in batch}
    said = []
    if len(found) < count:
        said.append(
            f"sample {index} was drawn with {count - 1} others, of which {path} holds {len(found) - 1}: "
            "without the rest it may round otherwise."
        )
    return [found[i] for i in sorted(found)], said


def _known_of(record: Record, path: Path) -> Tensor | None:
    """The known codes that a sample was drawn with."""
    wanted = record.settings["known_hash"]
    if wanted is None:
        return None
    known = read_known(path.parent)
    if known is None or hash_codes(known) != wanted:
        got = "none" if known is None else "others"
        raise ValueError(
            f"sample: {path.parent / KNOWN} must hold the known codes of sample {record.index}, got {got}. "
            "Copy them there from the job's folder."
        )
    return known


def _compared(tokens: Tensor, record: Record, path: Path) -> list[str]:
    """What is to be said of the codes [image_seq_len] beside the stored ones."""
    stored_in = path.parent / record.tokens
    try:
        stored = read_chunk(stored_in, 0).tokens
    except (FileNotFoundError, ValueError):
        return [f"the codes of sample {record.index} could not be compared: {stored_in} is not there or not whole."]
    if record.row >= len(stored) or stored.shape[1:] != tokens.shape:
        return [f"the codes of sample {record.index} could not be compared: {stored_in} is of another job."]
    n_other = int((stored[record.row] != tokens).sum())
    return (
        [f"{n_other} of {len(tokens)} codes of sample {record.index} are other than in {stored_in}."] if n_other else []
    )


def best_first(records: Iterable[Record]) -> list[Record]:
    """By score, highest first, then by index."""
    return sorted(records, key=lambda record: (-(record.score or 0.0), record.index))


def _refuse(constant: str) -> None:
    """NaN and Infinity, which Python reads and JSON has not."""
    raise ValueError(f"{constant} is not JSON")


def _shown(line: bytes) -> str:
    return repr(line[:60].decode("utf-8", "replace")) + ("..." if len(line) > 60 else "")


def _corrupt(where: str, got: str) -> ValueError:
    return ValueError(f"sample: {where} must be a record of the job, got {got}. Run the job again without this file.")
