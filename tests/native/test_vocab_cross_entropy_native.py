"""vocab_cross_entropy in C++: every instruction set, sizes at the edges of tiles, blocks, slices, parts and chunks."""

import pytest
import torch
from vocab_cross_entropy_cases import Case, check_case, make_inputs, results, same

from benchmarks.memory import peak_bytes
from dalle_fast import _extension

# Rows in tiles of 64 (4 share a task forward), codes in blocks of 96 (8 make a slice forward) or of 48
# above a width of 1024, channels in vectors of 16 and parts of about 256.
CASES = [
    Case((1, 1), 1, problems=16, grid=(1, 1), batch=64),
    Case((96, 97), 16, n_text=64, grid=(8, 8), batch=1, ignored=0),
    Case((97, 768), 17, n_text=65, grid=(9, 7), batch=1, divide_max=True),
    Case((769, 50), 130, torch.bfloat16, n_text=40, grid=(13, 5), batch=5),
    Case((191, 100), 256, torch.float16, divide_max=True),
    Case((100, 193), 257, bias=False),
    Case((49, 97), 1025, divide_max=True, problems=4),
    Case((49, 48), 1030, torch.bfloat16, problems=4),
    Case((60, 33), 15, n_text=600, grid=(20, 30), batch=1, problems=4),
]
# So wide that both passes take the rows in several chunks; so many rows that the backward pass takes the codes in
# several ranges.
IN_CHUNKS = [
    Case((7, 100), 6000, n_text=60, grid=(18, 18), batch=1, problems=3),
    Case((7, 100), 6000, torch.bfloat16, n_text=60, grid=(18, 18), batch=1, problems=3),
    Case((100, 7), 6000, torch.float16, divide_max=True, n_text=330, grid=(6, 10), batch=1, problems=3),
    Case((10, 1000), 16, n_text=10, grid=(80, 80), batch=1, problems=4),
]


@pytest.mark.parametrize("case", [*CASES, *IN_CHUNKS], ids=str)
def test_is_as_exact_as_the_oracle(case, isa):
    check_case("cpu", case)


@pytest.mark.parametrize(
    "case",
    [Case((300, 700), 40, divide_max=True, n_text=90, grid=(9, 11), batch=3), *IN_CHUNKS[1:]],
    ids=str,
)
def test_any_number_of_threads_gives_the_same_bits(case, isa, restored_threads):
    inputs = make_inputs(case)
    expected = results("cpu", case, inputs)
    for n_threads in (1, 2, 5):
        torch.set_num_threads(n_threads)
        assert same(results("cpu", case, inputs), expected)


@pytest.mark.skipif(_extension.missing() is not None, reason=str(_extension.missing()))
@pytest.mark.parametrize("batch", [1, 4])
def test_a_real_call_takes_20_mb_beyond_its_results(batch):
    """The logits of one sample are 44 MB."""
    case = Case((10256, 8192), 512, n_text=256, grid=(32, 32), batch=batch)
    inputs = make_inputs(case)

    def call():
        kept.append(results("cpu", case, inputs))

    kept: list = []
    call()  # the threads' memory, which they keep, is counted below again
    given = sum(t.nbytes for t in kept.pop())
    peak = peak_bytes(call, torch.device("cpu"))
    if peak is None:
        pytest.skip("this system does not tell how much memory a process uses")
    assert peak - given <= 20 * 2**20
