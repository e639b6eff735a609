"""What to compile of vocab_cross_entropy: every kernel of every launch row, for every target of the row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from dalle_fast.kernels.vocab_cross_entropy import launch_backward, launch_forward
from dalle_fast.kernels.vocab_cross_entropy_arguments import prepare
from dalle_fast.kernels.vocab_cross_entropy_sizes import TABLE, Row
from triton_tools.ahead_of_time import TARGETS, AotCase, recorded_launches

BATCH, N_TEXT, N_IMAGE, CODES = 8, 256, 1024, (10256, 8192)
LAUNCH_OPTIONS = ("num_warps", "num_stages")
DTYPES = {2: torch.bfloat16, 4: torch.float32}
PRODUCTS = ("_fwd", "_bwd_logits", "_bwd_normed", "_bwd_weight")  # kernels with matrix products


def aot_cases() -> list[AotCase]:
    """Of every row the variant that does most, at 512 channels, and one that masks its channels, for one target."""
    return [case for row in TABLE for case in _cases(row)]


def _cases(row: Row) -> Iterator[AotCase]:
    targets = tuple(target for target in TARGETS if target // 10 * 10 in row.arches)
    for what, width, whole in (("bias, divide_max", 512, True), ("C260", 260, False)):
        seen = set()
        for kernel, args, kwargs in _launches(row, width, whole):
            again = ", again" if kwargs.get("AGAIN") else ""
            name = f"{DTYPES[row.itemsize]} sm_{row.arches[0]}, {what}{again}"
            if (kernel.__name__, name) in seen:  # text and image are one kernel
                continue
            seen.add((kernel.__name__, name))
            constants = {key: value for key, value in kwargs.items() if key not in LAUNCH_OPTIONS}
            options = {key: kwargs[key] for key in LAUNCH_OPTIONS}
            sixteen_bit = row.itemsize == 2 and kernel.__name__.endswith(PRODUCTS)
            yield AotCase(name, kernel, args, constants, options, sixteen_bit, targets if whole else targets[:1])


def _launches(row: Row, width: int, whole: bool) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """(kernel, args, kwargs) of a forward and a backward call."""
    hidden = torch.empty(BATCH, N_TEXT + N_IMAGE, width, dtype=DTYPES[row.itemsize], device="meta")
    parameter, bias = hidden.new_empty(width), hidden.new_empty(sum(CODES)) if whole else None
    labels = hidden.new_empty(hidden.shape[:2], dtype=torch.int64)
    call = prepare(
        hidden, parameter, parameter, hidden.new_empty(sum(CODES), width), bias, labels, n_text=N_TEXT,
        num_text_tokens=CODES[0], divide_max=whole, product_dtype=hidden.dtype,
    )  # fmt: skip
    with recorded_launches() as launches:
        losses, statistics = launch_forward(call, eps=1e-5, launch=row.launch)
        launch_backward(losses, statistics, call, hidden.dtype, launch=row.launch)
    return launches
