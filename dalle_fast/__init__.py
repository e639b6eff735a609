"""DALL-E style models: the modules of dalle_pytorch on kernels written for their sparse attention.

Public names are resolved at first use: importing the package loads no model, no kernel and no compiled code.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dalle_fast import clip, compat, functional, patterns
    from dalle_fast.clip.model import PretrainedCLIP
    from dalle_fast.layout import TokenLayout
    from dalle_fast.models.clip import CLIP
    from dalle_fast.models.colour_clusters import ColourClusterVAE
    from dalle_fast.models.dalle import DALLE
    from dalle_fast.models.dvae import DiscreteVAE
    from dalle_fast.models.openai_dvae import OpenAIDiscreteVAE
    from dalle_fast.models.vqgan import VQGanVAE

__version__ = "0.1.0.dev0"

__all__ = [
    "CLIP",
    "DALLE",
    "ColourClusterVAE",
    "DiscreteVAE",
    "OpenAIDiscreteVAE",
    "PretrainedCLIP",
    "TokenLayout",
    "VQGanVAE",
    "__version__",
    "clip",
    "compat",
    "explain",
    "functional",
    "patterns",
]

_HOMES = {
    "CLIP": "dalle_fast.models.clip",
    "ColourClusterVAE": "dalle_fast.models.colour_clusters",
    "DALLE": "dalle_fast.models.dalle",
    "DiscreteVAE": "dalle_fast.models.dvae",
    "OpenAIDiscreteVAE": "dalle_fast.models.openai_dvae",
    "PretrainedCLIP": "dalle_fast.clip.model",
    "TokenLayout": "dalle_fast.layout",
    "VQGanVAE": "dalle_fast.models.vqgan",
}
_MODULES = ("clip", "compat", "functional", "patterns")


def explain(op: str, **facts: object) -> str:
    """In words: which implementation of `op` runs for a call with these facts, and why the others do not.

    Args:
        op: the name of a function of `dalle_fast.functional`, or "decode": which engine draws.
        facts: as the op's module gives them by `facts(...)`; of "decode": model, weight_dtype, max_memory.
    Raises: ValueError (unknown op).
    """
    if op == "decode":
        from dalle_fast.sampling import engine

        return engine.explain(**facts)  # type: ignore[arg-type]
    from dalle_fast import dispatch
    from dalle_fast import functional as _functional  # noqa: F401  (importing the ops registers them)

    return dispatch.explain(op, **facts)


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"dalle_fast.{name}")
    raise AttributeError(f"module 'dalle_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
