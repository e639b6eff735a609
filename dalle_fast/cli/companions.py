"""What a file of weights needs and does not hold: options of `convert`, `draw` and `sample`. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

_ANY, _FILE = (click.Path(exists=True, dir_okay=dir_okay, path_type=Path) for dir_okay in (True, False))
# Option -> its settings; named as the fields of compat.formats.base.Companions.
COMPANIONS: dict[str, dict[str, Any]] = {
    "tokenizer": {
        "type": _ANY,
        "metavar": "PATH",
        "help": "tokenizer.json, CLIP's merges, or a folder with vocab.txt; default: a tokenizer.json beside the file, "
        "else by vocabulary.",
    },
    "vae": {
        "type": _ANY,
        "metavar": "PATH",
        "help": "The VAE of a DALLE, a file or a saved model; default: the one in the DALLE's file.",
    },
    "yaml": {
        "type": _FILE,
        "metavar": "FILE",
        "help": "The configuration of a VQGAN; default: the VQGAN's own name with .yaml.",
    },
}
