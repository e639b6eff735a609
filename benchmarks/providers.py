"""Our implementations of an op as providers: one a name of the dispatch table, absent for the table's reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import Case, Job, Provider
from dalle_fast import dispatch


def implementations(
    op: str, call: Callable[[Case, Any, str], Any], facts: Callable[[Case, torch.device], dict[str, object]]
) -> tuple[Provider, ...]:
    """A provider for each implementation name.

    Args:
        op: name in the dispatch table (its module is imported).
        call: (case, inputs, impl) -> result; timed whole.
        facts: (case, device) -> the facts by which the table judges whether an implementation can run.
    """

    def provider(impl: str) -> Provider:
        def missing(case: Case, device: torch.device) -> str | None:
            entry = dispatch.registered()[op].get(impl)
            if impl == "triton" and device.type == "cpu":
                return "Triton's kernels run on GPUs; its interpreter has no speed to report."
            return "not written for this op." if entry is None else entry.supports(**facts(case, device))

        def prepare(case: Case, inputs: Any, device: torch.device) -> Job:
            def whole() -> Any:
                return call(case, inputs, impl)

            return Job(result=whole, pieces={"whole": whole})

        return Provider(impl, prepare, missing, packages=("triton",) if impl == "triton" else ())

    return tuple(provider(impl) for impl in dispatch.IMPLEMENTATIONS)
