"""The layouts that we know, one module a family."""

from __future__ import annotations

import importlib
from functools import cache

from dalle_fast.compat.formats.base import Companions, Description, Format

__all__ = ["Companions", "Description", "Format", "known_formats"]

# In the order in which they are asked.
_MODULES = ("saved_model", "dalle_pytorch", "deepspeed", "openai_dvae", "taming_vqgan", "clip")


@cache
def known_formats() -> tuple[Format, ...]:
    """Every layout, in the order in which a file is compared with them."""
    modules = (importlib.import_module(f"{__name__}.{name}") for name in _MODULES)
    return tuple(known for module in modules for known in module.FORMATS)
