"""Several processes draw what one draws; none of them outlives the one that started them, or hides what went wrong."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_models import saved_model

from dalle_fast.jobs.job import JobConfig, hash_codes, hash_model
from dalle_fast.jobs.pool import SentChunk, drawn_by_processes
from dalle_fast.jobs.stream import Drawer


def brightness(prompts, images):
    """A ranker."""
    return images.mean(dim=(1, 2, 3))


def killing(prompts, images):
    """A ranker that ends its process, as a system without memory does; not when it is tried on one picture."""
    if _asked.append(len(images)) or sum(_asked) > 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return images.mean(dim=(1, 2, 3))


def failing(prompts, images):
    """A ranker that gives no scores once it is in earnest."""
    return images.mean(dim=(1, 2, 3)) / (len(images) == 1)


_asked: list[int] = []


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("saved") / "model")


def job(model, **changes):
    settings = {
        "prompts": ("red apple", "a flag", "red apple"), "model": str(model), "model_hash": hash_model(model),
        "images_per_prompt": 3, "seed": 5, "batch_size": 2, "device": "cpu", "dtype": "float32", "engine": "eager",
        "temperature": 1.0, "cond_scale": 1.0,
    }  # fmt: skip
    return JobConfig(**settings | changes)


def test_processes_draw_what_one_draws(model):
    known = torch.full((64,), -1)
    known[:11] = 7
    config = job(model, rank=f"{__name__}:brightness", known_hash=hash_codes(known))
    told = []
    draw = drawn_by_processes(config, known, 2, on_codes=told.append)
    got = {drawn.chunk: drawn for drawn in draw([0, 1, 3, 4])}
    alone = Drawer(config, known=known)
    assert sorted(got) == [0, 1, 3, 4]
    for chunk, drawn in got.items():
        expected = alone.draw(chunk)
        assert drawn.tokens.dtype == torch.long and torch.equal(drawn.tokens, expected.tokens)
        assert drawn.backend.partition(",")[0] == expected.backend.partition(",")[0]
        assert torch.equal(drawn.pixels, expected.pixels) and torch.equal(drawn.scores, expected.scores)
    assert sum(told) <= 7 * (64 - 11)
    assert list(draw([])) == []


def test_a_killed_worker_is_a_sentence(model):
    config = job(model, rank=f"{__name__}:killing")
    with pytest.raises(RuntimeError, match=r"a worker was killed.*the same command goes on"):
        list(drawn_by_processes(config, None, 1)(range(5)))


def test_an_error_comes_back_as_itself(model):
    config = job(model, rank=f"{__name__}:failing")
    with pytest.raises(ValueError, match="the ranker failing must give one finite number a picture"):
        list(drawn_by_processes(config, None, 1)(range(5)))


def test_what_is_sent_comes_back():
    from dalle_fast.jobs.job import DrawnChunk

    tokens = torch.randint(2**20, (3, 4))
    for scores, pixels in ((None, None), (torch.rand(3), torch.zeros(3, 1, 2, 2, dtype=torch.uint8))):
        got = SentChunk.of(DrawnChunk(7, tokens, scores, pixels, "backend")).received()
        assert (got.chunk, got.backend) == (7, "backend") and torch.equal(got.tokens, tokens)
        assert scores is None or (torch.equal(got.scores, scores) and torch.equal(got.pixels, pixels))


@pytest.mark.long
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_command(model, tmp_path, end, request):
    """They are killed in the middle of a chunk that would take minutes."""
    arguments = ["red apple", "--images-per-prompt", "100000", "--batch-size", "20000", "--workers", "2"]
    arguments += ["--engine", "eager", "--model", str(model), "--out", str(tmp_path / "out")]
    command = subprocess.Popen(
        [sys.executable, "-m", "dalle_fast.cli", "sample", *arguments],
        stderr=subprocess.PIPE,
        # Shells start what runs in the background deaf to Ctrl-C, and their children with it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    request.addfinalizer(command.kill)
    workers = []
    while len(workers) < 2:  # the third child counts what is shared
        assert command.poll() is None
        time.sleep(0.2)
        workers = [pid for pid in children(command.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    time.sleep(3)
    command.send_signal(end)
    said = command.communicate(timeout=20)[1].decode()
    assert command.returncode == (130 if end == signal.SIGINT else -end)
    if end == signal.SIGINT:
        assert said.splitlines()[-1].startswith("sample: interrupted. What was drawn stays in ")
    limit = time.monotonic() + 20
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < limit
        time.sleep(0.1)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
