"""The compiled extension: loaded at first use, bound by a plain C interface, absent with one sentence.

csrc/cpu/exports.h declares the functions; `_SIGNATURES` repeats their argument types and nothing else does.
"""

from __future__ import annotations

import ctypes
import functools
import os

from dalle_fast import _build

ISA_VARIABLE = "DALLE_FAST_ISA"  # baseline, avx2, avx512 or amx: overrides the choice by processor
OFF_VARIABLE = "DALLE_FAST_NO_EXTENSION"  # 1: as if the extension had not been built

_I32, _U32, _I64, _POINTER = ctypes.c_int32, ctypes.c_uint32, ctypes.c_int64, ctypes.c_void_p
_SIGNATURES: dict[str, tuple[list[type], type | None]] = {
    "dalle_fast_source_digest": ([], ctypes.c_char_p),
    "dalle_fast_set_parallel_for": ([_POINTER], None),
    "dalle_fast_isa": ([], _I32),
    "dalle_fast_isa_supported": ([_I32], _I32),
    "dalle_fast_set_isa": ([_I32], None),
    "dalle_fast_gumbel_noise": ([_POINTER, _I64, _POINTER, _I64, _U32, _I64, _POINTER], _I32),
    "dalle_fast_philox_words": ([_POINTER, _I64, _POINTER, _I64, _U32, _I64, _POINTER], _I32),
    "dalle_fast_gumbel_of_words": ([_POINTER, _I64, _POINTER], _I32),
    "dalle_fast_gumbel_float_of_words": ([_POINTER, _I64, _POINTER], _I32),
    "dalle_fast_choose_tokens": ([_POINTER, _POINTER, _I64, _POINTER, _POINTER, _POINTER], _I32),
    "dalle_fast_gumbel_codebook_forward": ([_POINTER], _I32),
    "dalle_fast_gumbel_codebook_nearest": ([_POINTER], _I32),
    "dalle_fast_gumbel_codebook_backward": ([_POINTER], _I32),
    "dalle_fast_geglu_forward": ([_POINTER], _I32),
    "dalle_fast_geglu_backward": ([_POINTER], _I32),
    "dalle_fast_nearest_code": ([_POINTER, _I64, _I64, _POINTER, _I64, _POINTER], _I32),
    "dalle_fast_decode": ([_POINTER], _I32),
    "dalle_fast_decode_workspace": ([_POINTER, _I64], _I64),
    "dalle_fast_packed_product": ([_POINTER], _I32),
    "dalle_fast_digest": ([_POINTER, _I64, _POINTER], _I32),
    "dalle_fast_sparse_attention_forward": ([_POINTER], _I32),
    "dalle_fast_sparse_attention_backward": ([_POINTER], _I32),
    "dalle_fast_vocab_cross_entropy_forward": ([_POINTER], _I32),
    "dalle_fast_vocab_cross_entropy_backward": ([_POINTER], _I32),
}
_REBUILD = "Build it: `make setup`, or `python -m dalle_fast._build` in a checkout."


def missing() -> str | None:
    """None where the extension works; else "missing: " and the one sentence that says why (see `dispatch.choose`)."""
    if os.environ.get(OFF_VARIABLE) == "1":
        return f"missing: the compiled extension is switched off by {OFF_VARIABLE}=1."
    reason = _open()[1]
    return None if reason is None else f"missing: {reason}"


def library() -> ctypes.CDLL:
    """The loaded extension. Raises: RuntimeError with the sentence of `missing`."""
    reason = missing()
    if reason is not None:
        raise RuntimeError(reason.removeprefix("missing: "))
    loaded = _open()[0]
    assert loaded is not None
    return loaded


def instruction_sets() -> list[str]:
    """Those that this build and this processor have, slowest first."""
    return _instruction_sets(library())


def isa() -> str:
    """The instruction set in force."""
    return list(_build.INSTRUCTION_SETS)[library().dalle_fast_isa()]


def set_isa(name: str) -> None:
    """Puts an instruction set in force for every op of this process. Raises: ValueError where it is not to be had."""
    _set_isa(library(), name)


def check(status: int, function: str) -> None:
    """Raises RuntimeError where a function of the extension returned another status than 0."""
    if status != 0:
        raise RuntimeError(f"{function}: torch's thread pool reported error {status}; the warning above says more.")


@functools.cache
def _open() -> tuple[ctypes.CDLL | None, str | None]:
    """(library, None), or (None, why not)."""
    if not _build.LIBRARY.exists():
        cause = _build.why_not()
        return None, "the compiled extension is not built" + (f": {cause}." if cause else ".") + " " + _REBUILD
    loaded = ctypes.CDLL(str(_build.LIBRARY))
    sources = _build.source_digest()
    try:
        _bind(loaded)
        stale = sources is not None and loaded.dalle_fast_source_digest().decode() != sources
    except AttributeError:  # a function that older sources did not have
        stale = True
    if stale:
        return None, f"the compiled extension was built from other sources than those in csrc/. {_REBUILD}"
    reason = _share_thread_pool(loaded)
    if reason is not None:
        return None, reason
    if os.environ.get(ISA_VARIABLE):
        _set_isa(loaded, os.environ[ISA_VARIABLE])
    return loaded, None


def _bind(loaded: ctypes.CDLL) -> None:
    for name, (arguments, result) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, result


def _share_thread_pool(loaded: ctypes.CDLL) -> str | None:
    """Hands torch's own parallel_for (part of its stable C interface since 2.10) to the extension."""
    import torch

    # A look-up in this handle goes on to the libraries it depends on, libtorch_cpu among them, wherever they lie.
    torch_library = ctypes.CDLL(torch._C.__file__)
    try:
        parallel_for = torch_library.torch_parallel_for
    except AttributeError:
        return f"torch {torch.__version__} has no torch_parallel_for, through which the extension shares its threads."
    loaded.dalle_fast_set_parallel_for(ctypes.cast(parallel_for, _POINTER))
    return None


def _instruction_sets(loaded: ctypes.CDLL) -> list[str]:
    return [name for i, name in enumerate(_build.INSTRUCTION_SETS) if loaded.dalle_fast_isa_supported(i)]


def _set_isa(loaded: ctypes.CDLL, name: str) -> None:
    available = _instruction_sets(loaded)
    if name not in available:
        raise ValueError(
            f"{ISA_VARIABLE}: the instruction set must be one that this machine has, {', '.join(available)},"
            f" got {name!r}. Leave it out to take the best."
        )
    loaded.dalle_fast_set_isa(list(_build.INSTRUCTION_SETS).index(name))
