"""The original's `transformer` module: what old code imports from there."""

from dalle_fast.models.attention import FeedForward
from dalle_fast.models.transformer import DivideMax, Transformer

__all__ = ["DivideMax", "FeedForward", "Transformer"]
