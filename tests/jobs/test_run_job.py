"""Running a job whose pictures are made up: what is kept, in any order of chunks, after any interruption."""

import json
import random

import pytest
import torch
from test_job import config

from dalle_fast.jobs.job import DrawnChunk
from dalle_fast.jobs.run import Summary, run_job
from dalle_fast.jobs.store import JobFolder


def decoded(tokens):
    """Pixels uint8 [b, 3, 4, 4] that follow from tokens."""
    return tokens[:, :1, None].expand(-1, 48, 1).reshape(-1, 3, 4, 4).to(torch.uint8)


def drawn(job, chunk):
    seeds = [s.seed + 31 * s.prompt_index for s in job.samples_of(chunk)]
    tokens = torch.tensor([[seed * 7 % 200, seed % 11, 3, 4] for seed in seeds])
    scores = None if job.rank is None else torch.tensor([float(seed * 5 % 13) for seed in seeds])
    return DrawnChunk(chunk, tokens, scores, decoded(tokens), "a backend")


class Power(Exception):
    """Somebody pulled the plug."""


def run(path, job, *, order=None, fails_after=None, shard=None):
    def draws(chunks):
        chunks = list(chunks)
        if order is not None:
            order.shuffle(chunks)
        for i, chunk in enumerate(chunks):
            if i == fails_after:
                raise Power
            yield drawn(job, chunk)

    with JobFolder.open(path, job, shard=shard) as folder:
        return run_job(job, folder, draws, decoded, shard=shard)


def contents(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


RANKED = {"rank": "module:function", "keep": 2}
JOBS = [config(batch_size=size, **ranking) for size in (1, 3, 5, 6, 64) for ranking in ({}, RANKED)]
JOBS += [config(batch_size=4, **RANKED | {"keep": None})]
IDS = [f"b{job.batch_size}-{'ranked' if job.rank else 'all'}-{job.keep}" for job in JOBS]


@pytest.mark.parametrize("job", JOBS, ids=IDS)
def test_an_interrupted_job_ends_in_the_same_bytes(tmp_path, job):
    summary = run(tmp_path / "whole", job)
    assert summary == Summary(drawn=15, found=0)
    expected = contents(tmp_path / "whole")
    for fails_after in range(job.n_chunks):
        out = tmp_path / str(fails_after)
        with pytest.raises(Power):
            run(out, job, fails_after=fails_after)
        summary = run(out, job)
        assert summary.drawn + summary.found == 15
        assert summary.found == sum(len(job.samples_of(chunk)) for chunk in range(fails_after))
        assert contents(out) == expected
    assert run(tmp_path / "whole", job) == Summary(drawn=0, found=15)
    assert contents(tmp_path / "whole") == expected


@pytest.mark.parametrize("job", JOBS, ids=IDS)
def test_chunks_may_come_in_any_order(tmp_path, job):
    run(tmp_path / "in order", job)
    for seed in range(3):
        out = tmp_path / str(seed)
        if job.n_chunks > 2:
            with pytest.raises(Power):
                run(out, job, order=random.Random(seed), fails_after=2)
        run(out, job, order=random.Random(seed + 10))
        assert contents(out) == contents(tmp_path / "in order")


def test_without_ranks_every_picture_is_kept(tmp_path):
    job = config()
    run(tmp_path / "out", job)
    lines = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(15))
    assert all(line["kept"] and (tmp_path / "out" / line["image"]).is_file() for line in lines)


def test_the_best_of_each_prompt_are_kept(tmp_path):
    job = config(rank="module:function", keep=2, batch_size=4)
    run(tmp_path / "out", job)
    lines = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert len(lines) == 15
    for prompt in range(3):
        own = [line for line in lines if line["prompt_index"] == prompt]
        best = sorted(own, key=lambda line: (-line["score"], line["index"]))[:2]
        assert [line["index"] for line in own if line["kept"]] == sorted(line["index"] for line in best)
    assert len(list((tmp_path / "out" / "images").iterdir())) == 6


def test_shards_draw_their_chunks_and_finish_nothing(tmp_path):
    job = config(batch_size=2, rank="module:function", keep=1)
    run(tmp_path / "whole", job)
    for i in range(3):
        run(tmp_path / "out", job, shard=(i, 3))
        assert not (tmp_path / "out" / "manifest.jsonl").exists()
    with JobFolder.open(tmp_path / "out", job) as folder:
        assert folder.chunks_done() == set(range(job.n_chunks))
        assert run_job(job, folder, lambda chunks: iter(()), decoded) == Summary(drawn=0, found=15)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_picture_that_was_removed_comes_back_while_its_prompt_is_not_finished(tmp_path):
    job = config(batch_size=3)
    run(tmp_path / "whole", job)
    with pytest.raises(Power):
        run(tmp_path / "out", job, fails_after=1)
    next((tmp_path / "out" / "images").iterdir()).unlink()
    run(tmp_path / "out", job)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
