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
# Of each mode the kernels that no other mode compiles.
FORWARD, ROWS, WEIGHT = "_gumbel_codebook_fwd", "_gumbel_codebook_bwd_rows", "_gumbel_codebook_bwd_weight"
MIXTURE, CHOSEN = "_gumbel_codebook_bwd_mixture", "_gumbel_codebook_bwd_chosen"
OWN = {
    "soft": (FORWARD, ROWS, WEIGHT, MIXTURE),
    "straight_through": (FORWARD, CHOSEN),
    "reinmax": (FORWARD, ROWS, WEIGHT),
}


def aot_cases() -> list[AotCase]:
    """Of every row and mode the variant that does most (bias, KL, noise drawn), and one that reads its noise."""
    return [case for row in TABLE for mode in OWN for case in _cases(row, mode)]


def _cases(row: Row, mode: str) -> Iterator[AotCase]:
    targets = tuple(target for target in TARGETS if target // 10 * 10 in row.arches)
    for what, drawn in (("noise drawn, bias, KL", True), ("noise given", False)):
        for kernel, args, kwargs in _launches(row, mode, drawn):
            # What a mixture leaves out, and where noise comes from, is compiled once a row.
            slight = not drawn or (mode != "soft" and kernel.__name__ == FORWARD)
            constants = {name: value for name, value in kwargs.items() if name not in LAUNCH_OPTIONS}
            options = {name: kwargs[name] for name in LAUNCH_OPTIONS}
            name = f"{constants.get('MODE', mode)} {DTYPES[row.itemsize]} sm_{row.arches[0]}, {what}"
            yield AotCase(
                name,
                kernel,
                args,
                constants,
                options,
                row.itemsize == 2,
                targets[:1] if slight else targets,
            )


def _launches(row: Row, mode: str, drawn: bool) -> list[tuple]:
    """(kernel, args, kwargs) of a forward and a backward call; of `codes`, too, once a row."""
    dtype = DTYPES[row.itemsize]
    features = torch.empty(BATCH, N_FEATURES, *GRID, dtype=dtype, device="meta")
    weight, codebook = features.new_empty(N_CODES, N_FEATURES), features.new_empty(N_CODES, DIM)
    bias = features.new_empty(N_CODES)
    call = prepare(
        features,
        weight,
        bias if drawn else None,
        codebook,
        None if drawn else features.new_empty(BATCH, N_CODES, *GRID, dtype=torch.float32),
        features.new_empty(1, dtype=torch.int64) if drawn else None,
        first_row=0,
        temperature=0.9,
        mode=mode,
    )
    dkl = features.new_empty((), dtype=torch.float32) if drawn else None
    with recorded_launches() as launches:
        embeds, _, noisy_codes, _, statistics = launch_forward(call, with_kl=drawn, launch=row.launch)
        launch_backward(embeds, dkl, embeds, noisy_codes, statistics, call, launch=row.launch)
    own = [launch for launch in launches if launch[0].__name__ in OWN[mode]]
    if not drawn:
        return own if mode == "soft" else []
    if mode == "soft":
        with recorded_launches() as launches:
            launch_codes(features, weight, bias, launch=row.launch)
        own += launches
    return own
