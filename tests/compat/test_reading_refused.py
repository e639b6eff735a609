"""What is refused: code by name, bombs and absurd shapes by their measure, other files by what they are."""

from __future__ import annotations

import builtins
import gzip
import os
import pickle
import pickletools
import shutil
import struct
import subprocess
import tarfile

import numpy as np
import pytest
import torch
from crafted_files import (
    Calling,
    archive_of,
    archive_with_pickle,
    pickled,
    records_of,
    saved,
    tensor_opcodes,
    text,
    training_state,
    write,
)

from dalle_fast.compat import UnreadableFile, UnsafeFile, read
from dalle_fast.compat.reading import state_dict_of


def refused(path, match):
    with pytest.raises(UnreadableFile, match=match) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


CALLS = {
    "os.system": (os.system, "touch ran"),
    "builtins.eval": (eval, "open('ran', 'w')"),
    "builtins.exec": (exec, "open('ran', 'w')"),
    "builtins.getattr": (getattr, (1).__class__, "real"),
    "builtins.open": (open, "ran", "w"),
    "subprocess.Popen": (subprocess.Popen, ["touch", "ran"]),
    "shutil.rmtree": (shutil.rmtree, "kept"),
    "torch.load": (torch.load, "other.pt"),
    "torch.hub.load": (torch.hub.load, "x/y", "z"),
    "pickle.loads": (pickle.loads, b"N."),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", CALLS)
def test_code_is_refused_by_name_and_not_run(name, legacy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept").mkdir()
    data = {"weights": {"a": torch.ones(2)}, "more": Calling(*CALLS[name])}
    path = write(tmp_path / "x.pt", saved(data, legacy=legacy, protocol=2))
    with pytest.raises(UnsafeFile, match="Nothing of it was run") as caught:
        read(path)
    stored_as = next(argument for op, argument, _ in pickletools.genops(pickled(CALLS[name][0])) if op.name == "GLOBAL")
    assert f"asks for {stored_as.replace(' ', '.')}." in str(caught.value)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["kept", "x.pt"]


@pytest.mark.parametrize(
    "stream",
    [
        b"cos\nsystem\n" + text("touch ran") + b"\x85R.",
        b"(" + text("touch ran") + b"ios\nsystem\n.",
        text("posix") + text("system") + b"\x93" + text("touch ran") + b"\x85R.",
        b"(cos\nsystem\n" + text("touch ran") + b"o.",
        b"cos\nsystem\n" + text("touch ran") + b"\x85\x81.",
        b"cbuiltins\n__import__\n" + text("os") + b"\x85R.",
        b"ctorch.nn\n__builtins__\n0cnumpy\nload\n.",
    ],
)
def test_every_way_to_name_code_is_refused(stream, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsafeFile):
        read(write(tmp_path / "x.pt", archive_with_pickle(stream)))
    assert not (tmp_path / "ran").exists()


def test_an_allowed_name_stays_a_name(tmp_path):
    """A dotted way from an allowed package to code is never walked."""
    stream = b"ctorch.nn\nmodules.os.system\n" + text("touch ran") + b"\x85R."
    node = read(write(tmp_path / "x.pt", archive_with_pickle(stream))).data
    assert node.name == "torch.nn.modules.os.system" and node.args == ("touch ran",)


# --------------------------------------------------------------------------------------------------- absurd tensors


@pytest.mark.parametrize(
    ("size", "stride", "options"),
    [
        ((1 << 40,), (0,), {}),
        ((1 << 62, 1 << 62), (0, 0), {}),
        ((5,), (1,), {}),
        ((2, 2), (3, 1), {}),
        ((2,), (1,), {"offset": 3}),
        ((2,), (1,), {"offset": -1}),
        ((-1,), (1,), {}),
        ((2,), (-1,), {}),
        ((2,), (1, 1), {}),
        ((1,) * 40, (1,) * 40, {}),
        ((4,), (1,), {"n": 1 << 60}),
        ((4,), (1,), {"n": -4}),
        ((4,), (1,), {"key": "1"}),
        ((4,), (1,), {"key": "../../../etc/passwd"}),
        ((0, 1 << 60), (1, 1), {}),
    ],
)
def test_shapes_that_the_storage_does_not_hold(size, stride, options, tmp_path):
    refused(
        write(tmp_path / "x.pt", archive_with_pickle(tensor_opcodes(size, stride, **options))), "must be a whole file"
    )


def test_shapes_that_it_does_hold(tmp_path):
    for size, stride in (((4,), (1,)), ((2, 2), (2, 1)), ((2, 2), (1, 2)), ((), ()), ((0, 7), (7, 1)), ((2,), (3,))):
        tensor = read(write(tmp_path / "x.pt", archive_with_pickle(tensor_opcodes(size, stride)))).data
        assert tuple(tensor.shape) == size and not tensor.any()


# ------------------------------------------------------------------------------------------------------------- bombs

_DOUBLED = b"2\x86" * 200 + b"."
BOMBS = {
    "a tuple of twice itself, again and again": (b"N" + _DOUBLED, "repeats them more often"),
    "lists in lists": (b"]" * 5000 + b"a" * 4999 + b".", "nests its data deeper"),
    "lists through the memo": (b"]q\x00" + b"]q\x010h\x01h\x00aq\x00" * 3000 + b".", "nests its data deeper"),
    "a long text": (b"X\xff\xff\xff\x7f" + bytes(64), "text of 2147483647 bytes"),
    "a very long text": (b"\x8d" + b"\xff" * 7 + b"\x7f", "text of"),
    "a long integer": (b"\x8b\xff\xff\xff\x7f.", "integer of 2147483647 bytes"),
    "digits": (b"L" + b"9" * 60000 + b"L\n.", "very long integer"),
    "many marks": (b"(" * 3_000_000 + b".", "far more objects"),
    "many lists": (b"(" + b"]" * 3_000_000 + b"l.", "far more objects"),
    "many dicts": (b"(" + b"}" * 3_000_000 + b"t.", "far more objects"),
    "many memos": (b"".join(b"]r" + struct.pack("<I", i) + b"0" for i in range(500_000)) + b"N.", "far more objects"),
    "keys of one hash": (
        b"}("
        + b"".join(b"\x8a\x0a" + (i * ((1 << 61) - 1)).to_bytes(10, "little") + b"N" for i in range(5000))
        + b"u.",
        "a key of a dict",
    ),
    "a key of tuples in tuples": (b"}N" + b"2\x86" * 60 + b"Ns.", "a key of a dict"),
    "copies of a list": (
        b"](" + b"N" * 100_000 + b"eq\x00" + b"cbuiltins\nlist\nh\x00\x85R" * 1000 + b".",
        "far more objects",
    ),
    "no end": (b"N", "ends in the middle"),
    "a persistent id of text": (b"Pabc\n.", "opcode 0x50"),
    "an extension": (b"\x82\x01.", "opcode 0x82"),
    "a buffer outside": (b"\x97.", "opcode 0x97"),
    "a call of a text": (text("x") + b")R.", "a call of a str"),
    "a long name": (b"\x8c\x08torch.nnX\x00\x10\x00\x00" + b"n" * 4096 + b"\x93.", "very long name of a class"),
    "a state again and again": (
        b"ctorch.nn\nLinear\n)Rq\x00}("
        + b"".join(b"M" + struct.pack("<H", i) + b"N" for i in range(9999))
        + b"uq\x01b"
        + b"h\x00h\x01b" * 1000
        + b".",
        "far more objects",
    ),
    "states that are no dicts": (b"ctorch.nn\nLinear\n)R" + b"K\x01b" * 500_000 + b".", "far more objects"),
    "arguments with keywords again and again": (
        b"("
        + b"N" * 100_000
        + b"tq\x00ctorch.nn\nLinear\nq\x01}"
        + text("k")
        + b"Nsq\x02"
        + b"h\x01h\x00h\x02\x92" * 999,
        "far more objects",
    ),
    "a long text again and again": (b"(" + text("n" * 1_000_000) + b"q\x00" + b"h\x00" * 99 + b"l.", "repeats them"),
    "a long key": (b"}" + text("n" * 5000) + b"Ns.", "a key of a dict that weights do not need, a str"),
    "a set as a key": (b"}(K\x01\x91Ns.", "a key of a dict that weights do not need, a frozenset"),
    "a list that contains itself": (b"]q\x00h\x00a.", "list or dict that contains itself"),
    "dicts that contain each other": (b"}q\x00K\x01}q\x01K\x01h\x00ss.", "list or dict that contains itself"),
    "nodes nested as keys": (
        b"K\x01q\x00" + b"0ctorch.nn\nModule\n)R}h\x00Nsbq\x00" * 300 + b".",
        "nests its data deeper",
    ),
    "a state for a function": (b"ccollections\nOrderedDict\n}b.", "a state for a Reference"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name, tmp_path):
    stream, told = BOMBS[name]
    refused(write(tmp_path / "x.pt", archive_with_pickle(stream)), told)


def test_long_names_of_modules_in_modules_are_refused(tmp_path):
    """A key of 1 KB in the memo, used at each of 100 levels, would make names of 5 MB."""
    level = b"ctorch.nn\nModule\n)R}h\x00h\x01sbq\x010"
    stream = text("n" * 1000) + b"q\x000ctorch.nn\nModule\n)Rq\x010" + level * 100 + b"h\x01."
    data = read(write(tmp_path / "x.pt", archive_with_pickle(stream))).data
    with pytest.raises(UnreadableFile, match="got far longer ones"):
        state_dict_of(data)


def test_legacy_headers_share_one_budget(tmp_path):
    magic = pickled(0x1950A86A20F9469CFC6C)
    lists = b"\x80\x02(" + b"]" * 250_000 + b"l."
    refused(write(tmp_path / "x.pt", magic + pickled(1001) + lists * 3), "far more objects")


def test_every_storage_of_a_legacy_file_is_counted(tmp_path):
    headers = b"".join(pickled(value) for value in (0x1950A86A20F9469CFC6C, 1001, {}))
    pid = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x00Ntq\x00Q"
    refused(write(tmp_path / "x.pt", headers + b"\x80\x02" + pid + b"h\x00Q" * 200_000 + b"."), "far more objects")


def test_an_object_may_lead_back_to_itself_and_counts(tmp_path):
    node = b"ctorch.nn\nModule\n)Rq\x00}" + text("own") + b"h\x00s"
    data = read(write(tmp_path / "x.pt", archive_with_pickle(node + b"b."))).data
    assert data.state["own"] is data
    many = node + text("more") + b"(" + b"h\x00" * 5000 + b"lsb."
    refused(write(tmp_path / "x.pt", archive_with_pickle(many)), "repeats them more often")


# ---------------------------------------------------------------------------------------------------------- archives


def test_archives_that_unpack_to_far_more(tmp_path):
    n = 1 << 27
    stream = tensor_opcodes((n // 4,), (1,), n=n // 4)
    path = tmp_path / "x.pt"
    path.write_bytes(archive_of({"archive/data.pkl": stream, "archive/data/0": bytes(n)}, deflated=True))
    assert path.stat().st_size < 1 << 20
    refused(path, "unpacks to far more")


def test_traversal_names_are_keys(tmp_path):
    records = {**records_of(saved(training_state())), "../../outside": b"x", "/etc/passwd": b"x", "archive/../y": b"x"}
    assert read(write(tmp_path / "x.pt", archive_of(records))).data["epoch"] == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_contradict_themselves(tmp_path):
    good = records_of(saved({"a": torch.ones(3)}))
    twice = [*good.items(), ("archive/data.pkl", b"N.")]
    refused(write(tmp_path / "twice.pt", archive_of(twice)), "two records of one name")
    refused(write(tmp_path / "roots.pt", archive_of({**good, "other/data.pkl": b"N."})), "zip file of other things")
    refused(write(tmp_path / "names.pt", archive_of({**good, "n" * 5000: b""})), "record of a very long name")
    data = saved(training_state())
    refused(write(tmp_path / "cut.pt", data[:-30]), "ends before the directory")
    at = data.rindex(b"PK\5\6")
    for first, change in ((at + 12, b"\xff\xff\xff\x7f"), (at + 10, b"\xfe\xff"), (at + 16, b"\x05\0\0\0")):
        lies = data[:first] + change + data[first + len(change) :]
        refused(write(tmp_path / "lies.pt", lies), "must be a whole file")


# ------------------------------------------------------------------------------------------------------- other files


def others(folder):
    np.savez(folder / "a.npz", x=np.ones(2))
    with tarfile.open(folder / "a.tar", "w") as archive:
        archive.add(folder / "a.npz", "a.npz")
    with gzip.open(folder / "a.tar.gz", "wb") as file:
        file.write(b"x")
    (folder / "page.pt").write_bytes(b"\n<!DOCTYPE html><html>Sign in</html>")
    (folder / "lfs.pt").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (folder / "bare.pkl").write_bytes(pickle.dumps({"a": 1}))
    (folder / "empty.pt").write_bytes(b"")
    (folder / "noise.pt").write_bytes(bytes(range(256)))
    return {
        "a.npz": "a zip file of other things", "a.tar": "a tar archive", "a.tar.gz": "a gzip archive",
        "page.pt": "a web page", "lfs.pt": "a pointer of git-lfs", "bare.pkl": "a pickle that torch did not save",
        "empty.pt": "an empty one", "noise.pt": "something else",
    }  # fmt: skip


def test_other_files_are_told_apart(tmp_path):
    for name, told in others(tmp_path).items():
        refused(tmp_path / name, told)
    with pytest.raises(FileNotFoundError, match="which is not there"):
        read(tmp_path / "missing.pt")


def test_builtins_are_those_that_were(tmp_path):
    before = dict(vars(builtins))
    for stream, _ in BOMBS.values():
        if len(stream) < 10_000:
            with pytest.raises(UnreadableFile):
                read(write(tmp_path / "x.pt", archive_with_pickle(stream)))
    assert vars(builtins) == before
