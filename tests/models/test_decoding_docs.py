"""The code in docs/decoding.md runs, and the page names dtypes as the engine knows them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from dalle_fast import _extension
from dalle_fast.sampling.packed import WEIGHT_DTYPES

PAGE = (Path(__file__).parents[2] / "docs" / "decoding.md").read_text(encoding="utf-8")


def test_the_code_runs_and_an_image_alone_is_the_one_in_the_batch(capsys) -> None:
    if missing := _extension.missing():
        pytest.skip(missing.removeprefix("missing: "))
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    torch.manual_seed(0)
    names: dict = {}
    exec(block, names)
    assert names["images"].shape == (6, 3, 32, 32) and len(names["images"].unique(dim=0)) > 1
    assert "runs on 'cpu'" in capsys.readouterr().out


def test_the_table_lists_every_dtype_of_weights() -> None:
    rows = re.findall(r"^\| `torch\.(\w+)` \|", PAGE, flags=re.MULTILINE)
    assert [getattr(torch, name) for name in rows] == list(WEIGHT_DTYPES)
