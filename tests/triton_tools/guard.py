"""Checks every memory access of interpreted kernels: bounds, races, duplicate stores; faults name the kernel argument.

Pointers remember the argument they were computed from, so an access must hit an element of that very view: a gap
between the rows of a strided view is out of bounds, and so is the neighbour in one packed tensor. Where the origin is
lost (a choice between two pointers) an element of any argument will do.

Two program instances race where both touch one element, at least one with a plain store: their order is undefined.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_ORIGIN = "triton_tools.origin"  # attribute of a pointer: the address its argument starts at
_MOVING = (  # builder methods that make pointers of pointers
    "create_addptr",
    "create_splat",
    "create_broadcast",
    "create_expand_dims",
    "create_reshape",
    "create_trans",
    "create_select",
)
_NOBODY, _MANY = 0, -1  # instead of a program's number


class KernelFault(AssertionError):
    """A kernel touched memory that it must not touch, or in an order that is not defined."""


@dataclass
class _Memory:
    """One allocation that arguments look into, and who touched what of it, in units of `unit` bytes."""

    start: int
    n_bytes: int
    unit: int

    def __post_init__(self) -> None:
        n_units = -(-self.n_bytes // self.unit)
        self.writer, self.reader, self.updater = (np.full(n_units, _NOBODY, np.int32) for _ in range(3))


@dataclass
class _Argument:
    """A tensor given to a kernel: `own[i]` says whether the i-th element from its first one on belongs to its view."""

    name: str
    start: int
    itemsize: int
    own: np.ndarray
    memory: _Memory

    def holds(self, addresses: np.ndarray) -> np.ndarray:
        """bool, for each address: an element of this view starts there."""
        index, rest = np.divmod(addresses - self.start, self.itemsize)
        inside = (rest == 0) & (index >= 0) & (index < self.own.size)
        inside[inside] = self.own[index[inside]]
        return inside

    def distance_to(self, address: int) -> int:
        """Bytes from an address outside to the nearer end of this view."""
        return min(abs(address - self.start), abs(address - self.start - self.own.size * self.itemsize))


@dataclass
class _Launch:
    """The kernel being interpreted and its tensors."""

    kernel: str = ""
    arguments: list[_Argument] = field(default_factory=list)

    def of_origin(self, origin: int | None) -> list[_Argument]:
        """The arguments that start at `origin`; all of them where it is None."""
        return [argument for argument in self.arguments if origin is None or argument.start == origin]


_launch = _Launch()


def install() -> None:
    """Puts the checks into the interpreter. `interpreter.install` calls it, once."""
    for name in _MOVING:
        setattr(InterpreterBuilder, name, _keeping_origin(getattr(InterpreterBuilder, name)))
    _check_before("create_masked_load", "load", pointers=0, mask=1)
    _check_before("create_masked_store", "store", pointers=0, mask=2)
    _check_before("create_atomic_rmw", "update", pointers=1, mask=3)
    _check_before("create_atomic_cas", "update", pointers=0, mask=None)
    _watch_launches()


def _watch_launches() -> None:
    executor = triton_interpreter.GridExecutor
    to_host, execute = executor._init_args_hst, executor.__call__

    @functools.wraps(to_host)
    def noting_arguments(self: Any, positional: Any, keywords: Any) -> Any:
        positional, keywords = to_host(self, positional, keywords)
        given = inspect.signature(self.fn).bind_partial(*positional, **keywords).arguments
        tensors = [pair for name, value in given.items() for pair in _tensors_of(name, value)]
        _launch.kernel, _launch.arguments = self.fn.__name__, _describe(tensors)
        return positional, keywords

    @functools.wraps(execute)
    def forgetting_arguments(self: Any, *positional: Any, **keywords: Any) -> None:
        try:
            execute(self, *positional, **keywords)
        finally:
            _launch.arguments = []

    executor._init_args_hst, executor.__call__ = noting_arguments, forgetting_arguments


def _tensors_of(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _tensors_of(f"{name}[{i}]", item)
    elif hasattr(value, "data_ptr") or hasattr(value, "base"):
        # tensor descriptors and reinterpreted tensors wrap one
        tensor = value if isinstance(value, torch.Tensor) else value.base
        if tensor.numel():
            yield name, tensor


def _describe(tensors: list[tuple[str, torch.Tensor]]) -> list[_Argument]:
    memories: dict[int, _Memory] = {}
    for _, tensor in tensors:
        storage = tensor.untyped_storage()
        known = memories.get(storage.data_ptr())
        unit = min(tensor.element_size(), known.unit if known else tensor.element_size())
        memories[storage.data_ptr()] = _Memory(storage.data_ptr(), storage.nbytes(), unit)
    return [
        _Argument(name, x.data_ptr(), x.element_size(), _own_elements(x), memories[x.untyped_storage().data_ptr()])
        for name, x in tensors
    ]


def _own_elements(tensor: torch.Tensor) -> np.ndarray:
    """bool, from the first element of a view to its last: which ones are elements of the view."""
    # An expanded axis is one element long.
    sizes = [1 if stride == 0 else size for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    extent = 1 + sum((size - 1) * stride for size, stride in zip(sizes, tensor.stride(), strict=True))
    own = np.zeros(extent, np.bool_)
    np.lib.stride_tricks.as_strided(own, sizes, tensor.stride())[...] = True
    return own


# -- where a pointer comes from


def _is_pointer(value: object) -> bool:
    return isinstance(value, TensorHandle) and isinstance(value.dtype.scalar, tl.pointer_type)


def _origin(pointer: TensorHandle) -> int | None:
    """The address at which the argument starts that a pointer was computed from; None where that is not known."""
    if _ORIGIN in pointer.attr:
        return pointer.attr[_ORIGIN]
    if pointer.data.size == 1 and _launch.of_origin(int(pointer.data.item())):
        return int(pointer.data.item())  # an argument itself
    return None


def _keeping_origin(move: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def moved(self: InterpreterBuilder, *operands: Any) -> TensorHandle:
        result = move(self, *operands)
        if _is_pointer(result):
            origins = {_origin(value) for value in operands if _is_pointer(value)}
            result.attr[_ORIGIN] = origins.pop() if len(origins) == 1 else None
        return result

    return moved


# -- the checks


def _check_before(method: str, kind: str, *, pointers: int, mask: int | None) -> None:
    """Wraps a builder method; `pointers` and `mask` are the positions of its arguments."""
    access = getattr(InterpreterBuilder, method)

    @functools.wraps(access)
    def checked(self: InterpreterBuilder, *operands: Any, **options: Any) -> Any:
        if _launch.arguments:
            _check(self, kind, operands[pointers], None if mask is None else operands[mask])
        return access(self, *operands, **options)

    setattr(InterpreterBuilder, method, checked)


def _check(builder: InterpreterBuilder, kind: str, pointers: TensorHandle, mask: TensorHandle | None) -> None:
    shape = np.shape(pointers.data)
    addresses = np.ravel(pointers.data).astype(np.int64)
    if mask is not None:
        addresses = addresses[np.broadcast_to(mask.data, shape).ravel().astype(bool)]
    if not addresses.size:
        return
    who = f"{_launch.kernel}: program {tuple(builder.grid_idx)}"
    candidates = _launch.of_origin(_origin(pointers)) or _launch.arguments
    left = addresses
    for argument in candidates:
        inside = argument.holds(left)
        if inside.any():
            _note(builder, who, kind, argument, left[inside])
            left = left[~inside]
    if left.size:
        _report_out_of_bounds(who, kind, left, candidates)


def _report_out_of_bounds(who: str, kind: str, addresses: np.ndarray, candidates: list[_Argument]) -> None:
    bad = int(addresses[0])
    nearest = min(candidates, key=lambda argument: argument.distance_to(bad))
    index = (bad - nearest.start) // nearest.itemsize
    where = "between its elements" if 0 <= index < nearest.own.size else f"its last one is {nearest.own.size - 1}"
    raise KernelFault(
        f"{who} {kind}s {addresses.size} elements out of bounds,"
        f" the first at index {index} of `{nearest.name}`: {where}."
    )


def _note(builder: InterpreterBuilder, who: str, kind: str, argument: _Argument, addresses: np.ndarray) -> None:
    """Raises where others touched these elements, or this access does so twice; else writes down who touched them."""
    if kind == "store" and np.unique(addresses).size != addresses.size:
        raise KernelFault(f"{who} stores twice to one element of `{argument.name}` in one tl.store: either may stay.")
    memory = argument.memory
    units = (addresses - memory.start) // memory.unit
    if argument.itemsize > memory.unit:
        units = (units[:, None] + np.arange(argument.itemsize // memory.unit)).ravel()
    (x, y, z), (n_x, n_y, _) = builder.grid_idx, builder.grid_dim
    program = 1 + x + n_x * (y + n_y * z)
    conflicts = [memory.writer]
    if kind != "load":
        conflicts.append(memory.reader)
    if kind != "update":
        conflicts.append(memory.updater)
    for users in conflicts:
        of_others = (users[units] != _NOBODY) & (users[units] != program)
        if of_others.any():
            raise KernelFault(
                f"{who} {kind}s {int(of_others.sum())} elements of `{argument.name}` that another program instance"
                f" also touches (a race): the first at byte {int(units[of_others][0]) * memory.unit} of its memory."
            )
    if kind == "store":
        memory.writer[units] = program
    else:
        users = memory.reader if kind == "load" else memory.updater
        users[units] = np.where(np.isin(users[units], (_NOBODY, program)), program, _MANY)
