"""Encoding once: the codes of on-the-fly encoding, shards whole or not there, the same call goes on."""

import json

import pytest
import torch
from data_folders import SIZE, batches, encoded, opened, tokenizer, write_folder, write_pair, write_shards
from safetensors.torch import load_file

from dalle_fast.models.dalle import DALLE
from dalle_fast.models.dvae import DiscreteVAE
from dalle_fast.training import encode as encoding
from dalle_fast.training.data.codes import MANIFEST, CodesManifest
from dalle_fast.training.encode import encode


def tiny_vae(seed=0, **options):
    torch.manual_seed(seed)
    settings = {"image_size": SIZE, "num_tokens": 12, "codebook_dim": 5, "num_layers": 1, "hidden_dim": 6}
    return DiscreteVAE(**{**settings, **options})


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "vae"
    tiny_vae().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("tokenizer"))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_codes_are_those_of_the_pictures_in_their_order(tmp_path, vae):
    write_folder(tmp_path / "pictures")
    made = encode(str(tmp_path / "pictures"), vae, tmp_path / "codes", batch=4, shard_size=4)
    assert (made.counts, made.skipped, made.num_tokens, made.image_seq_len) == ([4, 2], 0, 12, 16)
    pixels = torch.cat([batch["pixels"] for batch in batches(ordered(tmp_path / "pictures"), batch=6, micro_batch=6)])
    found = [load_file(tmp_path / "codes" / f"{number:06d}.safetensors")["codes"] for number in range(2)]
    assert all(part.dtype == torch.int16 for part in found)
    model = DiscreteVAE.from_pretrained(vae)
    assert torch.equal(torch.cat(found).long(), model.get_codebook_indices(pixels / 255))
    lines = [json.loads(line) for line in (tmp_path / "codes" / "000001.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["deeper/004", "deeper/005"]
    assert [len(line["captions"]) for line in lines] == [3, 3]


class ordered:
    """A folder's pictures once, in order, undrawn."""

    def __init__(self, folder):
        self.source = opened(folder, resize="none", flip=False)
        self.source.kept_apart = self.source.trained

    def loader(self, *, batch, **_):
        return self.source.held_out(batch)


def test_training_from_codes_gives_the_losses_of_encoding_on_the_fly(tmp_path, vae, words):
    write_folder(tmp_path / "pictures", width=12, height=10)
    encode(str(tmp_path / "pictures"), vae, tmp_path / "codes", batch=5, shard_size=4, workers=1)
    model = DiscreteVAE.from_pretrained(vae)
    options = {"resize": "none", "flip": False, "need": {"text", "codes"}}

    def losses(source, workers):
        torch.manual_seed(0)
        dalle = DALLE(dim=16, vae=model, num_text_tokens=300, text_seq_len=24, depth=1, heads=2, dim_head=8)
        optimiser = torch.optim.SGD([p for p in dalle.parameters() if p.requires_grad], lr=0.1)
        found = []
        for batch in batches(opened(source, words, **options), workers=workers, steps=4):
            codes = batch["codes"] if "codes" in batch else model.get_codebook_indices(batch["pixels"].float() / 255)
            loss = dalle(batch["text"], codes, return_loss=True)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            found.append(loss.item())
        return found

    fly, cached = losses(tmp_path / "pictures", 1), losses(tmp_path / "codes", 0)
    assert fly == cached and len(set(fly)) == 4


def test_shards_and_uncaptioned_pictures_are_encoded_and_broken_ones_left_out(tmp_path, vae, words, caplog):
    pytest.importorskip("webdataset", reason="shards need the package webdataset, part of the extra train")
    made = encode(write_shards(tmp_path / "tars"), vae, tmp_path / "of tars")
    assert made.counts == [6]
    write_folder(tmp_path / "pictures", 2)
    (tmp_path / "pictures" / "bare.png").write_bytes(encoded(3))
    write_pair(tmp_path / "pictures", "broken", 4)
    (tmp_path / "pictures" / "broken.png").write_bytes(b"")
    made = encode(str(tmp_path / "pictures"), vae, tmp_path / "codes", batch=2, shard_size=3)
    assert (made.n_pictures, made.counts, made.skipped) == (4, [2, 1], 1)
    assert sum("broken.png" in message for message in caplog.messages) == 1
    captioned = opened(tmp_path / "codes", words, need={"text", "codes"})
    assert captioned.n == 2 and captioned.skipped() == {"picture without a caption": 1}
    assert opened(tmp_path / "codes", need={"codes"}).n == 3


def test_crops_are_drawn_apart_and_do_not_depend_on_batch_or_workers(tmp_path, vae, words):
    write_folder(tmp_path / "pictures", 4, width=30, height=30)
    options = {"crops": 3, "resize": "upstream", "smallest_crop": 0.2, "shard_size": 2}
    for name, how in {"a": {"batch": 2}, "b": {"batch": 64, "workers": 2}, "c": {"seed": 1}}.items():
        encode(str(tmp_path / "pictures"), vae, tmp_path / name, **options, **how)
    first, second, other = (contents(tmp_path / name) for name in "abc")
    assert first == second
    assert first["000000.safetensors"] != other["000000.safetensors"]
    codes = load_file(tmp_path / "a" / "000000.safetensors")["codes"]
    assert len(codes) == 6 and len({tuple(row.tolist()) for row in codes[:3]}) > 1
    names = batches(opened(tmp_path / "a", words, need={"text", "codes"}), batch=12, micro_batch=12)[0]["names"]
    assert len(set(names)) == 12 and {name[-2:] for name in names} == {"#0", "#1", "#2"}


def test_a_killed_run_goes_on_and_makes_the_same_files(tmp_path, vae):
    write_folder(tmp_path / "pictures", 7)
    arguments = (str(tmp_path / "pictures"), vae)
    encode(*arguments, tmp_path / "whole", batch=1, shard_size=2)
    for stop in range(1, 8):
        out = tmp_path / f"cut {stop}"

        def kill(done, total, stop=stop):
            if done == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            encode(*arguments, out, batch=1, shard_size=2, on_batch=kill)
        kept = {path.name: path.stat().st_ino for path in out.glob("0*")}
        (out / ".tmp-000001.safetensors").write_bytes(b"half")
        with pytest.raises(ValueError, match="got an unfinished encode"):
            opened(out, need={"codes"})
        encode(*arguments, out, batch=3, shard_size=2)
        assert contents(out) == contents(tmp_path / "whole")
        assert all((out / name).stat().st_ino == inode for name, inode in kept.items())


def test_a_shard_that_is_damaged_or_gone_is_named_and_made_anew(tmp_path, vae):
    write_folder(tmp_path / "pictures", 4)
    arguments = (str(tmp_path / "pictures"), vae, tmp_path / "codes")
    encode(*arguments, shard_size=2)
    whole = contents(tmp_path / "codes")
    for name in ("000001.safetensors", "000001.jsonl"):
        (tmp_path / "codes" / name).write_bytes(whole[name][:20])
        with pytest.raises(ValueError, match=r"000001\.safetensors must hold 2 samples"):
            opened(tmp_path / "codes", need={"codes"})
        encode(*arguments, shard_size=2)
        assert contents(tmp_path / "codes") == whole


def test_codes_of_another_vae_are_refused(tmp_path, vae, words):
    write_folder(tmp_path / "pictures", 2)
    encode(str(tmp_path / "pictures"), vae, tmp_path / "codes")
    other = tmp_path / "other"
    tiny_vae(seed=1).save_pretrained(other)
    options = {"need": {"codes"}}
    assert opened(tmp_path / "codes", vae=vae, num_tokens=12, image_seq_len=16, **options).n == 2
    for wrong, message in (
        ({"vae": other}, r"of the model's VAE, got those of \S*vae as it was then \(sha256"),
        ({"num_tokens": 13}, "with num_tokens=13, the model's, got 12"),
        ({"image_seq_len": 64}, "with image_seq_len=64, the model's, got 16"),
    ):
        with pytest.raises(ValueError, match=message):
            opened(tmp_path / "codes", **wrong, **options)
    with pytest.raises(ValueError, match="the data must be pictures, got the codes in"):
        opened(tmp_path / "codes", words)


def test_other_pictures_of_the_same_number_are_refused(tmp_path, vae):
    write_folder(tmp_path / "pictures", 2)
    encode(str(tmp_path / "pictures"), vae, tmp_path / "codes")
    (tmp_path / "pictures").rename(tmp_path / "moved")
    assert encode(str(tmp_path / "moved"), vae, tmp_path / "codes").complete
    (tmp_path / "moved" / "000.png").rename(tmp_path / "moved" / "a.png")
    with pytest.raises(ValueError, match="got keys_hash"):
        encode(str(tmp_path / "moved"), vae, tmp_path / "codes")


def test_other_settings_and_other_files_there_are_refused(tmp_path, vae):
    write_folder(tmp_path / "pictures", 2)
    arguments = (str(tmp_path / "pictures"), vae, tmp_path / "codes")
    encode(*arguments)
    assert encode(*arguments, batch=1).complete
    for wrong, message in (
        ({"shard_size": 1}, "shard_size 10000, now 1"),
        ({"resize": "paper"}, "resize 'none', now 'paper'"),
        ({"dtype": "bfloat16"}, "dtype 'float32', now 'bfloat16'"),
    ):
        with pytest.raises(ValueError, match=f"must hold codes of the same call, got {message}. Name a new folder"):
            encode(*arguments, **wrong)
    with pytest.raises(ValueError, match="out must be empty or hold codes"):
        encode(str(tmp_path / "pictures"), vae, tmp_path / "pictures")
    with pytest.raises(ValueError, match="the data must be pictures, got codes"):
        encode(str(tmp_path / "codes"), vae, tmp_path / "again")
    for wrong, message in (({"batch": 0}, "must be at least 1"), ({"crops": 2}, "upstream or paper for crops=2")):
        with pytest.raises(ValueError, match=message):
            encode(*arguments[:2], tmp_path / "new", **wrong)


def test_pictures_none_of_which_opens_are_a_sentence(tmp_path, vae):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="must hold a picture that opens, got 1 that do not"):
        encode(str(tmp_path / "pictures"), vae, tmp_path / "codes")
    assert not CodesManifest.read(tmp_path / "codes").complete


def test_a_full_disk_loses_nothing_that_is_written(tmp_path, vae, monkeypatch):
    write_folder(tmp_path / "pictures", 4)
    write = encoding.write_whole

    def full(path, pieces, **options):
        if path.name == "000001.safetensors":
            raise OSError(28, "No space left on device", str(path))
        write(path, pieces, **options)

    monkeypatch.setattr(encoding, "write_whole", full)
    arguments = (str(tmp_path / "pictures"), vae, tmp_path / "codes")
    with pytest.raises(OSError, match="No space left"):
        encode(*arguments, shard_size=2)
    monkeypatch.undo()
    assert encode(*arguments, shard_size=2).counts == [2, 2]


def test_a_manifest_that_is_none_of_ours_is_a_sentence(tmp_path):
    for content in ("{", '{"a": 1}', "[]"):
        (tmp_path / MANIFEST).write_text(content)
        with pytest.raises(ValueError, match=r"codes\.json must be what dalle-fast encode writes"):
            opened(tmp_path, need={"codes"})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_codes_are_codes(tmp_path, vae, dtype):
    write_folder(tmp_path / "pictures", 2)
    encode(str(tmp_path / "pictures"), vae, tmp_path / "codes", dtype=dtype)
    codes = load_file(tmp_path / "codes" / "000000.safetensors")["codes"]
    assert codes.shape == (2, 16) and codes.min() >= 0 and codes.max() < 12


def test_a_large_codebook_has_codes_of_32_bits(tmp_path):
    tiny_vae(num_tokens=40_000, codebook_dim=1).save_pretrained(tmp_path / "vae")
    write_folder(tmp_path / "pictures", 2)
    encode(str(tmp_path / "pictures"), tmp_path / "vae", tmp_path / "codes")
    codes = load_file(tmp_path / "codes" / "000000.safetensors")["codes"]
    pixels = next(iter(ordered(tmp_path / "pictures").loader(batch=2)))["pixels"]
    expected = DiscreteVAE.from_pretrained(tmp_path / "vae").get_codebook_indices(pixels / 255)
    assert codes.dtype == torch.int32 and torch.equal(codes.long(), expected)
