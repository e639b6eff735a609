"""What dalle_pytorch called things: its parameter names and layouts, read and written."""

from dalle_fast.compat.names import translate, upstream_names

__all__ = ["translate", "upstream_names"]
