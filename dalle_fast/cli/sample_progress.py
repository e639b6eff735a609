"""How far a job is, told while it is drawn: a bar on a terminal, elsewhere a line of logging now and then."""

from __future__ import annotations

import logging
import sys
import time

from torch import Tensor
from tqdm import tqdm

from dalle_fast.jobs.job import DrawnChunk

_LOG_EVERY = 10.0  # seconds
_BAR = "{percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} images [{elapsed}<{remaining}, {rate_noinv_fmt}]"

_log = logging.getLogger(__name__)


class Progress:
    """Counts codes as they are drawn and chunks as they are committed, and tells it.

    Args:
        total: images of the job.   found: of them, drawn by earlier runs.
        codes: that are drawn for one image.
        quiet: tell nothing.
    """

    def __init__(self, total: int, found: int, codes: int, *, quiet: bool) -> None:
        self._total, self._found, self._codes, self._quiet = total, found, max(codes, 1), quiet
        self._drawn = 0.0  # images, those that are being drawn in part
        self._committed = 0
        self._began = self._told = time.monotonic()
        silent = quiet or not sys.stderr.isatty() or found == total
        self._bar = tqdm(total=total, initial=found, unit=" images", bar_format=_BAR, disable=silent)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def on_rows(self, first: int, codes: Tensor) -> None:
        """`on_tokens` of `DALLE.generate_images`."""
        self.on_codes(int((codes >= 0).sum()))

    def on_codes(self, n: int) -> None:
        """So many more codes are drawn."""
        self._tell(self._drawn + n / self._codes)

    def on_chunk(self, drawn: DrawnChunk) -> None:
        """A chunk is committed, whose codes were counted or not."""
        self._committed += len(drawn.tokens)
        self._tell(max(self._drawn, float(self._committed)))

    def _tell(self, drawn: float) -> None:
        drawn = min(drawn, float(self._total - self._found))
        self._bar.update(drawn - self._drawn)
        self._drawn = drawn
        now = time.monotonic()
        if self._quiet or not self._bar.disable or now - self._told < _LOG_EVERY or not drawn:
            return
        self._told = now
        rate = drawn / (now - self._began)
        left = (self._total - self._found - drawn) / rate
        _log.info("%d of %d images, %.2f images/s, about %.0f s left", self._found + drawn, self._total, rate, left)
