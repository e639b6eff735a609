"""What one process finds out, all do: none is left waiting for one that has stopped."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from accelerate import Accelerator

Found = TypeVar("Found")


def main_does(accelerator: Accelerator, work: Callable[[], Found]) -> Found:
    """What `work` returns or raises in the main process, in all of them; it must be picklable."""
    if accelerator.num_processes == 1:
        return work()
    from accelerate.utils import broadcast_object_list

    found: list[Found | Exception | None] = [None]
    if accelerator.is_main_process:
        try:
            found = [work()]
        except Exception as error:
            found = [error]
    (result,) = broadcast_object_list(found)
    if isinstance(result, Exception):
        raise result
    return result


def all_do(accelerator: Accelerator, work: Callable[[], None]) -> None:
    """Runs `work` in all processes; what it raises in one of them, all raise."""
    if accelerator.num_processes == 1:
        return work()
    from accelerate.utils import gather_object

    errors: list[Exception | None] = [None]
    try:
        work()
    except Exception as error:
        errors = [error]
    for found in gather_object(errors):
        if found is not None:
            raise found
    return None
