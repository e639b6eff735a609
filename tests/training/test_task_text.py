"""Tokenizers by name, and how they go along with a trained model."""

import pytest

from dalle_fast.tokenizers.chinese import ChineseTokenizer
from dalle_fast.tokenizers.hug import HugTokenizer
from dalle_fast.tokenizers.merges import find_clip_merges
from dalle_fast.training.tasks.text import load_tokenizer, mean_text_length, saved_tokenizer, with_vocabulary

CAPTIONS = ["A red apple", "  two  DOGS on a\tskateboard, 3 of 4!", "it's an owl's", "Ünïcode – naïve café", ""]


def test_clips_tokenizer_is_saved_so_that_it_reads_alike(tmp_path):
    try:
        find_clip_merges()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    clip = load_tokenizer("clip")
    saved_tokenizer("clip").save(str(tmp_path / "tokenizer.json"))
    saved = HugTokenizer(tmp_path / "tokenizer.json")
    assert [saved.encode(caption) for caption in CAPTIONS] == [clip.encode(caption) for caption in CAPTIONS]
    assert with_vocabulary("train", {}, saved) == with_vocabulary("train", {}, clip) == {"num_text_tokens": 49408}
    assert saved.decode(saved.encode("A red apple")).split() == ["a", "red", "apple"]


def test_a_file_is_read_and_copied_and_chinese_is_not(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"must be a tokenizer\.json file, found none at nowhere"):
        load_tokenizer("nowhere")
    assert saved_tokenizer("some/tokenizer.json").name == "tokenizer.json"
    monkeypatch.setattr(ChineseTokenizer, "__init__", lambda self: None)
    assert isinstance(load_tokenizer("chinese"), ChineseTokenizer) and saved_tokenizer("chinese") is None


def test_what_is_no_source_has_no_captions():
    assert mean_text_length(object()) == 1.0
