"""WebDataset shards as a source: the same samples as the folder they were made of, whatever is wrong with a tar."""

import gzip
import json
import logging
import shutil
import sys

import pytest
from data_folders import (
    assert_same,
    batches,
    captions,
    encoded,
    opened,
    tokenizer,
    write_folder,
    write_shards,
    write_tar,
)

webdataset = pytest.importorskip("webdataset", reason="shards need the package webdataset, part of the extra train")

from dalle_fast.training.data import shards as shard_files
from dalle_fast.training.data.shards import INDEX_SUFFIX, ShardSamples, expand, index_of


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_shards_give_the_samples_of_the_folder_they_were_made_of(tmp_path, words):
    write_folder(tmp_path / "folder")
    ours = batches(opened(write_shards(tmp_path / "shards", shards=3), words), workers=1)
    theirs = batches(opened(tmp_path / "folder", words))
    assert [name.rpartition("/")[2] for batch in ours for name in batch["names"]] == [
        name[-7:-4] for batch in theirs for name in batch["names"]
    ]
    for batch in (*ours, *theirs):
        batch["names"] = []
    assert_same(ours, theirs)


def test_shards_of_the_librarys_own_writer_are_read(tmp_path, words):
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for i in range(3):
            text = {"caption": captions(i)}
            writer.write({"__key__": f"some/{i}", "jpg": encoded(i, "jpeg"), "json": text, "cls": 1})
    source = opened(tmp_path / "a.tar", words)
    assert source.n == 3 and not source.skipped()
    assert batches(source)[0]["names"][0].startswith(f"{tmp_path}/a.tar/some/")


def test_headers_are_read_once(tmp_path, monkeypatch):
    paths = expand(write_shards(tmp_path))
    first = [index_of(path) for path in paths]
    assert all((tmp_path / (path.name + INDEX_SUFFIX)).is_file() for path in paths)
    monkeypatch.setattr(shard_files, "_read_headers", None)
    assert [[tuple(row) for row in index_of(path).rows] for path in paths] == [index.rows for index in first]


def test_an_index_of_another_tar_or_a_damaged_one_is_made_anew(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"1.png": encoded(1), "1.txt": b"one"})
    beside = tmp_path / ("a.tar" + INDEX_SUFFIX)
    assert len(index_of(path).rows) == 1
    for content in ("{", "[]", "{}", json.dumps({"size": 1})):
        beside.write_text(content)
        assert len(index_of(path).rows) == 1
    write_tar(path, {f"{i}.png": encoded(i) for i in range(9)})
    assert len(index_of(path).rows) == 9


def test_a_folder_that_cannot_be_written_keeps_no_index(tmp_path, monkeypatch):
    pattern = write_shards(tmp_path)

    def refuse(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr(shard_files, "write_whole", refuse)
    assert len(ShardSamples(expand(pattern), captioned=True)) == 6
    assert not list(tmp_path.glob("*" + INDEX_SUFFIX))


def test_of_a_half_written_shard_the_whole_samples_are_used_and_it_is_named_once(tmp_path, words, caplog):
    """Cut anywhere: in a header, in a picture, between members, before the end."""
    whole = write_tar(tmp_path / "whole.tar", {f"{i}.{end}": data for i in range(3) for end, data in sample(i).items()})
    data = whole.read_bytes()
    rows = index_of(whole).rows
    ends = [row[3] + row[4] for row in rows]  # the text comes second
    cuts = [512 * block + offset for block in range(len(data) // 512 - 16) for offset in (0, 100, 511)]
    assert any(cut == ends[0] for cut in cuts) or ends[0] % 512  # some cut is just behind a member or in its padding
    for cut in [*cuts, ends[0], ends[2]]:
        path = tmp_path / "cut.tar"
        path.write_bytes(data[:cut])
        index = index_of(path)
        n_whole = sum(end <= cut for end in ends)
        assert sum(row[5] >= 0 for row in index.rows) == n_whole
        assert index.whole == (cut >= -(-ends[2] // 512) * 512 + 512)
    path.write_bytes(data[: ends[1]])
    with caplog.at_level(logging.WARNING):
        source = opened(tmp_path / "{whole,cut}.tar", words)
        batches(source)
    assert source.n == 5
    assert source.skipped() == {"rest of a shard that ends early": 1}
    assert caplog.messages == [f"skipped {path}: it ends early; its 2 whole samples are used"]


def sample(i):
    return {"png": encoded(i), "txt": "\n".join(captions(i)).encode()}


def test_what_is_no_sample_is_counted(tmp_path, words):
    members = {f"{i}.{end}": data for i in range(2) for end, data in sample(i).items()}
    members |= {"bare.png": encoded(3), "alone.txt": b"text", "folder/.hidden": b"", "readme": b"text"}
    members |= {"broken.png": b"no picture", "broken.txt": b"broken", "empty.png": encoded(4), "empty.txt": b" \n"}
    members |= {"other.png": encoded(5), "other.json": b'{"text": 1}', "bad.png": encoded(6), "bad.json": b"{"}
    write_tar(tmp_path / "a.tar", members)
    source = opened(tmp_path / "a.tar", words)
    names = {name.rpartition("/")[2] for batch in batches(source, steps=4, workers=1) for name in batch["names"]}
    assert names == {"0", "1"}
    assert source.skipped() == {
        "picture without a caption": 1,
        "caption without a picture": 1,
        "broken picture": 1,
        "empty caption": 2,
        "caption is no JSON": 1,
    }
    assert opened(tmp_path / "a.tar").n == 7


def test_held_out_samples_are_those_of_the_folder(tmp_path, words):
    pattern = write_shards(tmp_path / "shards", n=40)
    for i in range(40):
        write_folder(tmp_path / "folder", 1)
        (tmp_path / "folder" / f"{i:03d}.png").write_bytes(encoded(i))
        (tmp_path / "folder" / f"{i:03d}.txt").write_text("\n".join(captions(i)))
    first, second = (
        list(opened(source, words, held_out=0.3).held_out(50)) for source in (pattern, tmp_path / "folder")
    )
    first[0]["names"] = second[0]["names"] = []
    first[0].pop("index"), second[0].pop("index")
    assert_same(first, second)


def test_bad_shards_are_sentences(tmp_path, words):
    pattern = write_shards(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"all 4 shards of .* 2 are missing, \S*002\.tar the first"):
        opened(pattern.replace("001}", "003}"), words)
    for address in ("https://example.com/{0..3}.tar", "s3://bucket/a.tar", "pipe:cat a.tar"):
        with pytest.raises(ValueError, match=r"shards must be files .* Fetch them first"):
            opened(address, words)
    (tmp_path / "text.tar").write_text("no tar at all" * 100)
    with gzip.open(tmp_path / "packed.tar", "wb") as packed:
        packed.write((tmp_path / "000.tar").read_bytes())
    for name in ("text", "packed"):
        with pytest.raises(ValueError, match=rf"a shard must be a plain tar, got \S*{name}\.tar"):
            opened(tmp_path / f"{name}.tar", words)
    (tmp_path / "nothing.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="the shards must hold pictures with captions, got none in 1 of them"):
        opened(tmp_path / "nothing.tar", words)


def test_a_shard_that_changes_under_training_is_a_skipped_sample(tmp_path, words):
    source = opened(write_shards(tmp_path), words)
    shutil.copy(tmp_path / "000.tar", tmp_path / "kept.tar")
    (tmp_path / "000.tar").write_bytes(b"")
    assert len(batches(source, steps=4)) == 4
    assert set(source.skipped()) <= {"broken picture", "empty caption"} and source.skipped()


def test_without_webdataset_it_says_what_to_install(monkeypatch):
    class Without:
        def find_spec(self, name, path=None, target=None):
            if name == "webdataset":
                raise ModuleNotFoundError(name=name)

    for name in [name for name in sys.modules if name.partition(".")[0] == "webdataset"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Without(), *sys.meta_path])
    with pytest.raises(RuntimeError, match=r"pip install dalle-fast\[train\]"):
        expand("a.tar")
