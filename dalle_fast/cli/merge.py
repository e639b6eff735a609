"""`dalle-fast merge`: finishes a job whose shards were drawn apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import groupby
from pathlib import Path

import click

from dalle_fast.cli.companions import COMPANIONS
from dalle_fast.cli.sample_run import Report, run_and_report
from dalle_fast.cli.sentences import in_sentences
from dalle_fast.jobs.job import DrawnChunk, JobConfig
from dalle_fast.jobs.store import CONFIG, JobFolder
from dalle_fast.jobs.stream import Drawer
from dalle_fast.jobs.token_files import check_chunk, chunk_name, read_chunk

_FOLDER = click.Path(file_okay=False, path_type=Path)
_SHOWN = 8  # ranges of samples in a sentence


@click.command()
@click.argument("out", type=_FOLDER)
@click.argument("parts", type=_FOLDER, nargs=-1, metavar="[PART]...")
@click.option("--json", "as_json", is_flag=True, help="End with one line of JSON.")
@click.option("--quiet", is_flag=True, help="Tell nothing but what is wrong.")
def merge(out: Path, parts: tuple[Path, ...], as_json: bool, quiet: bool) -> None:
    """Finish the job in OUT, whose shards drew into it or into the folders PART (`dalle-fast sample --shard I/N`).

    Codes and scores of the parts are copied to OUT; then its pictures, galleries and manifest are made, the same bytes
    that one process would have made. Where samples are missing, it says which, and exits with 1.
    """
    with in_sentences():
        config = _common_config(out, parts)
        known = next((codes for path in (out, *parts) if (codes := JobFolder.stored_known(path)) is not None), None)
        with JobFolder.open(out, config, known=known) as folder:
            missing = _collect(folder, config, parts)
            if missing:
                raise ValueError(_told_missing(config, out, missing))
            report = _finished(config, folder, quiet)
    report.tell(as_json=as_json, quiet=quiet)


def _common_config(out: Path, parts: Sequence[Path]) -> JobConfig:
    """The job of all these folders; OUT may be new."""
    config = JobFolder.stored_config(out)
    if config is None and not parts:
        raise ValueError(f"merge: OUT must be the folder of a job, got {out}, which has no {CONFIG}. Name the parts.")
    for part in parts:
        stored = JobFolder.stored_config(part)
        if stored is None:
            raise ValueError(f"merge: PART must be the folder of a job, got {part}, which has no {CONFIG}.")
        config = config or stored
        differing = set(config.differences(stored))
        if stored.model_hash == config.model_hash:
            differing -= {"model", *COMPANIONS}  # the same, under other paths
        if differing:
            raise ValueError(
                f"merge: the parts must be of one job, got {part}, which differs in {', '.join(sorted(differing))}. "
                "Draw it with the options of the others."
            )
    assert config is not None
    return config


def _collect(folder: JobFolder, config: JobConfig, parts: Sequence[Path]) -> list[int]:
    """Copies the chunks that the folder lacks. Returns: those that nobody has."""
    missing = sorted(set(range(config.n_chunks)) - folder.chunks_done())
    for chunk in missing:
        path = next((path for part in parts if (path := part / chunk_name(chunk)).is_file()), None)
        if path is not None:
            check_chunk(path, len(config.samples_of(chunk)), config.rank is not None)
            folder.commit(read_chunk(path, chunk))
    return sorted(set(missing) - folder.chunks_done())


def _told_missing(config: JobConfig, out: Path, missing: Sequence[int]) -> str:
    samples = [config.samples_of(chunk) for chunk in missing]
    n, names = sum(map(len, samples)), []
    for _, group in groupby(enumerate(missing), key=lambda pair: pair[1] - pair[0]):  # chunks one after the other
        own = [samples[i] for i, _ in group]
        names.append(f"{own[0][0].index}..{own[-1][-1].index}")
    more = ", ..." if len(names) > _SHOWN else ""
    chunks = ", ".join(map(str, missing[:_SHOWN])) + (", ..." if len(missing) > _SHOWN else "")
    return (
        f"merge: {out} must have {config.n_samples} samples, {n} are missing: {', '.join(names[:_SHOWN])}{more} "
        f"(chunks {chunks}; chunk k is of shard k % N). Run those shards again, or name their folders."
    )


def _finished(config: JobConfig, folder: JobFolder, quiet: bool) -> Report:
    """Makes what follows from the chunks. The model is read if pictures are to be decoded, which a job's end leaves."""

    @cache
    def drawer() -> Drawer:
        return Drawer(replace(config, rank=None, keep=None), known=None)

    def nothing(chunks: Sequence[int]) -> Iterator[DrawnChunk]:
        yield from ()

    return run_and_report(
        config, folder, lambda progress: nothing, lambda tokens: drawer().decode(tokens),
        shard=None, codes=lambda: 1, quiet=quiet,
    )  # fmt: skip
