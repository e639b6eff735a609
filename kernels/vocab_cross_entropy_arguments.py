"""What the launchers of vocab_cross_entropy hand to every kernel: tensors, strides and sizes of one call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from dalle_fast.kernels.vocab_cross_entropy_blocks import IGNORED
from torch import Tensor

PROGRAMS = 256  # as many fill a GPU; the shape alone decides how a sum is split, not the GPU


class Half(NamedTuple):
    """Text or image: its positions and its codes. Its rows are counted sample by sample."""

    which: int  # 0: text, 1: image
    first_position: int
    n_positions: int
    n_rows: int  # B n_positions
    first_row: int  # among the rows of both halves, of which those of text come first
    first_code: int
    n_codes: int


class Call(NamedTuple):
    """One call, as its kernels see it."""

    hidden: Tensor  # [B, N, C], unit stride on C
    norm_weight: Tensor  # [C], contiguous as the next
    norm_bias: Tensor  # [C]
    weight: Tensor  # [V, C] of the products' dtype, unit stride on C
    bias: Tensor | None  # [V], contiguous
    labels: Tensor  # int64 [B, N]
    n_text: int
    num_text_tokens: int
    divide_max: bool

    @property
    def width(self) -> int:
        """C."""
        return self.hidden.shape[2]

    @property
    def product_dtype(self) -> torch.dtype:
        """Of the products' operands."""
        return self.weight.dtype

    @property
    def strides(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of hidden and labels, by sample and position."""
        return (self.hidden.stride(0), self.hidden.stride(1)), (self.labels.stride(0), self.labels.stride(1))

    @property
    def halves(self) -> tuple[Half, Half]:
        """Text and image; either may be without positions or codes."""
        batch, n = self.labels.shape
        n_text = min(self.n_text, n)
        return (
            Half(0, 0, n_text, batch * n_text, 0, 0, self.num_text_tokens),
            Half(
                1,
                n_text,
                n - n_text,
                batch * (n - n_text),
                batch * n_text,
                self.num_text_tokens,
                len(self.weight) - self.num_text_tokens,
            ),
        )


def prepare(
    hidden: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    n_text: int,
    num_text_tokens: int,
    divide_max: bool,
    product_dtype: torch.dtype,
) -> Call:
    """The call of these arguments; see `vocab_cross_entropy.forward`."""
    # once, as autocast itself does: in the kernels it would be done for each tile of rows
    weight = weight.to(product_dtype)
    return Call(
        hidden=_with_unit_stride(hidden),
        norm_weight=norm_weight.contiguous(),
        norm_bias=norm_bias.contiguous(),
        weight=_with_unit_stride(weight),
        bias=None if bias is None else bias.contiguous(),
        labels=labels,
        n_text=n_text,
        num_text_tokens=num_text_tokens,
        divide_max=divide_max,
    )


def counts_of(call: Call) -> Tensor:
    """float32 [2]: labels that count, text and image; on the device, for which no host waits."""
    counted = call.labels != IGNORED.value
    n_text = min(call.n_text, counted.shape[1])
    return torch.stack([counted[:, :n_text].sum(), counted[:, n_text:].sum()]).float()


def cdiv(n: int, block: int) -> int:
    """How many blocks hold n."""
    return -(-n // block)


def filled(n: int, multiple: int) -> int:
    """n, or what it takes to whole blocks."""
    return cdiv(n, multiple) * multiple


def split(n: int, block: int, n_programs: int) -> tuple[int, int]:
    """Into how many parts n is cut where each takes n_programs, and their length, whole blocks; at least one part."""
    n_blocks = max(1, cdiv(n, block))
    blocks_each = cdiv(n_blocks, min(n_blocks, max(1, PROGRAMS // n_programs)))
    return cdiv(n_blocks, blocks_each), blocks_each * block


def _with_unit_stride(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()
