"""A job on a local Ray cluster is the job of one process, also when an actor is killed on the way."""

import importlib.util
import os
import signal
from pathlib import Path

import pytest
from small_models import saved_model

from dalle_fast.cli.__main__ import main
from dalle_fast.jobs.job import JobConfig, hash_model
from dalle_fast.jobs.on_ray import drawn_on_ray

JOB = ("red apple", "a flag", "green apple", "red", "--images-per-prompt", "5", "--batch-size", "2", "--keep", "2")
MARK = "KILLED_ONCE"  # the variable that names a file; there once an actor was killed


def redness(prompts, images):
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1].mean(dim=(1, 2))


def killing(prompts, images):
    """As `redness`; but one actor, at its second chunk, is killed."""
    _seen.append(len(images))
    mark = Path(os.environ[MARK])
    if len(_seen) == 4 and not mark.exists():  # the drawer asks once before it draws
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return redness(prompts, images)


_seen: list[int] = []


def contents(folder):
    """Every file, but those that name the ranker, without the name."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".lock")]
    return {path.relative_to(folder).as_posix(): path.read_bytes().replace(b":killing", b":redness") for path in files}


def sample(*arguments):
    main(["sample", *map(str, arguments)], standalone_mode=False)


@pytest.mark.long
def test_a_killed_actor_changes_nothing(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    model = saved_model(tmp_path / "model")
    sample(*JOB, "--rank", f"{__name__}:redness", "--model", model, "--out", tmp_path / "whole")
    monkeypatch.setenv(MARK, str(tmp_path / "mark"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1]))))
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        out = tmp_path / "out"
        places = ["--model", model, "--out", out]
        sample(*JOB, "--rank", f"{__name__}:killing", *places, "--ray", "local", "--workers", 2, "--quiet")
        assert (tmp_path / "mark").exists()
        assert contents(out) == contents(tmp_path / "whole")

        # What is wrong on another machine is told in a sentence.
        config = JobConfig.from_yaml((out / "config.yaml").read_text(), "config.yaml")
        (model / "config.json").write_text((model / "config.json").read_text() + " ")
        with pytest.raises(RuntimeError, match=r"must be the job's, with hash"):
            list(drawn_on_ray(config, None, "local", 1)([0]))
    finally:
        ray.shutdown()


@pytest.mark.long
def test_a_cluster_is_started_and_stopped(tmp_path):
    ray = pytest.importorskip("ray")
    model = saved_model(tmp_path / "model")
    sample("red", "--model", model, "--out", tmp_path / "whole", "--batch-size", 2)
    sample("red", "--model", model, "--out", tmp_path / "out", "--batch-size", 2, "--ray", "local")
    assert not ray.is_initialized()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    job = JobConfig.from_yaml((tmp_path / "out" / "config.yaml").read_text(), "config.yaml")
    with pytest.raises(RuntimeError, match=r"--ray must be the address of a Ray cluster, or 'local', got '127"):
        list(drawn_on_ray(job, None, "127.0.0.1:1")([0]))


def test_without_ray_a_sentence_says_what_to_install(tmp_path, monkeypatch):
    model = saved_model(tmp_path / "model")
    job = JobConfig(
        prompts=("red",), model=str(model), model_hash=hash_model(model), images_per_prompt=1, seed=0, batch_size=1,
        device="cpu", dtype="float32", engine="eager", temperature=1.0, cond_scale=1.0,
    )  # fmt: skip
    if importlib.util.find_spec("ray") is not None:
        monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(RuntimeError, match=r"pip install 'dalle-fast\[ray\]'"):
        drawn_on_ray(job, None, "local")
