"""Weights of other packages: read without running them, and what dalle_pytorch called things.

`read(path)` gives what a file holds, `load(path)` the model of ours that it is (docs/old-weights.md).
"""

from dalle_fast.compat.loading import Loaded, load
from dalle_fast.compat.names import translate, upstream_names
from dalle_fast.compat.reading import Stored, UnreadableFile, UnsafeFile, read

__all__ = ["Loaded", "Stored", "UnreadableFile", "UnsafeFile", "load", "read", "translate", "upstream_names"]
