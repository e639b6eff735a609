"""Which implementation of an op runs, and why: one table, one sentence for every refusal.

An op registers its implementations with a `supports` function that looks at the facts of a call (device type, dtype,
head width, ...) and returns None where it can run, or the reason in words where it cannot. The same sentence is the
error of an implementation asked for by name, the line in `explain`, and the skip reason of a test. One that can run but
should not unless asked for gives its reason by `avoid`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

IMPLEMENTATIONS = ("reference", "cpu", "triton", "cuda")

Supports = Callable[..., str | None]
T = TypeVar("T")


@dataclass(frozen=True)
class Implementation:
    """One way to run an op: `function` does it, `supports(**facts)` says in words why it cannot (None: it can)."""

    name: str
    function: Callable
    supports: Supports
    avoid: Supports  # why `auto` passes over it where it could run (None: it does not)
    rank: int  # `auto` takes the supported implementation of the highest rank


_OPS: dict[str, dict[str, Implementation]] = {}


def constant(function: Callable[[], T]) -> Callable[[], T]:
    """Marks what a `supports` function asks of the machine: torch.compile runs it while it traces and keeps the answer.

    torch.compiler.assume_constant_result does the same, but imports torch._dynamo, and Triton with it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def _no_objection(**facts: object) -> str | None:
    return None


def register(
    op: str,
    name: str,
    function: Callable,
    *,
    supports: Supports = _no_objection,
    avoid: Supports = _no_objection,
    rank: int = 0,
) -> None:
    """Adds implementation `name` of `op`; called where the op is defined, once."""
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"{op}: implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {name!r}.")
    _OPS.setdefault(op, {})[name] = Implementation(name, function, supports, avoid, rank)


def choose(op: str, impl: str = "auto", **facts: object) -> Implementation:
    """The implementation that runs `op` for a call with these facts.

    Args:
        impl: "auto" takes the best supported one; a name gets that one or an error, never another.
    Raises: ValueError (unknown name), NotImplementedError (the op has no such implementation, or it does not support
        the call), RuntimeError (what it needs is missing from this machine).
    """
    table = _table(op)
    if impl == "auto":
        best = None
        for candidate in table.values():  # spelt out: torch.compile traces this
            objection = candidate.supports(**facts) or candidate.avoid(**facts)
            if objection is None and (best is None or candidate.rank > best.rank):
                best = candidate
        if best is None:
            raise NotImplementedError(f"{op}: no implementation supports this call. {refusals(op, facts)}")
        return best
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{op}: impl must be 'auto' or one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}.")
    if impl not in table:
        raise NotImplementedError(f"{op}: has no {impl!r} implementation. Use one of {', '.join(table)} or 'auto'.")
    reason = table[impl].supports(**facts)
    if reason is not None:
        error = RuntimeError if reason.startswith("missing: ") else NotImplementedError
        raise error(
            f"{op}: impl={impl!r} cannot run here: {reason.removeprefix('missing: ')} Use impl='auto' for another one."
        )
    return table[impl]


def explain(op: str, **facts: object) -> str:
    """In words: which implementation of `op` runs for a call with these facts, and why the others do not."""
    chosen = choose(op, "auto", **facts).name
    return f"{op}: runs on {chosen!r}.\n{refusals(op, facts, chosen=chosen)}"


def refusals(op: str, facts: Mapping[str, object], *, chosen: str = "") -> str:
    """Why each implementation but `chosen` does not run a call with these facts, a line each."""
    lines = []
    for name in IMPLEMENTATIONS:
        if name == chosen:
            continue
        implementation = _table(op).get(name)
        if implementation is None:
            lines.append(f"  {name}: not written for this op.")
        else:
            reason = implementation.supports(**facts) or implementation.avoid(**facts)
            lines.append(f"  {name}: {reason.removeprefix('missing: ') if reason else 'supported, ranked lower.'}")
    return "\n".join(lines)


def registered() -> Mapping[str, Mapping[str, Implementation]]:
    """Every op and its implementations (read only)."""
    return _OPS


def _table(op: str) -> dict[str, Implementation]:
    if op not in _OPS:
        raise ValueError(f"explain: op must be one of {', '.join(sorted(_OPS))}, got {op!r}.")
    return _OPS[op]
