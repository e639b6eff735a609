"""Captions become ids: which line, which words, which merges."""

from collections import Counter

import pytest
import torch
from data_folders import captions, tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers

from dalle_fast.tokenizers.clip_bpe import SimpleTokenizer
from dalle_fast.tokenizers.hug import HugTokenizer
from dalle_fast.tokenizers.merges import find_clip_merges
from dalle_fast.training.data.bpe_dropout import BpeDropout
from dalle_fast.training.data.captions import Captions, draw_caption
from dalle_fast.training.order import generator

TEXTS = (
    "the red bird on the house",
    "  The SMALL apple,\tflag!  ",
    "naïve café — 42 birds' nests <|endoftext|> ☃",
    "redbirdhouse",
    "",
)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def clip():
    try:
        find_clip_merges()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return SimpleTokenizer()


def drawn(lines, n=2000, **options):
    settings = {"first_caption": None, "word_dropout": 0.0, **options}
    return Counter(draw_caption(lines, generator(0, position), **settings) for position in range(n))


def test_without_a_first_caption_all_lines_are_alike():
    counts = drawn(["a", "b", "c", "d"])
    assert all(abs(counts[line] - 500) < 5 * 375**0.5 for line in "abcd")


def test_the_first_caption_has_its_probability_and_the_others_share_the_rest():
    counts = drawn(["a", "b", "c"], first_caption=0.6)
    assert abs(counts["a"] - 1200) < 5 * 480**0.5
    assert abs(counts["b"] - 400) < 5 * 320**0.5
    assert drawn(["a", "b"], first_caption=1.0) == {"a": 2000}
    assert drawn(["a"], first_caption=0.0) == {"a": 2000}
    assert "a" not in drawn(["a", "b"], first_caption=0.0)


def test_one_word_is_dropped_of_captions_that_can_spare_it():
    counts = drawn(["one two  three"], word_dropout=0.3)
    assert counts.keys() == {"one two  three", "one two", "one three", "two three"}
    assert abs(counts["one two  three"] - 1400) < 5 * 420**0.5
    assert all(abs(counts[line] - 200) < 5 * 180**0.5 for line in ("one two", "one three", "two three"))
    assert drawn(["one two"], word_dropout=1.0) == {"one two": 2000}


def test_ids_are_padded_and_too_many_are_cut_or_refused(words):
    ids = words.encode("the red bird")
    row = Captions(words, 24)(["the red bird"], None)
    assert row.tolist() == ids + [0] * (24 - len(ids)) and row.dtype == torch.int64
    assert Captions(words, 2, truncate=True)(["the red bird"], None).tolist() == ids[:2]
    with pytest.raises(ValueError, match=r"must fit text_seq_len=2, got \d+ tokens for 'the red bird'"):
        Captions(words, 2)(["the red bird"], None)


@pytest.mark.parametrize("name", ["words", "clip"])
def test_without_dropout_the_merges_are_the_librarys(name, request):
    own = request.getfixturevalue(name)
    ours = BpeDropout(own, 0.0)
    for text in (*TEXTS, *captions(4)):
        assert ours.encode(text, 0) == list(own.encode(text)), text


@pytest.mark.parametrize("name", ["words", "clip"])
def test_dropout_leaves_the_text_and_repeats(name, request):
    own = request.getfixturevalue(name)
    ours = BpeDropout(own, 0.5)
    text = "the small bird on the house"
    found = {tuple(ours.encode(text, seed)) for seed in range(20)}
    assert len(found) > 10
    assert {own.decode(list(ids)).strip() for ids in found} == {text}
    assert ours.encode(text, 3) == ours.encode(text, 3)


def test_with_all_merges_left_out_there_are_bytes(words):
    ids = BpeDropout(words, 1.0).encode("the bird", 0)
    assert len(ids) == len(b" the bird")


def test_the_share_of_merges_left_out_is_the_rate(tmp_path):
    """Of a word that one merge makes."""
    vocabulary = {"[PAD]": 0, "a": 1, "b": 2, "ab": 3}
    inner = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.save(str(tmp_path / "tokenizer.json"))
    ours = BpeDropout(HugTokenizer(tmp_path / "tokenizer.json"), 0.2)
    merged = sum(ours.encode("ab", seed) == [3] for seed in range(2000))
    assert abs(merged - 1600) < 5 * 320**0.5


def test_dropout_depends_on_the_position_alone(words):
    ours = Captions(words, 40, bpe_dropout=0.3)
    lines = captions(2)
    first = [ours(lines, generator(0, position)) for position in range(10)]
    assert all(torch.equal(row, ours(lines, generator(0, position))) for position, row in enumerate(first))
    assert len({tuple(row.tolist()) for row in first}) == 10
    assert torch.equal(ours(lines, None), Captions(words, 40)(lines, None))


def test_dropout_lengthens_no_caption_into_an_error(words):
    text = "the red bird"
    n = len(words.encode(text))
    assert Captions(words, n, bpe_dropout=1.0)([text], generator(0, 0)).min() > 0
    with pytest.raises(ValueError, match=f"must fit text_seq_len={n - 1}"):
        Captions(words, n - 1, bpe_dropout=1.0)([text], generator(0, 0))


def test_dropout_without_merges_is_a_sentence(tmp_path):
    inner = Tokenizer(models.WordLevel({"[PAD]": 0, "a": 1}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "tokenizer.json"))
    for other in (HugTokenizer(tmp_path / "tokenizer.json"), object()):
        with pytest.raises(TypeError, match="bpe_dropout needs a tokenizer with byte pairs to merge, got"):
            Captions(other, 8, bpe_dropout=0.1)
    assert Captions(object(), 8).bpe_dropout == 0
