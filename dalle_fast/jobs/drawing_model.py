"""A saved model with what drawing needs beside its weights: tokenizer, known captions, settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle_fast.compat.formats.base import Companions
from dalle_fast.jobs.job import DTYPES
from dalle_fast.jobs.prompts import KnownCaptions
from dalle_fast.models.dalle import DALLE
from dalle_fast.models.saving import CONFIG
from dalle_fast.tokenizers.hug import HugTokenizer

SHIPPED_MODEL = Path(__file__).resolve().parents[2] / "assets" / "emoji-64"
_TOKENIZER = "tokenizer.json"
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class SamplingSettings:
    """How codes are drawn; what is not said is as in `DALLE.generate_images`."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    cond_scale: float = 1.0

    @classmethod
    def read(cls, path: Path) -> SamplingSettings:
        """From a JSON object with some of these keys. Raises ValueError (no such object, unknown key), TypeError."""
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
            raise ValueError(f"{path} must be JSON, got something else ({error}). Write it again.") from None
        if not isinstance(stored, dict):
            raise ValueError(f"{path} must hold a JSON object, got {stored!r}. Write it again.")
        keys = [field.name for field in fields(cls)]
        for key in stored:
            if key not in keys:
                raise ValueError(f"{path} must have no keys but {', '.join(keys)}, got {key!r}. Remove it.")
        top_p = stored.get("top_p", cls.top_p)
        return cls(
            temperature=_number(stored.get("temperature", cls.temperature), "temperature", path),
            top_k=_integer_or_none(stored.get("top_k", cls.top_k), "top_k", path),
            top_p=None if top_p is None else _number(top_p, "top_p", path),
            cond_scale=_number(stored.get("cond_scale", cls.cond_scale), "cond_scale", path),
        )

    def overridden(
        self,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        cond_scale: float | None = None,
    ) -> SamplingSettings:
        """Those that are given here, and these for the others."""
        given: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "cond_scale": cond_scale}
        return replace(self, **{key: value for key, value in given.items() if value is not None})


def _number(value: object, key: str, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{path}: {key} must be a number, got {value!r}. Correct the file.")
    return float(value)


def _integer_or_none(value: object, key: str, path: Path) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(f"{path}: {key} must be an integer or null, got {value!r}. Correct the file.")
    return value


@dataclass(frozen=True)
class DrawingModel:
    """A saved model in memory.

    Attributes:
        dalle: in evaluation mode; its VAE is float32 whatever the dtype.
        tokenizer: with `encode` and `tokenize`, as those of `dalle_fast.tokenizers`.
        captions: that it was trained on; None where nobody wrote them down.   examples: prompts that show it.
        settings: that its makers recommend.
        dtype: of the transformer, one of `job.DTYPES`.
    """

    dalle: DALLE
    tokenizer: Any
    captions: KnownCaptions | None
    examples: list[str]
    settings: SamplingSettings
    dtype: str = "float32"

    @classmethod
    def read(
        cls, directory: Path, *, companions: Companions | None = None, dtype: str = "float32", device: str = "cpu"
    ) -> DrawingModel:
        """From a directory of `save_pretrained`, or a file of weights (docs/old-weights.md).

        Where there are, it also reads captions.txt, examples.txt and sampling.json of the directory.

        Args:
            companions: instead of what is in and beside the file; of a saved model: the tokenizer that it lacks.
            dtype: of the transformer; int8: bfloat16, its matrices held in 8 bits while it draws.
            device: torch's name of one.
        Raises: FileNotFoundError, ValueError, TypeError (what the files hold, a companion that would do nothing, an
            unknown dtype, a device that is not there).
        """
        if directory == SHIPPED_MODEL and not directory.is_dir():
            raise FileNotFoundError(
                "model: the shipped model is part of the repository, not of an installed package;"
                f" {directory} is not there. Name a saved model with --model."
            )
        if dtype not in DTYPES:
            raise ValueError(f"model: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
        check_device(device)
        dalle, tokenizer = _model_and_tokenizer(directory, companions or Companions(), device)
        dalle.to(torch.bfloat16 if dtype == "int8" else getattr(torch, dtype))
        captions, examples, sampling = (directory / name for name in ("captions.txt", "examples.txt", "sampling.json"))
        return cls(
            dalle,
            tokenizer,
            KnownCaptions.read(captions) if captions.is_file() else None,
            examples.read_text(encoding="utf-8").splitlines() if examples.is_file() else [],
            SamplingSettings.read(sampling) if sampling.is_file() else SamplingSettings(),
            dtype,
        )

    @property
    def weight_dtype(self) -> torch.dtype | None:
        """What `DALLE.generate_images` takes under this name."""
        return torch.int8 if self.dtype == "int8" else None

    @property
    def device(self) -> torch.device:
        """Where it draws."""
        return self.dalle.to_logits.weight.device

    def advice(self, prompt: str) -> str | None:
        """A sentence about a prompt with words that no caption of the training had; None where there is none to say."""
        unknown = self.captions.unknown_words(prompt) if self.captions is not None else []
        if not unknown or self.captions is None:
            return None
        near = ", ".join(f'"{caption}"' for caption in self.captions.nearest(prompt))
        return f'"{prompt}": the model has never read {", ".join(unknown)}. Captions it knows: {near}.'

    def token_ids(self, prompts: Sequence[str], truncate: bool) -> Tensor:
        """Ids of prompts, lower-cased as the captions of the training were: int64 [B, text_seq_len], on the CPU.

        Args: truncate: cut a prompt that is longer than the model's text.
        Raises: ValueError (a prompt too long, with its number, from 1, and its text), TypeError (not text).
        """
        most = self.dalle.text_seq_len
        rows = torch.zeros(len(prompts), most, dtype=torch.long)
        for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True), start=1):
            ids = self.tokenizer.encode(prompt.lower() if isinstance(prompt, str) else prompt)
            if len(ids) > most and not truncate:
                raise ValueError(
                    f"sample: prompt {number} must have at most {most} tokens, got {len(ids)} in {_shown(prompt)}. "
                    "Shorten it, or let --truncate cut it."
                )
            row[: len(ids)] = torch.as_tensor(ids[:most], dtype=torch.long)
        return rows


def _model_and_tokenizer(path: Path, companions: Companions, device: str) -> tuple[DALLE, Any]:
    """In float32, whatever is stored."""
    _check_companions(path, companions)
    complete = (path / CONFIG).is_file() and (path / _TOKENIZER).is_file()
    if complete or not path.exists():
        dalle = DALLE.from_pretrained(path, device=device)
        return dalle, HugTokenizer(path / _TOKENIZER)
    from dalle_fast.compat.loading import load  # at call time: it knows all layouts, a saved model needs none of them

    loaded = load(path, companions)
    if not isinstance(loaded.model, DALLE):
        raise ValueError(
            f"model: {path} must hold a DALLE, got a {loaded.description.kind} ({loaded.description.format}). A DALLE "
            "draws; name its file."
        )
    if loaded.tokenizer is None:
        raise ValueError(loaded.problem)
    return loaded.model.to(device=device, dtype=torch.float32), loaded.tokenizer


def _check_companions(path: Path, companions: Companions) -> None:
    """Refuses those that would do nothing. Raises: ValueError."""
    if (path / CONFIG).is_file():
        own = ("vae", "yaml", "tokenizer") if (path / _TOKENIZER).is_file() else ("vae", "yaml")
        for name in own:
            if (given := getattr(companions, name)) is not None:
                raise ValueError(
                    f"model: --{name} must be left out, got {given}: {path} is a saved model, which carries its own."
                )
    elif companions.yaml is not None and companions.vae is None:
        raise ValueError(
            f"model: --yaml must be the configuration of a VQGAN that --vae names, got {companions.yaml} alone."
        )


def check_device(device: str) -> None:
    """That torch can compute on a device.

    Raises: ValueError.
    """
    try:
        torch.zeros(1, device=device).item()  # item: so that the device must compute, which "meta" does not
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"model: device must be one that torch finds here, such as cpu or cuda, got {device!r} ({reason})."
        ) from None


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "...")
