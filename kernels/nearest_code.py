"""The nearest code of each row on NVIDIA GPUs: a search in two kernels, distances compared where they are summed.

    index_m = argmin_k sum_d (x_md - c_kd)^2        x [n, D], codebook [K, D]; ties go to the lowest k

Every program takes BLOCK_M rows and a share of the codes, BLOCK_N of them at a time, and keeps the least distance of
each row and its code; a second kernel takes the least of all shares. No matrix of distances exists: behind inputs and
result there are 8 bytes a row and share.

Precision: float32, differences squared and added in one order for every code, so that equal codes tie exactly; none of
these operations is fused with another, which a compiler may do here and not there. (The product |x|^2 - 2 x.c + |c|^2
would run on matrix units, but cancels.) A distance that is not a number is the smallest, and the first of them wins, as
in torch's argmin. 16-bit numbers are exact in float32.
Floor: 3 n K D float32 operations; D (n + K) numbers read, 8 bytes a row written.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from dalle_fast.kernels.attention_blocks import unspecialised
from dalle_fast.kernels.sparse_attention_arguments import launching_on
from torch import Tensor


class Launch(NamedTuple):
    """How the kernels of one call are launched."""

    block_m: int  # rows
    block_n: int  # codes
    block_d: int  # channels at a time
    codes: int  # of one program, a multiple of block_n: a small batch still fills a GPU
    num_warps: int


MERGE_ROWS = 128  # of a program of the second kernel
# Compiled for sm_80, sm_86, sm_89, sm_90, sm_100 and sm_120; not yet measured. No matrix products: one row for all.
LAUNCH = Launch(block_m=32, block_n=128, block_d=4, codes=1024, num_warps=4)


@unspecialised("n", "n_codes", "width")
@triton.jit
def _nearest_code_search(
    x_ptr,
    codebook_ptr,
    distance_ptr,
    code_ptr,
    stride_x_m,
    stride_codebook_n,
    n,
    n_codes,
    width,
    CODES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The nearest of CODES codes for BLOCK_M rows: distance float32 and code int32 of [shares, n]."""
    share = tl.program_id(1)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < n
    offs_d = tl.arange(0, BLOCK_D)
    x_rows = x_ptr + offs_m * stride_x_m  # [BLOCK_M]

    least = tl.full([BLOCK_M], float("inf"), tl.float32)
    nearest = tl.zeros([BLOCK_M], tl.int32)
    for first in range(share * CODES, tl.minimum((share + 1) * CODES, n_codes), BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        mask_n = offs_n < n_codes
        code_rows = codebook_ptr + offs_n.to(tl.int64) * stride_codebook_n  # [BLOCK_N]
        distance = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, width, BLOCK_D):
            mask_d = start + offs_d < width
            x = tl.load(
                x_rows[None, :] + start + offs_d[:, None], mask=mask_d[:, None] & mask_m[None, :], other=0.0
            )  # [BLOCK_D, BLOCK_M]
            code = tl.load(
                code_rows[None, :] + start + offs_d[:, None], mask=mask_d[:, None] & mask_n[None, :], other=0.0
            )  # [BLOCK_D, BLOCK_N]
            difference = x.to(tl.float32)[:, :, None] - code.to(tl.float32)[:, None, :]
            # the channels of one distance are all in one thread
            distance += tl.sum(difference * difference, axis=0)
        # no square is -inf: it stands for what is not a number
        distance = tl.where(distance == distance, distance, -float("inf"))
        distance = tl.where(mask_n[None, :], distance, float("inf"))
        of_block = tl.min(distance, axis=1)  # [BLOCK_M]
        code_of_block = tl.min(tl.where(distance == of_block[:, None], offs_n[None, :], n_codes), axis=1)
        is_nearer = of_block < least
        least = tl.where(is_nearer, of_block, least)
        nearest = tl.where(is_nearer, code_of_block, nearest)

    place = share.to(tl.int64) * n + offs_m
    tl.store(distance_ptr + place, least, mask=mask_m)
    tl.store(code_ptr + place, nearest, mask=mask_m)


@unspecialised("n", "n_shares")
@triton.jit
def _nearest_code_merge(distance_ptr, code_ptr, nearest_ptr, n, n_shares, BLOCK_M: tl.constexpr):
    """int64 [n]: the code of the least distance of [shares, n], of equal ones the first."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < n
    least = tl.full([BLOCK_M], float("inf"), tl.float32)
    nearest = tl.zeros([BLOCK_M], tl.int32)
    for _ in range(n_shares):
        distance = tl.load(distance_ptr + offs_m, mask=mask_m, other=float("inf"))
        is_nearer = distance < least
        nearest = tl.where(is_nearer, tl.load(code_ptr + offs_m, mask=mask_m, other=0), nearest)
        least = tl.where(is_nearer, distance, least)
        distance_ptr += n
        code_ptr += n
    tl.store(nearest_ptr + offs_m, nearest.to(tl.int64), mask=mask_m)


def nearest_code(x: Tensor, codebook: Tensor, *, normalised: bool) -> Tensor:
    """int64 [...]: arguments as `dalle_fast.ops.nearest_code`, checked there; at least one row."""
    return launch_nearest_code(x, codebook, normalised=normalised, launch=LAUNCH)


@torch.no_grad()
def launch_nearest_code(x: Tensor, codebook: Tensor, *, normalised: bool, launch: Launch) -> Tensor:
    """`nearest_code` with launch sizes of the caller's choice."""
    nearest = x.new_empty(x.shape[:-1], dtype=torch.int64)
    n, (n_codes, width) = nearest.numel(), codebook.shape
    rows = x.reshape(n, width)
    if normalised:
        with torch.autocast(x.device.type, enabled=False):
            rows, codebook = F.normalize(rows.float(), dim=-1), F.normalize(codebook.float(), dim=-1)
    rows, codebook = (t if t.stride(1) == 1 else t.contiguous() for t in (rows, codebook))
    n_shares = triton.cdiv(n_codes, launch.codes)
    distance = x.new_empty(n_shares, n, dtype=torch.float32)
    code = x.new_empty(n_shares, n, dtype=torch.int32)
    with launching_on(x.device):
        _nearest_code_search[(triton.cdiv(n, launch.block_m), n_shares)](
            rows, codebook, distance, code, rows.stride(0), codebook.stride(0), n, n_codes, width, CODES=launch.codes,
            BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_D=launch.block_d, num_warps=launch.num_warps,
            enable_fp_fusion=False,
        )  # fmt: skip
        _nearest_code_merge[(triton.cdiv(n, MERGE_ROWS),)](
            distance, code, nearest, n, n_shares, BLOCK_M=MERGE_ROWS, num_warps=4
        )
    return nearest
