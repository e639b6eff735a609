"""Every kernel of vocab_cross_entropy against the float64 oracle, and what must hold of it exactly."""

from dataclasses import replace

import pytest
import torch
from tolerance import assert_within_budget
from vocab_cross_entropy_cases import NAMES, Case, check_case, check_problems, losses_of, make_inputs, results, same

OP = "vocab_cross_entropy"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
every_dtype = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["float32", "bfloat16", "float16"])

# Each pair of values of two columns meets in some row, or nearly so; few codes take many problems, many take few.
CASES = [
    Case((1, 2), 1, problems=32),
    Case((2, 1), 3, BF16, divide_max=True, problems=32),
    Case((9, 5), 16, FP16, bias=False, problems=16),
    Case((9, 130), 70, FP32, divide_max=True, batch=3, problems=16),
    Case((64, 5), 24, BF16, batch=5, grid=(1, 37)),
    Case((64, 97), 130, FP32, n_text=64, grid=(8, 8)),
    Case((97, 64), 300, FP16, divide_max=True, grid=(29, 1)),
    Case((130, 1000), 24, BF16, divide_max=True, bias=False),
    Case((1000, 130), 70, FP32, n_text=40, ignored=2),
    Case((130, 97), 1100, FP32, divide_max=True, problems=4),
    Case((130, 97), 1100, BF16, problems=4),
    Case((97, 1000), 64, FP16, n_text=1, grid=(11, 13)),
    Case((300, 8192), 64, FP32, n_text=70, grid=(9, 11), batch=1, problems=4),
    Case((8192, 300), 64, BF16, n_text=70, grid=(9, 11), batch=1, problems=4),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pairs_of_sizes_dtypes_and_arguments(case, kernel):
    check_case(kernel, case)


@every_dtype
@pytest.mark.parametrize("divide_max", [False, True])
@pytest.mark.parametrize("n", [4, 7, 8, 11])
def test_a_part_of_the_positions(n, divide_max, dtype, kernel):
    """Text alone, without its last position, with none and with some of the image."""
    check_case(kernel, Case(dtype=dtype, divide_max=divide_max, n=n, problems=16))


def test_layout_without_text(kernel):
    check_case(kernel, Case((0, 14), n_text=0, problems=16))


@every_dtype
def test_logits_of_ten_thousand(dtype, kernel):
    case = Case((130, 97), 24, dtype)
    problems = [make_inputs(case, seed=i) for i in range(case.problems)]
    problems = [inputs._replace(weight=inputs.weight * 4000) for inputs in problems]
    check_problems(kernel, case, problems)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_rows_far_from_zero(offset, kernel):
    """The variance is that of what is left after the mean."""
    case = Case((130, 97), 70)
    problems = [make_inputs(case, seed=i) for i in range(case.problems)]
    check_problems(kernel, case, [inputs._replace(hidden=inputs.hidden + offset) for inputs in problems])


# -- exact things


def _in_memory(t, layout):
    """`t` with its values in memory that lies as `layout` says, and that memory; NaN, or -7, around them."""
    fill = torch.nan if t.is_floating_point() else -7
    if layout == "transposed":
        memory = torch.full((*t.shape[:-2], *reversed(t.shape[-2:])), fill, dtype=t.dtype)
        view = memory.transpose(-1, -2) if t.dim() > 1 else memory
    elif layout == "rows of a wider matrix":
        memory = torch.full((*t.shape[:-1], t.shape[-1] + 3), fill, dtype=t.dtype)
        view = memory[..., 1 : 1 + t.shape[-1]]
    else:  # every second number of wider rows
        memory = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 3), fill, dtype=t.dtype)
        view = memory[..., : 2 * t.shape[-1] : 2]
    view.copy_(t)
    return view, memory


@every_dtype
@pytest.mark.parametrize("layout", ["transposed", "rows of a wider matrix", "every second"])
def test_any_strides_give_the_same_bits_and_inputs_stay(layout, dtype, kernel):
    case = Case((63, 40), 24, dtype, divide_max=True)
    inputs = make_inputs(case)
    views, memories = zip(*(_in_memory(t, layout) for t in inputs), strict=True)
    before = [memory.clone() for memory in memories]
    assert same(results(kernel, case, type(inputs)(*views)), results(kernel, case, inputs))
    assert all(torch.equal(m.nan_to_num(7.5), b.nan_to_num(7.5)) for m, b in zip(memories, before, strict=True))


@every_dtype
def test_equal_bits_for_any_number_of_threads_and_in_a_second_run(dtype, kernel, restored_threads):
    case = Case((700, 1100), 70, dtype, divide_max=True, batch=3, n_text=60, grid=(9, 11))
    inputs = make_inputs(case)
    torch.set_num_threads(1)
    expected = results(kernel, case, inputs)
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        assert same(results(kernel, case, inputs), expected), f"{threads} threads"


def test_two_backward_passes_have_equal_bits(kernel):
    case = Case((63, 40), 24)
    inputs = make_inputs(case)
    leaves = [getattr(inputs, name).requires_grad_() for name in NAMES]
    loss = sum(losses_of(kernel, case, inputs))
    once, again = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert same(once, again)


@pytest.mark.parametrize("divide_max", [False, True])
def test_one_sample_alone_is_the_same_as_the_only_one_that_counts_in_its_batch(divide_max, kernel):
    case = Case((130, 97), 24, divide_max=divide_max, batch=3)
    inputs = make_inputs(case)
    for b in range(case.batch):
        alone = inputs._replace(hidden=inputs.hidden[b : b + 1], labels=inputs.labels[b : b + 1])
        others = torch.arange(case.batch)[:, None] != b
        only = inputs._replace(labels=inputs.labels.masked_fill(others, -100))
        text, image, dhidden, *gradients = results(kernel, case, only)
        expected_text, expected_image, expected_dhidden, *expected = results(kernel, case, alone)
        assert same((text, image, *gradients), (expected_text, expected_image, *expected))
        assert torch.equal(dhidden[b : b + 1], expected_dhidden) and not dhidden[others[:, 0]].any()


@every_dtype
@pytest.mark.parametrize("codes", [(1, 1), (5, 96), (97, 130)])
@pytest.mark.parametrize("sizes", [{"width": 1, "batch": 1}, {"width": 70, "grid": (1, 67)}, {"width": 300, "n": 5}])
def test_all_of_the_results_is_written(codes, sizes, dtype, kernel, poisoned_memory):
    assert torch.empty(3).isnan().all()
    case = Case(codes, dtype=dtype, **sizes)
    assert all(t.isfinite().all() for t in results(kernel, case, make_inputs(case)))


def test_rows_that_do_not_count_reach_nothing_and_get_zeros(kernel):
    """Not even where they hold no numbers."""
    case = Case((63, 40), 24)
    inputs = make_inputs(case)
    uncounted = inputs.labels < 0
    broken = inputs._replace(hidden=inputs.hidden.masked_fill(uncounted[..., None], torch.nan))
    found = results(kernel, case, broken)
    assert same(found, results(kernel, case, inputs))
    assert not found[2][uncounted].any() and found[2][~uncounted].any(-1).all()


@pytest.mark.parametrize("half", ["text", "image", "both"])
def test_a_half_without_labels_has_loss_0_and_gradients_of_zeros(half, kernel):
    case = Case((63, 40), 24)
    inputs = make_inputs(case)
    is_text = torch.arange(inputs.labels.shape[1]) < case.n_text
    gone = {"text": is_text, "image": ~is_text, "both": is_text | ~is_text}[half]
    inputs.labels[:, gone] = -100
    *losses, dhidden, _, _, dweight, dbias = results(kernel, case, inputs)
    rows = {"text": slice(0, 63), "image": slice(63, None), "both": slice(None)}[half]
    assert not dhidden[:, gone].any() and not dweight[rows].any() and not dbias[rows].any()
    assert [bool(loss) for loss in losses] == [half == "image", half == "text"]
    if half != "both":
        assert dweight.any() and dhidden.any()


@pytest.mark.parametrize("rates", [(0.0, 1.9), (0.7, 0.0)])
def test_the_gradient_of_one_loss_is_what_it_is_beside_the_other(rates, kernel):
    case = Case((63, 40), 24)
    inputs = make_inputs(case)
    _, _, dhidden, _, _, dweight, dbias = results(kernel, case, inputs, rates=rates)
    _, _, every_dhidden, _, _, every_dweight, every_dbias = results(kernel, case, inputs)
    rows, positions = (slice(0, 63), slice(0, case.n_text)) if rates[0] else (slice(63, None), slice(case.n_text, None))
    assert torch.equal(dhidden[:, positions], every_dhidden[:, positions])
    assert torch.equal(dweight[rows], every_dweight[rows]) and torch.equal(dbias[rows], every_dbias[rows])
    assert dweight.count_nonzero() == dweight[rows].count_nonzero()
    assert dhidden.count_nonzero() == dhidden[:, positions].count_nonzero()


# -- meaning


def test_text_positions_read_text_rows_alone_and_image_positions_the_others(kernel):
    case = Case((63, 40), 24)
    inputs = make_inputs(case)
    text, image, dhidden, *_ = results(kernel, case, inputs)
    for half, (rows, reading) in {
        "text": (slice(0, 63), slice(0, case.n_text)),
        "image": (slice(63, None), slice(case.n_text, None)),
    }.items():
        changed = inputs._replace(weight=inputs.weight.clone(), bias=inputs.bias.clone())
        changed.weight[rows] *= 3
        changed.bias[rows] = torch.nan
        changed_text, changed_image, changed_dhidden, *_ = results(kernel, case, changed)
        assert torch.equal(changed_text, text) == (half == "image")
        assert torch.equal(changed_image, image) == (half == "text")
        unread = torch.ones_like(dhidden, dtype=torch.bool)
        unread[:, reading] = False
        assert torch.equal(changed_dhidden[unread], dhidden[unread]) and changed_dhidden[:, reading].isnan().any()


@pytest.mark.parametrize("codes", [(64, 40), (97, 300)])
def test_a_certain_label_costs_nothing(codes, kernel):
    """Its bias is 1e4 above the others: the loss and its gradients are exactly 0, at every place of a block."""
    case = Case(codes, 6, ignored=0)
    inputs = make_inputs(case)
    for label in range(0, min(codes), 7):
        bias = torch.zeros(sum(codes))
        bias[[label, codes[0] + label]] = 1e4
        certain = inputs._replace(bias=bias, labels=torch.full_like(inputs.labels, label))
        assert not any(t.any() for t in results(kernel, case, certain))


def test_without_weight_the_gradient_of_the_bias_counts_labels(kernel):
    """Equal logits of 64 codes: softmax is 1/64 exactly, and the rates are chosen so that all is exact."""
    case = Case((64, 64), 6, batch=2, n_text=8, grid=(2, 4), ignored=0)
    inputs = make_inputs(case)
    flat = inputs._replace(weight=torch.zeros(128, 6), bias=torch.zeros(128))
    *_, dbias = results(kernel, case, flat, rates=(16.0, 16.0))  # 16 rows in either half
    counts = [torch.bincount(labels.flatten(), minlength=64) for labels in inputs.labels.split(8, dim=1)]
    assert torch.equal(dbias, 16 / 64 - torch.cat(counts).float())


@pytest.mark.parametrize("where", ["hidden", "weight", "bias"])
def test_what_is_no_number_makes_its_loss_none(where, kernel):
    case = Case((130, 97), 24, ignored=0)
    inputs = make_inputs(case)
    getattr(inputs, where)[-1] = torch.nan
    text, image = losses_of(kernel, case, inputs)
    assert image.isnan() and bool(text.isnan()) == (where == "hidden")


@pytest.mark.parametrize("impossible", [1, 100, 129])
def test_impossible_codes_are_as_if_they_were_not_there(impossible, kernel):
    """A bias of minus infinity on the first text codes, more of them than a block holds."""
    case = Case((130, 97), 24, ignored=0)
    fewer = replace(case, codes=(130 - impossible, 97))
    found: dict[str, list] = {"got": [], "exact": [], "own": []}
    for seed in range(case.problems):
        inputs = make_inputs(case, seed)
        inputs.bias[:impossible] = -torch.inf
        inputs.labels[:, : case.n_text] = 129
        *losses, dhidden, _, _, dweight, dbias = results(kernel, case, inputs)
        assert dhidden.isfinite().all() and not dweight[:impossible].any() and not dbias[:impossible].any()
        found["got"].append(torch.stack(losses))
        labels = inputs.labels - impossible * (torch.arange(inputs.labels.shape[1]) < case.n_text)
        cut = inputs._replace(weight=inputs.weight[impossible:], bias=inputs.bias[impossible:], labels=labels)
        exact = cut._replace(**{name: getattr(cut, name).double() for name in NAMES})
        found["own"].append(torch.stack(losses_of("reference", fewer, cut)))
        found["exact"].append(torch.stack(losses_of("reference", fewer, exact)))
    assert_within_budget(**{name: torch.stack(losses) for name, losses in found.items()})
