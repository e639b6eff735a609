"""From the options of `dalle-fast sample` to a job: what is given, what the folder's job says, what the model says."""

from __future__ import annotations

import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import click
from torch import Tensor

from dalle_fast.cli.companions import COMPANIONS
from dalle_fast.cli.sample_options import SampleOptions
from dalle_fast.compat.formats.base import Companions
from dalle_fast.jobs.drawing_model import SHIPPED_MODEL, DrawingModel
from dalle_fast.jobs.job import JobConfig, hash_codes, hash_model
from dalle_fast.jobs.known import inpainted_codes, primed_codes
from dalle_fast.jobs.store import JobFolder
from dalle_fast.jobs.stream import memory_for_engine
from dalle_fast.sampling.engine import choose_engine
from dalle_fast.sampling.plan import MOST_SAMPLES, plan_drawing

_EAGER_BATCH = {"cpu": 8, "cuda": 32}


class ResolvedJob:
    """The job that a command is to draw.

    What was given must be so; the rest is as the job in the folder has it, and where there is none, as the model or the
    option's default says. The model is read when something needs it.

    Args: given: names of the options that have a value of the user's.
    Attributes: stored: the job in the folder `options.out`.
    Raises: click.UsageError (no prompts), ValueError, FileNotFoundError, and what reading a model raises.
    """

    def __init__(self, options: SampleOptions, given: frozenset[str]) -> None:
        self._options, self._given = options, given
        self.stored = JobFolder.stored_config(options.out)
        self._device, self._dtype = self._value("device"), self._value("dtype")
        self._directory, self._companions, self._hash = self._found_model()

    @cached_property
    def model(self) -> DrawingModel:
        """In memory."""
        return DrawingModel.read(self._directory, companions=self._companions, dtype=self._dtype, device=self._device)

    @cached_property
    def known(self) -> Tensor | None:
        """Codes [image_seq_len] that are given, -1 where they are drawn; None: all are."""
        options = self._options
        if options.prime is not None:
            return primed_codes(self.model.dalle, options.prime, options.prime_rows)
        if options.inpaint is not None and options.mask is not None:
            return inpainted_codes(self.model.dalle, options.inpaint, options.mask)
        return JobFolder.stored_known(options.out) if self.stored is not None else None

    @cached_property
    def config(self) -> JobConfig:
        """All of it."""
        names = ("device", "dtype", "images_per_prompt", "seed", "truncate")
        values = {name: self._value(name) for name in names} | self._settings()
        prompts = self._prompts()
        values |= {
            "prompts": prompts,
            "model": str(self._directory),
            "model_hash": self._hash,
            "engine": self._engine(),
        }
        values |= {name: None if path is None else str(path) for name, path in vars(self._companions).items()}
        values |= {"known_hash": self._known_hash(), "rank": self._rank(), "keep": self._value("keep")}
        values["batch_size"] = self._batch_size(values)
        return JobConfig(**values)

    # -------------------------------------------------------------------------------------------------- from where

    def _value(self, name: str) -> Any:
        """An option's value: as given, as the job in the folder has it, or its default."""
        if name not in self._given and self.stored is not None:
            return getattr(self.stored, name)
        return getattr(self._options, name)

    def _found_model(self) -> tuple[Path, Companions, str]:
        """Where the model and its companions are, and the hash of them."""
        directory = (self._value("model") and Path(self._value("model"))) or SHIPPED_MODEL
        paths = {name: self._value(name) for name in COMPANIONS}
        companions = Companions(
            **{name: None if path is None else Path(path).absolute() for name, path in paths.items()}
        )
        found = hash_model(directory, companions)
        wanted = self._options.model_hash
        if wanted is not None and wanted != found:
            raise ValueError(
                f"sample: {directory} must be the model that the configuration was made with, of hash {wanted}, got "
                f"{found}. Name that one with --model."
            )
        stored = self.stored
        if stored is not None and stored.model_hash == found:
            paths_there = [Path(stored.model), *filter(None, vars(stored.companions).values())]
            if all(path.exists() for path in paths_there):  # the same, whatever it is called from here
                return paths_there[0], stored.companions, found
        return directory.absolute(), companions, found  # links stay: what lies beside them may belong to them

    def _prompts(self) -> tuple[str, ...]:
        options = self._options
        prompts = list(options.prompts)
        if options.text is not None:
            prompts += [text.strip() for text in options.text.split("|") if text.strip()]
        if options.prompt_file is not None:
            prompts += _lines(options.prompt_file)
        if not prompts and self.stored is not None:
            return self.stored.prompts
        if not prompts:
            raise click.UsageError(
                "sample: prompts must be given, got none. Write them behind the command, or name a file with one a "
                "line (--prompts FILE; - is standard input), or the folder of an unfinished job (--out)."
            )
        if options.gentxt:
            prompts = [self._continued(prompt) for prompt in prompts]
        return tuple(prompts)

    def _continued(self, prompt: str) -> str:
        model, options = self.model, self._options
        share: dict[str, Any] = {} if options.filter_thres is None else {"filter_thres": options.filter_thres}
        _, texts = model.dalle.generate_texts(
            model.tokenizer, prompt.lower(), seed=options.seed, engine=options.engine,
            weight_dtype=model.weight_dtype, **share,
        )  # fmt: skip
        return texts[0].strip()

    def _settings(self) -> dict[str, Any]:
        """How codes are chosen."""
        names = ("temperature", "top_k", "top_p", "cond_scale", "filter_thres")
        if self.stored is not None:
            values = {name: self._value(name) for name in names}
        else:
            own, given = self.model.settings, {name: getattr(self._options, name) for name in names}
            recommended = {"filter_thres": None} | {name: getattr(own, name) for name in names[:-1]}
            values = {name: recommended[name] if value is None else value for name, value in given.items()}
        for name, other in (("top_k", "filter_thres"), ("filter_thres", "top_k")):
            if name in self._given:  # each stands for the other
                values[other] = None
        return values

    def _rank(self) -> str | None:
        rank = self._value("rank")
        if rank is not None:
            return str(Path(rank).resolve()) if Path(rank).exists() else rank
        if self._value("keep") is None:
            return None
        own = self._directory / "clip"
        if not own.is_dir():
            raise click.UsageError(
                f"sample: --keep needs --rank, which says what is best: {self._directory} has no CLIP of its own."
            )
        return str(own)

    def _known_hash(self) -> str | None:
        wanted, known = self._options.known_hash, self.known
        found = None if known is None else hash_codes(known)
        if wanted is not None and wanted != found:
            raise ValueError(
                "sample: the configuration is of a job with known codes, so --prime or --inpaint must give them, got "
                f"{'none' if found is None else 'others'}."
            )
        return found

    def _engine(self) -> str:
        if self.stored is not None:
            return self._value("engine")
        options, model = self._options, self.model
        return choose_engine(
            model.dalle, options.engine, weight_dtype=model.weight_dtype, max_memory=options.max_memory, op="sample"
        )

    # -------------------------------------------------------------------------------------------------- batches

    def _batch_size(self, values: dict[str, Any]) -> int:
        options = self._options
        if "batch_size" in self._given and options.batch_size is not None:
            return options.batch_size
        if self.stored is not None:
            return self.stored.batch_size
        parts = (options.workers or 1) * (options.shard[1] if options.shard else 1)
        total = len(values["prompts"]) * values["images_per_prompt"]
        share = -(-total // parts)
        if values["engine"] == "eager":
            return min(_EAGER_BATCH["cpu" if self._device == "cpu" else "cuda"], share)
        most = min(MOST_SAMPLES, share)
        return most if options.max_memory is None else self._that_fit(most, values)

    def _that_fit(self, most: int, values: dict[str, Any]) -> int:
        """Samples that --max-memory lets a process draw at a time."""
        model, known, max_memory = self.model, self.known, self._options.max_memory
        assert max_memory is not None
        while True:
            try:
                left = memory_for_engine(max_memory, model, most, cond_scale=values["cond_scale"])
                break
            except ValueError:
                if most == 1:
                    raise
                most //= 2
        plan = plan_drawing(
            model.dalle, most,
            prompts=min(len(values["prompts"]), most), cond_scale=values["cond_scale"],
            weight_dtype=model.weight_dtype, max_memory=left, primed=known is not None and int(known[0]) >= 0,
        )  # fmt: skip
        return max(plan.micro_batches)


def _lines(name: str) -> list[str]:
    """Prompts of a file, or of standard input ("-"), without blank lines."""
    where = "standard input" if name == "-" else name
    try:
        text = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        lines = [line.strip() for line in text.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"sample: {where} must be text in UTF-8, got something else ({error}).") from None
    prompts = [line for line in lines if line]
    if not prompts:
        raise ValueError(f"sample: {where} must hold a prompt a line, got none.")
    return prompts
