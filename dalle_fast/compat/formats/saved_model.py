"""Our own directories, so that `info`, `convert` and `--vae` take them as they take files."""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from dalle_fast.compat.formats.base import Companions, Description, Format
from dalle_fast.compat.reading import Stored

_NAME = "dalle_fast saved model (directory)"
_CONFIG = "config.json"


def _config_of(stored: Stored) -> dict[str, Any]:
    path = stored.path / _CONFIG
    if stored.container != "directory" or not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # JSONDecodeError and UnicodeDecodeError
        return {}
    ours = isinstance(config, dict) and isinstance(config.get("class"), str) and "format_version" in config
    return config if ours else {}


def _describe(stored: Stored) -> Description:
    config = _config_of(stored)
    arguments = config.get("arguments")
    return Description(config["class"], _NAME, dict(arguments) if isinstance(arguments, dict) else {})


def _load(stored: Stored, companions: Companions) -> nn.Module:
    from dalle_fast.models.saving import Pretrained

    return Pretrained.from_pretrained(stored.path)


FORMATS = (Format(_NAME, lambda stored: bool(_config_of(stored)), _describe, _load, frozenset()),)
