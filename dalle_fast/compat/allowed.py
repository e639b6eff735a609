"""What a pickle of weights may name, and what is built of it: tensors, dtypes, plain values. The rest are names.

A builder takes the arguments a file gives it, checks them, and returns plain data; none reads, writes, imports or calls
anything that a file names.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dalle_fast.compat.nodes import MOST_TEXT, Budget, Damaged, Names, Node, Reference, Refused
from dalle_fast.compat.unpickling import checked_key

_MOST_DIMENSIONS = 16
_TENSOR_BYTES = 1200  # of an object, its storage apart
_LARGEST_SIZE = 1 << 48


@dataclass(frozen=True)
class StorageType:
    """A class of storages, e.g. torch.HalfStorage."""

    dtype: torch.dtype


@dataclass(frozen=True)
class Storage:
    """A storage: one tensor [n] of its dtype."""

    flat: Tensor


def find(name: str) -> Any:
    """What a pickle's global is: a dtype, a class of storages, or a `Reference`.

    Raises: Refused.
    """
    if name in _VALUES:
        return _VALUES[name]
    if name in _BUILDERS or name in _INERT or name.startswith(_INERT_BELOW):
        return Reference(name)
    raise Refused(name)


NAMES = Names(find, lambda name: _BUILDERS.get(name))


# ------------------------------------------------------------------------------------------------------------- tensors


def _tensor(args: tuple[Any, ...], budget: Budget) -> Tensor:
    """torch._utils._rebuild_tensor and _v2: storage, offset, size, stride; requires_grad, hooks, metadata."""
    storage, offset, size, stride = args[:4]
    return _view(storage, None, offset, size, stride, budget)


def _tensor_of_bytes(args: tuple[Any, ...], budget: Budget) -> Tensor:
    """torch._utils._rebuild_tensor_v3: as v2, of a storage of bytes; requires_grad, hooks, dtype."""
    storage, offset, size, stride, _, _, dtype = args[:7]
    if not isinstance(dtype, torch.dtype):
        raise TypeError("a dtype that is none")
    return _view(storage, dtype, offset, size, stride, budget)


def _view(
    storage: object, dtype: torch.dtype | None, offset: object, size: object, stride: object, budget: Budget
) -> Tensor:
    if not isinstance(storage, Storage):
        raise TypeError(f"a tensor of a {type(storage).__name__}")
    flat = storage.flat
    if dtype is not None and dtype != flat.dtype:
        flat = flat[: flat.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
    sizes, strides = _lengths(size), _lengths(stride)
    (first,) = _lengths((offset,))
    if len(sizes) != len(strides):
        raise ValueError("as many strides as sizes")
    n = math.prod(sizes)
    last = first + sum((length - 1) * step for length, step in zip(sizes, strides, strict=True))
    held = flat.numel()
    if n > held or (n and last >= held) or (not n and math.prod(max(length, 1) for length in sizes) > _LARGEST_SIZE):
        raise Damaged(f"has a tensor of shape {list(sizes)} in a storage of {held} values")
    budget.spend(_TENSOR_BYTES)
    # as_strided counts from the beginning of the memory that `flat` is a part of: the whole file.
    return flat.as_strided(sizes, strides, flat.storage_offset() + (first if n else 0))


def _lengths(value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or len(value) > _MOST_DIMENSIONS:
        raise TypeError("a shape that is none")
    if not all(type(length) is int and 0 <= length <= _LARGEST_SIZE for length in value):
        raise ValueError("lengths out of range")
    return tuple(value)


def _first(args: tuple[Any, ...], budget: Budget) -> Any:
    """Of a parameter its tensor; of a size its tuple; of what TorchScript tags with a type the value."""
    return args[0]


def _rebuilt(args: tuple[Any, ...], budget: Budget) -> Any:
    """torch._tensor._rebuild_from_type_v2: function, class, its arguments, state."""
    function, _, inner = args[:3]
    if not isinstance(function, Reference) or not isinstance(inner, tuple):
        raise TypeError("a tensor that is none")
    build = _BUILDERS.get(function.name)
    return Node(function.name, inner) if build is None else build(inner, budget)


def _device(args: tuple[Any, ...], budget: Budget) -> torch.device:
    if not args or not all(type(arg) in (str, int) for arg in args[:2]) or not isinstance(args[0], str):
        raise TypeError("a device that is none")
    return torch.device(*args[:2])


# -------------------------------------------------------------------------------------------------------- plain values


def _list(args: tuple[Any, ...], budget: Budget) -> list[Any]:
    items = _items(args)
    budget.spend(64 + 16 * len(items))
    return items


def _tuple(args: tuple[Any, ...], budget: Budget) -> tuple[Any, ...]:
    return tuple(_list(args, budget))


def _set(args: tuple[Any, ...], budget: Budget) -> set[Any]:
    items = _items(args)
    budget.spend(216 + 100 * len(items))
    return set(map(checked_key, items))


def _frozenset(args: tuple[Any, ...], budget: Budget) -> frozenset[Any]:
    return frozenset(_set(args, budget))


def _dict(args: tuple[Any, ...], budget: Budget) -> dict[Any, Any]:
    """Of nothing, a dict, or a list of pairs."""
    pairs = list(args[0].items()) if args and isinstance(args[0], dict) else _items(args)
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        raise TypeError("a dict of no pairs")
    budget.spend(64 + 104 * len(pairs))
    return {checked_key(key): value for key, value in pairs}


def _default_dict(args: tuple[Any, ...], budget: Budget) -> dict[Any, Any]:
    return _dict(args[1:], budget)


def _items(args: tuple[Any, ...]) -> list[Any]:
    if not args:
        return []
    if not isinstance(args[0], list | tuple | set | frozenset):
        raise TypeError(f"items of a {type(args[0]).__name__}")
    return list(args[0])


def _bytes(args: tuple[Any, ...], budget: Budget) -> bytes:
    """Bytes as protocol 2 writes them: text and its encoding, for every byte a character."""
    data = args[0] if args else b""
    if isinstance(data, str):
        data = data.encode("latin-1")
    if not isinstance(data, bytes) or len(data) > MOST_TEXT or (len(args) > 1 and args[1] not in ("latin1", "latin-1")):
        raise TypeError("bytes that are none")
    budget.spend(64 + len(data))
    return data


def _complex(args: tuple[Any, ...], budget: Budget) -> complex:
    if len(args) != 2 or not all(type(arg) in (int, float) for arg in args):
        raise TypeError("a complex number that is none")
    return complex(*args)


def _bare(args: tuple[Any, ...], budget: Budget) -> Node:
    """copyreg: an object of a class that has no arguments; its state follows."""
    if not args or not isinstance(args[0], Reference):
        raise TypeError("an object of no class")
    return Node(args[0].name, args[1:])


_NUMBERS = {"f2": "e", "f4": "f", "f8": "d", "b1": "?"} | {
    f"{kind}{size}": code if kind == "i" else code.upper()
    for size, code in ((1, "b"), (2, "h"), (4, "i"), (8, "q"))
    for kind in "iu"
}


def _numpy_scalar(args: tuple[Any, ...], budget: Budget) -> Any:
    """A number of Python's, or a node: numpy's dtype and the bytes."""
    dtype, data = (*args, None, None)[:2]
    if isinstance(dtype, Node) and dtype.args and isinstance(data, bytes):
        code = _NUMBERS.get(dtype.args[0]) if isinstance(dtype.args[0], str) else None
        if code is not None and len(data) == struct.calcsize(code):
            big = isinstance(dtype.state, tuple) and len(dtype.state) > 1 and dtype.state[1] == ">"
            return struct.unpack((">" if big else "<") + code, data)[0]
    return Node("numpy.scalar", args)


# --------------------------------------------------------------------------------------------------------------- names

_DTYPES = {
    str(dtype): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.uint16, torch.uint32, torch.uint64,
    )
}  # fmt: skip
_STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128, "Untyped": torch.uint8,
}  # fmt: skip
_VALUES: dict[str, Any] = {
    **_DTYPES,
    **{f"torch.{at}{kind}Storage": StorageType(dtype) for kind, dtype in _STORAGES.items() for at in ("", "cuda.")},
    "torch.storage.UntypedStorage": StorageType(torch.uint8),
}
_PYTHON = ("builtins", "__builtin__")
_BUILDERS: dict[str, Callable[[tuple[Any, ...], Budget], Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_bytes,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _rebuilt,
    "torch.device": _device,
    "torch.Size": _tuple,
    "torch.jit._pickle.build_intlist": _list,
    "torch.jit._pickle.build_doublelist": _list,
    "torch.jit._pickle.build_boollist": _list,
    "torch.jit._pickle.build_tensorlist": _list,
    "torch.jit._pickle.restore_type_tag": _first,
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "collections.defaultdict": _default_dict,
    "_codecs.encode": _bytes,
    "copyreg._reconstructor": _bare,
    "copy_reg._reconstructor": _bare,
    "copyreg.__newobj__": _bare,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    **{
        f"{module}.{name}": build
        for module in _PYTHON
        for name, build in (
            ("list", _list), ("tuple", _tuple), ("set", _set), ("frozenset", _frozenset), ("dict", _dict),
            ("bytes", _bytes), ("bytearray", _bytes), ("complex", _complex),
        )
    },
}  # fmt: skip
_INERT = frozenset(
    {
        "torch.layout", "torch.memory_format", "torch.serialization._get_layout", "torch.torch_version.TorchVersion",
        "torch.Tensor",
        "numpy.dtype", "numpy.ndarray", "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
        "argparse.Namespace", "typing.Any", "typing.Union", "uuid.UUID", "functools.partial",
        "datetime.datetime", "datetime.timedelta", "datetime.date", "types.SimpleNamespace",
        *(f"numpy.{name}" for name in ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "bool_")),
        *(f"pathlib.{flavour}Path" for flavour in ("", "Pure", "Posix", "Windows", "PurePosix", "PureWindows")),
        *(f"pathlib._local.{flavour}Path" for flavour in ("", "Posix", "Windows")),
        *(f"{module}.{name}" for module in _PYTHON for name in ("int", "float", "bool", "str", "object", "slice")),
    }
)  # fmt: skip
# Packages whose models and trainers wrote such files.
_INERT_BELOW = (
    "__torch__.", "torch.nn.", "torch.optim.", "torch.utils.data.", "torch._utils._rebuild_", "torchvision.transforms.",
    "dall_e.", "dalle_pytorch.", "taming.", "clip.", "open_clip.", "pytorch_lightning.", "lightning.",
    "lightning_fabric.", "lightning_utilities.", "omegaconf.", "deepspeed.", "apex.", "transformers.configuration_",
    "transformers.train", "accelerate.", "main.",
)  # fmt: skip
