"""A job that is killed at random moments ends as one that was left alone: nothing lost, nothing twice, no bit other."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
from small_models import saved_model

KILLS = 100
ARGUMENTS = ("--images-per-prompt", "5", "--batch-size", "4", "--seed", "3", "--quiet")
PROMPTS = ("red apple", "a flag", "green apple", "red flag", "a red apple")


def score(prompts, images):
    """Any function of the pixels ranks: here how red a picture is."""
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1].mean(dim=(1, 2))


def sample(arguments: list[str]) -> None:
    """What the killed process runs."""
    from dalle_fast.cli.__main__ import main

    main(["sample", *arguments])


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


@pytest.mark.long
@pytest.mark.parametrize("ranked", [False, True])
def test_killed_at_random_moments_it_ends_in_the_same_bytes(tmp_path, ranked):
    model = saved_model(tmp_path / "model")
    # One server has imported everything and started no thread: its children begin at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dalle_fast.cli.sample", "dalle_fast.jobs.stream", "dalle_fast.jobs.run"])

    def started(out: Path) -> multiprocessing.Process:
        ranking = ["--rank", f"{__name__}:score", "--keep", "2"] if ranked else []
        arguments = [*PROMPTS, "--model", str(model), "--out", str(out), *ARGUMENTS, *ranking]
        job = context.Process(target=sample, args=(arguments,))
        job.start()
        return job

    undisturbed = tmp_path / "undisturbed"
    for out in (tmp_path / "warm", undisturbed):  # the first one imports what the server has not
        began = time.monotonic()
        job = started(out)
        job.join()
        assert job.exitcode == 0
    takes = time.monotonic() - began
    expected = contents(undisturbed)
    assert len([name for name in expected if name.endswith(".png")]) == (10 if ranked else 25)

    chance, kills, runs = random.Random(5), 0, 0
    out, committed = tmp_path / "0", set()
    while kills < KILLS // 2:
        job = started(out)
        job.join(timeout=chance.uniform(0.0, 1.1 * takes))
        if job.exitcode is None:
            os.kill(job.pid, signal.SIGKILL)
            job.join()
            kills += job.exitcode == -signal.SIGKILL
        if job.exitcode == 0:
            assert contents(out) == expected
            runs += 1
            out, committed = tmp_path / str(runs), set()
            continue
        assert job.exitcode == -signal.SIGKILL
        now = {path.name for path in out.glob("tokens-*.safetensors")}
        assert committed <= now, "what was committed must stay"
        committed = now
    job = started(out)
    job.join()
    assert job.exitcode == 0 and contents(out) == expected
    assert runs > 0
