"""Text to token ids and back: the CLIP byte-pair encoding, `tokenizer.json` files, and Chinese BERT."""

from dalle_fast.tokenizers.chinese import ChineseTokenizer
from dalle_fast.tokenizers.clip_bpe import SimpleTokenizer
from dalle_fast.tokenizers.hug import HugTokenizer
from dalle_fast.tokenizers.merges import find_clip_merges

__all__ = ["ChineseTokenizer", "HugTokenizer", "SimpleTokenizer", "find_clip_merges"]
