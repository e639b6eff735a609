"""Batches for a trainer out of numbered samples, in the order of the steps, read by the workers of a DataLoader."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dalle_fast.training.data.captions import Captions, CaptionTooLong
from dalle_fast.training.data.pictures import BROKEN, Pixels
from dalle_fast.training.data.samples import DataError, Samples, Unusable
from dalle_fast.training.order import Draw, StepOrder, Stream, generator, is_held_out
from dalle_fast.training.stopping import leave_signals_to_the_trainer

# What a worker has to tell beside the tensors.
_SKIPPED, _ERROR = "skipped", "error"


class SampleSource:
    """The `Source` over `Samples`.

    Args:
        pixels, captions: how pictures and captions are read; None: not at all.
        held_out: share of the samples kept from training, chosen by the hash of their keys.
    Raises: ValueError (nothing left to train on).
    """

    def __init__(
        self,
        samples: Samples,
        *,
        pixels: Pixels | None = None,
        captions: Captions | None = None,
        held_out: float = 0.0,
    ) -> None:
        self.samples, self.pixels, self.captions = samples, pixels, captions
        apart = [held_out > 0 and is_held_out(samples.key(i), held_out) for i in range(len(samples))]
        mask = torch.tensor(apart, dtype=torch.bool)
        self.trained, self.kept_apart = (~mask).nonzero().flatten(), mask.nonzero().flatten()
        if not len(self.trained):
            raise ValueError(
                f"train: held_out must leave samples to train on, got {held_out} of {len(samples)}. Make it smaller."
            )
        self.n = len(self.trained)

    def loader(
        self,
        *,
        rank: int,
        world: int,
        batch: int,
        micro_batch: int,
        first_step: int,
        steps: int,
        seed: int,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> Iterator[dict[str, Any]]:
        """This process's micro-batches of `steps` steps, `batch` // (`micro_batch` * `world`) each; see `StepOrder`.

        Raises: ValueError (a batch that does not split; while reading, a caption too long or no usable sample),
            RuntimeError (a worker died).
        """
        order = StepOrder(
            self.n,
            batch=batch,
            micro_batch=micro_batch,
            rank=rank,
            world=world,
            seed=seed,
            first_step=first_step,
            steps=steps,
        )
        reads = Reads(self.samples, self.trained, self.pixels, self.captions, seed=seed)
        return self.read(reads, order, workers=workers, pin_memory=pin_memory)

    def held_out(self, batch: int) -> Iterator[dict[str, Any]] | None:
        """The samples kept apart, in order, nothing drawn; None if there are none. Unusable ones are left out."""
        if not len(self.kept_apart):
            return None
        reads = Reads(self.samples, self.kept_apart, self.pixels, self.captions, seed=None, replace=False)
        parts = torch.arange(len(self.kept_apart)).split(batch)
        order = [[Draw(place, place) for place in part.tolist()] for part in parts]
        return (read for read in self.read(reads, order) if read["names"])

    def skipped(self) -> Counter[str]:
        """How many samples were left out so far, by reason."""
        return self.samples.skipped.counts

    def report(self, out: Path) -> str:
        """What the data are: out/data.txt, which is returned, and out/batch.png."""
        from dalle_fast.training.data.report import write_report  # draws, which the loop does not

        return write_report(self, out)

    def read(
        self, reads: Reads, order: Iterable[list[Draw]], *, workers: int = 0, pin_memory: bool = False
    ) -> Iterator[dict[str, Any]]:
        """The batches of `order`, what was skipped taken note of."""
        loader: DataLoader[dict[str, Any]] = DataLoader(
            reads,
            batch_sampler=order,
            num_workers=workers,
            collate_fn=_same,
            pin_memory=pin_memory,
            worker_init_fn=leave_signals_to_the_trainer,
            generator=torch.Generator(),  # the default one would go on by a number with each loader
        )
        try:
            for batch in loader:
                for skipped in batch.pop(_SKIPPED):
                    self.samples.skipped.add(*skipped)
                error = batch.pop(_ERROR)
                if error is not None:
                    raise DataError(error)
                yield batch
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise RuntimeError(
                f"train: a worker that reads data must stay alive, one was killed ({str(error).splitlines()[0]}). Out "
                "of memory is the usual cause: take fewer data.workers. The same command goes on."
            ) from error


class Reads(Dataset[dict[str, Any]]):
    """Lists of draws become batches; what cannot be used is replaced by the sample after it in the data.

    Args:
        indices: long [n], the samples that `Draw.index` counts.   seed: of the draws; None: nothing is drawn.
        replace: False leaves out what cannot be used: shorter batches.
    """

    def __init__(
        self,
        samples: Samples,
        indices: Tensor,
        pixels: Pixels | None,
        captions: Captions | None,
        *,
        seed: int | None,
        replace: bool = True,
    ) -> None:
        self.samples, self.indices, self.pixels, self.captions = samples, indices, pixels, captions
        self.seed, self.replace = seed, replace
        self._unusable: set[int] = set()

    def __getitems__(self, draws: list[Draw]) -> dict[str, Any]:
        """The batch of these draws: tensors, names, and what was skipped or went wrong."""
        rows: list[dict[str, Any]] = []
        skipped: list[tuple[str, str, str]] = []
        error = None
        try:
            for draw in draws:
                row = self._usable(draw, skipped)
                if row is not None:
                    rows.append(row)
        except DataError as found:  # raised here, it would come with the worker's traceback
            error = str(found)
        batch: dict[str, Any] = {"names": [row.pop("name") for row in rows], _SKIPPED: skipped, _ERROR: error}
        batch["position"] = torch.tensor([row.pop("position") for row in rows], dtype=torch.long)
        batch["index"] = torch.tensor([row.pop("index") for row in rows], dtype=torch.long)
        for field in rows[0] if rows else ():
            batch[field] = torch.stack([row[field] for row in rows])
        return batch

    def _usable(self, draw: Draw, skipped: list[tuple[str, str, str]]) -> dict[str, Any] | None:
        """The sample drawn or the first usable one after it; None where it must not be replaced.

        Raises: DataError (none can be used, a caption too long).
        """
        n = len(self.indices)
        for place in range(draw.index, draw.index + (n if self.replace else 1)):
            index = int(self.indices[place % n])
            if index in self._unusable:
                continue
            try:
                return self._read(index, draw.position)
            except Unusable as error:
                self._unusable.add(index)
                skipped.append((self.samples.name(index), error.reason, str(error)))
        if not self.replace:
            return None
        raise DataError(
            f"train: the data must hold a sample that can be used, got {n} unusable ones. The log names each file and "
            "what is wrong with it."
        )

    def _read(self, index: int, position: int) -> dict[str, Any]:
        name = self.samples.name(index)
        row: dict[str, Any] = {"name": name, "position": position, "index": index}
        if self.captions is not None:
            lines = self.samples.captions(index)
            try:
                row["text"] = self.captions(lines, self._generator(position, Stream.CAPTION))
            except CaptionTooLong as error:
                raise DataError(f"train: {name}: {error}") from None
        if self.samples.has_codes:
            row["codes"] = self.samples.codes(index)
        elif self.pixels is not None:
            try:
                row["pixels"] = self.pixels(self.samples.picture(index), self._generator(position, Stream.PICTURE))
            except BROKEN as error:
                raise Unusable("broken picture", f"{type(error).__name__}: {error}") from None
        return row

    def _generator(self, position: int, stream: Stream) -> torch.Generator | None:
        return None if self.seed is None else generator(self.seed, position, stream)


def _same(batch: Any) -> Any:
    return batch
