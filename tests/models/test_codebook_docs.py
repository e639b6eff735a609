"""The code in docs/codebook.md runs, and the page names arguments, defaults and figures as they are."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import torch

from dalle_fast import DiscreteVAE

PAGE = (Path(__file__).parents[2] / "docs" / "codebook.md").read_text(encoding="utf-8")


def test_the_code_runs_and_logs_the_figures_of_the_page(capsys) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    torch.manual_seed(0)
    names: dict = {}
    exec(block, names)
    assert names["codes"].shape == (4, 64) and names["pictures"].shape == (4, 3, 32, 32)
    printed = capsys.readouterr().out
    for figure in names["log"].row():
        assert f"`{figure}`" in PAGE and figure in block and f"'{figure}'" in printed


def test_defaults_are_those_of_the_page() -> None:
    section = PAGE[PAGE.index("## vq") : PAGE.index("## What a training log")]
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \|", section, flags=re.MULTILINE)
    parameters = inspect.signature(DiscreteVAE.__init__).parameters
    defaults = {name: default.strip("`") for name, default in rows}
    assert set(defaults) == {"commitment_loss_weight", "codebook_decay", "revive_codes_below", "normalised_codes"}
    assert defaults == {name: str(parameters[name].default) for name in defaults}
