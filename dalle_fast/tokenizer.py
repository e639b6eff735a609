"""The tokenizers under the original's module name: `from dalle_fast.tokenizer import tokenizer, HugTokenizer`."""

from dalle_fast.tokenizers import ChineseTokenizer, HugTokenizer, SimpleTokenizer
from dalle_fast.tokenizers.clip_bpe import DefaultTokenizer

__all__ = ["ChineseTokenizer", "HugTokenizer", "SimpleTokenizer", "tokenizer"]

tokenizer = DefaultTokenizer()  # CLIP's; reads its merges file when first used
