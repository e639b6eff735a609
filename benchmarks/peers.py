"""The original, dalle-pytorch 1.6.6, as a peer: what it does not need stubbed, its cache mended on request.

It imports at its top packages that only its trainers, tokenizers and pretrained VAEs use; those that are not installed
are empty modules while it is imported, and are gone afterwards. Its cache is mended from outside, on one instance:

* B2: with cond_scale 1 its guidance wrapper drops the cache, so the steps here call `forward` with the cache.
* B4: layers that recompute all share one cache slot; here each has its own.
* B5: priming with image tokens fills the token shift's queue with shifted values; here it is refilled.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections import deque
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from importlib import metadata
from types import ModuleType
from typing import Any

from torch import Tensor, nn

VERSION = "1.6.6"
PACKAGES = ("dalle-pytorch", "rotary-embedding-torch", "axial-positional-embedding")
INSTALL = (
    "pip install --no-deps dalle-pytorch==1.6.6 rotary-embedding-torch==0.2.3 axial-positional-embedding==0.2.1"
    " (into a folder of their own with --target, named in PYTHONPATH, if they should not stay)"
)
# Imported by the original, unused by its DALLE and DiscreteVAE.
UNUSED = (
    "deepspeed", "horovod", "omegaconf", "pkg_resources", "requests", "taming", "taming.models", "taming.models.vqgan",
    "torchvision", "transformers", "webdataset", "yaml", "youtokentome",
)  # fmt: skip


def missing() -> str | None:
    """None where the original can be imported, or what to do, in words."""
    for package in PACKAGES:
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            return f"needs {package}, which is not installed: {INSTALL}."
        if package == PACKAGES[0] and found != VERSION:
            return f"needs dalle-pytorch {VERSION}, found {found}: {INSTALL}."
    return None


@functools.cache
def original() -> ModuleType:
    """The original's module with DALLE, DiscreteVAE and its sampling helpers.

    Raises: RuntimeError (not installed, or another version).
    """
    reason = missing()
    if reason is not None:
        raise RuntimeError(f"original: {reason}")
    with _stubbed(UNUSED):
        return importlib.import_module("dalle_pytorch.dalle_pytorch")


def attention_class(pattern: str) -> tuple[type, dict[str, int]]:
    """The original's attention class for one of our patterns, and the arguments that choose it.

    Args: pattern: full, axial_row, axial_col or conv_like.   Raises: RuntimeError (not installed).
    """
    original()  # the package imports all of itself, which needs the stubs
    module = importlib.import_module("dalle_pytorch.attention")
    axial = module.SparseAxialCausalAttention
    known: dict[str, tuple[type, dict[str, int]]] = {
        "full": (module.Attention, {}),
        "axial_row": (axial, {"axis": 0}),
        "axial_col": (axial, {"axis": 1}),
        "conv_like": (module.SparseConvCausalAttention, {}),
    }
    return known[pattern]


def mend_cache(model: nn.Module) -> nn.Module:
    """Mends the cache of one original DALLE (B4, B5) in place; its weights and its numbers without a cache stay.

    Returns: the model.
    """
    transformer = importlib.import_module("dalle_pytorch.transformer")
    for number, module in enumerate(model.modules()):
        if isinstance(module, transformer.NonCached):
            module.forward = _with_own_slot(module.forward, f"recomputed_{number}")
        elif isinstance(module, transformer.PreShiftToken):
            module.forward = _with_unshifted_queue(module)
    return model


def copy_cache(cache: dict) -> dict:
    """A cache that steps may change without touching `cache`: tensors are never written in place, queues are."""
    return {key: entry.copy() if isinstance(entry, deque) else entry for key, entry in cache.items()}


def _with_own_slot(forward: Any, slot: str) -> Any:
    def inner(x: Tensor, *, cache_key: str | None = None, **arguments: Any) -> Tensor:
        return forward(x, cache_key=slot, **arguments)

    return inner


def _with_unshifted_queue(shift: Any) -> Any:
    forward, row = shift.forward, shift.image_size

    def inner(x: Tensor, cache: MutableMapping | None = None, cache_key: str | None = None, **arguments: Any) -> Tensor:
        primed = cache is None or cache_key in cache or x.shape[1] < shift.text_len
        out = forward(x, cache=cache, cache_key=cache_key, **arguments)
        if cache is not None and not primed:
            above, left = x.chunk(4, dim=-1)[:2]
            first = x.shape[1] - min(row, x.shape[1] - shift.text_len)
            blank = [(above[:, 0] * 0, left[:, 0] * 0)] * (row - (x.shape[1] - first))
            last = [(above[:, i], left[:, i]) for i in range(first, x.shape[1])]
            cache[cache_key] = deque(blank + last)
        return out

    return inner


@contextmanager
def _stubbed(names: tuple[str, ...]) -> Iterator[None]:
    """Empty modules in place of those of `names` that cannot be imported, for as long as the context lasts."""
    absent = [name for name in names if name not in sys.modules and not _installed(name)]
    # It imports Lightning, which is not installed for it; a class made of a stub must not stay in sys.modules.
    absent += [name for name in names if name not in sys.modules and name.startswith("taming") and _installed(name)]
    try:
        for name in absent:
            sys.modules[name] = _Stub(name)
        yield
    finally:
        for name in absent:
            sys.modules.pop(name, None)


def _installed(name: str) -> bool:
    top = name.partition(".")[0]
    return importlib.util.find_spec(top) is not None


class _Stub(ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} is a stub without {name!r}")
        return type(name, (), {})
