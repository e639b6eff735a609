"""SIGTERM and SIGINT end a training at the end of a step, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """While a with-statement runs, the first signal is only remembered; a second one acts as it always did.

    Attributes: name: "SIGTERM" or "SIGINT" once one came, "" before. Outside the main thread none is ever seen.
    """

    def __init__(self) -> None:
        self.name = ""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in _SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self.__exit__()


def leave_signals_to_the_trainer(worker: int) -> None:
    """A DataLoader's `worker_init_fn`: a signal to the whole group must not kill what the last step still reads."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
