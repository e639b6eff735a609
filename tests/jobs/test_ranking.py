"""Ranking: the best of what comes by, scores of a CLIP and of any function, and what is said where one does not fit."""

import random

import numpy as np
import pytest
import torch
from small_models import saved_model

from dalle_fast.jobs.drawing_model import DrawingModel
from dalle_fast.jobs.job import Sample
from dalle_fast.jobs.ranking import ClipRanker, TopK, load_ranker, scores_of
from dalle_fast.models.clip import CLIP

FITS = {
    "dim_text": 16, "dim_image": 16, "dim_latent": 16, "num_text_tokens": 25, "text_enc_depth": 1, "text_seq_len": 5,
    "text_heads": 1, "visual_enc_depth": 1, "visual_heads": 1, "visual_image_size": 16, "visual_patch_size": 8,
}  # fmt: skip


def sample(index):
    return Sample(index, 0, index, "a flag", index)


def saved_clip(directory, **changes):
    torch.manual_seed(0)
    CLIP(**FITS | changes).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return DrawingModel.read(saved_model(tmp_path_factory.mktemp("saved") / "model"))


# --- the best


@pytest.mark.parametrize("keep", [1, 2, 7, 40, 100, None])
@pytest.mark.parametrize("seed", range(3))
def test_top_k_is_sorting(keep, seed):
    chance = random.Random(seed)
    scores = [float(chance.randrange(8)) for _ in range(40)]  # many are equal
    best = sorted(range(40), key=lambda i: (-scores[i], i))[:keep]
    order = list(range(40))
    chance.shuffle(order)
    top = TopK(keep)
    for i in order:
        top.offer(sample(i), scores[i], torch.full((1, 2, 2), i, dtype=torch.uint8))
    kept = top.kept()
    assert [s.index for s, _, _ in kept] == best
    assert [score for _, score, _ in kept] == [scores[i] for i in best]
    assert [int(pixels[0, 0, 0]) for _, _, pixels in kept] == best


@pytest.mark.parametrize("keep", [3, None])
def test_without_scores_the_first_are_the_best(keep):
    top = TopK(keep)
    for i in (4, 0, 3, 1, 2):
        top.offer(sample(i), None, None)
    assert [(s.index, score, pixels) for s, score, pixels in top.kept()] == [(i, None, None) for i in range(5)][:keep]


def test_kept_pixels_hold_no_batch():
    batch, top = torch.zeros(64, 3, 4, 4, dtype=torch.uint8), TopK(2)
    for i in range(64):
        top.offer(sample(i), float(i), batch[i])
    batch.fill_(9)
    for _, _, pixels in top.kept():
        assert pixels.untyped_storage().nbytes() == 3 * 4 * 4 and not pixels.any()


# --- a CLIP


def test_a_clip_scores_as_it_does_by_itself(model, tmp_path):
    directory = saved_clip(tmp_path / "clip", text_seq_len=6)
    ranker = load_ranker(str(directory), model)
    images, prompts = torch.rand(3, 3, 16, 16), ["Red apple", "a flag", "red apple red apple"]
    text = model.tokenizer.tokenize(["red apple", "a flag", "red apple red apple"], 6, truncate_text=True)
    with torch.no_grad():
        expected = CLIP.from_pretrained(directory)(text, images, text_mask=text != 0)
    scores = scores_of(ranker, prompts, images)
    assert torch.equal(scores, expected) and not scores.requires_grad and scores.unique().numel() == 3


def test_a_clip_may_bring_its_own_tokenizer(model, tmp_path):
    directory = saved_clip(tmp_path / "clip")
    stored = model.tokenizer.tokenizer.to_str().replace('"red":1', '"red":20')
    assert '"red":20' in stored
    (directory / "tokenizer.json").write_text(stored)
    ranker = load_ranker(str(directory), model)
    assert isinstance(ranker, ClipRanker) and ranker.tokenizer.encode("red") == [20]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"visual_image_size": 32},
            "score what the model draws, pictures 16 x 16 with 3 channels, got one for 32 x 32 with 3",
        ),
        ({"channels": 1}, "score what the model draws, pictures 16 x 16 with 3 channels, got one for 16 x 16 with 1"),
        ({"num_text_tokens": 5}, "know the 6 tokens of its tokenizer, got 5"),
        ({"text_seq_len": 4}, "read texts of 5 tokens, as the model does, got at most 4"),
    ],
)
def test_a_clip_that_does_not_fit_is_refused(model, tmp_path, changes, message):
    directory = saved_clip(tmp_path / "clip", **changes)
    with pytest.raises(ValueError, match=f"the CLIP in {directory} must {message}"):
        load_ranker(str(directory), model)


def test_a_directory_without_a_clip_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="must hold a CLIP, got a DALLE"):
        load_ranker(str(saved_model(tmp_path / "other")), model)
    with pytest.raises(FileNotFoundError, match=r"must hold config\.json"):
        load_ranker(str(tmp_path), model)


# --- a function


def redness(prompts, images):
    """How red pictures are."""
    return images[:, 0].mean(dim=(1, 2))


def test_any_function_ranks(model):
    images = torch.rand(4, 3, 16, 16)
    ranker = load_ranker(f"{__name__}:redness", model)
    assert ranker is redness
    assert torch.equal(scores_of(ranker, ["a"] * 4, images), images[:, 0].mean(dim=(1, 2)))


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        ("no/such/directory", "must be a CLIP's directory or file, or module:function, got 'no/such/directory'"),
        ("module.without.function", "module:function, got 'module.without.function'"),
        (".relative:function", "module:function, got"),
        ("no_such_module:function", r"can import, got 'no_such_module:function' \(No module named 'no_such_module'\)"),
        ("random:no_such_function", "must name a function of random, got 'random:no_such_function'"),
        ("math:pi", "must name a function of math, got 'math:pi'"),
    ],
)
def test_names_of_nothing_are_refused(model, rank, message):
    with pytest.raises(ValueError, match=message):
        load_ranker(rank, model)


@pytest.mark.parametrize(
    "said",
    [
        [1.0, 2.0],
        (1, 2),
        np.array([1.0, 2.0]),
        torch.tensor([1, 2], dtype=torch.int8),
        torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True),
    ],
)
def test_scores_may_be_numbers_of_any_kind(said):
    scores = scores_of(lambda prompts, images: said, ["a", "b"], torch.zeros(2, 3, 4, 4))
    assert scores.dtype == torch.float32 and scores.tolist() == [1.0, 2.0] and not scores.requires_grad


@pytest.mark.parametrize(
    ("said", "got"),
    [
        (None, "NoneType"),
        ("high", "str"),
        (1.0, r"float32 \[\]"),
        ([1.0], r"float32 \[1\]"),
        ([[1.0], [2.0]], r"float32 \[2, 1\]"),
        ([True, False], r"bool \[2\]"),
        ([1.0, float("nan")], "nan for 'b'"),
        (torch.tensor([1e300, 0.0], dtype=torch.float64), "inf for 'a'"),
        (torch.ones(2, dtype=torch.complex64), "complex64"),
    ],
)
def test_what_is_no_score_is_refused_by_the_ranker_s_name(said, got):
    def mine(prompts, images):
        return said

    with pytest.raises(ValueError, match=rf"the ranker .*mine must give one finite number a picture, \[2\], got {got}"):
        scores_of(mine, ["a", "b"], torch.zeros(2, 3, 4, 4))
