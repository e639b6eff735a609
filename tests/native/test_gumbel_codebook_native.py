"""gumbel_codebook in C++: every instruction set, sizes at the edges of its tiles, blocks, slices and chunks; noise."""

import pytest
import torch
from gumbel_codebook_cases import MODES, Case, check_case, make_inputs, named, results, same

from benchmarks.memory import peak_bytes
from dalle_fast import _extension, rng
from dalle_fast.functional import codebook_indices

# Rows in tiles of 64 (4 of which share a task), codes in blocks of 96, channels in vectors of 16 and packs of 48. The
# last two have so many numbers a row that the backward pass takes one tile of rows at a time, codes in several slices.
CASES = [
    Case(1, 1, 1, problems=8, grid=(1, 1), batch=64),
    Case(96, 48, 16, mode="straight_through", grid=(8, 8), seeded=True),
    Case(97, 49, 17, grid=(9, 9), seeded=True),
    Case(200, 33, 130, mode="reinmax", grid=(13, 5), batch=5),
    Case(100, 64, 20, dtype=torch.bfloat16, grid=(8, 16), seeded=True),
    Case(100, 50, 20, mode="straight_through", dtype=torch.float16, bias=False),
    Case(3100, 130, 1024, batch=1, grid=(13, 10), problems=2, seeded=True),
    Case(3100, 130, 1024, mode="reinmax", dtype=torch.bfloat16, batch=1, grid=(13, 10), problems=2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_as_exact_as_the_oracle(case, isa):
    check_case("cpu", case)


@pytest.mark.parametrize("mode", MODES)
def test_any_number_of_threads_gives_the_same_bits(mode, isa):
    inputs, _ = named(make_inputs(3, 20, (9, 11), 700, 40))
    expected, threads = results("cpu", inputs, mode=mode, seed=3), torch.get_num_threads()
    try:
        for n_threads in (1, 2, 5):
            torch.set_num_threads(n_threads)
            assert same(results("cpu", inputs, mode=mode, seed=3), expected)
    finally:
        torch.set_num_threads(threads)


def test_float32_noise_of_every_u_is_as_near_as_documented(isa):
    words = (torch.arange(2**23) << 9).to(torch.int32)  # the bits: wraps to negative
    noise = torch.empty(len(words))
    function = _extension.library().dalle_fast_gumbel_float_of_words
    assert function(words.data_ptr(), len(words), noise.data_ptr()) == 0
    exact = -torch.log(-torch.log(rng.uniform(words.long() & 0xFFFFFFFF).double()))
    assert ((noise.double() - exact).abs() <= 2**-22 * exact.abs().clamp(min=1)).all()


def test_indices_are_the_codes_of_the_forward_pass(isa):
    inputs, _ = named(make_inputs(2, 20, (9, 11), 300, 4))
    codes = results("cpu", inputs, seed=0)[1]
    got = codebook_indices(inputs["features"], inputs["weight"], inputs["bias"], impl="cpu")
    assert torch.equal(got, codes)
    twice = torch.cat((inputs["weight"], inputs["weight"])), torch.cat((inputs["bias"], inputs["bias"]))
    assert torch.equal(codebook_indices(inputs["features"], *twice, impl="cpu"), codes)  # the first of equals


@pytest.mark.skipif(_extension.missing() is not None, reason=str(_extension.missing()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_call_takes_20_mb_beyond_its_results(dtype):
    """The logits of three pictures are 96 MB."""
    inputs, _ = named(make_inputs(3, 64, (32, 32), 8192, 512, dtype=dtype))
    dembeds = torch.ones(3, 512, 32, 32, dtype=dtype)

    def call():
        kept.append(results("cpu", inputs, seed=0, dembeds=dembeds))

    kept = []
    call()  # the threads' memory, which they keep, is counted below again
    given = sum(t.nbytes for t in kept.pop() if t is not None)
    peak = peak_bytes(call, torch.device("cpu"))
    if peak is None:
        pytest.skip("this system does not tell how much memory a process uses")
    assert peak - given <= 20 * 2**20
