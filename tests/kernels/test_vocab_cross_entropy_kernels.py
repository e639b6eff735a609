"""Triton kernels of vocab_cross_entropy in the interpreter, which checks bounds and races, against the oracle."""

import itertools
import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (or blocked: the bare pass)")

from dalle_fast.kernels.vocab_cross_entropy_sizes import TABLE, Launch, Sizes, pick_vocab_cross_entropy
from vocab_cross_entropy_cases import NAMES, Case, check_case, check_problems, losses_of, make_inputs, results, same

from dalle_fast.kernels import vocab_cross_entropy as kernels
from dalle_fast.kernels import vocab_cross_entropy_arguments

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# Blocks so small that a few rows, codes and channels have several of each, in no two kernels alike.
SMALL = Launch(
    rows=Sizes(16, 64, 1, 4, 1),
    logits=Sizes(16, 32, 32, 4, 1),
    dnormed=Sizes(32, 32, 32, 4, 1),
    dweight=Sizes(64, 16, 16, 4, 1),
)
CASES = [
    Case((1, 1), 1, n_text=1, grid=(1, 2), batch=1, problems=2),
    Case((70, 33), 24, FP32, n_text=17, grid=(5, 9), problems=2),
    Case((33, 70), 40, BF16, divide_max=True, grid=(1, 37), batch=1, problems=2),
    Case((9, 65), 70, FP16, bias=False, n_text=33, grid=(3, 3), batch=1, problems=2),
    Case((31, 32), 130, FP32, divide_max=True, n_text=3, grid=(2, 3), bias=False, ignored=2, problems=3),
    Case((64, 40), 33, FP16, divide_max=True, batch=3, n=5, problems=3),  # text alone
    Case((0, 14), 6, BF16, n_text=0, problems=4),
]


@pytest.fixture(autouse=True)
def small_and_poisoned(monkeypatch):
    """Small blocks, few programs, chunks of 64 rows; what kernels leave unwritten is NaN."""
    monkeypatch.setattr(kernels, "pick_vocab_cross_entropy", lambda *_: SMALL)
    monkeypatch.setattr(kernels, "WORKSPACE", 1)
    monkeypatch.setattr(vocab_cross_entropy_arguments, "PROGRAMS", 4)
    allocate = torch.Tensor.new_empty

    def poisoned(*args, **kwargs):
        x = allocate(*args, **kwargs)
        return x.fill_(math.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_and_gradients_are_within_the_budget(case):
    check_case("triton", case)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"sm{row.arches[0]}-{8 * row.itemsize}bit")
def test_every_launch_row(row, monkeypatch):
    monkeypatch.undo()
    dtype = FP32 if row.itemsize == 4 else BF16
    assert pick_vocab_cross_entropy(dtype, row.arches[0]) == row.launch
    monkeypatch.setattr(kernels, "pick_vocab_cross_entropy", lambda *_: row.launch)
    check_case("triton", Case((130, 20), 72, dtype, n_text=70, n=70, batch=1, problems=2))


def test_the_table_has_a_row_for_every_architecture_and_dtype():
    for arch, dtype in itertools.product((80, 86, 87, 89, 90, 100, 103, 110, 120, 121), (FP32, BF16, FP16)):
        assert isinstance(pick_vocab_cross_entropy(dtype, arch), Launch)
    with pytest.raises(NotImplementedError, match=r"no launch sizes for torch\.float64"):
        pick_vocab_cross_entropy(torch.float64, 90)


# -- numbers at the edges


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_logits_of_ten_thousand(dtype):
    case = Case((40, 9), 24, dtype, grid=(1, 4), batch=1, problems=2)
    problems = [make_inputs(case, seed=i) for i in range(case.problems)]
    check_problems("triton", case, [inputs._replace(weight=inputs.weight * 4000) for inputs in problems])


@pytest.mark.long
def test_rows_far_from_zero():
    """So wide that a plain sum of a row is off."""
    case = Case((2, 3), 1000, n_text=2, grid=(1, 5), batch=1, ignored=0, problems=2)
    problems = [make_inputs(case, seed=i) for i in range(case.problems)]
    check_problems("triton", case, [inputs._replace(hidden=inputs.hidden + 1e3) for inputs in problems])


def test_gradients_of_unlikely_codes_are_not_lost_in_float16():
    """Rows are equal, so that of the weight is that of the bias times the normed row, which is rounded as G is."""
    case = Case((40, 9), 24, batch=1, ignored=0)
    inputs = make_inputs(case)
    inputs.hidden[:] = inputs.hidden[:, :1].clone()
    inputs.weight.zero_()
    inputs.labels.zero_()
    inputs.bias[:] = -17.0  # a probability of 4e-8, less than float16 holds
    inputs.bias[[0, 40]] = 0.0
    with torch.autocast("cpu", FP16):
        *_, dweight, dbias = results("triton", case, inputs)
    y = torch.nn.functional.layer_norm(inputs.hidden[0, 0], (24,), inputs.norm_weight, inputs.norm_bias)
    expected = dbias[:, None] * y
    assert dbias.all() and ((dweight - expected).abs() <= 2 * torch.finfo(FP16).eps / 2 * expected.abs()).all()


def test_impossible_codes_are_as_if_they_were_not_there():
    """A bias of minus infinity on more codes than a block holds, the first ones."""
    case = Case((40, 5), 6, batch=1, ignored=0, grid=(1, 2))
    inputs = make_inputs(case)
    inputs.bias[:35] = -torch.inf
    inputs.labels[:, : case.n_text] = 39
    text, image, dhidden, _, _, dweight, dbias = results("triton", case, inputs)
    assert dhidden.isfinite().all() and not dweight[:35].any() and not dbias[:35].any()
    torch.testing.assert_close((text, image), losses_of("reference", case, inputs))


def test_a_certain_label_costs_nothing():
    case = Case((40, 33), 6, batch=1, ignored=0, grid=(1, 2))
    inputs = make_inputs(case)
    for label in (0, 32):
        bias = torch.zeros(73)
        bias[[label, 40 + label]] = 1e4
        certain = inputs._replace(bias=bias, labels=torch.full_like(inputs.labels, label))
        assert not any(t.any() for t in results("triton", case, certain))


# -- labels


def test_rows_that_do_not_count_reach_nothing_and_get_zeros():
    """Not even where they hold no numbers; with divide_max not even through their maximum."""
    case = Case((40, 9), 24, batch=1, divide_max=True)
    inputs = make_inputs(case)
    uncounted = inputs.labels < 0
    broken = inputs._replace(hidden=inputs.hidden.masked_fill(uncounted[..., None], torch.nan))
    found = results("triton", case, broken)
    assert same(found, results("triton", case, inputs))
    assert not found[2][uncounted].any() and found[2][~uncounted].any(-1).all()


@pytest.mark.parametrize("half", ["text", "image", "both"])
def test_a_half_without_labels_has_loss_0_and_gradients_of_zeros(half):
    case = Case((40, 9), 24, batch=1, grid=(1, 4))
    inputs = make_inputs(case)
    is_text = torch.arange(inputs.labels.shape[1]) < case.n_text
    gone = {"text": is_text, "image": ~is_text, "both": is_text | ~is_text}[half]
    inputs.labels[:, gone] = -100
    # of a half without labels nothing is read
    rows = {"text": slice(0, 40), "image": slice(40, None), "both": slice(None)}[half]
    inputs.bias[rows] = torch.nan
    *losses, dhidden, _, _, dweight, dbias = results("triton", case, inputs)
    assert not dhidden[:, gone].any() and not dweight[rows].any() and not dbias[rows].any()
    assert [bool(loss) for loss in losses] == [half == "image", half == "text"]


def test_a_label_out_of_range_makes_its_loss_nan():
    """The op looks at ids on the CPU alone: on a GPU this is what tells."""
    case = Case((40, 9), 24, batch=1, grid=(1, 4))
    inputs = make_inputs(case)
    options = {"n_text": case.n_text, "num_text_tokens": 40, "divide_max": False, "product_dtype": FP32}
    for label in (9, 33, -1, 2**32):
        inputs.labels[0, -1] = label
        losses, statistics = kernels.forward(*inputs, eps=1e-5, **options)
        assert losses.isnan().tolist() == [False, True]
        kernels.backward(torch.ones(2), *inputs, statistics, **options)  # touches nothing else: the guard would say


# -- what a kernel must not do


def test_views_give_the_bits_of_contiguous_tensors_twice_and_stay():
    case = Case((40, 9), 24, BF16, divide_max=True)
    inputs = make_inputs(case)
    wide = inputs.hidden.new_full((3, case.layout.max_inputs, 2, 30), math.nan)
    wide[: case.batch, :, 1, 3:27] = inputs.hidden
    hidden = wide[: case.batch, :, 1, 3:27]
    weight = torch.nn.functional.pad(inputs.weight, (1, 2))[:, 1:-2]
    views = inputs._replace(hidden=hidden, weight=weight, labels=inputs.labels.T.contiguous().T)
    turned = inputs._replace(hidden=inputs.hidden.mT.contiguous().mT, weight=inputs.weight.T.contiguous().T)
    before = [t.clone() for t in views]
    expected = results("triton", case, inputs)
    for given in (views, views, turned):
        assert same(results("triton", case, given), expected)
    assert same(before, list(views))


def test_an_empty_batch_launches_nothing(monkeypatch):
    monkeypatch.setattr(kernels, "forward", None)
    monkeypatch.setattr(kernels, "backward", None)
    case = Case((40, 9), 24, batch=0)
    found = results("triton", case, make_inputs(case))
    assert not any(t.any() for t in found)


def test_gradients_of_some_inputs_are_those_of_all():
    case = Case((40, 9), 24, batch=1, grid=(1, 4))
    inputs = make_inputs(case)
    every = dict(zip(NAMES, results("triton", case, inputs)[2:], strict=True))
    for needed in (("hidden",), ("weight", "bias")):
        some = results("triton", case, inputs, needed=needed)[2:]
        assert same(some, [every[name] for name in needed])


def test_autocast_takes_mixed_dtypes_and_gives_each_gradient_its_own():
    """Parameters in float32, as they train. Where they hold 16-bit numbers, nothing differs from such inputs."""
    case = Case((40, 9), 24, batch=1, grid=(1, 4))
    inputs = make_inputs(case)
    mixed = inputs._replace(hidden=inputs.hidden.half(), weight=inputs.weight.bfloat16().float())
    with torch.autocast("cpu", BF16):
        found = results("triton", case, mixed)
        narrow = results("triton", case, mixed._replace(weight=mixed.weight.bfloat16()))
    assert [t.dtype for t in found] == [FP32] * 2 + [FP16] + [FP32] * 4
    *others, dweight, dbias = found
    *expected, narrow_dweight, narrow_dbias = narrow
    assert same((*others, dbias, dweight.bfloat16()), (*expected, narrow_dbias, narrow_dweight))
