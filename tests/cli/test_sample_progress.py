"""How far a job is: a bar where somebody looks, lines of logging elsewhere, nothing where nothing is wanted."""

import logging
import sys

import pytest
import torch

from dalle_fast.cli import sample_progress
from dalle_fast.cli.sample_progress import Progress
from dalle_fast.jobs.job import DrawnChunk


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [0.0]
    monkeypatch.setattr(sample_progress.time, "monotonic", lambda: now[0])
    return now


def chunk(n):
    return DrawnChunk(0, torch.zeros(n, 64), None, None, "")


def test_lines_come_every_ten_seconds(clock, caplog, capsys):
    caplog.set_level(logging.INFO)
    with Progress(100, 20, 64, quiet=False) as progress:
        for second in range(41):
            clock[0] = second
            progress.on_rows(0, torch.zeros(8, 8))  # one image a second
    assert [record.message for record in caplog.records] == [
        "31 of 100 images, 1.10 images/s, about 63 s left",
        "41 of 100 images, 1.05 images/s, about 56 s left",
        "51 of 100 images, 1.03 images/s, about 47 s left",
        "61 of 100 images, 1.02 images/s, about 38 s left",
    ]
    assert capsys.readouterr() == ("", "")


def test_codes_of_other_samples_and_known_ones_do_not_count(clock, caplog):
    caplog.set_level(logging.INFO)
    codes = torch.full((4, 8), -1)
    codes[:2] = 5
    with Progress(8, 0, 16, quiet=False) as progress:
        clock[0] = 10
        progress.on_rows(0, codes)
        clock[0] = 20
        progress.on_chunk(chunk(4))  # its codes were not all told
        clock[0] = 30
        progress.on_codes(1000)
    assert [record.message.split(" images,")[0] for record in caplog.records] == ["1 of 8", "4 of 8", "8 of 8"]


def test_quiet_tells_nothing(clock, caplog, capsys, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress(8, 0, 64, quiet=True) as progress:
        clock[0] = 20
        progress.on_chunk(chunk(4))
    assert not caplog.records and capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_that_moves(caplog, capsys, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress(8, 2, 64, quiet=False) as progress:
        progress._bar.mininterval = 0
        progress.on_rows(0, torch.zeros(4, 8))
        progress.on_rows(0, torch.zeros(8, 8))
        progress.on_chunk(chunk(6))
    said = capsys.readouterr().err
    assert all(part in said for part in ("| 2/8 images", "| 4/8 images", "| 8/8 images", "100%", " images/s]"))
    assert not caplog.records
