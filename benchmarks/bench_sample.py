"""What `dalle-fast sample` adds to the engine: 64 pictures of one prompt, and how soon somebody sees something.

`ours_cpu` is `generate_images` alone, pixels included, its weights packed. `sample_job` does what the command does
within a process that has the model: it draws into a folder, with tokens, pictures, pages and manifest. `sample_command`
is the command from its start: Python, imports, the model read, its weights packed. Their tokens must be those of
`generate_images`, bit for bit.

In `first preview` the command is timed until its first preview is on disk, with nothing to compare it with.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch import Tensor

from benchmarks import decoding
from benchmarks.bench_sampler import DEMO, TOY, cpu_missing
from benchmarks.decoding import CYCLE, D512, SEED
from benchmarks.harness import Benchmark, Case, Cost, Job, Provider, dtype_name
from dalle_fast.jobs.drawing_model import SHIPPED_MODEL, DrawingModel
from dalle_fast.jobs.job import JobConfig, hash_model
from dalle_fast.jobs.run import run_job
from dalle_fast.jobs.store import JobFolder
from dalle_fast.jobs.stream import Drawer
from dalle_fast.sampling.engine import choose_engine

MODE, PREVIEW = "64 pictures", "first preview"
BATCH = 64
PROMPT = "word"
CASES = (
    Case("d512_64", D512 | {"attn_types": CYCLE, "batch": BATCH}, torch.bfloat16, mode=MODE),
    Case("shipped_64", DEMO | {"attn_types": CYCLE, "batch": BATCH, "codes": 512}, mode=MODE),
    Case("shipped_preview", DEMO | {"attn_types": CYCLE, "batch": BATCH, "codes": 512}, mode=PREVIEW),
    Case("toy", TOY | {"attn_types": CYCLE, "batch": 3}, mode=MODE, toy=True),
    Case("toy_preview", TOY | {"attn_types": CYCLE, "batch": 3}, mode=PREVIEW, toy=True),
)


class Saved:
    """A saved model; the shipped one, or one of the case's sizes with random weights."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="bench-sample-")
        self.scratch = Path(self._folder.name)
        self.directory = SHIPPED_MODEL
        if not case.name.startswith("shipped"):
            self.directory = self.scratch / "model"
            tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, PROMPT: 1}, unk_token="[PAD]"))
            decoding.Inputs(case, device).model.save_pretrained(self.directory, tokenizer=tokenizer)
        self.model = DrawingModel.read(self.directory, dtype=dtype_name(case.dtype))
        self.text = self.model.token_ids([PROMPT], truncate=False).expand(case.sizes["batch"], -1)

    def new_folder(self) -> Path:
        """A folder for a job's output."""
        return Path(tempfile.mkdtemp(dir=self.scratch))

    def draw(self) -> Tensor:
        """The engine alone: tokens [B, n]."""
        settings = self.model.settings
        drawn = self.model.dalle.generate_images(
            self.text, seed=SEED, temperature=settings.temperature, top_k=settings.top_k,
            cond_scale=settings.cond_scale, return_tokens=True,
        )  # fmt: skip
        return drawn[-1]

    def command(self, case: Case, out: Path, *more: str) -> list[str]:
        """The command that draws the same."""
        settings = ["--images-per-prompt", str(case.sizes["batch"]), "--seed", str(SEED), "--quiet", *more]
        places = ["--model", str(self.directory), "--out", str(out), "--dtype", dtype_name(case.dtype)]
        return [sys.executable, "-m", "dalle_fast.cli", "sample", PROMPT, *places, *settings]

    def config(self, case: Case) -> JobConfig:
        """The same as a job."""
        settings = self.model.settings
        return JobConfig(
            prompts=(PROMPT,), model=str(self.directory), model_hash=hash_model(self.directory),
            images_per_prompt=case.sizes["batch"], seed=SEED, batch_size=BATCH, device="cpu",
            dtype=dtype_name(case.dtype), engine=choose_engine(self.model.dalle), temperature=settings.temperature,
            cond_scale=settings.cond_scale, top_k=settings.top_k,
        )  # fmt: skip


def _prepare_engine(case: Case, inputs: Saved, device: torch.device) -> Job:
    return Job(result=inputs.draw, pieces={"images": inputs.draw})


def _prepare_job(case: Case, inputs: Saved, device: torch.device) -> Job:
    config = inputs.config(case)
    drawer = Drawer(config, known=None, model=inputs.model)

    def run() -> Path:
        out = inputs.new_folder()
        with JobFolder.open(out, config) as folder:
            run_job(config, folder, lambda chunks: map(drawer.draw, chunks), drawer.decode)
        return out

    return Job(result=lambda: _tokens(run()), pieces={"images": run}, measure_memory=False)


def _prepare_command(case: Case, inputs: Saved, device: torch.device) -> Job:
    def run() -> Path:
        out = inputs.new_folder()
        subprocess.run(inputs.command(case, out), check=True, cwd=_ROOT)
        return out

    return Job(result=lambda: _tokens(run()), pieces={"images": run}, measure_memory=False)


def _prepare_preview(case: Case, inputs: Saved, device: torch.device) -> Job:
    def run() -> Path:
        out = inputs.new_folder()
        with subprocess.Popen(inputs.command(case, out, "--preview", "1"), cwd=_ROOT) as process:
            while not (out / "preview.png").exists():
                if process.poll() is not None:
                    raise RuntimeError(f"sample: the command must leave a preview before it ends, got {out}.")
                time.sleep(_BETWEEN_LOOKS)
            process.kill()
        return out

    return Job(result=lambda: (run() / "preview.png").stat().st_size, pieces={"preview": run}, measure_memory=False)


_ROOT = Path(__file__).resolve().parents[1]
_BETWEEN_LOOKS = 0.005  # seconds


def _tokens(out: Path) -> Tensor:
    files = sorted(os.fspath(path) for path in out.glob("tokens-*.safetensors"))
    return torch.cat([load_file(path)["tokens"].long() for path in files])


def _expected(case: Case, inputs: Saved) -> Tensor:
    return inputs.draw()


def _check(case: Case, got: Any, expected: Tensor) -> str | None:
    if case.mode == PREVIEW:
        return None if got > 0 else "the preview must be a picture, is an empty file."
    return None if torch.equal(got, expected) else "tokens must be those of generate_images, differ."


def _in(mode: str) -> Callable[[Case, torch.device], str | None]:
    def missing(case: Case, device: torch.device) -> str | None:
        return None if case.mode == mode else f"measured in the cases of {mode}."

    return missing


def _engine_missing(case: Case, device: torch.device) -> str | None:
    return _in(MODE)(case, device) or cpu_missing(case, device)


def cost(case: Case) -> Cost:
    """The engine's; of a preview nothing is counted."""
    return decoding.cost(case) if case.mode == MODE else Cost()


BENCHMARK = Benchmark(
    op="sample",
    mode=MODE,
    cases=CASES,
    providers=(
        Provider("ours_cpu", _prepare_engine, _engine_missing),
        Provider("sample_job", _prepare_job, _in(MODE)),
        Provider("sample_command", _prepare_command, _in(MODE)),
        Provider("sample_preview", _prepare_preview, _in(PREVIEW)),
    ),
    inputs=Saved,
    expected=_expected,
    check=_check,
    cost=cost,
    baseline="ours_cpu",
    cold=False,
)
