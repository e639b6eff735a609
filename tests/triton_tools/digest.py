"""A short name for everything that a compilation depends on but the compiler: code, constants, kinds of arguments.

Comments, docstrings and line numbers do not count. So a kept result says whether it still belongs to the kernel beside
it, and only what changed needs to be compiled again.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import torch

ALIGNMENT = 16  # bytes, and units of an integer: Triton specialises for multiples
MODULES = ("triton", "math")  # whose functions the compiler brings along


def digest(kernel: Any, arguments: object, options: object) -> str:
    """16 hexadecimal digits for a @triton.jit function (compiled or interpreted), its arguments and launch options."""
    parts = [*_code(kernel, set()), _kind(arguments), _kind(options, constant=True)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _code(kernel: Any, seen: set[str]) -> Iterator[str]:
    """The code of a kernel and of all it calls, each once, and the values of the globals they name."""
    function = _function(kernel)
    if f"{function.__module__}.{function.__qualname__}" in seen:
        return
    seen.add(f"{function.__module__}.{function.__qualname__}")
    text, names = _parsed(function)
    yield text
    for name in names:
        value = function.__globals__.get(name)
        if value is None or inspect.ismodule(value):
            continue
        if inspect.isfunction(_function(value)):
            if not _function(value).__module__.startswith(MODULES):
                yield from _code(value, seen)
        else:
            yield f"{name} = {value!r}"


@functools.cache
def _parsed(function: Callable) -> tuple[str, list[str]]:
    """The code of a function in one normal form, and the names in it."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree), sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)})


def _function(value: Any) -> Any:
    """The Python function inside what @triton.jit makes of it."""
    return getattr(value, "fn", value)


def _kind(value: Any, *, constant: bool = False) -> str:
    """What Triton specialises for: types, alignment, 1 and multiples of 16; of a constant, its value."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_kind(value[key], constant=True)}' for key in sorted(value))}}}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(_kind(item, constant=constant) for item in value)})"
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {'aligned' if value.data_ptr() % ALIGNMENT == 0 else 'unaligned'}"
    if isinstance(value, int) and not isinstance(value, bool) and not constant:
        special = "1" if value == 1 else "aligned" if value % ALIGNMENT == 0 else ""
        return f"int{64 if abs(value) >= 2**31 else 32} {special}"
    return type(value).__name__ if isinstance(value, float) and not constant else repr(value)
