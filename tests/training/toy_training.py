"""A tiny task and data in memory for tests of the loop; as a program, one training in a process of its own.

python tests/training/toy_training.py OUT KEY=VALUE ...   with settings of the loop, and toy.NAME=VALUE ones
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader, Dataset

from dalle_fast.training.config import VaeConfig, resolve
from dalle_fast.training.order import Draw, StepOrder

DEFAULTS = ("data.source=memory", "data.workers=0", "loop.steps=6", "loop.batch=4", "loop.log_steps=1")


def config_of(*settings: str) -> VaeConfig:
    """The defaults, and over them these settings."""
    config = resolve("vae", overrides=[*DEFAULTS, *settings])
    assert isinstance(config, VaeConfig)
    return config


class ToyModule(nn.Module):
    """A linear map with dropout, whose buffer counts what it saw."""

    def __init__(self, dropout: float, generator: torch.Generator) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Dropout(dropout), nn.Linear(8, 1))
        for parameter in self.model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, batch, step: int, progress: float):
        if self.training:
            self.seen += len(batch["x"])
        loss = (self.model(batch["x"])[:, 0] - batch["y"]).square().mean()
        return loss, {"absolute": loss.detach().sqrt()}


class ToyTask:
    """Args: dropout: draws at random in every step."""

    name = "toy"

    def __init__(self, dropout: float = 0.0) -> None:
        self.module = ToyModule(dropout, torch.Generator().manual_seed(1))

    def parameters_for(self):
        return list(self.module.named_parameters())

    def figures(self):
        return {"toys": 2.0}

    def pictures(self, batch):
        assert not self.module.training
        return {"toy": torch.full((3, 4, 4), len(batch["x"]), dtype=torch.uint8)}

    def evaluate(self, batches):
        assert not self.module.training
        losses = [self.module(batch, 0, 0.0)[0] for batch in batches]
        return {"loss": float(sum(losses) / len(losses))}

    def save(self, directory: Path) -> None:
        torch.save(self.module.state_dict(), directory / "toy.pt")


class _Memory(Dataset):
    def __init__(self, n: int, nan_at: int, slow: float, die_at: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(n, 6, generator=generator), torch.randn(n, generator=generator)
        self.nan_at, self.slow, self.die_at = nan_at, slow, die_at

    def __getitem__(self, draw: Draw):
        time.sleep(self.slow)
        if draw.position == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        x = self.x[draw.index]
        return (torch.full_like(x, torch.nan) if draw.position == self.nan_at else x), self.y[draw.index], draw


def _collate(samples):
    x, y, draws = zip(*samples, strict=True)
    positions = torch.tensor([draw.position for draw in draws])
    names = [f"{draw.index}.png" for draw in draws]
    return {"x": torch.stack(x), "y": torch.stack(y), "position": positions, "names": names}


class ToySource:
    """Args: n: samples.   nan_at, die_at: the position of a NaN, of a dying reader.   slow: seconds each."""

    def __init__(self, n: int = 10, *, nan_at: int = -1, slow: float = 0.0, die_at: int = -1) -> None:
        self.n = n
        self._data = _Memory(n, nan_at, slow, die_at)

    def loader(self, *, rank, world, batch, micro_batch, first_step, steps, seed, workers, pin_memory):
        from dalle_fast.training.stopping import leave_signals_to_the_trainer

        order = StepOrder(
            self.n, batch=batch, micro_batch=micro_batch, rank=rank, world=world, seed=seed, first_step=first_step,
            steps=steps,
        )  # fmt: skip
        return DataLoader(
            self._data, batch_sampler=order, num_workers=workers, collate_fn=_collate,
            worker_init_fn=leave_signals_to_the_trainer if workers else None,
        )  # fmt: skip

    def held_out(self, batch: int):
        return [{"x": torch.ones(2, 6), "y": torch.zeros(2), "names": ["a", "b"]}]

    def skipped(self):
        return Counter({"empty caption": 1})

    def report(self, out: Path) -> str:
        (out / "data.txt").write_text("ten toys\n")
        return "ten toys"


def shard_on_cpus() -> None:
    """Accelerate shards parameters (FSDP2) only over accelerators; here it believes that CPUs are some."""
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    from dalle_fast.training import machine

    class Sharding(Accelerator):
        def __init__(self, **settings) -> None:
            super().__init__(**settings)
            self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=1, cpu_ram_efficient_loading=False
            )
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.state.distributed_type = DistributedType.FSDP

    machine.Accelerator = Sharding  # type: ignore[misc]


def main(out: str, *settings: str) -> None:
    """A training, whose task and source take the settings toy.dropout, toy.nan_at, toy.slow, toy.die_at, toy.n;
    toy.sharded: FSDP2; toy.kill_at and toy.stop_at are steps after whose log it gets a signal."""
    from dalle_fast.training.trainer import run

    torch.set_num_threads(1)
    toy = {k.removeprefix("toy."): yaml.safe_load(v) for k, _, v in (s.partition("=") for s in settings) if "toy." in k}
    task = ToyTask(toy.pop("dropout", 0.0))
    if toy.pop("sharded", False):
        shard_on_cpus()
    kill_at, stop_at = toy.pop("kill_at", None), toy.pop("stop_at", None)

    def on_log(row) -> None:
        print(row["step"], row["loss"], flush=True)
        if row["step"] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if row["step"] == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    config = config_of(*(setting for setting in settings if not setting.startswith("toy.")))
    result = run(task, ToySource(**toy), config, Path(out), on_log=on_log)
    # One write: two processes print into one pipe.
    sys.stdout.write(f"stopped: {result.stopped} {result.step}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
