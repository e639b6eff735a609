"""Drawing on several processes of one machine: each holds the model and draws whole chunks; this one writes.

Chunks come back as NumPy arrays: tensors would travel through shared memory, of which containers have little.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dalle_fast.jobs.job import DrawnChunk, JobConfig
from dalle_fast.jobs.run import Draws

if TYPE_CHECKING:
    from dalle_fast.jobs.stream import Drawer

_AHEAD = 2  # chunks a worker that are handed out at a time: what waits to be written stays bounded
_LOOK_EVERY = 0.5  # seconds between looks at what workers have drawn


@dataclass(frozen=True)
class SentChunk:
    """A DrawnChunk whose tensors are arrays: what one process sends another."""

    chunk: int
    tokens: np.ndarray
    scores: np.ndarray | None
    pixels: np.ndarray | None
    backend: str

    @classmethod
    def of(cls, drawn: DrawnChunk) -> SentChunk:
        """Codes fit 32 bits."""
        return cls(
            drawn.chunk,
            drawn.tokens.to(torch.int32).cpu().numpy(),
            None if drawn.scores is None else drawn.scores.cpu().numpy(),
            None if drawn.pixels is None else drawn.pixels.cpu().numpy(),
            drawn.backend,
        )

    def received(self) -> DrawnChunk:
        """As it was drawn. The arrays must not be used any more."""
        return DrawnChunk(
            self.chunk,
            torch.from_numpy(self.tokens).long(),
            None if self.scores is None else torch.from_numpy(self.scores),
            None if self.pixels is None else torch.from_numpy(self.pixels),
            self.backend,
        )


@dataclass(frozen=True)
class Task:
    """What a process needs to draw chunks of a job.

    Attributes: known: int32 [image_seq_len], -1 where codes are drawn.   threads: of torch.
    """

    config: JobConfig
    known: np.ndarray | None
    max_memory: int | None
    threads: int

    @classmethod
    def of(cls, config: JobConfig, known: Tensor | None, max_memory: int | None, threads: int) -> Task:
        """Known codes as a tensor [image_seq_len]."""
        return cls(config, None if known is None else known.to(torch.int32).numpy(), max_memory, threads)

    def drawer(self) -> Drawer:
        """Reads the model, with this many threads from here on."""
        from dalle_fast.jobs.stream import Drawer  # at call time: a worker that starts needs less

        torch.set_num_threads(self.threads)
        known = None if self.known is None else torch.from_numpy(self.known).long()
        return Drawer(self.config, known=known, max_memory=self.max_memory)


def drawn_by_processes(
    config: JobConfig,
    known: Tensor | None,
    workers: int,
    *,
    max_memory: int | None = None,
    on_codes: Callable[[int], None] | None = None,
) -> Draws:
    """Draws with processes of this machine, each on its share of torch's threads or on a GPU of its own.

    They end with this one, whatever ends it. More workers than GPUs share them.

    Args:
        known: codes [image_seq_len], -1 where they are drawn.
        max_memory: bytes, of each.
        on_codes: called now and then with how many codes were drawn since, in all of them.
    Raises: RuntimeError (a worker was killed), and what a Drawer raises.
    """
    threads = max(1, torch.get_num_threads() // workers)

    def draw(chunks: Sequence[int]) -> Iterator[DrawnChunk]:
        if not chunks:
            return
        n_workers = min(workers, len(chunks))
        with _Workers(Task.of(config, known, max_memory, threads), n_workers) as pool:
            yield from pool.draw(chunks, on_codes)

    return draw


class _Workers:
    """Processes that draw. Leaving it by an exception stops them in the middle of what they do."""

    def __init__(self, task: Task, n: int) -> None:
        context = multiprocessing.get_context("spawn")  # a forked one would hang in the threads of torch
        self._n = n
        self._counts = context.RawArray(ctypes.c_int64, n)  # codes that each has drawn; each writes its own
        numbers = context.SimpleQueue()
        for number in range(n):
            numbers.put(number)
        self._ends_with, self._alive = context.Pipe(duplex=False)  # closed where this process ends, too
        self._pool = ProcessPoolExecutor(
            n,
            mp_context=context,
            initializer=_begin,
            initargs=(task, numbers, self._counts, self._ends_with),
        )

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._alive.close()
        self._pool.shutdown(cancel_futures=True)
        self._alive.close()
        self._ends_with.close()

    def draw(self, chunks: Sequence[int], on_codes: Callable[[int], None] | None) -> Iterator[DrawnChunk]:
        """Hands chunks out, a few ahead; gives back what is drawn first."""
        todo, pending, told = iter(chunks), set[Future[SentChunk]](), 0
        try:
            while True:
                pending |= {self._pool.submit(_draw, chunk) for chunk in islice(todo, _AHEAD * self._n - len(pending))}
                if not pending:
                    return
                done, pending = wait(pending, timeout=_LOOK_EVERY, return_when=FIRST_COMPLETED)
                drawn = sum(self._counts)
                if on_codes is not None and drawn > told:
                    on_codes(drawn - told)
                    told = drawn
                for future in done:
                    yield future.result().received()
        except BrokenProcessPool:
            raise RuntimeError(
                "sample: a worker was killed, perhaps for want of memory. What was drawn stays; the same command goes "
                "on, with fewer --workers or less --max-memory if it happens again."
            ) from None


# --- in a worker ------------------------------------------------------------------------------------------------------


class _Worker:
    """This process, where it is a worker."""

    def __init__(self, task: Task, number: int, counts: Any) -> None:
        self._task, self._number, self._counts = task, number, counts

    @cached_property
    def drawer(self) -> Drawer:
        """Made by the first chunk, so that what is wrong with the model is told as what is wrong with a chunk."""
        config = self._task.config
        n_gpus = torch.cuda.device_count() if config.device == "cuda" else 0
        if n_gpus:
            config = replace(config, device=f"cuda:{self._number % n_gpus}")
        return replace(self._task, config=config).drawer()

    def draw(self, chunk: int) -> SentChunk:
        return SentChunk.of(self.drawer.draw(chunk, self._count))

    def _count(self, first: int, codes: Tensor) -> None:
        self._counts[self._number] += int((codes >= 0).sum())


_worker: _Worker | None = None


def _begin(task: Task, numbers: Any, counts: Any, ends_with: Connection) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of them; the parent answers it
    threading.Thread(target=_end, args=(ends_with,), daemon=True).start()
    _worker = _Worker(task, numbers.get(), counts)


def _end(ends_with: Connection) -> None:
    """Ends this process at once when the parent closes its side, or is no more."""
    ends_with.poll(None)
    os._exit(1)


def _draw(chunk: int) -> SentChunk:
    assert _worker is not None
    return _worker.draw(chunk)
