"""Files of weights for tests, good and crafted: archives of any records, legacy streams, pickles of opcodes."""

from __future__ import annotations

import argparse
import collections
import io
import pathlib
import pickle
import struct
import sys
import types
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn


def saved(data: Any, *, legacy: bool = False, protocol: int = 2) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(data, buffer, _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)
    return buffer.getvalue()


def scripted() -> bytes:
    """What torch.jit.save writes of a small module, traced."""
    torch.manual_seed(5)
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))).eval()
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, torch.zeros(1, 3)), buffer)
    return buffer.getvalue()


def records_of(data: bytes) -> dict[str, bytes]:
    """Name -> bytes of a zip file."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archive_of(records: Mapping[str, bytes] | list[tuple[str, bytes]], *, deflated: bool = False) -> bytes:
    """A zip file of records; a list may have a name twice."""
    buffer = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, "w", kind) as archive:
        for name, content in records.items() if isinstance(records, Mapping) else records:
            archive.writestr(zipfile.ZipInfo(name), content, compress_type=kind)
    return buffer.getvalue()


def archive_with_pickle(stream: bytes, storage: bytes = bytes(16)) -> bytes:
    """An archive of torch.save whose data are this pickle, and one storage, "0"."""
    return archive_of({"archive/data.pkl": stream, "archive/version": b"3\n", "archive/data/0": storage})


def tensor_opcodes(
    size: tuple[int, ...], stride: tuple[int, ...], *, offset: int = 0, n: int = 4, key: str = "0"
) -> bytes:
    """A pickle of a float32 tensor of storage `key`, which has `n` values as it says."""
    numbers = b"".join(map(_integer, size)), b"".join(map(_integer, stride))
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(("
        + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + _integer(n) + b"tQ"
        + _integer(offset) + b"(" + numbers[0] + b"t(" + numbers[1] + b"t\x89}tR."
    )  # fmt: skip


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _integer(value: int) -> bytes:
    data = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


class Calling:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.args


@contextmanager
def fake_classes(names: Mapping[str, type]) -> Iterator[None]:
    """Makes classes importable under names of packages that are not installed, and takes them away again."""
    made = []
    try:
        for name, cls in names.items():
            module, _, cls.__qualname__ = name.rpartition(".")
            cls.__name__, cls.__module__ = cls.__qualname__, module
            parts = module.split(".")
            for i in range(len(parts)):
                partial = ".".join(parts[: i + 1])
                if partial not in sys.modules:
                    sys.modules[partial] = types.ModuleType(partial)
                    made.append(partial)
            setattr(sys.modules[module], cls.__name__, cls)
        yield
    finally:
        for name in made:
            del sys.modules[name]


def training_state() -> dict[str, Any]:
    """Like a trainer's checkpoint: weights, an optimiser's state, a scheduler's, names and numbers."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2, bias=False))
    moments = {
        i: {"step": torch.tensor(3.0), "exp_avg": torch.rand_like(p), "exp_avg_sq": torch.rand_like(p)}
        for i, p in enumerate(model.parameters())
    }
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "amsgrad": False, "fused": None, "params": list(moments)}
    return {
        "hparams": {"dim": 4, "attn_types": ("full", "axial_row"), "ids": (), "rate": 0.5, "on": True, "none": None},
        "weights": model.state_dict(),
        "opt_state": {"state": moments, "param_groups": [group]},
        "scheduler_state": {"best": float("inf"), "mode": "min", "_last_lr": [1e-3]},
        "epoch": 3,
        "version": "1.6.6",
    }


def lightning_state() -> bytes:
    """Like a checkpoint of Lightning: classes as keys, its own kinds of dict, a namespace, numpy's numbers, a path."""
    import numpy as np

    class AttributeDict(dict):
        pass

    class ModelCheckpoint:
        pass

    names = {
        "pytorch_lightning.utilities.parsing.AttributeDict": AttributeDict,
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint": ModelCheckpoint,
    }
    with fake_classes(names):
        return saved(
            {
                "epoch": np.int64(7),
                "global_step": 11,
                "state_dict": collections.OrderedDict(weight=torch.arange(6.0).reshape(2, 3)),
                "callbacks": {ModelCheckpoint: {"best_model_score": torch.tensor(0.5), "path": pathlib.Path("a/b")}},
                "hyper_parameters": AttributeDict(rate=np.float32(0.25), names=["a"]),
                "args": argparse.Namespace(width=3),
            }
        )


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def pickled(value: Any, protocol: int = 2) -> bytes:
    return pickle.dumps(value, protocol)
