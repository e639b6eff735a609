"""Running a job: chunks are drawn, committed to the folder, and prompts finished when all of their chunks are there.

What is committed is never drawn again. Pictures, pages and manifest follow from the configuration and the committed
chunks alone, so a job that was killed ends in the same bytes as one that was not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle_fast.jobs.job import DrawnChunk, JobConfig, Sample
from dalle_fast.jobs.ranking import TopK
from dalle_fast.jobs.store import JobFolder

Draws = Callable[[Sequence[int]], Iterator[DrawnChunk]]  # chunks to draw -> the drawn ones, in any order
Decode = Callable[[Tensor], Tensor]  # tokens [b, image_seq_len] -> pixels, uint8 [b, C, H, W]
_DECODED_AT_ONCE = 64


@dataclass(frozen=True)
class Summary:
    """What a run came to: samples that it drew, and that it found drawn."""

    drawn: int
    found: int


def run_job(
    config: JobConfig,
    folder: JobFolder,
    draw: Draws,
    decode: Decode,
    *,
    shard: tuple[int, int] | None = None,
    on_chunk: Callable[[DrawnChunk], None] | None = None,
) -> Summary:
    """Draws what the folder lacks, and finishes its prompts in order.

    Args:
        draw: draws chunks.   decode: makes the pixels of kept samples that were drawn by an earlier run.
        shard: (i, n): only the chunks i, i + n, i + 2 n, ...; then no prompt is finished, which is for `merge`.
        on_chunk: called with every chunk once it cannot be lost.
    Raises: OutOfSpace, and what `draw` raises; all that was committed stays.
    """
    done = folder.chunks_done()
    first, step = shard or (0, 1)
    wanted = range(first, config.n_chunks, step)
    missing = [chunk for chunk in wanted if chunk not in done]
    finishing = None if shard else _Finishing(config, folder, decode)
    if finishing is not None:
        finishing.resume(done)
    for drawn in draw(missing):
        folder.commit(drawn)
        if finishing is not None:
            finishing.take(drawn)
        if on_chunk is not None:
            on_chunk(drawn)
    if finishing is not None:
        folder.write_index()
    sizes = {chunk: len(config.samples_of(chunk)) for chunk in wanted}
    n_drawn = sum(sizes[chunk] for chunk in missing)
    return Summary(n_drawn, sum(sizes.values()) - n_drawn)


class _Finishing:
    """Holds the samples of prompts that are not complete: their scores, and the pixels of the best so far."""

    def __init__(self, config: JobConfig, folder: JobFolder, decode: Decode) -> None:
        self._config, self._folder, self._decode = config, folder, decode
        self._next = folder.finished_prompts()
        self._backends: dict[int, str] = {}  # of chunks
        self._best: dict[int, TopK] = {}  # of prompts
        self._all: dict[int, list[tuple[Sample, float | None]]] = {}

    def resume(self, done: set[int]) -> None:
        """Takes what earlier runs committed of the prompts they did not finish."""
        first = self._next * self._config.images_per_prompt // self._config.batch_size
        for chunk in sorted(done):
            if chunk >= first:
                self.take(self._folder.read(chunk))

    def take(self, drawn: DrawnChunk) -> None:
        """Takes a committed chunk; finishes the prompts that it completes."""
        self._backends[drawn.chunk] = drawn.backend
        pictures = []  # that are kept, whatever comes
        for row, sample in enumerate(self._config.samples_of(drawn.chunk)):
            if sample.prompt_index < self._next:
                continue
            score = None if drawn.scores is None else float(drawn.scores[row])
            pixels = None if drawn.pixels is None else drawn.pixels[row]
            if pixels is not None and self._config.keep is None:
                pictures.append((sample, pixels, score))
                pixels = None
            self._all.setdefault(sample.prompt_index, []).append((sample, score))
            self._best.setdefault(sample.prompt_index, TopK(self._config.keep)).offer(sample, score, pixels)
        self._write(pictures)
        while len(self._all.get(self._next, ())) == self._config.images_per_prompt:
            self._finish(self._next)
            self._next += 1

    def _finish(self, prompt: int) -> None:
        kept = self._best.pop(prompt).kept()
        self._write([(sample, pixels, score) for sample, score, pixels in kept if pixels is not None])
        to_decode = [(s, score) for s, score, pixels in kept if pixels is None and not self._folder.has_image(s)]
        for start in range(0, len(to_decode), _DECODED_AT_ONCE):
            self._write_decoded(to_decode[start : start + _DECODED_AT_ONCE])
        everything = sorted(self._all.pop(prompt), key=lambda pair: pair[0].index)
        pairs = [(sample, score) for sample, score, _ in kept]
        self._folder.finish_prompt(prompt, pairs, everything, self._backend_of)

    def _write_decoded(self, samples: list[tuple[Sample, float | None]]) -> None:
        chunks = {chunk: self._folder.read(chunk).tokens for chunk in sorted({self._chunk_of(s) for s, _ in samples})}
        tokens = [chunks[chunk][row] for chunk, row in (self._config.place_of(sample) for sample, _ in samples)]
        decoded = self._decode(torch.stack(tokens))
        self._write([(sample, pixels, score) for (sample, score), pixels in zip(samples, decoded, strict=True)])

    def _write(self, pictures: list[tuple[Sample, Tensor, float | None]]) -> None:
        # Compressing them is most of what a job adds to drawing; it needs no interpreter.
        with ThreadPoolExecutor(max(1, min(torch.get_num_threads(), len(pictures)))) as pool:
            list(pool.map(lambda picture: self._folder.write_image(*picture), pictures))

    def _chunk_of(self, sample: Sample) -> int:
        return self._config.place_of(sample)[0]

    def _backend_of(self, sample: Sample) -> str:
        return self._backends[self._chunk_of(sample)]
