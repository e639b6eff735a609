"""The implementations that tests of an op run over, each skipped with its own reason where it cannot run."""

from __future__ import annotations

import pytest

from dalle_fast import dispatch


def skip_without(impl: str, op: str = "sparse_attention", **facts: object) -> None:
    """Skips the running test with the sentence that a user gets who asks for `impl` by name.

    Args: facts: of the call, where it matters; every kernel takes those that `supports` has by default.
    """
    reason = dispatch.registered()[op][impl].supports(**facts)
    if reason is not None:
        pytest.skip(reason.removeprefix("missing: "))


def auto_takes(monkeypatch: pytest.MonkeyPatch, impl: str, op: str = "sparse_attention") -> None:
    """Until the test ends, `op` with impl="auto" runs on `impl` or raises."""
    only = {impl: dispatch.registered()[op][impl]}
    monkeypatch.setitem(dispatch._OPS, op, only)
