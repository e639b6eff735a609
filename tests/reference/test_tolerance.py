"""The tolerance helper itself: it must let rounding pass and stop everything else."""

import pytest
import torch
from tolerance import (
    assert_argmax_within_budget,
    assert_within_budget,
    budget,
    check_against_oracle,
    outputs_and_gradients,
)


def _softmax(x):
    return x.softmax(-1)


def test_budget_is_twice_the_oracles_error_and_one_rounding():
    exact = torch.tensor([1.0, -4.0], dtype=torch.float64)
    own = torch.tensor([1.0, -4.0 + 2**-20])
    assert budget(exact, own) == 2 * 2**-20 + 2**-24 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_another_order_of_the_same_sums_passes(dtype):
    x = torch.randn(5, 33, generator=torch.Generator().manual_seed(1))
    check_against_oracle(lambda x: _softmax(x.flip(-1)).flip(-1), _softmax, (x,), dtype)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: _softmax(x) * (1 + 2**-18),
        lambda x: _softmax(x) * torch.where(torch.arange(33) == 32, torch.nan, 1.0),
        lambda x: _softmax(x.detach()) + 0 * x,  # right output, wrong gradient
        lambda x: _softmax(x).double(),
        lambda x: _softmax(x)[:-1],
    ],
)
def test_wrong_results_fail(wrong):
    x = torch.randn(5, 33, generator=torch.Generator().manual_seed(1))
    with pytest.raises(AssertionError):
        check_against_oracle(wrong, _softmax, (x,), torch.float32)


def test_wrong_indices_fail():
    x = torch.randn(5, 33, generator=torch.Generator().manual_seed(1))
    with pytest.raises(AssertionError, match="output 0: 5 of 5 differ"):
        check_against_oracle(lambda x: x.argmin(-1), lambda x: x.argmax(-1), (x,), torch.float32, backward=False)


def test_a_clear_argmax_must_be_found_and_a_tie_within_rounding_may_go_either_way():
    exact = torch.tensor([[1.0, 4.0, 2.0], [4.0, 4.0 - 2**-22, 0.0]], dtype=torch.float64)
    own = exact.float() + 2**-23
    for chosen in ([1, 0], [1, 1]):
        assert_argmax_within_budget(torch.tensor(chosen), exact, own)
    for chosen in ([1, 2], [2, 0]):
        with pytest.raises(AssertionError, match="codes: 1 of 2 are up to"):
            assert_argmax_within_budget(torch.tensor(chosen), exact, own)


def test_exact_must_be_float64():
    x = torch.ones(2)
    with pytest.raises(AssertionError, match="float64"):
        assert_within_budget(x, x, x)


def test_infinities_that_agree_are_no_error():
    x = torch.tensor([-torch.inf, 1.0])
    assert_within_budget(x, x.double(), x)


def test_empty_tensors_pass():
    x = torch.zeros(0, 3)
    assert_within_budget(x, x.double(), x)


def test_gradients_are_numbered_as_given():
    a, mask, b = torch.randn(3), torch.tensor([True, False, True]), torch.randn(3)
    results = outputs_and_gradients(
        lambda a, mask, none, b: (a * mask, None, b.sum()), (a, mask, None, b), torch.float64
    )
    assert sorted(results) == ["gradient 0", "gradient 3", "output 0", "output 2"]
