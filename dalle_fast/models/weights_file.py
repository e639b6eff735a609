"""Files of weights (safetensors), written and read one tensor at a time: neither way holds a second copy of a model.

    8 bytes: length of the header, little-endian
    header:  JSON, name -> {dtype, shape, data_offsets: [first, last) of the bytes behind the header}
    tensors: row-major, one behind the other

Source: the format's description (safetensors, "Format").
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_ALIGNMENT = 64  # of the first tensor in the file; a mapped file then has tensors where vector loads like them


def write_weights(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Writes tensors of any device and strides.

    Args: dtype: floating dtype of the file; None keeps each tensor's own. `tensors` do not change.
    Raises: TypeError (a dtype that the format has not), OSError.
    """
    kept = {name: _stored_dtype(name, tensor, dtype) for name, tensor in tensors.items()}
    order = sorted(tensors, key=lambda name: (-kept[name].itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name in order:
        end = place + tensors[name].numel() * kept[name].itemsize
        header[name] = {
            "dtype": _NAMES[kept[name]], "shape": list(tensors[name].shape), "data_offsets": [place, end],
        }  # fmt: skip
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            flat = tensors[name].detach().to("cpu", kept[name]).contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)


def read_weights(path: Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The tensors of a file, in memory of their own.

    Args: dtype: floating dtype to convert to while reading; None keeps those of the file.
    Raises: ValueError (not such a file, or cut short), OSError.
    """
    try:
        with safe_open(path, framework="pt"):
            pass  # the library has checked the header: no overlap, no hole, every size that of its shape
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    tensors = {}
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] not in _DTYPES:
                raise ValueError(f"{name} is {entry['dtype']}, which is none of {', '.join(_DTYPES)}")
            tensor = torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]])
            file.seek(8 + length + entry["data_offsets"][0])
            into = tensor.reshape(-1).view(torch.uint8).numpy().data
            if file.readinto(into) != len(into):
                raise ValueError(f"{name} is cut short")
            tensors[name] = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
    return tensors


def _stored_dtype(name: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    kept = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    if kept not in _NAMES:
        raise TypeError(f"save_pretrained: {name} must be of a dtype safetensors knows, got {kept}. Convert it first.")
    return kept
