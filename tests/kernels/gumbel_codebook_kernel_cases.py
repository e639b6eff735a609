"""What to compile of gumbel_codebook: every kernel of every launch row, for every target of the row."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from dalle_fast.kernels.gumbel_codebook import launch_backward, launch_codes, launch_forward
from dalle_fast.kernels.gumbel_codebook_arguments import prepare
from dalle_fast.kernels.gumbel_codebook_sizes import TABLE, Row
from triton_tools.ahead_of_time import TARGETS, AotCase, recorded_launches

BATCH, GRID, N_FEATURES, N_CODES, DIM = 8, (32, 32), 64, 8192, 512
LAUNCH_OPTIONS = ("num_warps", "num_stages")
DTYPES = {2: torch.bfloat16, 4: torch.float32}
MODES = ("soft", "straight_through", "reinmax")


def aot_cases() -> list[AotCase]:
    """Of every row and mode the variant that does most (bias, KL, noise drawn), and one that reads its noise."""
    return [case for row in TABLE for mode in MODES for case in _cases(row, mode)]


def _cases(row: Row, mode: str) -> Iterator[AotCase]:
    targets = tuple(target for target in TARGETS if target // 10 * 10 in row.arches)
    for what, on, drawn in (("noise drawn, bias, KL", targets, True), ("noise given", targets[:1], False)):
        for kernel, args, kwargs in _launches(row, mode, drawn):
            constants = {name: value for name, value in kwargs.items() if name not in LAUNCH_OPTIONS}
            options = {name: kwargs[name] for name in LAUNCH_OPTIONS}
            name = f"{constants.get('MODE', mode)} {DTYPES[row.itemsize]} sm_{row.arches[0]}, {what}"
            yield AotCase(name, kernel, args, constants, options, row.itemsize == 2, on)


def _launches(row: Row, mode: str, drawn: bool) -> list[tuple]:
    """(kernel, args, kwargs) of a forward and a backward call; of `codes`, too, once a row."""
    dtype, batch = DTYPES[row.itemsize], (BATCH,)
    features = torch.empty(*batch, N_FEATURES, *GRID, dtype=dtype, device="meta")
    weight, codebook = features.new_empty(N_CODES, N_FEATURES), features.new_empty(N_CODES, DIM)
    call = prepare(
        features,
        weight,
        features.new_empty(N_CODES) if drawn else None,
        codebook,
        None if drawn else features.new_empty(*batch, N_CODES, *GRID, dtype=torch.float32),
        features.new_empty(1, dtype=torch.int64) if drawn else None,
        first_row=0,
        temperature=0.9,
        mode=mode,
    )
    dkl = features.new_empty((), dtype=torch.float32) if drawn else None
    with recorded_launches() as launches:
        embeds, _, noisy_codes, _, statistics = launch_forward(call, with_kl=drawn, launch=row.launch)
        launch_backward(embeds, dkl, embeds, noisy_codes, statistics, call, launch=row.launch)
        if mode == "soft" and drawn:
            launch_codes(features, weight, features.new_empty(N_CODES), launch=row.launch)
    if not drawn and mode != "soft":  # nothing there is another kernel than where noise is drawn
        return launches[:1]
    return launches
