"""The interpreter's checks find what they are for, name the argument, and leave good kernels alone."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed (or blocked: the bare pass)")

import triton.language as tl

from triton_tools.guard import KernelFault


@triton.jit
def _copy(x_ptr, out_ptr, n, stride, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (offs < n) | (not MASKED)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs.to(tl.int64) * stride, mask=mask), mask=offs < n)


@triton.jit
def _copy_shifted(x_ptr, out_ptr, shift, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs + shift))


@triton.jit
def _store_at(index_ptr, out_ptr, BLOCK: tl.constexpr):
    index = tl.load(index_ptr + tl.arange(0, BLOCK))
    tl.store(out_ptr + index, index.to(tl.float32))


@triton.jit
def _sum_into_first(x_ptr, out_ptr, ATOMIC: tl.constexpr):
    x = tl.load(x_ptr + tl.program_id(0))
    if ATOMIC:
        tl.atomic_add(out_ptr, x)
    else:
        tl.store(out_ptr, tl.load(out_ptr) + x)


@triton.jit
def _shift_in_place(x_ptr, n):
    pid = tl.program_id(0)
    tl.store(x_ptr + pid, tl.load(x_ptr + pid + 1, mask=pid + 1 < n, other=0.0))


@triton.jit
def _assert_positive(x_ptr, BLOCK: tl.constexpr):
    tl.device_assert(tl.load(x_ptr + tl.arange(0, BLOCK)) > 0, "not positive")


@triton.jit
def _square(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(out_ptr + offs, x * x)


def test_good_kernel_passes_and_computes():
    x, out = torch.randn(21), torch.full((21,), torch.nan)
    _copy[(2,)](x, out, 21, 1, BLOCK=16, MASKED=True)
    assert torch.equal(x, out)


def test_load_beyond_the_end_names_the_argument():
    x, out = torch.randn(21), torch.zeros(21)
    with pytest.raises(
        KernelFault, match=r"_copy: program \(1, 0, 0\) loads 11 elements out of bounds, .*index 21 of `x_ptr`"
    ):
        _copy[(2,)](x, out, 21, 1, BLOCK=16, MASKED=False)


def test_load_before_the_start_names_the_argument():
    memory = torch.randn(40)
    with pytest.raises(KernelFault, match="index -1 of `x_ptr`"):
        _copy_shifted[(1,)](memory[8:], torch.zeros(16), -1, BLOCK=16)


def test_store_beyond_the_end_names_the_argument():
    with pytest.raises(KernelFault, match="stores 16 elements out of bounds, the first at index 16 of `out_ptr`"):
        _copy_shifted[(2,)](torch.randn(32), torch.zeros(32)[:16], 0, BLOCK=16)


def test_gap_of_a_strided_view_is_out_of_bounds():
    packed = torch.randn(16, 3)
    out = torch.zeros(16)
    _copy[(1,)](packed[:, 1], out, 16, 3, BLOCK=16, MASKED=True)
    assert torch.equal(out, packed[:, 1])
    with pytest.raises(KernelFault, match="`x_ptr`: between its elements"):
        _copy[(1,)](packed[:, 1], out, 16, 2, BLOCK=16, MASKED=True)


def test_neighbour_in_one_allocation_is_out_of_bounds():
    """Another argument lies where the pointer reads: still not its own."""
    packed = torch.randn(2, 16)
    with pytest.raises(KernelFault, match="`x_ptr`"):
        _copy_shifted[(1,)](packed[0], packed[1], 1, BLOCK=16)


def test_expanded_view_is_in_bounds():
    x, out = torch.randn(1).expand(16), torch.zeros(16)
    _copy[(1,)](x, out, 16, 0, BLOCK=16, MASKED=True)
    assert torch.equal(x, out)


def test_instances_that_store_to_one_element_race():
    with pytest.raises(KernelFault, match=r"_sum_into_first: program \(1, 0, 0\) .*`out_ptr`.*race"):
        _sum_into_first[(2,)](torch.ones(2), torch.zeros(1), ATOMIC=False)


def test_atomics_do_not_race():
    out = torch.zeros(1)
    _sum_into_first[(4,)](torch.ones(4), out, ATOMIC=True)
    assert out.item() == 4


def test_instance_that_overwrites_what_another_read_races():
    with pytest.raises(KernelFault, match=r"`x_ptr`.*race"):
        _shift_in_place[(4,)](torch.randn(4), 4)


def test_races_are_found_across_two_names_of_one_memory():
    x = torch.randn(33)
    with pytest.raises(KernelFault, match="race"):
        _copy_shifted[(2,)](x[:32], x[1:], 0, BLOCK=16)


def test_two_stores_to_one_element_in_one_store():
    with pytest.raises(KernelFault, match=r"_store_at: .* stores twice to one element of `out_ptr`"):
        _store_at[(1,)](torch.tensor([0, 1, 2, 1]), torch.zeros(4), BLOCK=4)
    out = torch.zeros(4)
    _store_at[(1,)](torch.tensor([3, 1, 2, 0]), out, BLOCK=4)
    assert out.tolist() == [0, 1, 2, 3]


def test_device_assert_asserts():
    _assert_positive[(1,)](torch.ones(4), BLOCK=4)
    with pytest.raises(AssertionError, match="not positive"):
        _assert_positive[(1,)](torch.tensor([1.0, 0.0, 1.0, 1.0]), BLOCK=4)


def test_integer_overflow_is_found():
    x = torch.full((4,), 50_000, dtype=torch.int32)
    with pytest.raises(AssertionError, match="overflow"):
        _square[(1,)](x, torch.zeros_like(x), BLOCK=4)


def test_autotuned_kernel_runs_every_configuration():
    ran = []
    configs = [triton.Config({"BLOCK": size}, pre_hook=lambda given: ran.append(given["BLOCK"])) for size in (4, 8)]
    tuned = triton.autotune(configs, key=[])(_square)
    x, out = torch.randn(8), torch.zeros(8)
    tuned[(1,)](x, out)
    assert {4, 8} <= set(ran)
