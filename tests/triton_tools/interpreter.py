"""Makes Triton's interpreter compute what a GPU computes and check what a GPU does not. See the package's docstring.

Known to work with Triton 3.6 (which needs numpy < 2.4) and 3.9.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import autotuner
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.errors import InterpreterError

from triton_tools import bfloat16, guard

Benchmark = Callable[..., list[float]]


@functools.cache
def install() -> None:
    """Mends the interpreter of this process, once. Call it after TRITON_INTERPRET=1 is set, before any launch."""
    bfloat16.install()
    guard.install()
    _enable_device_assert()
    _patch_language_once_a_launch()
    _unwrap_errors()
    autotuner.Autotuner.do_bench = property(_benchmark_nothing)


def _enable_device_assert() -> None:
    """The interpreter's options say debug=False whatever TRITON_DEBUG says."""
    builder = triton_interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, debug=True)


def _patch_language_once_a_launch() -> None:
    """Every call of a device function would put the interpreted tl.* into place again: a third of a test's time."""
    patch, execute = triton_interpreter._patch_lang, triton_interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch_what_is_not(function: Callable) -> Any:
        languages = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
        if languages and languages <= patched:
            return triton_interpreter._LangPatchScope()
        patched.update(languages)
        return patch(function)

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        try:
            execute(self, *args, **kwargs)
        finally:
            patched.clear()

    triton_interpreter._patch_lang, triton_interpreter.GridExecutor.__call__ = patch_what_is_not, run


def _unwrap_errors() -> None:
    """Raises what went wrong in a kernel itself, out of the InterpreterErrors that each level of calls puts around."""
    execute = triton_interpreter.GridExecutor.__call__

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            execute(self, *args, **kwargs)
        except InterpreterError as error:
            cause: BaseException = error
            while isinstance(cause, InterpreterError) and cause.__cause__ is not None:
                cause = cause.__cause__
            raise cause from None

    triton_interpreter.GridExecutor.__call__ = run


def _benchmark_nothing(tuner: autotuner.Autotuner) -> Benchmark:
    """Autotuning needs a driver to time with: here every configuration runs once, and the first one wins."""

    def run_once(call: Callable[[], None], quantiles: tuple[float, ...] | None = None) -> list[float]:
        call()
        return [1.0, 1.0, 1.0]

    return tuner._do_bench or run_once
