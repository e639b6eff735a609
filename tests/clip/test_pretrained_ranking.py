"""Pretrained CLIPs as rankers of what a DALLE draws."""

import pytest
import torch
from clip_twins import openai_twin, pictures, shaken, texts
from small_models import saved_model

from dalle_fast.clip import (
    ClipTokenizer,
    PretrainedCLIP,
    hugging_face_config,
    hugging_face_state_dict,
    load,
    openai_state_dict,
)
from dalle_fast.jobs.drawing_model import DrawingModel
from dalle_fast.jobs.ranking import PretrainedRanker, load_ranker, scores_of
from dalle_fast.tokenizers import find_clip_merges

PROMPTS = ["Red apple", "a flag", "Red apple"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return DrawingModel.read(saved_model(tmp_path_factory.mktemp("saved") / "model"))


@pytest.fixture(scope="module")
def clip():
    """One that reads OpenAI's tokens."""
    try:
        find_clip_merges()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    torch.manual_seed(3)
    sizes = {"vision_width": 64, "vision_layers": 1, "text_width": 64, "text_layers": 1}
    return shaken(PretrainedCLIP(embed_dim=16, image_size=32, patch_size=8, **sizes))


@torch.no_grad()
def expected_of(clip, images):
    ids = ClipTokenizer().tokenize(PROMPTS)
    return clip(clip.preprocess(images), ids)[0].diagonal()


@pytest.mark.parametrize("how", ["file", "ours", "hugging_face"])
def test_every_kind_of_file_ranks(model, clip, tmp_path, how):
    path = tmp_path / "clip"
    if how == "file":
        path = tmp_path / "openai.pt"
        torch.save(openai_state_dict(clip), path)
    elif how == "ours":
        clip.save_pretrained(path)
    else:
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        twin = transformers.CLIPModel(transformers.CLIPConfig.from_dict(hugging_face_config(clip)))
        twin.load_state_dict(hugging_face_state_dict(clip))
        twin.save_pretrained(path)
    ranker = load_ranker(str(path), model)
    images = torch.rand(3, 3, 16, 16)  # smaller than the CLIP's
    scores = scores_of(ranker, PROMPTS, images)
    assert isinstance(ranker, PretrainedRanker) and torch.equal(scores, expected_of(clip, images))


def test_a_score_depends_on_its_text_and_picture_alone(clip):
    ranker, images = PretrainedRanker(clip, ClipTokenizer()), torch.rand(3, 3, 40, 40)
    together = ranker(PROMPTS, images)
    for prompt, image, score in zip(PROMPTS, images, together, strict=True):
        assert torch.equal(PretrainedRanker(clip, ClipTokenizer())([prompt], image[None])[0], score)
    assert not together.requires_grad


def test_a_text_is_read_once_for_all_batches_of_its_pictures(clip, monkeypatch):
    ranker, read = PretrainedRanker(clip, ClipTokenizer()), []
    encode = clip.encode_text
    monkeypatch.setattr(clip, "encode_text", lambda ids: read.append(len(ids)) or encode(ids))
    images = torch.rand(3, 3, 32, 32)
    first = ranker(PROMPTS, images)
    assert torch.equal(ranker(PROMPTS, images), first) and read == [2]
    ranker(["a flag", "a flag", "new"], images)
    ranker(["Red apple"], images[:1])  # no longer kept: only the last batch's are
    assert read == [2, 1, 1]


def test_a_long_prompt_is_cut(clip):
    ranker = PretrainedRanker(clip, ClipTokenizer())
    long = " ".join(["apple"] * 100)
    cut = " ".join(["apple"] * 75)
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(ranker([long], image), ranker([cut], image))


def test_grey_pictures_rank_and_other_channels_are_refused(clip, tmp_path, model, monkeypatch):
    clip.save_pretrained(tmp_path / "clip")
    grey = torch.rand(2, 1, 32, 32)
    ranker = PretrainedRanker(clip, ClipTokenizer())
    assert torch.equal(ranker(PROMPTS[:2], grey), ranker(PROMPTS[:2], grey.expand(-1, 3, -1, -1)))
    monkeypatch.setattr(model.dalle.vae, "channels", 4)
    with pytest.raises(ValueError, match="of 3 channels, or of 1 as grey, and the model draws 4"):
        load_ranker(str(tmp_path / "clip"), model)


def test_a_clip_of_another_tokenizer_is_refused(model, tmp_path):
    torch.save(openai_twin().state_dict(), tmp_path / "openai.pt")
    with pytest.raises(ValueError, match="must read the 49408 tokens of OpenAI's tokenizer, got one of 60"):
        load_ranker(str(tmp_path / "openai.pt"), model)


def test_a_file_that_is_no_clip_is_refused(model, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="must be a CLIP of OpenAI, open_clip or Hugging Face"):
        load_ranker(str(tmp_path / "other.pt"), model)


def test_merges_beside_the_weights_are_taken(model, clip, tmp_path):
    clip.save_pretrained(tmp_path / "clip")
    (tmp_path / "clip" / "merges.txt").write_text("#version: 0.2\nno merges\n")
    with pytest.raises(ValueError, match="bpe_path must hold 48894 merges"):
        load_ranker(str(tmp_path / "clip"), model)


def test_twins_rank_the_same(clip, tmp_path):
    twin = openai_twin()
    torch.save(twin.state_dict(), tmp_path / "openai.pt")
    model = load(tmp_path / "openai.pt")
    with torch.no_grad():
        own, theirs = model(pictures(), texts())[0], twin(pictures(), texts())[0]
    assert torch.equal(own.argsort(), theirs.argsort())
