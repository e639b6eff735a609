"""Drawing on many machines with Ray Data: chunks are the dataset, actors hold the model, this process writes.

An actor that dies is started again and what it was drawing is drawn once more; the bits of a sample do not depend on
who draws it. Every machine must see the model under the path that the job's configuration names.
"""

from __future__ import annotations

import importlib
import logging
import pickle
import socket
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from dalle_fast.jobs.job import DrawnChunk, JobConfig
from dalle_fast.jobs.pool import SentChunk, Task
from dalle_fast.jobs.run import Draws

if TYPE_CHECKING:
    from dalle_fast.jobs.stream import Drawer

LOCAL = "local"  # the address that starts a cluster on this machine
_ANSWERS_WITHIN = 10.0  # seconds


def drawn_on_ray(
    config: JobConfig, known: Tensor | None, address: str, actors: int | None = None, *, max_memory: int | None = None
) -> Draws:
    """Draws with the actors of a Ray cluster.

    Args:
        known: codes [image_seq_len], -1 where they are drawn.
        address: of the cluster, as `ray.init` takes it; "local" starts one on this machine.
        actors: how many; None: one a GPU where the job's device is one, otherwise one a machine.
        max_memory: bytes, of each actor.
    Raises: RuntimeError (Ray is not installed, no cluster at this address, the drawing itself failed).
    """
    ray = _ray()

    def draw(chunks: Sequence[int]) -> Iterator[DrawnChunk]:
        if not chunks:
            return
        own = not ray.is_initialized()
        if own:
            _connect(ray, address)
        try:
            yield from _drawn(ray, config, known, chunks, actors, max_memory)
        finally:
            if own:
                ray.shutdown()

    return draw


def _drawn(
    ray: Any, config: JobConfig, known: Tensor | None, chunks: Sequence[int], actors: int | None, max_memory: int | None
) -> Iterator[DrawnChunk]:
    on_gpus = config.device.startswith("cuda")
    n, cpus = _shares(ray, actors, len(chunks), on_gpus)
    # A block a chunk: what an actor takes at a time, and what is drawn once more when it dies.
    data = ray.data.from_items([{"chunk": chunk} for chunk in chunks], override_num_blocks=len(chunks))
    data.context.enable_progress_bars = False
    data.context.execution_no_progress_timeout_s = -1  # a chunk may take as long as it takes
    drawn = data.map_batches(
        ChunkActor,
        fn_constructor_args=(Task.of(config, known, max_memory, cpus),),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=n),
        num_cpus=cpus,
        num_gpus=1 if on_gpus else 0,
    )
    for row in drawn.iter_rows():
        answer = pickle.loads(row["answer"])
        if isinstance(answer, str):
            raise RuntimeError(answer)
        yield answer.received()


class ChunkActor:
    """An actor that draws chunks; its model is read for the first one."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._drawer: Drawer | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A batch {"chunk": [1]} as {"answer": [1]}: a pickled SentChunk, or the sentence that says what is wrong."""
        try:
            answer: SentChunk | str = SentChunk.of(self._read().draw(int(batch["chunk"][0])))
        except Exception as error:  # told by the process that asked, without the traces of three machines
            answer = str(error) or type(error).__name__
        pickled = np.empty(1, dtype=object)
        pickled[0] = pickle.dumps(answer)
        return {"answer": pickled}

    def _read(self) -> Drawer:
        if self._drawer is None:
            self._drawer = self._task.drawer()
        return self._drawer


def _shares(ray: Any, actors: int | None, n_chunks: int, on_gpus: bool) -> tuple[int, int]:
    """How many actors there are to be, and CPU cores of each."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    cores = [int(resources["CPU"]) for resources in machines]
    if actors is None:
        actors = int(sum(resources.get("GPU", 0) for resources in machines)) if on_gpus else len(machines)
    n = max(1, min(actors, n_chunks))
    return n, max(1, min(min(cores, default=1), sum(cores) // n))


def _connect(ray: Any, address: str) -> None:
    try:
        host, _, port = address.rpartition("://")[2].rpartition(":")
        if host:  # Ray itself waits for minutes where nobody answers
            socket.create_connection((host, int(port)), timeout=_ANSWERS_WITHIN).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise RuntimeError(
            f"sample: --ray must be the address of a Ray cluster, or {LOCAL!r}, got {address!r} ({reason:.200})."
        ) from None


def _ray() -> Any:
    try:
        ray = importlib.import_module("ray")
        importlib.import_module("ray.data")
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells of itself as it works
    except ModuleNotFoundError as error:
        if error.name not in ("ray", "ray.data"):
            raise
        raise RuntimeError("sample: --ray needs Ray, which is not installed. pip install 'dalle-fast[ray]'") from None
    return ray
