"""Philox4x32-10 and its Gumbel noise in kernels: the twin of dalle_fast/rng.py, word for word.

One call gives the noise of four codes, v = 4 c .. 4 c + 3, of one position: counter (c, position, stream, 0), key = the
two halves of the seed. u = ((word >> 9) + 0.5) * 2**-23 is exact; noise = -log(-log(u)) is float32 arithmetic.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
import triton
import triton.language as tl

ROUNDS: tl.constexpr = tl.constexpr(10)
MULTIPLIER_0: tl.constexpr = tl.constexpr(0xD2511F53)
MULTIPLIER_1: tl.constexpr = tl.constexpr(0xCD9E8D57)
KEY_STEP_0: tl.constexpr = tl.constexpr(0x9E3779B9)
KEY_STEP_1: tl.constexpr = tl.constexpr(0xBB67AE85)


@triton.jit
def philox4x32(counter_0, counter_1, counter_2, key_0, key_1):
    """Four uint32 words of the counter (counter_0, counter_1, counter_2, 0), all uint32, in their broadcast shape.

    Where the counters vary along different axes, two rounds and more are those of an axis, not of the tile.
    """
    x0, x1, x2, x3 = counter_0, counter_1, counter_2, tl.zeros([1, 1], tl.uint32)
    for _ in tl.static_range(ROUNDS):
        high_0, high_1 = tl.umulhi(x0, MULTIPLIER_0), tl.umulhi(x2, MULTIPLIER_1)
        # products and keys are meant modulo 2**32
        low_0 = tl.mul(x0, MULTIPLIER_0, sanitize_overflow=False)
        low_1 = tl.mul(x2, MULTIPLIER_1, sanitize_overflow=False)
        x0, x1, x2, x3 = high_1 ^ x1 ^ key_0, low_1, high_0 ^ x3 ^ key_1, low_0
        key_0 = tl.add(key_0, KEY_STEP_0, sanitize_overflow=False)
        key_1 = tl.add(key_1, KEY_STEP_1, sanitize_overflow=False)
    return x0, x1, x2, x3


@triton.jit
def words(seed, quad, position, stream: tl.constexpr):
    """The words of codes 4 quad .. 4 quad + 3.

    seed: int64 scalar, its 64 bits.   quad: int32, [1, QUADS].   position: int64 [ROWS, 1], taken modulo 2**32.
    """
    key_0, key_1 = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    position = (position & 0xFFFFFFFF).to(tl.uint32)
    return philox4x32(quad.to(tl.uint32), position, tl.full([1, 1], stream, tl.uint32), key_0, key_1)


@triton.jit
def gumbel(word):
    """float32 noise of uint32 words."""
    u = ((word >> 9).to(tl.int32).to(tl.float32) + 0.5) * (2.0**-23)
    return -tl.log(-tl.log(u))
