"""A sample's picture as a PNG that says what it is of."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from dalle_fast.jobs.job import Sample

_LEVEL = 3  # of zlib: a smooth 256x256 picture takes 10 ms instead of 22 ms at the usual 6, and a tenth more bytes


def to_png(
    pixels: Tensor, sample: Sample, score: float | None, *, model_hash: str, settings: Mapping[str, Any]
) -> bytes:
    """A PNG with prompt, seed, score (where there is one), model hash and settings (JSON) in its iTXt chunks.

    Args: pixels: uint8 [1 or 3, H, W].   settings: `JobConfig.settings`.
    """
    said = {"prompt": sample.prompt, "seed": str(sample.seed)}
    if score is not None:
        said["score"] = repr(score)
    info = PngInfo()
    for key, value in (said | {"model_hash": model_hash, "settings": json.dumps(settings)}).items():
        info.add_itxt(key, value)
    levels = pixels.permute(1, 2, 0).cpu().numpy()
    png = io.BytesIO()
    Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else levels).save(
        png, "PNG", pnginfo=info, compress_level=_LEVEL
    )
    return png.getvalue()


def is_whole_png(end: bytes) -> bool:
    """Whether a file that ends so is whole."""
    return end.endswith(b"IEND\xaeB`\x82")
