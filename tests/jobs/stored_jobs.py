"""Jobs without a model: codes, scores and pixels are functions of a sample's index, so every file can be foretold."""

from pathlib import Path

import torch

from dalle_fast.jobs.job import DrawnChunk, JobConfig
from dalle_fast.jobs.run import run_job
from dalle_fast.jobs.store import JobFolder

BACKEND = "cpu engine, baseline, float32, dalle_fast 0, torch 0"
HOSTILE = (
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>`",
    "</title></style></h1></textarea><!-- & &amp; &lt; -->",
    "{{ 7 * 7 }} {% for x in y %} %s {0}",
    "two\nlines\tand a tab",
    "שלום עולם \u202e العربية",
    "👩‍👩‍👧‍👦 🏳️‍🌈 naïve 中文 \u2028 \x7f",
    "../../etc/passwd",
    "\ufeffa nul \x00 and \r\n \r \x1b[31m",
    "a very long prompt " * 600,
)


def job_config(**changes) -> JobConfig:
    settings = {
        "prompts": ("red apple", "a flag"),
        "model": "/models/m",
        "model_hash": "0" * 64,
        "images_per_prompt": 3,
        "seed": 7,
        "batch_size": 2,
        "device": "cpu",
        "dtype": "float32",
        "engine": "cpu",
        "temperature": 0.9,
        "cond_scale": 1.0,
        "top_k": 20,
    }
    return JobConfig(**settings | changes)


RANKED = job_config(rank="module:function", keep=2)


def drawn(config: JobConfig, chunk: int) -> DrawnChunk:
    """16 codes below 30 a sample; scores with ties."""
    index = torch.tensor([sample.index for sample in config.samples_of(chunk)])
    tokens = (index[:, None] * 7 + torch.arange(16) * 11) % 30
    scores = (index * 5 % 3).float() / 10 if config.rank else None
    return DrawnChunk(chunk, tokens, scores, decode(tokens), BACKEND)


def decode(tokens: torch.Tensor) -> torch.Tensor:
    """Pixels uint8 [b, 3, 4, 4]."""
    grey = (tokens * 8).to(torch.uint8).view(-1, 1, 4, 4)
    return torch.cat((grey, 255 - grey, grey // 2), dim=1)


def run(folder: Path, config: JobConfig = RANKED, *, order=sorted, on_chunk=None, **opening) -> None:
    """Runs a job to its end, or to the first error."""
    with JobFolder.open(folder, config, **opening) as opened:
        chunks = lambda missing: (drawn(config, chunk) for chunk in order(missing))  # noqa: E731
        run_job(config, opened, chunks, decode, shard=opening.get("shard"), on_chunk=on_chunk)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, by its path; but the locks."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".lock")
    }
