"""bfloat16 in the interpreter equals torch's: every bit pattern, every operation that kernels use."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed (or blocked: the bare pass)")

import triton.language as tl


@triton.jit
def _convert(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs).to(out_ptr.dtype.element_ty))


@triton.jit
def _compute(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    y = tl.load(y_ptr + offs)
    if OP == "add":
        z = x + y
    elif OP == "multiply":
        z = x * y
    elif OP == "divide":
        z = (x / y).to(tl.bfloat16)
    elif OP == "maximum":
        z = tl.maximum(x, y)
    elif OP == "negate":
        z = -x
    elif OP == "absolute":
        z = tl.abs(x)
    elif OP == "choose":
        z = tl.where(x < y, x, y)
    elif OP == "fma":
        z = tl.fma(x, y, x)
    else:
        tl.static_assert(OP == "scale")
        z = (x * 3.0).to(tl.bfloat16)
    tl.store(out_ptr + offs, z)


@triton.jit
def _product(a_ptr, b_ptr, out_ptr, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)[:, None] * BLOCK
    cols = tl.arange(0, BLOCK)[None, :]
    product = tl.dot(tl.load(a_ptr + rows + cols), tl.load(b_ptr + rows + cols))
    tl.store(out_ptr + rows + cols, product)


@triton.jit
def _sum(x_ptr, out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK))))


OPERATIONS = {
    "add": torch.add,
    "multiply": torch.mul,
    "divide": torch.div,
    "maximum": torch.maximum,
    "negate": lambda x, y: -x,
    "absolute": lambda x, y: x.abs(),
    "choose": torch.minimum,
    "fma": lambda x, y: (x.double() * y.double() + x.double()).float().bfloat16(),
    "scale": lambda x, y: x * 3.0,
}


def test_rounds_to_nearest_even():
    """1 + 1/256 lies midway between 1 and 1 + 1/128 (even: 1), 1 + 3/256 between odd 1 + 1/128 and even 1 + 1/64."""
    x = torch.tensor([1 + 1 / 256, 1 + 3 / 256, 1 + 1 / 256 + 2**-20, -1 - 3 / 256])
    out = torch.zeros(4, dtype=torch.bfloat16)
    _convert[(1,)](x, out, BLOCK=4)
    assert out.tolist() == [1.0, 1 + 1 / 64, 1 + 1 / 128, -1 - 1 / 64]


def test_conversions_are_those_of_torch():
    torch.manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int64).to(torch.int32)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, 1e-40, -1e-45])
    x = torch.cat([bits.view(torch.float32), special.repeat(512)])
    out = torch.zeros(x.shape, dtype=torch.bfloat16)
    _convert[(1,)](x, out, BLOCK=8192)
    assert torch.equal(out.isnan(), x.isnan())
    assert torch.equal(out.nan_to_num(7.0), x.bfloat16().nan_to_num(7.0))


def test_every_bfloat16_widens_exactly():
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    out = torch.zeros(x.shape)
    _convert[(16,)](x, out, BLOCK=4096)
    assert torch.equal(out.nan_to_num(7.0), x.float().nan_to_num(7.0))


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_arithmetic_is_that_of_torch(name):
    torch.manual_seed(0)
    x, y = torch.randn(2, 256).bfloat16()
    out = torch.full((256,), torch.nan, dtype=torch.bfloat16)
    _compute[(1,)](x, y, out, OP=name, BLOCK=256)
    assert torch.equal(out, OPERATIONS[name](x, y))


def test_dot_multiplies_values_not_bits():
    torch.manual_seed(0)
    a, b = torch.randint(-4, 5, (2, 16, 16)).bfloat16()
    out = torch.full((16, 16), torch.nan)
    _product[(1,)](a, b, out, BLOCK=16)
    assert torch.equal(out, a.float() @ b.float())


def test_reduction_is_refused():
    with pytest.raises(TypeError, match="widen to float32 first"):
        _sum[(1,)](torch.ones(8).bfloat16(), torch.zeros(1), BLOCK=8)
