"""`dalle-fast tokenizer train`: from folders, shards and text files to a tokenizer.json."""

import pytest
from click.testing import CliRunner
from data_folders import captions, write_folder, write_shards

from dalle_fast.cli.tokenizer import tokenizer
from dalle_fast.tokenizers.hug import HugTokenizer
from dalle_fast.tokenizers.training import train_tokenizer


def run(*arguments):
    result = CliRunner().invoke(tokenizer, ["train", *(str(a) for a in arguments)])
    assert "Traceback" not in result.output
    return result


def test_a_folder_shards_and_a_text_file_give_the_same_tokenizer(tmp_path):
    pytest.importorskip("webdataset", reason="shards need the package webdataset, part of the extra train")
    write_folder(tmp_path / "folder")
    (tmp_path / "lines.txt").write_text("\n".join(line for i in range(6) for line in captions(i)) + "\n\n")
    shards = write_shards(tmp_path / "shards")
    sources = {"folder": tmp_path / "folder", "shards": shards, "text": tmp_path / "lines.txt"}
    for name, source in sources.items():
        result = run(source, "--vocab-size", 270, "--out", tmp_path / f"{name}.json")
        assert result.exit_code == 0 and "270 entries" in result.output, result.output
    made = {(tmp_path / f"{name}.json").read_bytes() for name in sources}
    assert len(made) == 1
    trained = HugTokenizer(tmp_path / "folder.json")
    assert trained.vocab_size == 270 and trained.tokenizer.id_to_token(0) == "[PAD]"
    assert trained.encode("The RED bird") == trained.encode("the red bird")
    assert trained.decode(trained.encode("naïve ☃")).strip() == "naïve ☃"


def test_few_captions_give_a_smaller_one_and_say_so(tmp_path):
    write_folder(tmp_path / "folder", 1)
    (tmp_path / "folder" / "x.png").write_bytes(b"")
    (tmp_path / "folder" / "x.txt").write_text("\n")
    result = run(tmp_path / "folder", "--out", tmp_path / "tokenizer.json")
    assert result.exit_code == 0
    size = HugTokenizer(tmp_path / "tokenizer.json").vocab_size
    assert 257 < size < 400 and f"The captions give no more than {size}" in result.output


def test_errors_are_sentences(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.png").write_bytes(b"")
    (tmp_path / "folder" / "x.txt").write_text("\n")
    for arguments, message in (
        ((tmp_path / "absent",), "found nothing at"),
        ((tmp_path / "empty.txt",), "holds no caption"),
        ((tmp_path / "folder",), "must hold captions, got only empty ones"),
        ((tmp_path / "folder", "--vocab-size", 256), "must be at least 257, got 256"),
    ):
        result = run(*arguments, "--out", tmp_path / "tokenizer.json")
        assert result.exit_code == 1 and message in result.output, result.output
    assert not (tmp_path / "tokenizer.json").exists()


def test_the_papers_size_is_the_default():
    with pytest.raises(ValueError, match="at least 257"):
        train_tokenizer(["a"], 100)
    assert train_tokenizer([]).get_vocab_size() == 257
    assert "16384" in CliRunner().invoke(tokenizer, ["train", "--help"]).output
