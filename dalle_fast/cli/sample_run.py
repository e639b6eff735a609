"""What `dalle-fast sample` and `dalle-fast merge` do: run a job in a folder, and say what came of it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import click
from torch import Tensor

from dalle_fast.cli.sample_config import ResolvedJob
from dalle_fast.cli.sample_options import SampleOptions
from dalle_fast.cli.sample_progress import Progress
from dalle_fast.compat.formats.base import Companions
from dalle_fast.jobs.job import DrawnChunk, JobConfig, Sample
from dalle_fast.jobs.manifest import redraw
from dalle_fast.jobs.on_ray import drawn_on_ray
from dalle_fast.jobs.pictures import to_png
from dalle_fast.jobs.pool import drawn_by_processes
from dalle_fast.jobs.preview import Preview
from dalle_fast.jobs.run import Decode, Draws, run_job
from dalle_fast.jobs.store import INDEX, JobFolder
from dalle_fast.jobs.stream import Drawer
from dalle_fast.whole_files import make_folder, write_whole

PREVIEW = "preview.png"
_MOST_ADVISED, _MOST_ADVICE = 100, 5  # prompts that are looked at, sentences that are told
Shard = tuple[int, int]


@dataclass(frozen=True)
class Report:
    """What a command says at its end: figures for programs, words for people."""

    figures: dict[str, Any]
    words: str

    def tell(self, *, as_json: bool, quiet: bool) -> None:
        """On standard output."""
        if as_json:
            click.echo(json.dumps(self.figures, ensure_ascii=False))
        elif not quiet:
            click.echo(self.words)


def draw_job(options: SampleOptions, given: frozenset[str]) -> Report:
    """Starts a job, or goes on with it; raises what is wrong."""
    job = ResolvedJob(options, given)
    if job.config.rank is not None and "" not in sys.path:
        sys.path.append("")  # a ranker's module may lie in the current folder
    here = _Here(job, options)
    if job.stored is None:  # what is wrong with a new job is said before it has a folder
        job.model.token_ids(job.config.prompts, job.config.truncate)
        if not options.quiet:
            _advise(job)
        _ = here.drawer
    with JobFolder.open(options.out, job.config, known=job.known, shard=options.shard) as folder:
        report = run_and_report(
            job.config, folder, here.draws, here.decode,
            shard=options.shard, codes=here.codes, quiet=options.quiet,
        )  # fmt: skip
    (options.out / PREVIEW).unlink(missing_ok=True)
    return report


def _advise(job: ResolvedJob) -> None:
    """Tells which prompts the model may not know what to do with; the first of many."""
    sentences = list(filter(None, map(job.model.advice, dict.fromkeys(job.config.prompts[:_MOST_ADVISED]))))
    for sentence in sentences[:_MOST_ADVICE]:
        click.echo(sentence, err=True)


def run_and_report(
    config: JobConfig,
    folder: JobFolder,
    draws: Callable[[Progress], Draws],
    decode: Decode,
    *,
    shard: Shard | None,
    codes: Callable[[], int],
    quiet: bool,
) -> Report:
    """Runs a job, telling how far it is.

    Args:
        draws: what draws chunks and counts them.   codes: that are drawn for one image, asked if any is drawn.
        shard, decode: as in `run_job`.
    """
    first, step = shard or (0, 1)
    sizes = {chunk: len(config.samples_of(chunk)) for chunk in range(first, config.n_chunks, step)}
    done = folder.chunks_done()
    total, found = sum(sizes.values()), sum(size for chunk, size in sizes.items() if chunk in done)
    finished = shard is None and folder.finished_prompts() == len(config.prompts)
    began = time.perf_counter()
    with (
        Progress(total, found, 1 if found == total else codes(), quiet=quiet) as progress,
        ExitStack() as stack,
    ):

        def drawn(chunks: Sequence[int]) -> Iterator[DrawnChunk]:
            # Closed before an error is told: what draws elsewhere stops then, not when this process ends.
            iterator = cast(Generator[DrawnChunk, None, None], draws(progress)(chunks))
            return stack.enter_context(closing(iterator))

        run_job(config, folder, drawn, decode, shard=shard, on_chunk=progress.on_chunk)
    return _report(config, folder.path, total, found, time.perf_counter() - began, shard, finished)


def redraw_sample(options: SampleOptions) -> Report:
    """Draws one sample of a manifest again, into the folder `options.out`."""
    assert options.from_manifest is not None and options.index is not None
    companions = Companions(options.vae, options.yaml, options.tokenizer)
    pixels, record, warnings = redraw(
        options.from_manifest, options.index, model_dir=options.model, companions=companions
    )
    for warning in warnings:
        click.echo(f"sample: {warning}", err=True)
    drawn = Sample(record.index, record.prompt_index, record.number, record.prompt, record.seed)
    path = options.out / f"{drawn.name}.png"
    make_folder(options.out)
    png = to_png(pixels, drawn, record.score, model_hash=record.model_hash, settings=record.settings)
    write_whole(path, [png])
    figures = {"image": str(path), "index": record.index, "same": not warnings, "warnings": warnings}
    same = "" if warnings else ", the codes that are stored"
    return Report(figures, f"Sample {record.index} drawn again{same}. Look at {path.resolve()}")


class _Here:
    """A job that this process draws, or lets others draw; its model is read when something needs it."""

    def __init__(self, job: ResolvedJob, options: SampleOptions) -> None:
        self._job, self._options = job, options

    @cached_property
    def drawer(self) -> Drawer:
        """Of this process."""
        job = self._job
        return Drawer(job.config, known=job.known, max_memory=self._options.max_memory, model=job.model)

    def codes(self) -> int:
        """That are drawn for one image; those that it begins with may be known."""
        n, known = self._job.model.dalle.image_seq_len, self._job.known
        return n if known is None else n - int((known >= 0).long().cumprod(0).sum())

    def decode(self, tokens: Tensor) -> Tensor:
        """As `Drawer.decode`."""
        return self.drawer.decode(tokens)

    def draws(self, progress: Progress) -> Draws:
        """What draws chunks, by the options."""
        config, known, options = self._job.config, self._job.known, self._options
        if options.ray is not None:
            return drawn_on_ray(config, known, options.ray, options.workers, max_memory=options.max_memory)
        if options.workers is not None and options.workers > 1:
            return drawn_by_processes(
                config, known, options.workers, max_memory=options.max_memory, on_codes=progress.on_codes
            )
        return lambda chunks: self._drawn_here(chunks, progress)

    def _drawn_here(self, chunks: Sequence[int], progress: Progress) -> Iterator[DrawnChunk]:
        preview = None
        if self._options.preview is not None and chunks:
            where = self._options.out / PREVIEW
            preview = Preview(where, self._job.model, self._options.preview, known=self._job.known)

        def on_rows(first: int, codes: Tensor) -> None:
            progress.on_rows(first, codes)
            if preview is not None:
                preview(first, codes)

        for chunk in chunks:
            yield self.drawer.draw(chunk, on_rows)


def _report(
    config: JobConfig, out: Path, total: int, found: int, seconds: float, shard: Shard | None, finished: bool
) -> Report:
    """Of a job whose samples, `total`, are all drawn, `found` of them by earlier runs."""
    drawn, each = total - found, config.images_per_prompt
    kept = 0 if shard else len(config.prompts) * min(config.keep or each, each)
    rate = drawn / seconds
    figures = {
        "out": str(out), "images": total, "kept": kept, "resumed": found, "seconds": round(seconds, 3),
        "images_per_second": round(rate, 3), "prompts": len(config.prompts),
    }  # fmt: skip
    images = f"{_counted(total, 'image')} of {_counted(len(config.prompts), 'prompt')}"
    if finished:
        return Report(figures, f"{out} is complete: {images}; nothing to draw. Look at {(out / INDEX).resolve()}")
    earlier = f", {found} of them earlier" if found else ""
    took = f"{images}{earlier}, in {seconds:.1f} s" + (f" ({rate:.1f} images/s)" if drawn else "")
    if shard is not None:
        return Report(
            figures, f"Shard {shard[0]}/{shard[1]}: {took}. When all shards are drawn: dalle-fast merge {out}"
        )
    best = f", the best {config.keep} of each kept" if kept < total else ""
    return Report(figures, f"{took}{best}. Look at {(out / INDEX).resolve()}")


def _counted(n: int, thing: str) -> str:
    return f"1 {thing}" if n == 1 else f"{n} {thing}s"
