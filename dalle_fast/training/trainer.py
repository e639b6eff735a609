"""The training loop, on Hugging Face Accelerate: one process or many, started by `accelerate launch` or torchrun.

A step takes `loop.batch` samples, split over processes and micro-steps; its gradient is the mean over all of them, so
a loss that is a mean over samples learns the same however they are split. Random draws of a module come from torch's
default generator, which every micro-step seeds with a function of (loop.seed, step, place in the batch): a checkpoint
holds no random state, and a run that goes on from it makes the same steps, bit for bit.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor

from dalle_fast.training.agreement import main_does
from dalle_fast.training.checkpoints import CHECKPOINTS, DEAD_WORKER, Checkpoints, claim
from dalle_fast.training.config import TrainConfig
from dalle_fast.training.ema import MovingAverage
from dalle_fast.training.machine import (
    WholeModule,
    any_number_of_processes,
    make_accelerator,
    part,
    settle_order_of_sums,
)
from dalle_fast.training.meter import Meter
from dalle_fast.training.optimisers import make_optimiser
from dalle_fast.training.schedules import Plateau, learning_rate
from dalle_fast.training.stopping import StopSignals
from dalle_fast.training.task import Batch, Source, Task
from dalle_fast.training.trackers import Console, CsvTracker, tensorboard_tracker, write_pictures
from dalle_fast.whole_files import TEMPORARY, bring_to_disk

_EMA = "ema.safetensors"
_PICTURED = 8  # held-out samples

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """How a training ended.

    Attributes: step: steps made, in all runs.   figures: the last row of the log.
        stopped: "finished", or the signal: "SIGTERM", "SIGINT".
    """

    step: int
    figures: dict[str, float]
    stopped: str


def run(
    task: Task,
    source: Source,
    config: TrainConfig,
    out: Path,
    *,
    on_log: Callable[[dict[str, Any]], None] | None = None,
) -> Result:
    """Trains until `loop.steps` steps are made; the same call goes on after the last good checkpoint in `out`.

    Args:
        task: its module is trained in place.   out: config.yaml, log.csv, tensorboard/, pictures/, checkpoints/ and,
            at the end, model/: what `task.save` writes.
        on_log: gets each row of the log, in the main process.
    Raises: ValueError (settings that do not go together, an `out` that holds something else), RuntimeError (another
        training at work there; a loss that is not finite; a checkpoint that cannot be written; a worker that died).
    """
    with ExitStack() as stack:
        accelerator, micro_batch = make_accelerator(config)
        stop = stack.enter_context(StopSignals())
        main_does(accelerator, lambda: _hold(stack, claim(out, config)))
        training = _Training(accelerator, task, source, config, out, micro_batch, stop, on_log)
        stack.callback(training.close)
        result = training.run()
    part(accelerator)
    return result


def _hold(stack: ExitStack, file: IO[bytes]) -> None:
    stack.enter_context(file)


class _Training:
    """One run: set up, resumed, stepped, logged, saved. All processes make the same calls."""

    def __init__(
        self,
        accelerator: Accelerator,
        task: Task,
        source: Source,
        config: TrainConfig,
        out: Path,
        micro_batch: int,
        stop: StopSignals,
        on_log: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self.accelerator, self.task, self.source, self.config, self.out = accelerator, task, source, config, out
        self.micro_batch, self.stop, self.on_log = micro_batch, stop, on_log
        self.loop, self.device, self.main = config.loop, accelerator.device, accelerator.is_main_process
        self.micro_steps = accelerator.gradient_accumulation_steps
        self.whole = WholeModule(accelerator, task)
        any_number_of_processes(accelerator)
        optimiser = make_optimiser(config.optimiser, task.parameters_for())
        self.module, self.optimiser = accelerator.prepare(task.module, optimiser)
        settle_order_of_sums(self.module)
        self.parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        decay = self.loop.ema_decay
        self.average = None if decay is None else MovingAverage(task.parameters_for(), decay)
        every = config.schedule.every or max(1, source.n // self.loop.batch)
        self.plateau = Plateau(config.schedule, every) if config.schedule.learning_rate == "plateau" else None
        self.meter = Meter(self.device)
        self.checkpoints = Checkpoints(accelerator, out / CHECKPOINTS, self.loop.keep)
        self.step, self.skipped = 0, 0
        self.seconds_before, self.started, self.rate = 0.0, time.perf_counter(), 0.0
        self.row: dict[str, Any] = {}
        self.micro_batches: Iterator[Batch] = iter(())
        self.last_batch: Batch = {}

    # ------------------------------------------------------------------------------------------------------ the run

    def run(self) -> Result:
        """Until the last step, or a signal."""
        self._resume()
        self._start_trackers()
        if self.step == 0:
            self.console.say(main_does(self.accelerator, lambda: self.source.report(self.out)))
        self.module.train()
        self._start_clock()
        try:
            stopped = self._steps()
        except RuntimeError as error:
            if DEAD_WORKER not in str(error):
                raise
            raise RuntimeError(
                f"train: the workers that read data must stay alive, got {str(error).splitlines()[0]!r} after step "
                f"{self.step}. Last good checkpoint: {self.checkpoints.last_good}. Run the same command again, with "
                "fewer data.workers if memory ran out."
            ) from error
        if stopped == "finished":
            self._write_model()
        return Result(self.step, self.row, stopped)

    def _steps(self) -> str:
        """All that are to be made; "finished", or the signal that ended them."""
        if self.step < self.loop.steps:
            self.micro_batches = iter(self._loader())
        while self.step < self.loop.steps:
            started = time.perf_counter()
            signalled = self._one_step()
            self.busy += time.perf_counter() - started
            self._write_what_is_due()
            if signalled or self.step % self.loop.save_steps == 0 or self.step == self.loop.steps:
                self._save()
            if signalled and self.step < self.loop.steps:
                return self.stop.name or "SIGTERM"
        return "finished"

    def close(self) -> None:
        """Ends what writes."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers.clear()
        if hasattr(self, "console"):
            self.console.close()

    def _resume(self) -> None:
        def read_average(folder: Path) -> None:
            if self.average is not None:
                self.average.load(folder / _EMA)

        facts = self.checkpoints.load(read_average)
        if facts is None:
            return
        self.step, self.skipped, self.seconds_before = facts["step"], facts["skipped"], facts["seconds"]
        self.meter.load_state_dict(facts["meter"])
        if self.plateau is not None:
            self.plateau.load_state_dict(facts["plateau"])
        if self.step > self.loop.steps:
            raise ValueError(
                f"train: loop.steps must be at least the {self.step} that {self.out} has made, got {self.loop.steps}."
            )
        if self.main:
            _log.info("train: going on after step %d of %s", self.step, self.checkpoints.last_good)

    def _start_trackers(self) -> None:
        if self.main:
            csv = CsvTracker(self.out / "log.csv", self.step)
            self.accelerator.log_with = [csv, tensorboard_tracker(self.out / "tensorboard", self.step)]
            self.accelerator.init_trackers("")
        self.console = Console(f"train {self.task.name}", self.step, self.loop.steps, shown=self.main)

    def _loader(self) -> Iterable[Batch]:
        return self.source.loader(
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            batch=self.loop.batch,
            micro_batch=self.micro_batch,
            first_step=self.step,
            steps=self.loop.steps - self.step,
            seed=self.loop.seed,
            workers=self.config.data.workers,
            pin_memory=self.device.type == "cuda",
        )

    # ------------------------------------------------------------------------------------------------------ one step

    def _one_step(self) -> bool:
        """Accumulates, checks, updates. Whether a signal asks to stop."""
        rate = learning_rate(self.config.optimiser, self.config.schedule, self.step, self.loop.steps, self.plateau)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        losses, names = [], []
        for number in range(self.micro_steps):
            batch = self._next_batch()
            names.append(batch.pop("names", []))
            self._seed(number)
            with self.accelerator.accumulate(self.module):
                loss, figures = self.module(batch, self.step, self.step / self.loop.steps)
                self.accelerator.backward(loss)
            losses.append(loss.detach().float())
            self.meter.add({"loss": loss, **figures}, 1 / self.micro_steps)
        limit = self.config.optimiser.clip_norm or math.inf
        norm = self.accelerator.clip_grad_norm_(self.parameters, limit)
        mean, signalled = self._check(losses, names, norm)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.step += 1
        if self.accelerator.optimizer_step_was_skipped:
            self.skipped += 1
        elif self.average is not None and self.step % self.loop.ema_steps == 0:
            self.average.update()
        if self.plateau is not None:
            self.plateau.read(mean)
        self.rate = rate
        self.console.stepped()
        return signalled

    def _next_batch(self) -> Batch:
        """A micro-batch on the device; the time it takes to come is counted."""
        started = time.perf_counter()
        try:
            batch = next(self.micro_batches)
        except (ConnectionError, EOFError) as error:  # it died while its tensors were fetched
            raise RuntimeError(f"{DEAD_WORKER} is gone ({type(error).__name__})") from error
        batch = send_to_device(dict(batch), self.device, non_blocking=True)
        self.waited += time.perf_counter() - started
        self.last_batch = batch
        return dict(batch)

    def _seed(self, number: int) -> None:
        place = number * self.accelerator.num_processes + self.accelerator.process_index
        word = hashlib.blake2b(f"{self.loop.seed} {self.step} {place}".encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(word, "little"))

    def _check(self, losses: list[Tensor], names: list[list[str]], norm: Tensor | float | None) -> tuple[float, bool]:
        """The loss of the whole batch, and whether any process was signalled; one reduction, one wait for the device.

        Raises: RuntimeError (a loss, or without loss scaling a gradient, that is not finite).
        """
        each = torch.stack(losses)
        bad = (~each.isfinite()).sum()
        flags = torch.stack([each.mean(), bad.float(), torch.tensor(float(bool(self.stop.name)), device=self.device)])
        flags = self.accelerator.reduce(flags, "sum")
        norm = torch.as_tensor(0.0 if norm is None else norm, device=self.device, dtype=torch.float32)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        total, n_bad, n_signals, length = torch.cat([flags, norm.reshape(1)]).tolist()
        mean = total / self.accelerator.num_processes
        scaled = self.loop.precision == "fp16"
        if n_bad or not (scaled or math.isfinite(length)):
            guilty = (part for loss, part in zip(losses, names, strict=True) if not (n_bad and loss.isfinite()))
            files = gather_object([name for part in guilty for name in part])
            what, got = ("loss", mean) if n_bad else ("the gradients' norm", length)
            raise RuntimeError(
                f"train: {what} must be finite, got {got} at step {self.step + 1} (files {_some(files)}). Nothing was "
                f"learnt from it. Last good checkpoint: {self.checkpoints.last_good}. Take a lower learning rate or "
                "look at these files."
            )
        if math.isfinite(length):
            self.meter.add({"grad_norm": norm}, 1.0)
        return mean, n_signals > 0

    # ------------------------------------------------------------------------------------------------------- writing

    def _write_what_is_due(self) -> None:
        """Pictures, figures on held-out samples, the log's row."""
        loop, last = self.loop, self.step == self.loop.steps

        def due(every: int | None) -> bool:
            return every is not None and (self.step % every == 0 or last)

        try:
            held_out = self._evaluate() if due(loop.evaluate_steps) else {}
            if due(loop.picture_steps):
                self._write_pictures()
            if held_out or due(loop.log_steps):
                self._log(held_out)
        except OSError as error:
            raise RuntimeError(self.checkpoints.sentence("the log must be written", error)) from error

    def _log(self, held_out: dict[str, float]) -> None:
        row: dict[str, Any] = {"step": self.step, "seconds": self._seconds()}
        row["epoch"] = self.step * self.loop.batch / self.source.n
        row |= self.meter.means(self.accelerator) | {"learning_rate": self.rate}
        images = (self.step - self.logged) * self.loop.batch
        row |= {"images_per_second": images / self.busy, "data_share": self.waited / self.busy}
        if self.loop.precision == "fp16":
            row["fp16_skipped"] = self.skipped
        row |= {"unreadable": sum(self.source.skipped().values())} | self.task.figures() | held_out
        self.meter.clear()
        self.row = row
        self.accelerator.log({key: value for key, value in row.items() if key != "step"}, step=self.step)
        if self.main:
            self.console.log(row)
            if self.on_log is not None:
                self.on_log(row)
        self._start_clock()

    def _evaluate(self) -> dict[str, float]:
        def work() -> dict[str, float]:
            batches = self.source.held_out(self.micro_batch)
            if batches is None:
                return {}
            device = next(self.task.module.parameters()).device
            with torch.no_grad():
                figures = self.task.evaluate(send_to_device(batch, device) for batch in batches)
            return {f"held_out_{name}": figure for name, figure in figures.items()}

        return self.whole.do(self.module, self.average, work)

    def _write_pictures(self) -> None:
        def work() -> None:
            held_out = self.source.held_out(_PICTURED)
            batch = self.last_batch if held_out is None else next(iter(held_out))
            batch = send_to_device(batch, next(self.task.module.parameters()).device)
            with torch.no_grad():
                pictures = self.task.pictures(batch)
            write_pictures(
                self.out / "pictures", pictures, self.step, self.accelerator.get_tracker("tensorboard", True)
            )

        self.whole.do(self.module, self.average, work)

    def _save(self) -> None:
        def write_average(folder: Path) -> None:
            if self.average is not None:
                self.average.save(folder / _EMA)

        facts: dict[str, Any] = {"step": self.step, "skipped": self.skipped, "seconds": self._seconds()}
        facts |= {"meter": self.meter.state_dict(self.accelerator)}
        facts |= {"plateau": None if self.plateau is None else self.plateau.state_dict()}
        self.checkpoints.save(self.step, facts, write_average)

    def _write_model(self) -> None:
        """The result, in the place of an older one."""

        def work() -> None:
            path, scratch = self.out / "model", self.out / f"{TEMPORARY}model"
            old = self.out / f"{TEMPORARY}old-model"
            for folder in (scratch, old):
                shutil.rmtree(folder, ignore_errors=True)
            scratch.mkdir()
            self.task.save(scratch)
            if path.exists():
                os.replace(path, old)
            os.replace(scratch, path)
            bring_to_disk(self.out)
            shutil.rmtree(old, ignore_errors=True)

        try:
            self.whole.do(self.module, self.average, work)
        except OSError as error:
            raise RuntimeError(self.checkpoints.sentence("the model must be written", error)) from error

    def _start_clock(self) -> None:
        self.logged, self.busy, self.waited = self.step, 0.0, 0.0

    def _seconds(self) -> float:
        """Of all runs."""
        return self.seconds_before + time.perf_counter() - self.started


def _some(files: list[str]) -> str:
    shown = ", ".join(map(str, files[:8]))
    return f"{shown}, ..." if len(files) > 8 else shown or "unknown"
