"""The code in docs/upstream.md runs, and its table of mended defects has a test for every row."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from golden_cases import FOLDER

PAGE = (Path(__file__).parents[1] / "docs" / "upstream.md").read_text(encoding="utf-8")


def test_code_blocks_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == 2
    names: dict = {"torch": torch}
    for block in blocks:
        exec(block.replace('"dalle.pt"', repr(str(FOLDER / "checkpoint_dalle.pt"))), names)
    assert names["dalle"].text_seq_len == names["checkpoint"]["hparams"]["text_seq_len"]


def test_every_mended_row_has_a_test() -> None:
    here = Path(__file__).parent
    tests = "".join((here / file).read_text(encoding="utf-8") for file in ("test_mended.py", "test_tokenizers.py"))
    rows = re.findall(r"^\| (B\d+a?) \|", PAGE, flags=re.MULTILINE)
    assert len(rows) >= 15
    for row in rows:
        assert f"def test_{row.lower()}_" in tests or row == "B15", row
    assert "def test_decode_removes_the_end_token_and_keeps_40407" in tests  # B15
