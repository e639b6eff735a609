"""A look at pictures while they are drawn: a sheet of the first ones, grey where nothing is drawn yet."""

from __future__ import annotations

import io
import logging
import math
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from dalle_fast.jobs.drawing_model import DrawingModel
from dalle_fast.sampling.gallery import to_pil, to_pixels
from dalle_fast.whole_files import write_whole

_GREY = 0.5
_GAP = 2  # pixels between pictures

_log = logging.getLogger(__name__)


class Preview:
    """Writes a sheet of what a batch has become: `on_tokens` of `DALLE.generate_images`, for one batch after the other.

    Args:
        path: the PNG, there whole or not at all.
        every: rows of codes between two sheets; the first row and the last always make one.
        most: pictures on a sheet, the first of a batch.
        known: int [image_seq_len], codes that are given, -1 where one is drawn.
    Raises: ValueError (every or most below 1).
    """

    def __init__(
        self, path: Path, model: DrawingModel, every: int, most: int = 16, *, known: Tensor | None = None
    ) -> None:
        for name, value in (("every", every), ("most", most)):
            if value < 1:
                raise ValueError(f"sample: {name} of a preview must be at least 1, got {value}.")
        self._path, self._model, self._every, self._most = path, model, every, most
        n_codes = model.dalle.image_seq_len
        self._known = torch.full((n_codes,), -1) if known is None else known.to("cpu", torch.long)
        self._codes = torch.empty(0, n_codes, dtype=torch.long)
        self._drawn = torch.empty(0, n_codes, dtype=torch.bool)
        self._written = False

    def __call__(self, first: int, codes: Tensor) -> None:
        """Takes codes [B, m] from index `first` on, at most a grid row, -1 for samples that are not being drawn.

        A disk that takes no sheet is a warning: drawing goes on.
        """
        codes, place = codes[: self._most].cpu(), slice(first, first + codes.shape[1])
        new = codes >= 0
        if len(codes) != len(self._codes) or (new & self._drawn[:, place]).any():  # the next batch
            self._codes = self._known.repeat(len(codes), 1)
            self._drawn = torch.zeros_like(self._codes, dtype=torch.bool)
        if not new.any():
            return
        self._codes[:, place][new] = codes[new]
        self._drawn[:, place] |= new
        grid = self._model.dalle.layout
        row = place.stop // grid.grid_cols
        if self._written and row % self._every and row != grid.grid_rows:
            return
        try:
            write_whole(self._path, [self._sheet()], durable=False)
        except OSError as error:
            _log.warning("The preview %s cannot be written: %s.", self._path, error.strerror)
        self._written = True

    @torch.no_grad()
    def _sheet(self) -> bytes:
        """The codes so far, as a PNG."""
        vae, grid, device = self._model.dalle.vae, self._model.dalle.layout, self._model.device
        pixels = to_pixels(vae, vae.decode(self._codes.clamp(min=0).to(device))).float().cpu()
        cell = vae.image_size // grid.grid_cols
        missing = self._codes.unflatten(1, (1, grid.grid_rows, grid.grid_cols)) < 0
        missing = missing.repeat_interleave(cell, dim=2).repeat_interleave(cell, dim=3)
        pixels = torch.nn.functional.pad(pixels.masked_fill(missing, _GREY), (_GAP,) * 4, value=1.0)
        columns = math.ceil(math.sqrt(len(pixels)))
        rows = math.ceil(len(pixels) / columns)
        white = torch.ones(rows * columns - len(pixels), *pixels.shape[1:])
        sheet = rearrange(torch.cat([pixels, white]), "(r c) ch h w -> ch (r h) (c w)", r=rows)
        file = io.BytesIO()
        to_pil(sheet).save(file, format="PNG", compress_level=1)
        return file.getvalue()
