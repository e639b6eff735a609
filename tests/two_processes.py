"""Two processes that meet over gloo."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed


@contextmanager
def meeting(rank: int, folder: str) -> Iterator[None]:
    """A process group of ranks 0 and 1 while a with-statement runs. They part as in `training.machine.part`."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    yield
    distributed.barrier()
    distributed.destroy_process_group()
