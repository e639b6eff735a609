"""`dalle-fast merge`: shards that were drawn apart end as one job."""

import json

import pytest
from job_folders import RANK, contents
from PIL import Image
from small_models import saved_model

BEST = ["--rank", RANK, "--keep", 2]
JOB = ("red apple", "a flag", "green apple", "--images-per-prompt", 5, "--batch-size", 2, "--seed", 3)


@pytest.fixture(params=["all", "ranked"])
def job(request):
    return [*JOB, *(BEST if request.param == "ranked" else [])]


@pytest.fixture
def whole(draw, tmp_path, job):
    """What one process draws."""
    draw(*job, out=tmp_path / "whole")
    return contents(tmp_path / "whole")


def test_shards_in_one_folder(draw, join, tmp_path, job, whole):
    out = tmp_path / "out"
    for i in range(3):
        result = draw(*job, "--shard", f"{i}/3")
        assert f"Shard {i}/3: " in result.output and f"dalle-fast merge {out}" in result.output
        assert not (out / "manifest.jsonl").exists()
    kept = 6 if "--keep" in job else 15
    figures = json.loads(join(out, "--json").stdout)
    assert {name: figures[name] for name in ("images", "kept", "resumed", "prompts")} == {
        "images": 15, "kept": kept, "resumed": 15, "prompts": 3,
    }  # fmt: skip
    assert contents(out) == whole
    assert "is complete" in join(out).output


def test_shards_in_folders_of_their_own(draw, join, tmp_path, job, whole):
    parts = [tmp_path / str(i) for i in range(3)]
    for i, part in enumerate(parts):
        draw(*job, "--shard", f"{i}/3", out=part)
    before = [contents(part) for part in parts]
    assert "Look at" in join(tmp_path / "out", *parts).output
    assert contents(tmp_path / "out") == whole
    assert [contents(part) for part in parts] == before


def test_what_is_missing_is_named(draw, join, tmp_path):
    parts = [tmp_path / str(i) for i in range(3)]
    for i in (0, 2):
        draw(*JOB, "--shard", f"{i}/3", out=parts[i])
    missing = "must have 15 samples, 5 are missing: 2..3, 8..9, 14..14 (chunks 1, 4, 7; chunk k is of shard k % N)"
    join(tmp_path / "out", parts[0], parts[2], fails=missing)
    assert not (tmp_path / "out" / "manifest.jsonl").exists()
    draw(*JOB, "--shard", "1/3", out=parts[1])
    join(tmp_path / "out", parts[1])  # what was collected before is there
    draw(*JOB, out=tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_known_codes_come_along(draw, join, tmp_path):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "image.png")
    job = ["red", "--prime", tmp_path / "image.png", "--batch-size", 2]
    draw(*job, "--shard", "0/2", out=tmp_path / "0")
    draw(*job, "--shard", "1/2", out=tmp_path / "1")
    join(tmp_path / "out", tmp_path / "0", tmp_path / "1")
    draw(*job, out=tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_parts_may_have_the_model_elsewhere(draw, join, tmp_path):
    parts = [tmp_path / str(i) for i in range(2)]
    draw(*JOB, "--shard", "0/2", out=parts[0])
    draw(*JOB, "--shard", "1/2", out=parts[1], model=saved_model(tmp_path / "copy"))
    join(tmp_path / "out", *parts)
    draw(*JOB, out=tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_does_not_belong_together_is_refused(draw, join, tmp_path):
    draw("red", "--shard", "0/2", "--batch-size", 2)
    draw("red", "--shard", "1/2", "--batch-size", 2, "--seed", 4, out=tmp_path / "other")
    join(tmp_path / "out", tmp_path / "other", fails="the parts must be of one job, got")
    join(tmp_path / "out", tmp_path / "other", fails="which differs in seed")
    join(tmp_path / "out", tmp_path / "none", fails="PART must be the folder of a job")
    join(tmp_path / "none", fails="OUT must be the folder of a job")


def test_a_broken_part_is_named(draw, join, tmp_path):
    draw("red", "--shard", "0/1", out=tmp_path / "part")
    path = tmp_path / "part" / "tokens-000000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    join(tmp_path / "out", tmp_path / "part", fails=f"{path} must be whole")
