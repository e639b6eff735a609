"""docs/clip.md: its code runs, and the names it gives are there."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from clip_twins import shaken
from PIL import Image

import dalle_fast.clip
from dalle_fast.clip import PretrainedCLIP, loading
from dalle_fast.tokenizers import find_clip_merges

PAGE = (Path(__file__).parents[2] / "docs" / "clip.md").read_text(encoding="utf-8")


def test_the_code_runs(tmp_path):
    try:
        find_clip_merges()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    sizes = {"vision_width": 64, "vision_layers": 1, "text_width": 64, "text_layers": 1}
    model = shaken(PretrainedCLIP(embed_dim=16, **sizes))
    torch.save(dalle_fast.clip.openai_state_dict(model), tmp_path / "openai.pt")
    Image.new("RGB", (300, 200), "red").save(tmp_path / "red.png")
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    names = {"PATH": tmp_path / "openai.pt", "PICTURE": tmp_path / "red.png", "OUT": tmp_path / "out"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(block, names)
    assert names["picture"].shape == (1, 3, 224, 224) and names["text"].shape == (2, 77)
    assert names["per_image"].shape == (1, 2) and names["per_text"].shape == (2, 1)
    assert dalle_fast.clip.load(tmp_path / "out").config == model.config | {"vision_heads": 1, "text_heads": 1} | {
        "vision_hidden": 256, "text_hidden": 256,
    }  # fmt: skip


def test_names_are_those_of_the_code():
    for name in re.findall(r"`(\w+)\(model\)`", PAGE):
        assert name in dalle_fast.clip.__all__
    words = {word: quick for word, quick in loading._QUICK_BY_NAME.items() if word != "openclip"} | {"open_clip": False}
    assert all(f"`{word}`" in PAGE for word in words)
