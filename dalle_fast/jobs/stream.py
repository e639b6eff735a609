"""Drawing the samples of a job: chunk by chunk in a process that holds the model, or as a Python iterator.

for drawn in stream_images(DrawingModel.read(SHIPPED_MODEL), ["a red apple"], images_per_prompt=512):
    to_pil(drawn.pixels / 255).save(f"{drawn.sample.name}.png")
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dalle_fast
from dalle_fast import _extension
from dalle_fast.jobs.drawing_model import DrawingModel
from dalle_fast.jobs.job import DrawnChunk, JobConfig, Sample, hash_codes, hash_model
from dalle_fast.jobs.ranking import Ranker, load_ranker, scores_of
from dalle_fast.sampling.engine import choose_engine
from dalle_fast.sampling.gallery import to_pixels
from dalle_fast.sampling.plan import plan_drawing

_MIB = 1 << 20
_COPIES = 4  # of a batch's pixels in float32: decoded, and while they are normalised and rounded
_SPARE = 32 * _MIB  # of Python, torch and files, for what a chunk allocates besides
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class DrawnImage:
    """A picture of a stream.

    Attributes:
        tokens: int64 [image_seq_len].   pixels: uint8 [C, H, W].   score: None without a ranker.
    """

    sample: Sample
    tokens: Tensor
    pixels: Tensor
    score: float | None


class Drawer:
    """A model in memory that draws chunks of a job.

    Args:
        config: the job.
        known: int [image_seq_len], codes that are given, -1 where one is drawn; None: all are drawn.
        max_memory: bytes that this process may take, all of it included; None: what `generate_images` takes.
        model: that of the config; None reads it, and refuses other files than the job's.
        ranker: instead of the config's.
    Raises: whatever drawing would, before anything is drawn: ValueError, TypeError, FileNotFoundError (settings out of
        range, a model or ranker that does not fit, too little memory), NotImplementedError, RuntimeError (an engine
        that cannot run here).
    """

    def __init__(
        self,
        config: JobConfig,
        *,
        known: Tensor | None,
        max_memory: int | None = None,
        model: DrawingModel | None = None,
        ranker: Ranker | None = None,
    ) -> None:
        self.config = config
        self.model = _read_model(config) if model is None else model
        self._known = None if known is None else _checked_known(known, self.model)
        self._max_memory = max_memory
        self._generate([])  # checks every argument
        self._backend = backend_name(config.engine, config.device, config.dtype)
        if ranker is None and config.rank is not None:
            ranker = load_ranker(config.rank, self.model)
        self._ranker = ranker
        if ranker is not None:
            n = 1 if max_memory is None else config.batch_size  # what it takes then counts
            images = to_pixels(self.model.dalle.vae, _decoded(self.model, 1)).float()
            scores_of(ranker, [config.prompts[0]] * n, images.repeat(n, 1, 1, 1))
        if max_memory is not None:
            self._max_memory = memory_for_engine(
                max_memory, self.model, config.batch_size, cond_scale=config.cond_scale
            )

    def draw(self, chunk: int, on_rows: Callable[[int, Tensor], None] | None = None) -> DrawnChunk:
        """Draws a chunk, and scores it.

        Args: on_rows: `on_tokens` of `DALLE.generate_images`, for the chunk's samples.
        """
        samples = self.config.samples_of(chunk)
        images, tokens = self._generate(samples, on_rows)
        images = to_pixels(self.model.dalle.vae, images).float()
        scores = None
        if self._ranker is not None:
            scores = scores_of(self._ranker, [sample.prompt for sample in samples], images)
        return DrawnChunk(chunk, tokens.cpu(), scores, _levels(images), self._backend)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """The pixels of codes [b, image_seq_len], as `draw` made them: uint8 [b, C, H, W], on the CPU."""
        vae = self.model.dalle.vae
        return _levels(to_pixels(vae, vae.decode(tokens.long().to(self.model.device))).float())

    def _generate(
        self, samples: Sequence[Sample], on_rows: Callable[[int, Tensor], None] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Images as the VAE decodes them, and their codes."""
        config, dalle = self.config, self.model.dalle
        text = self.model.token_ids([sample.prompt for sample in samples], config.truncate).to(self.model.device)
        known = None if self._known is None else self._known.expand(len(samples), -1)
        threshold: dict[str, Any] = {} if config.filter_thres is None else {"filter_thres": config.filter_thres}
        drawn = dalle.generate_images(
            text, seed=[sample.seed for sample in samples], temperature=config.temperature, top_k=config.top_k,
            top_p=config.top_p, cond_scale=config.cond_scale, known_tokens=known, engine=config.engine,
            weight_dtype=self.model.weight_dtype, max_memory=self._max_memory, return_tokens=True, on_tokens=on_rows,
            **threshold,
        )  # fmt: skip
        return drawn[0], drawn[1]


def stream_images(
    model: DrawingModel,
    prompts: Sequence[str],
    *,
    images_per_prompt: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    cond_scale: float | None = None,
    known: Tensor | None = None,
    ranker: Ranker | None = None,
    engine: str = "auto",
    max_memory: int | None = None,
    truncate: bool = False,
) -> Iterator[DrawnImage]:
    """Draws prompts, and gives one picture after the other, prompt by prompt.

    Args:
        images_per_prompt, seed: see `dalle_fast.jobs.job`: the pictures are those of `dalle-fast sample`.
        batch_size: drawn at a time.
        temperature, top_k, top_p, cond_scale: as in `DALLE.generate_images`; None: the model's settings.
        known: int [image_seq_len], codes that are given, -1 where one is drawn (see `dalle_fast.jobs.known`).
        ranker: scores the pictures.
        engine: "cpu", "eager" or "auto".
        max_memory: bytes that this process may take, all of it included.
        truncate: cut prompts that are too long for the model.
    Raises: at the call, before anything is drawn: ValueError (no prompts, an empty one, one too long, a value out of
        its range, too little memory), TypeError, NotImplementedError, RuntimeError (the engine cannot run here).
    """
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"sample: prompts must be a list of texts, got {prompts!r:.60}. Put a text into a list.")
    settings = model.settings.overridden(temperature=temperature, top_k=top_k, top_p=top_p, cond_scale=cond_scale)
    chosen = choose_engine(model.dalle, engine, weight_dtype=model.weight_dtype, max_memory=max_memory, op="sample")
    config = JobConfig(
        prompts=tuple(prompts), model="", model_hash="", images_per_prompt=images_per_prompt, seed=seed,
        batch_size=batch_size, device=str(model.device), dtype=model.dtype, engine=chosen,
        temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p, cond_scale=settings.cond_scale,
        truncate=truncate, known_hash=None if known is None else hash_codes(known),
    )  # fmt: skip
    model.token_ids(config.prompts, truncate)  # now: later would be after others were drawn
    drawer = Drawer(config, known=known, max_memory=max_memory, model=model, ranker=ranker)
    return _streamed(drawer)


def _streamed(drawer: Drawer) -> Iterator[DrawnImage]:
    for chunk in range(drawer.config.n_chunks):
        drawn = drawer.draw(chunk)
        assert drawn.pixels is not None
        for row, sample in enumerate(drawer.config.samples_of(chunk)):
            score = None if drawn.scores is None else float(drawn.scores[row])
            yield DrawnImage(sample, drawn.tokens[row].clone(), drawn.pixels[row].clone(), score)


def backend_name(engine: str, device: str, dtype: str) -> str:
    """What else than model, prompt, seed and settings decides the bits: engine, instruction set or device, versions.

    Args: as in `JobConfig`.
    """
    if torch.device(device).type == "cuda":
        where = torch.cuda.get_device_name(device)
    elif engine == "cpu":
        where = _extension.isa()
    else:  # torch's products depend on its own instruction set, and on how many share their sums
        where = f"{device} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    versions = f"dalle_fast {dalle_fast.__version__}, torch {torch.__version__}"
    return f"{engine} engine, {where}, {dtype}, {versions}"


def memory_for_engine(max_memory: int, model: DrawingModel, batch_size: int, *, cond_scale: float = 1.0) -> int:
    """What `DALLE.generate_images` may take of `max_memory` bytes, which all of this process shall keep to.

    The rest is what the process has taken at most until now, with pictures decoded, and what a batch's pixels take.

    Raises: ValueError (nothing is left for the engine with one sample), RuntimeError (the system does not say what a
        process takes).
    """
    _decoded(model, min(batch_size, torch.get_num_threads()))
    taken = _peak_bytes()
    vae = model.dalle.vae
    pixels = _COPIES * 4 * batch_size * vae.channels * vae.image_size**2 + _SPARE
    one = plan_drawing(
        model.dalle, 1, cond_scale=cond_scale, weight_dtype=model.weight_dtype, max_memory=sys.maxsize, primed=True
    )
    least = taken + pixels + one.total_bytes
    if max_memory < least:
        parts = f"{_mib(taken)} the process and its model, {_mib(pixels)} the pictures of a batch of {batch_size}"
        raise ValueError(
            f"sample: max_memory must be at least {_mib(least)} MiB, got {max_memory // _MIB} MiB: {parts}, and "
            f"{_mib(one.total_bytes)} the engine with one sample. Give more, draw smaller batches, or hold the weights "
            "in fewer bits (dtype)."
        )
    return max_memory - taken - pixels


def _read_model(config: JobConfig) -> DrawingModel:
    directory = Path(config.model)
    model_hash = hash_model(directory, config.companions)
    if model_hash != config.model_hash:
        raise ValueError(
            f"sample: the model in {directory} must be the job's, with hash {config.model_hash[:12]}, got "
            f"{model_hash[:12]}. Copy the job's model there."
        )
    return DrawingModel.read(directory, companions=config.companions, dtype=config.dtype, device=config.device)


def _checked_known(known: Tensor, model: DrawingModel) -> Tensor:
    """Codes as int64 on the model's device."""
    n, last = model.dalle.image_seq_len, model.dalle.num_image_tokens - 1
    if list(known.shape) != [n] or known.is_floating_point() or known.dtype == torch.bool:
        raise ValueError(f"sample: known must be integers [{n}], got {known.dtype} {list(known.shape)}.")
    if not -1 <= int(known.min()) <= int(known.max()) <= last:
        raise ValueError(
            f"sample: known must be -1 or codes in 0..{last}, got {int(known.min())}..{int(known.max())}. "
            "-1 marks a code to draw."
        )
    return known.to(model.device, torch.long)


@torch.no_grad()
def _decoded(model: DrawingModel, n: int) -> Tensor:
    """n pictures of no meaning, as the VAE decodes them."""
    return model.dalle.vae.decode(torch.zeros(n, model.dalle.image_seq_len, dtype=torch.long, device=model.device))


def _levels(pixels: Tensor) -> Tensor:
    """Pixels in 0..1 as uint8, on the CPU."""
    return (pixels * 255).round_().to("cpu", torch.uint8)


def _peak_bytes() -> int:
    """The largest resident set of this process so far."""
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
        kib = next(line.split()[1] for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        raise RuntimeError(
            f"sample: max_memory needs a system that says what a process takes, in {_STATUS}; this one does not. "
            "Leave it out."
        ) from None
    return int(kib) * 1024


def _mib(n_bytes: int) -> int:
    return -(-n_bytes // _MIB)
