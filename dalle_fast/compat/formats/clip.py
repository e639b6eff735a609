"""CLIP with a vision transformer: OpenAI's files, open_clip's, Hugging Face's CLIPModel (see dalle_fast.clip)."""

from __future__ import annotations

from functools import partial

from dalle_fast.clip import loading
from dalle_fast.clip.model import PretrainedCLIP
from dalle_fast.clip.names import normal_forms, to_ours
from dalle_fast.compat.formats.base import Companions, Description, Format
from dalle_fast.compat.reading import Stored


def _matches(stored: Stored, *, name: str) -> bool:
    return loading.format_of(stored) == name


def _describe(stored: Stored) -> Description:
    found = _found(stored)
    if found.problem:
        return Description("CLIP", found.format, {}, f"{found.problem}.")
    arguments, assumed = loading.arguments_of(found, to_ours(found.weights))
    if assumed:
        arguments["quick_gelu"] = f"{arguments['quick_gelu']}, assumed"
    return Description("CLIP", found.format, arguments)


def _load(stored: Stored, companions: Companions) -> PretrainedCLIP:
    return loading.build(_found(stored))


def _found(stored: Stored) -> loading.FoundCLIP:
    found = loading.find(stored)
    if found is None:
        raise ValueError(f"clip.load: {stored.path} must hold a CLIP, got something else.")
    return found


FORMATS = tuple(
    Format(name, partial(_matches, name=name), _describe, _load, normal_forms())
    for name in (loading.OPENAI_ARCHIVE, loading.OPENAI, loading.OPEN_CLIP, loading.HUGGING_FACE)
)
