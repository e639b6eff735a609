"""Containers are read as torch reads them, whole modules and foreign classes as data; tensors are views of the file."""

from __future__ import annotations

import copy
import struct
from collections.abc import Mapping

import pytest
import torch
from crafted_files import (
    archive_of,
    fake_classes,
    lightning_state,
    records_of,
    saved,
    scripted,
    training_state,
    write,
)
from safetensors.torch import save_file
from torch import nn

from dalle_fast.compat import read
from dalle_fast.compat.reading import Node, Reference, state_dict_of

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16,
]  # fmt: skip


def same(ours, theirs) -> bool:
    if isinstance(theirs, torch.Tensor):
        return (
            ours.dtype == theirs.dtype
            and ours.shape == theirs.shape
            and ours.stride() == theirs.stride()
            and torch.equal(as_bytes(ours), as_bytes(theirs))
        )
    if isinstance(theirs, Mapping):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, list | tuple) and not isinstance(theirs, torch.Size):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs and (type(ours) is type(theirs) or isinstance(theirs, torch.Size))


def as_bytes(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def all_kinds():
    whole = torch.arange(24.0).reshape(4, 6)
    values = {str(dtype): torch.arange(5).to(dtype) for dtype in DTYPES}
    views = {"whole": whole, "column": whole[:, 2], "turned": whole.T, "tied": whole, "scalar": torch.tensor(3)}
    empty = {"none": torch.empty(0), "row": torch.empty(0, 512)}
    other = {
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "device": torch.device("cuda", 1),
        "key": {1: b"\xff"},
    }
    return {"values": values, "views": views, "empty": empty, "other": other, "grad": nn.Parameter(torch.ones(2))}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("make", [training_state, all_kinds])
def test_what_torch_saves_is_read_as_torch_reads_it(make, protocol, legacy, tmp_path):
    data = make()
    path = write(tmp_path / "x.pt", saved(data, legacy=legacy, protocol=protocol))
    stored = read(path)
    assert stored.container == ("legacy" if legacy else "zip")
    assert same(stored.data, data)
    # torch's restricted reader knows no other protocol, and in the legacy container not every dtype that it wrote.
    if protocol == 2 and not (legacy and make is all_kinds):
        assert same(stored.data, torch.load(path, weights_only=True, map_location="cpu"))


def test_tied_tensors_stay_tied(tmp_path):
    for legacy in (False, True):
        views = read(write(tmp_path / "x.pt", saved(all_kinds(), legacy=legacy))).data["views"]
        assert views["tied"].data_ptr() == views["whole"].data_ptr() == views["turned"].data_ptr()
        assert views["column"].data_ptr() == views["whole"].data_ptr() + 8


def test_storages_of_a_zip_are_views_of_the_file_which_does_not_change(tmp_path):
    path = write(tmp_path / "x.pt", saved({"a": torch.zeros(1000), "b": torch.ones(7, dtype=torch.int8)}))
    before = path.read_bytes()
    data = read(path).data
    first = data["a"].data_ptr() - before.index(bytes(4000))
    assert data["b"].data_ptr() == first + before.index(bytes([1] * 7)), "both in one map"
    assert [tensor.untyped_storage().nbytes() for tensor in data.values()] == [4000, 7], "in a storage each"
    data["a"].fill_(5)
    assert path.read_bytes() == before
    assert not read(path).data["a"].any()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_whole_module_is_a_node_with_its_state_dict(legacy, tmp_path):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 2))
            self.register_parameter("b", None)
            self.register_buffer("kept", torch.ones(1))
            self.register_buffer("not_kept", torch.ones(1), persistent=False)

    torch.manual_seed(2)
    with fake_classes({"dall_e.encoder.Block": Block}):
        module = nn.Sequential(Block(), nn.Sequential(nn.Conv2d(1, 2, 3), nn.Upsample(2)), nn.MaxPool2d(2))
        path = write(tmp_path / "module.pkl", saved(module, legacy=legacy))
    data = read(path).data
    assert isinstance(data, Node) and data.name == "torch.nn.modules.container.Sequential"
    assert data.state["_modules"]["0"].name == "dall_e.encoder.Block"
    assert same(state_dict_of(data), dict(module.state_dict()))


def test_torchscript_is_read_and_not_run(tmp_path):
    path = write(tmp_path / "x.pt", scripted())
    stored = read(path)
    assert stored.container == "torchscript"
    assert stored.data.name.startswith("__torch__.")
    theirs = torch.jit.load(path, map_location="cpu").state_dict()
    assert same(state_dict_of(stored.data), dict(theirs))


def test_lightnings_extras_are_data(tmp_path):
    data = read(write(tmp_path / "last.ckpt", lightning_state())).data
    assert (data["epoch"], type(data["epoch"])) == (7, int)
    assert data["hyper_parameters"].name == "pytorch_lightning.utilities.parsing.AttributeDict"
    assert data["hyper_parameters"].state == {"rate": 0.25, "names": ["a"]}
    ((callback, kept),) = data["callbacks"].items()
    assert isinstance(callback, Reference)
    assert callback.name == "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
    assert kept["path"].name.endswith("Path") and kept["path"].args == ("a", "b")
    assert data["args"].name == "argparse.Namespace" and data["args"].state == {"width": 3}
    assert torch.equal(state_dict_of(data["state_dict"])["weight"], torch.arange(6.0).reshape(2, 3))


def test_safetensors_and_directories(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(3, dtype=torch.int16)}
    save_file(tensors, tmp_path / "x.bin")  # told by its content
    stored = read(tmp_path / "x.bin")
    assert stored.container == "safetensors" and same(stored.data, tensors)
    assert read(tmp_path).container == "directory" and read(tmp_path).data == {}


def test_compressed_archives_and_the_other_byte_order(tmp_path):
    data = {"a": torch.randn(50), "b": torch.arange(7, dtype=torch.int16), "c": torch.randn(3, dtype=torch.complex64)}
    records = records_of(saved(data))
    assert same(read(write(tmp_path / "small.pt", archive_of(records, deflated=True))).data, data)
    widths = dict(zip(("0", "1", "2"), "fhf", strict=True))
    for name, content in records.items():
        key = name.rpartition("/data/")[2]
        if key in widths and "/data/" in name:
            form = f"{len(content) // struct.calcsize(widths[key])}{widths[key]}"
            records[name] = struct.pack(f">{form}", *struct.unpack(f"<{form}", content))
        elif name.endswith("/byteorder"):
            records[name] = b"big"
    for deflated in (False, True):
        path = write(tmp_path / "big.pt", archive_of(records, deflated=deflated))
        assert same(read(path).data, data)
        assert same(torch.load(path, weights_only=True), data) or deflated


def test_unaligned_storages_are_copied(tmp_path):
    records = records_of(saved({"a": torch.arange(9.0)}))
    for shift in range(8):
        path = write(tmp_path / "x.pt", archive_of({**records, "archive/pad": bytes(shift)} if shift else records))
        assert torch.equal(read(path).data["a"], torch.arange(9.0))


def test_state_dict_of_refuses_other_data():
    for data, told in (({"a": 1}, "a dict of something else"), ({}, "a dict of something else"), ([], "got list")):
        with pytest.raises(ValueError, match=told):
            state_dict_of(data)


def test_a_module_inside_itself_is_entered_once():
    node = Node("torch.nn.Module", (), {"_parameters": {"w": torch.ones(1)}, "_modules": {}})
    node.state["_modules"]["again"] = node
    assert list(state_dict_of(node)) == ["w"]
    assert copy.copy(node) is not node and repr(node) == "Node('torch.nn.Module')"
