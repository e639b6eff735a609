"""Where a training command leaves what it made."""

from __future__ import annotations

from pathlib import Path


def model_in(where: str | Path) -> Path:
    """The saved model itself, also where OUT of a training is named."""
    inner = Path(where) / "model"
    return inner if inner.is_dir() else Path(where)
