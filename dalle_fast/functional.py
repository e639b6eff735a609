"""The operations as functions: attention over token layouts, the VAE's bottleneck, quantisation, gates, loss, noise,
draws.

Each takes `impl=` ("auto" or the name of one implementation); `dalle_fast.explain(op, ...)` says which runs and why.
"""

from dalle_fast.ops.choose_token import choose_token
from dalle_fast.ops.codebook_indices import codebook_indices
from dalle_fast.ops.geglu import geglu
from dalle_fast.ops.gumbel_codebook import gumbel_codebook
from dalle_fast.ops.gumbel_noise import gumbel_noise
from dalle_fast.ops.nearest_code import nearest_code
from dalle_fast.ops.sparse_attention import sparse_attention
from dalle_fast.ops.vocab_cross_entropy import vocab_cross_entropy

__all__ = [
    "choose_token",
    "codebook_indices",
    "geglu",
    "gumbel_codebook",
    "gumbel_noise",
    "nearest_code",
    "sparse_attention",
    "vocab_cross_entropy",
]
