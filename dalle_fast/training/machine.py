"""What Accelerate is told: precision, accumulation, how a batch is split, checkpoints for any number of processes."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dalle_fast.training.agreement import main_does
from dalle_fast.training.config import LoopConfig, TrainConfig
from dalle_fast.training.ema import MovingAverage
from dalle_fast.training.task import Task

Found = TypeVar("Found")
_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def make_accelerator(config: TrainConfig) -> tuple[Accelerator, int]:
    """The accelerator and the samples of one process and forward.

    Raises: ValueError (a batch that does not split, settings that this machine cannot run).
    """
    # One process may train several models one after the other, each with its precision.
    AcceleratorState._reset_state(reset_partial_state=True)
    plugin = GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False)
    on_cpu = not torch.accelerator.is_available()
    for kind in ("FSDP", "DEEPSPEED"):
        if on_cpu and os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() == "true":
            raise ValueError(
                f"train: {kind} must have accelerators to shard over, got CPUs alone. Start with torchrun."
            )
    # Without `cpu`, each of torchrun's processes on a machine without an accelerator would believe to be the only one.
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=config.loop.precision,
        gradient_accumulation_plugin=plugin,
    )
    micro_batch = _micro_batch(config.loop, accelerator.num_processes)
    micro_steps = config.loop.batch // (micro_batch * accelerator.num_processes)
    if config.loop.precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError('train: loop.precision must be "bf16" or "no" on a CPU, got "fp16". Take bf16.')
    if accelerator.distributed_type in _SHARDED:
        _check_sharded(accelerator, config)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = micro_batch
        settings["gradient_accumulation_steps"] = micro_steps
        settings["gradient_clipping"] = config.optimiser.clip_norm or 0.0
    accelerator.gradient_accumulation_steps = micro_steps
    return accelerator, micro_batch


def _micro_batch(loop: LoopConfig, world: int) -> int:
    micro = loop.micro_batch or loop.batch // world
    if micro < 1 or loop.batch % (micro * world):
        raise ValueError(
            f"train: loop.batch must be a multiple of micro_batch times the processes, got {loop.batch} for "
            f"{max(1, micro)} x {world}. Change one of them."
        )
    return micro


def _check_sharded(accelerator: Accelerator, config: TrainConfig) -> None:
    refused: list[tuple[str, object, str]] = []
    if config.loop.ema_decay is not None:
        refused.append(("loop.ema_decay", config.loop.ema_decay, "null"))
    if config.optimiser.name == "muon":
        refused.append(("optimiser.name", "muon", "adamw"))
    for key, value, instead in refused:
        raise ValueError(
            f"train: {key} must be {instead} where parameters are sharded ({accelerator.distributed_type.value}), got "
            f"{value}: it needs whole ones. Take that, or DDP."
        )


class WholeModule:
    """A task's module with whole weights, averaged ones where an average is kept, in the main process.

    Args: task: its `module` is not prepared yet.
    """

    def __init__(self, accelerator: Accelerator, task: Task) -> None:
        self._accelerator, self._task = accelerator, task
        sharded = accelerator.distributed_type in _SHARDED
        # Shards of all processes meet in a copy on the CPU.
        self._copy = copy.deepcopy(task.module) if sharded and accelerator.is_main_process else None
        self._sharded = sharded

    def do(self, prepared: nn.Module, average: MovingAverage | None, work: Callable[[], Found]) -> Found:
        """What `work` returns, in all processes, from the main process and with the module in eval mode."""
        state = self._accelerator.get_state_dict(prepared) if self._sharded else None

        def on_main() -> Found:
            if self._copy is None:
                return _evaluating(self._task.module, average, work)
            own, self._task.module = self._task.module, self._copy
            try:
                self._copy.load_state_dict(state or {})
                return _evaluating(self._copy, None, work)
            finally:
                self._task.module = own

        return main_does(self._accelerator, on_main)


def _evaluating(module: nn.Module, average: MovingAverage | None, work: Callable[[], Found]) -> Found:
    module.eval()
    try:
        if average is None:
            return work()
        with average.in_place():
            return work()
    finally:
        module.train()


def settle_order_of_sums(prepared: nn.Module) -> None:
    """Has DistributedDataParallel group gradients now, in an order that no step decides.

    It regroups them after its first backward pass, by the order in which they came. Three processes or more then add in
    another order: the first steps of a run that goes on would round otherwise than those of one that never stopped.
    """
    if not isinstance(prepared, DistributedDataParallel):
        return
    module = prepared.module
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    own = vars(module).get("forward")
    module.forward = lambda: torch.stack([parameter.sum().float() for parameter in parameters]).sum()
    try:
        prepared().backward()
    finally:
        del module.forward
        if own is not None:
            module.forward = own
    for parameter in parameters:
        parameter.grad = None


def part(accelerator: Accelerator) -> None:
    """Ends what the processes share; all of them call it.

    gloo's threads drop the tensors of a collective after it is over, and need the interpreter for those that Python
    made. Near the end of the interpreter that aborts the process, or stops it for good. A barrier has no such tensors,
    and gives the threads the time to be done with the others.
    """
    accelerator.wait_for_everyone()
    accelerator.end_training()


def any_number_of_processes(accelerator: Accelerator) -> None:
    """Checkpoints without the prefix that DDP gives to names: one, two or eight processes read them."""

    def save(models: list[nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
        for state in weights:
            for name in list(state):
                state[name.removeprefix("module.")] = state.pop(name)

    def load(models: list[nn.Module], folder: str) -> None:
        models[:] = [accelerator.unwrap_model(model) for model in models]

    if accelerator.distributed_type in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        accelerator.register_save_state_pre_hook(save)
        accelerator.register_load_state_pre_hook(load)
