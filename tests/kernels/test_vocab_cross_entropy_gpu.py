"""Triton kernels of vocab_cross_entropy on a GPU, at real sizes: against the float64 oracle; opcheck, torch.compile."""

from functools import partial

import pytest
import torch
from vocab_cross_entropy_cases import NAMES, Case, Inputs, check_problems, losses_of, make_inputs, results, same

from dalle_fast.functional import vocab_cross_entropy

pytestmark = pytest.mark.gpu

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
D512 = {"codes": (10256, 8192), "width": 512, "n_text": 256, "grid": (32, 32), "batch": 1}
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def on_gpu(case, seed=0):
    return Inputs(*(None if t is None else t.cuda() for t in make_inputs(case, seed)))


def check(case):
    check_problems("triton", case, [on_gpu(case, seed) for seed in range(case.problems)])


@every_dtype
@pytest.mark.parametrize("divide_max", [False, True])
def test_real_sizes(divide_max, dtype):
    check(Case(dtype=dtype, divide_max=divide_max, **D512))


@every_dtype
@pytest.mark.parametrize(
    "case",
    [
        Case((1, 1), 1, n_text=1, grid=(1, 2), batch=1, problems=32),
        Case((1001, 4097), 200, n_text=77, grid=(17, 23), batch=3),
        Case((97, 130), 1100, n_text=1, grid=(11, 13), bias=False, divide_max=True),
        Case((49408, 1024), 260, n_text=80, grid=(8, 8), n=80),
        Case((300, 16384), 64, n_text=70, grid=(64, 64), batch=1),  # rows in several chunks
        Case((0, 500), 33, n_text=0, grid=(9, 7), problems=16),
    ],
    ids=str,
)
def test_other_sizes(case, dtype):
    check(Case(**{**vars(case), "dtype": dtype}))


@every_dtype
def test_logits_of_ten_thousand(dtype):
    case = Case((1300, 970), 64, dtype)
    problems = [on_gpu(case, seed) for seed in range(case.problems)]
    check_problems("triton", case, [inputs._replace(weight=inputs.weight * 4000) for inputs in problems])


@every_dtype
def test_two_runs_give_the_same_bits(dtype):
    case = Case(dtype=dtype, **{**D512, "batch": 4})
    inputs = on_gpu(case)
    assert same(results("triton", case, inputs), results("triton", case, inputs))


def test_a_certain_label_costs_nothing():
    case = Case((400, 300), 64, ignored=0)
    inputs = on_gpu(case)
    for label in (0, 127, 128, 299):
        bias = torch.zeros(700, device="cuda")
        bias[[label, 400 + label]] = 1e4
        certain = inputs._replace(bias=bias, labels=torch.full_like(inputs.labels, label))
        assert not any(t.any() for t in results("triton", case, certain))


def test_a_label_out_of_range_makes_its_loss_nan():
    case = Case((400, 300), 64)
    inputs = on_gpu(case)
    for label in (300, 400, -1, 2**32):
        inputs.labels[0, -1] = label
        text, image, *_ = results("triton", case, inputs)
        assert image.isnan() and text.isfinite()


def test_autocast_keeps_the_dtypes_of_parameters():
    case = Case((400, 300), 64)
    inputs = on_gpu(case)
    mixed = inputs._replace(hidden=inputs.hidden.bfloat16(), weight=inputs.weight.bfloat16().float())
    with torch.autocast("cuda", torch.bfloat16):
        found = results("triton", case, mixed)
        narrow = results("triton", case, mixed._replace(weight=mixed.weight.bfloat16()))
    assert [t.dtype for t in found] == [torch.float32] * 2 + [torch.bfloat16] + [torch.float32] * 4
    assert same((*found[:5], found[6]), (*narrow[:5], narrow[6])) and torch.equal(found[5].bfloat16(), narrow[5])


@pytest.mark.parametrize("batch", [1, 8])
def test_no_memory_but_results_rows_and_a_chunk(batch):
    """Logits in 16 bits would take 22 MB a sample; a chunk of their gradients takes at most 64 MiB."""
    case = Case(dtype=torch.bfloat16, **{**D512, "batch": batch})
    inputs = on_gpu(case)
    given = sum(t.nbytes for t in results("triton", case, inputs))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results("triton", case, inputs)
    peak = torch.cuda.max_memory_allocated() - before
    sums = 8192 * 512 * 4  # of dweight, where there are several chunks
    parts = 256 * 128 * 128 * 4 + inputs.hidden.numel() * 4  # of the gradient of normed
    assert peak <= given + 2 * inputs.hidden.nbytes + 2**26 + sums + parts + 12e6


def test_auto_takes_the_kernels_and_keeps_the_operator_rules():
    case = Case((400, 300), 64, torch.bfloat16)
    inputs = on_gpu(case)
    by_auto = results("auto", case, inputs)
    assert same(by_auto, results("triton", case, inputs))
    leaves = [t.requires_grad_() if t.is_floating_point() else t for t in inputs]
    constants = case.n_text, case.codes[0], case.divide_max, 1e-5, case.dtype, "triton"
    torch.library.opcheck(torch.ops.dalle_fast.vocab_cross_entropy.default, (*leaves, *constants))

    def train(function):
        losses = losses_of("auto", case, Inputs(*leaves), function=function)
        roots = 0.7 * losses[0] + 1.9 * losses[1]
        return *losses, *torch.autograd.grad(roots, [getattr(Inputs(*leaves), name) for name in NAMES])

    for function in (partial(vocab_cross_entropy), torch.compile(vocab_cross_entropy, fullgraph=True)):
        assert same([t.detach() for t in train(function)], by_auto)
