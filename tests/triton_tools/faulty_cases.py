"""Kernels that a gate must refuse, one for each fault, and one that every gate must let pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from triton_tools.ahead_of_time import AotCase, recorded_launches


@triton.jit
def _matmul(a_ptr, b_ptr, out_ptr, n_k, PRECISION: tl.constexpr, WIDEN: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, n_k, BLOCK):
        a = tl.load(a_ptr + rows * n_k + start + cols)
        b = tl.load(b_ptr + (start + rows) * BLOCK + cols)
        if WIDEN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tl.store(out_ptr + rows * BLOCK + cols, acc)


@triton.jit
def _normalise(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(out_ptr + offs, x / tl.sum(x))


@triton.jit
def _add_up(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(out_ptr, tl.sum(tl.load(x_ptr + offs)))


def _product(
    name: str, dtype: torch.dtype, *, stages: int = 2, targets: tuple[int, ...] = (90,), **constexprs
) -> AotCase:
    a, b = (torch.empty(64, 64, dtype=dtype, device="meta") for _ in range(2))
    out = torch.empty(64, 64, device="meta")
    settings = {"PRECISION": "ieee", "WIDEN": False, "BLOCK": 64, **constexprs}
    options = {"num_warps": 4, "num_stages": stages}
    return AotCase(name, _matmul, (a, b, out, 4096), settings, options, dtype != torch.float32, targets)


def _recorded_sum() -> list[AotCase]:
    x = torch.zeros(2**10)
    with recorded_launches() as launches:
        _normalise[(1,)](x, torch.empty_like(x), BLOCK=x.numel(), num_warps=2)
    return [AotCase("clean sum", *launch, {}, False, (90,)) for launch in launches]


def aot_cases() -> list[AotCase]:
    """The name of a case is what its only problem begins with; cases called "clean ..." have none."""
    x, out = torch.empty(2**11, device="meta"), torch.empty(2**11, device="meta")
    few_registers = {"num_warps": 1, "maxnreg": 32}
    return [
        _product("clean 16-bit", torch.bfloat16, targets=(80, 90, 100)),
        _product("clean ieee", torch.float32, BLOCK=32),
        _product("clean tf32x3", torch.float32, PRECISION="tf32x3", BLOCK=32),
        *_recorded_sum(),
        AotCase("spills", _normalise, (x, out), {"BLOCK": 2**11}, few_registers, False, (90,)),
        AotCase("atomics", _add_up, (x, out), {"BLOCK": 128}, {"num_warps": 1}, False, (90,)),
        _product("shared memory", torch.bfloat16, stages=16),
        _product("TF32", torch.float32, PRECISION="tf32", targets=(90, 100)),
        _product("16-bit", torch.bfloat16, WIDEN=True, BLOCK=32),
    ]
