"""The implementations of sparse_attention that tests run over, each skipped with its own reason where it cannot run."""

from __future__ import annotations

import pytest
import torch

from dalle_fast import dispatch
from dalle_fast.ops.sparse_attention import OP


def skip_without(impl: str, device: str = "cpu", dtype: torch.dtype = torch.float32, head_dim: int = 16) -> None:
    """Skips the running test with the sentence that a user gets who asks for `impl` by name."""
    reason = dispatch.registered()[OP][impl].supports(device=device, dtype=dtype, head_dim=head_dim)
    if reason is not None:
        pytest.skip(reason.removeprefix("missing: "))


def auto_takes(monkeypatch: pytest.MonkeyPatch, impl: str) -> None:
    """Until the test ends, sparse_attention with impl="auto" runs on `impl` or raises."""
    only = {impl: dispatch.registered()[OP][impl]}
    monkeypatch.setitem(dispatch._OPS, OP, only)
