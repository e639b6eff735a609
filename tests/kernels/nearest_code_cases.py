"""What to compile of nearest_code: both kernels, for every target and dtype."""

from __future__ import annotations

import torch
from dalle_fast.kernels.nearest_code import nearest_code
from triton_tools.ahead_of_time import AotCase, recorded_launches

ROWS, CODES, WIDTH = 1024, 8192, 256
LAUNCH_OPTIONS = ("num_warps", "enable_fp_fusion")


def aot_cases() -> list[AotCase]:
    """The search at each dtype that reaches it, and what merges its shares, which knows none."""
    cases = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with recorded_launches() as launches:
            x, codebook = (torch.empty(n, WIDTH, dtype=dtype, device="meta") for n in (ROWS, CODES))
            nearest_code(x, codebook, normalised=False)
        for kernel, args, kwargs in launches:
            constants = {name: value for name, value in kwargs.items() if name not in LAUNCH_OPTIONS}
            options = {name: kwargs[name] for name in LAUNCH_OPTIONS if name in kwargs}
            case = AotCase(str(dtype), kernel, args, constants, options, sixteen_bit=False)
            cases.setdefault(case.digest, case)
    return list(cases.values())
