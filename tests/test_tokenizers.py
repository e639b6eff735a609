"""Tokenizers: the original's ids, its mended decode, and a sentence for every wrong input."""

import gzip
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden_cases import FOLDER, golden
from tokenizers.pre_tokenizers import ByteLevel

from dalle_fast.tokenizer import ChineseTokenizer, HugTokenizer, SimpleTokenizer
from dalle_fast.tokenizers import find_clip_merges
from dalle_fast.tokenizers.clip_bpe import DefaultTokenizer
from dalle_fast.tokenizers.merges import MERGES_VARIABLE, N_MERGES

CASE = golden("tokenizer").spec
HUG_FILE = FOLDER / CASE["hug_file"]


@pytest.fixture(scope="session")
def clip_tokenizer():
    try:
        return SimpleTokenizer()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def made_up_merges(tmp_path_factory):
    """A file of the right form and length whose first merges build "cat" and "cats" at the end of a word."""
    letters = sorted(ByteLevel.alphabet())
    first = ["c a", "ca t</w>", "ca t", "cat s</w>"]
    others = (f"{a} {b}" for a, b in itertools.product(letters, letters) if f"{a} {b}" not in first)
    path = tmp_path_factory.mktemp("merges") / "bpe_simple_vocab_16e6.txt"
    lines = ["#version: 0.2", *first, *itertools.islice(others, N_MERGES - len(first)), "beyond the end"]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def made_up(made_up_merges):
    return SimpleTokenizer(made_up_merges)


@pytest.mark.parametrize("item", CASE["simple"], ids=lambda item: item["text"][:20])
def test_simple_tokenizer_equals_the_original(clip_tokenizer, item):
    assert clip_tokenizer.encode(item["text"]) == item["ids"]
    assert clip_tokenizer.decode(item["ids"]) == item["decoded"]
    assert clip_tokenizer.decode(torch.tensor(item["ids"])) == item["decoded"]
    rows = clip_tokenizer.tokenize(item["text"], CASE["context_length"], truncate_text=True)
    assert rows.dtype == torch.long
    assert rows.tolist() == [item["tokenize_trunc"]]


@pytest.mark.parametrize("item", CASE["hug"]["items"], ids=lambda item: item["text"][:20])
def test_hug_tokenizer_equals_the_original(item):
    tokenizer = HugTokenizer(HUG_FILE)
    assert tokenizer.vocab_size == CASE["hug"]["vocab_size"]
    assert tokenizer.encode(item["text"]) == item["ids"]
    assert tokenizer.decode(item["ids"]) == item["decoded"]
    rows = tokenizer.tokenize([item["text"]], CASE["context_length"], truncate_text=True)
    assert rows.tolist() == [item["tokenize_trunc"]]


def test_simple_tokenizer_vocabulary_and_word_ends(made_up):
    words = 2 * 256  # bytes, then bytes that end a word; merges follow
    assert made_up.vocab_size == CASE["vocab_size"] == made_up.tokenizer.get_vocab_size()
    assert made_up.encode("cat") == [words + 1]
    assert made_up.encode("  Cats\n cat ") == [words + 3, words + 1]
    assert made_up.decode(made_up.encode("CATS cat")) == "cats cat "
    assert made_up.encode("") == []


def test_simple_tokenizer_start_and_end_in_text_are_single_tokens(made_up):
    cat = made_up.encode("cat")
    assert made_up.encode("<|startoftext|>cat<|EndOfText|>") == [49406, *cat, 49407]
    # Behind other punctuation they are ordinary text, as in the original, whose pattern reads from the left.
    assert 49407 not in made_up.encode("!<|endoftext|>")


def test_decode_removes_the_end_token_and_keeps_40407(made_up):
    cat = made_up.encode("cat")
    assert made_up.decode([49406, *cat, 49407, 0]) == "cat "
    kept = made_up.decode([*cat, 40407])
    assert kept.startswith("cat ") and len(kept) > len("cat ")
    assert made_up.decode([49406, *cat, 49407], remove_start_end=False) == "<|startoftext|>cat <|endoftext|>"
    assert made_up.decode([*cat, 49408 + 3], pad_tokens={49408 + 3}) == "cat "


def test_special_ids_decode_as_recorded(clip_tokenizer):
    """The original's three recorded outputs, the end token and id 40407 mended."""
    expected = {
        (49406, 320, 2442, 49407, 0): "a small ",
        (320, 40407, 2442): "a berwick small ",
        (320, 0, 2442): "a small ",
    }
    for item in CASE["decode_special"]:
        assert clip_tokenizer.decode(item["ids"]) == expected[tuple(item["ids"])]


@pytest.mark.parametrize(
    "make", [lambda made_up: made_up, lambda made_up: HugTokenizer(HUG_FILE)], ids=["simple", "hug"]
)
class TestSharedContract:
    def test_tokenize_pads_each_row_of_a_batch(self, make, made_up):
        tokenizer = make(made_up)
        rows = tokenizer.tokenize(["cat", "", "cat cat"], 9)
        assert rows.shape == (3, 9)
        for row, text in zip(rows, ["cat", "", "cat cat"], strict=True):
            ids = tokenizer.encode(text)
            assert row.tolist() == ids + [0] * (9 - len(ids))
        assert tokenizer.tokenize("cat").shape == (1, 256)
        assert tokenizer.tokenize([], 9).shape == (0, 9)

    def test_a_text_too_long_is_named_with_its_length(self, make, made_up):
        tokenizer = make(made_up)
        text = "dog " * 30
        n_tokens = len(tokenizer.encode(text))
        with pytest.raises(ValueError, match=rf"context_length=7, got {n_tokens} tokens for 'dog dog.*truncate_text"):
            tokenizer.tokenize(["cat", text], 7)
        assert tokenizer.tokenize([text], 7, truncate_text=True)[0].tolist() == tokenizer.encode(text)[:7]
        assert tokenizer.tokenize([text], n_tokens).shape == (1, n_tokens)

    def test_what_is_not_text_or_not_ids_is_named(self, make, made_up):
        tokenizer = make(made_up)
        with pytest.raises(TypeError, match="must be a str, got bytes"):
            tokenizer.tokenize([b"cat"])
        with pytest.raises(TypeError, match="must be a str, got list"):
            tokenizer.encode(["cat"])
        with pytest.raises(ValueError, match=r"got a tensor \[1, 3\]"):
            tokenizer.decode(torch.zeros(1, 3, dtype=torch.long))
        with pytest.raises(TypeError, match="whole numbers"):
            tokenizer.decode([1.5])


def test_decode_names_an_id_outside_the_vocabulary(made_up):
    with pytest.raises(ValueError, match=r"0\.\.49407, got 49408.*pad_tokens"):
        made_up.decode([49408])
    with pytest.raises(ValueError, match="got -1"):
        made_up.decode([-1])


def test_hug_tokenizer_leaves_out_padding_and_ids_it_does_not_hold():
    tokenizer = HugTokenizer(HUG_FILE)
    ids = tokenizer.encode("a red bird")
    assert tokenizer.decode([*ids, 0, 0, 9999, 77], pad_tokens={77}) == "a red bird"


def test_hug_tokenizer_errors_are_sentences(tmp_path):
    with pytest.raises(TypeError, match=r"path of a tokenizer\.json, got None"):
        HugTokenizer()
    with pytest.raises(FileNotFoundError, match=r"found none at .*absent\.json"):
        HugTokenizer(tmp_path / "absent.json")
    with pytest.raises(FileNotFoundError, match="not its folder's"):
        HugTokenizer(tmp_path)
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json of the tokenizers library, got .*broken\.json"):
        HugTokenizer(broken)
    broken.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"broken\.json"):
        HugTokenizer(broken)


def test_merges_are_found_in_an_installed_package_that_is_not_imported(tmp_path, made_up_merges, monkeypatch):
    """A package that carries the gzip, known by its metadata only: importing it would fail the process."""
    package, info = tmp_path / "carrier", tmp_path / "carrier-1.0.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('the package was imported')")
    (package / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(made_up_merges.read_bytes()))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n")
    (info / "RECORD").write_text("carrier/__init__.py,,\ncarrier/bpe_simple_vocab_16e6.txt.gz,,\n")
    monkeypatch.delenv(MERGES_VARIABLE, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_clip_merges() == package / "bpe_simple_vocab_16e6.txt.gz"
    assert SimpleTokenizer().encode("cat") == SimpleTokenizer(made_up_merges).encode("cat")
    assert "carrier" not in sys.modules


def test_the_environment_names_the_merges_file(made_up_merges, monkeypatch, tmp_path):
    monkeypatch.setenv(MERGES_VARIABLE, str(made_up_merges))
    assert find_clip_merges() == made_up_merges
    monkeypatch.setenv(MERGES_VARIABLE, str(tmp_path / "absent.txt"))
    with pytest.raises(FileNotFoundError, match=f"found none at .*absent.txt.*{MERGES_VARIABLE}"):
        SimpleTokenizer()


def test_without_a_merges_file_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.delenv(MERGES_VARIABLE, raising=False)
    monkeypatch.setattr("dalle_fast.tokenizers.merges.distributions", lambda: iter(()))
    lazy = DefaultTokenizer()  # made without the file, as importing dalle_fast.tokenizer does
    assert lazy.vocab_size == 49408
    for use in (SimpleTokenizer, lambda: lazy.encode("cat"), lambda: lazy.tokenize("cat")):
        with pytest.raises(FileNotFoundError, match="pip install --no-deps clip-anytorch"):
            use()


def test_a_file_that_holds_no_merges_is_named(tmp_path):
    path = tmp_path / "few.txt"
    path.write_text("#version\na b\nb c\n")
    with pytest.raises(ValueError, match=rf"{N_MERGES} merges.*got 2 in .*few.txt"):
        SimpleTokenizer(path)
    path.write_bytes(gzip.compress(b"#version\na b\n" * 9)[:-9])
    with pytest.raises(ValueError, match="readable UTF-8 text or its gzip"):
        SimpleTokenizer(path)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="readable UTF-8 text"):
        SimpleTokenizer(path)
    with pytest.raises(FileNotFoundError, match="found none at"):
        SimpleTokenizer(tmp_path)


def test_importing_the_module_reads_no_file_and_no_transformers():
    code = (
        "import sys\nfrom dalle_fast.tokenizer import tokenizer, HugTokenizer, ChineseTokenizer\n"
        "assert 'tokenizer' not in vars(tokenizer), 'built at import'\nassert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_chinese_tokenizer_without_transformers_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RuntimeError, match="pip install transformers"):
        ChineseTokenizer()


def test_chinese_tokenizer_reads_a_local_vocabulary(tmp_path, monkeypatch):
    pytest.importorskip(
        "transformers", reason="ChineseTokenizer needs the transformers library: pip install transformers"
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="found no 'absent-vocabulary'"):
        ChineseTokenizer("absent-vocabulary")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n红\n鸟\n", encoding="utf-8")
    tokenizer = ChineseTokenizer(tmp_path)
    assert tokenizer.vocab_size == 7
    assert tokenizer.encode("红鸟").tolist() == [5, 6]
    assert tokenizer.tokenize("红鸟", 4).tolist() == [[5, 6, 0, 0]]
    assert tokenizer.decode([5, 6, 0]) == "红 鸟"
