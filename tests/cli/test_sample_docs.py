"""docs/sample.md says what the command is: its code runs, its flags exist, its tables are the command's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dalle_fast.cli.__main__ import main
from dalle_fast.cli.sample_options import ORIGINAL_FLAGS, PARAMETERS
from dalle_fast.jobs import store
from dalle_fast.jobs.drawing_model import SHIPPED_MODEL
from dalle_fast.jobs.token_files import KNOWN

PAGE = (Path(__file__).parents[2] / "docs" / "sample.md").read_text(encoding="utf-8")


@pytest.mark.skipif(not SHIPPED_MODEL.is_dir(), reason="the shipped model is not here")
def test_the_code_runs(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(block, {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" torch.Size")[0] for line in lines] == ["a red apple 7", "a red apple 8", "panda 7", "panda 8"]


def test_every_option_that_is_named_exists():
    known = {name for parameter in PARAMETERS for name in parameter.opts} | {"--array", "--wrap"}  # of sbatch
    assert set(re.findall(r"--[a-z][a-z_-]*", PAGE)) <= known


def test_the_table_of_the_originals_flags_is_the_commands():
    rows = re.findall(r"^\| `(--\w+)` \| (.*) \|$", PAGE, flags=re.MULTILINE)
    assert {flag: meaning.replace("\\|", "|") for flag, meaning in rows} == ORIGINAL_FLAGS


def test_the_files_are_called_what_the_page_says():
    for name in (store.CONFIG, store.INDEX, KNOWN, f"{store.IMAGES}/", f"{store.GALLERIES}/", "manifest.jsonl"):
        assert f"`{name}" in PAGE
    assert "merge" in main.list_commands(None)
