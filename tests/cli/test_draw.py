"""`dalle-fast draw` on a model saved by the test."""

import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from small_models import small_dalle
from tokenizers import Tokenizer, models, pre_tokenizers

from dalle_fast.cli.draw import draw
from dalle_fast.jobs.drawing_model import DrawingModel
from dalle_fast.jobs.ranking import load_ranker
from dalle_fast.models.clip import CLIP
from dalle_fast.models.dalle import DALLE
from dalle_fast.sampling.gallery import to_pixels


@pytest.fixture
def saved(tmp_path):
    words = ["[PAD]", "red", "green", "apple", "a", "flag"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    directory = tmp_path / "model"
    small_dalle(torch.float32).save_pretrained(directory, tokenizer=tokenizer)
    (directory / "captions.txt").write_text("red apple\ngreen apple\n")
    (directory / "examples.txt").write_text("red apple\na flag\n")
    return directory


def run(*arguments):
    return CliRunner().invoke(draw, [str(a) for a in arguments])


def test_it_draws_the_prompts_and_says_where(saved, tmp_path):
    out = tmp_path / "new folder" / "sheet.png"
    result = run("red apple", "a flag", "--model", saved, "--out", out, "--images-per-prompt", 3, "--seed", 5)
    assert result.exit_code == 0, result.output
    assert str(out) in result.output and "6 pictures" in result.output and "image tokens/s" in result.output
    assert Image.open(out).size == (3 * (32 + 8) + 8, 2 * (32 + 22 + 8) + 8)


def test_without_prompts_it_draws_the_examples_of_the_model(saved, tmp_path):
    result = run("--model", saved, "--out", tmp_path / "sheet.png", "--images-per-prompt", 1)
    assert result.exit_code == 0 and "2 pictures" in result.output


def test_the_same_seed_draws_the_same_sheet(saved, tmp_path):
    sheets = [tmp_path / f"{i}.png" for i in range(3)]
    for sheet, seed in zip(sheets, (3, 3, 4), strict=True):
        assert run("red apple", "--model", saved, "--out", sheet, "--seed", seed).exit_code == 0
    contents = [sheet.read_bytes() for sheet in sheets]
    assert contents[0] == contents[1] != contents[2]


def test_the_settings_of_the_model_hold_unless_the_call_says_otherwise(saved, tmp_path):
    def drawn(seed, *arguments):
        result = run("red apple", "--model", saved, "--out", tmp_path / "sheet.png", "--seed", seed, *arguments)
        assert result.exit_code == 0, result.output
        return (tmp_path / "sheet.png").read_bytes()

    default = drawn(3)
    (saved / "sampling.json").write_text('{"temperature": 0, "top_k": null, "cond_scale": 2}')
    assert drawn(3) == drawn(4)
    assert drawn(3, "--temperature", 1, "--cond-scale", 1) == default


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "sampling.json must be JSON"),
        ("[1]", "sampling.json must hold a JSON object"),
        ('{"top_q": 0.5}', "got 'top_q'"),
        ('{"temperature": "1"}', "sampling.json: temperature must be a number, got '1'"),
        ('{"cond_scale": true}', "sampling.json: cond_scale must be a number, got True"),
        ('{"top_k": 2.5}', "sampling.json: top_k must be an integer or null, got 2.5"),
    ],
)
def test_settings_that_are_none_are_refused_by_file_and_key(saved, tmp_path, content, message):
    (saved / "sampling.json").write_text(content)
    result = run("red apple", "--model", saved, "--out", tmp_path / "sheet.png")
    assert result.exit_code == 1
    assert message in result.output and "Traceback" not in result.output


def test_unknown_words_are_named_with_captions_nearby(saved, tmp_path):
    result = run("purple apple", "--model", saved, "--out", tmp_path / "sheet.png")
    assert result.exit_code == 0
    assert 'never read purple. Captions it knows: "red apple"' in result.output or '"green apple"' in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["red apple", "--model", "missing"], "missing"),
        (["  "], "empty"),
        (["red apple", "--temperature", "-1"], "temperature"),
        (["red " * 9], "context_length=5, got 10 tokens"),
    ],
)
def test_bad_input_ends_with_a_sentence(saved, tmp_path, arguments, message):
    given = arguments if "--model" in arguments else [*arguments, "--model", saved]
    result = run(*given, "--out", tmp_path / "sheet.png")
    assert result.exit_code == 1
    assert message in result.output and "Traceback" not in result.output
    assert not (tmp_path / "sheet.png").exists()


@pytest.fixture
def ranked(saved):
    """The model with a CLIP beside it."""
    dalle = DALLE.from_pretrained(saved)
    torch.manual_seed(0)
    clip = CLIP(
        dim_text=8, dim_image=8, dim_latent=8, num_text_tokens=8, text_enc_depth=1, text_seq_len=dalle.text_seq_len,
        text_heads=1, visual_enc_depth=1, visual_heads=1, visual_image_size=dalle.vae.image_size,
        visual_patch_size=8, channels=dalle.vae.channels,
    )  # fmt: skip
    clip.save_pretrained(saved / "clip")
    return saved


def sheet(path, *arguments):
    result = run("red apple", "--model", path, "--out", path.parent / "sheet.png", *arguments)
    assert result.exit_code == 0, result.output
    return np.asarray(Image.open(path.parent / "sheet.png")).astype(int), result.output


def test_the_best_of_the_candidates_by_the_models_own_clip_are_shown(ranked):
    best, said = sheet(ranked, "--images-per-prompt", 1)
    assert "16 pictures" in said and "The best 1 of 16 a prompt" in said
    model = DrawingModel.read(ranked)
    text = model.token_ids(["red apple"] * 16, truncate=False)
    pixels = to_pixels(model.dalle.vae, model.dalle.generate_images(text, seed=0)).float()
    scores = load_ranker(str(ranked / "clip"), model)(["red apple"] * 16, pixels)
    alone, _ = sheet(ranked, "--images-per-prompt", 1, "--candidates", 1, "--seed", int(scores.argmax()))
    assert (best == alone).all()
    other, _ = sheet(ranked, "--images-per-prompt", 1, "--candidates", 1, "--seed", int(scores.argmin()))
    assert (best != other).any()


def test_candidates_fewer_than_shown_or_without_a_clip_are_refused(saved, ranked, tmp_path):
    few = run("red apple", "--model", ranked, "--candidates", 2, "--out", tmp_path / "sheet.png")
    assert few.exit_code == 1 and "at least the 4 images per prompt, got 2" in few.output
    shutil.rmtree(ranked / "clip")
    none = run("red apple", "--model", saved, "--candidates", 8, "--out", tmp_path / "sheet.png")
    assert none.exit_code == 1 and "the model's own CLIP, got none" in none.output
