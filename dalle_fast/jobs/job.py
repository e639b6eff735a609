"""A job: many prompts, many samples of each, numbered, with everything that decides their bits.

Sample `number` of prompt p has index p * images_per_prompt + number. Its seed counts on from the job's; a prompt that
comes again goes on counting where it stopped, so no picture is drawn twice, and those of a prompt do not depend on the
other prompts. Samples are drawn and kept in chunks of `batch_size`; on the `cpu` engine the chunks change no bit.
"""

from __future__ import annotations

import hashlib
import types
import typing
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from dalle_fast import rng
from dalle_fast.compat.formats.base import Companions

DTYPES = ("float32", "bfloat16", "float16", "int8")
_READ_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Sample:
    """One picture of a job.

    Attributes:
        index: in the job.   prompt_index: of its prompt.   number: among those of its prompt.
        seed: 64 bits; with the prompt and the model it decides the picture.
    """

    index: int
    prompt_index: int
    number: int
    prompt: str
    seed: int

    @property
    def name(self) -> str:
        """What its files are called; prompts are in no file's name."""
        return f"{self.prompt_index:06d}-{self.number:05d}"


@dataclass(frozen=True)
class DrawnChunk:
    """A chunk as it was drawn.

    Attributes:
        tokens: int64 [b, image_seq_len].   scores: float32 [b], None without a ranker.
        pixels: uint8 [b, C, H, W]; None where only tokens are known.
        backend: what else decides the bits, in words: engine, instruction set, dtype, versions.
    """

    chunk: int
    tokens: Tensor
    scores: Tensor | None
    pixels: Tensor | None
    backend: str


@dataclass(frozen=True)
class JobConfig:
    """What a job draws and what it keeps; every process that works at it has the same.

    Args:
        prompts: at least one.   images_per_prompt, seed: 64 bits.   batch_size: samples of a chunk.
        model: directory of a saved model, or a file of weights.
        tokenizer, vae, yaml: its companions, paths; None: what is in or beside it.
        model_hash: `hash_model` of it and them.
        device: torch's name.   dtype: of the transformer, one of DTYPES; int8: bfloat16 with weights of 8 bits.
        engine: "cpu" or "eager".
        temperature, top_k, top_p, filter_thres, cond_scale: as in `DALLE.generate_images`.
        truncate: cut prompts that are too long for the model.
        known_hash: `hash_codes` of the codes that are given, not drawn; None: all are drawn.
        rank: what scores pictures: a CLIP's directory or file, or "module:function".
        keep: how many pictures a prompt, the best; None: all.
    Raises: ValueError (a value out of its range).
    """

    prompts: tuple[str, ...]
    model: str
    model_hash: str
    images_per_prompt: int
    seed: int
    batch_size: int
    device: str
    dtype: str
    engine: str
    temperature: float
    cond_scale: float
    top_k: int | None = None
    top_p: float | None = None
    filter_thres: float | None = None
    truncate: bool = False
    known_hash: str | None = None
    rank: str | None = None
    keep: int | None = None
    tokenizer: str | None = None
    vae: str | None = None
    yaml: str | None = None

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("sample: prompts must be at least one text, got none. Say what to draw.")
        for i, prompt in enumerate(self.prompts):
            if not prompt.strip():
                raise ValueError(f"sample: prompts must be texts, got an empty one as number {i + 1}. Leave it out.")
            if any(
                "\ud800" <= letter <= "\udfff" for letter in prompt
            ):  # what Python makes of bytes that are not UTF-8
                raise ValueError(f"sample: prompts must be text in UTF-8, got {prompt!r:.80} as number {i + 1}.")
        for name, least in (("images_per_prompt", 1), ("batch_size", 1), ("keep", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"sample: {name} must be at least {least}, got {value}.")
        if self.seed >= rng.SEEDS:
            raise ValueError(f"sample: seed must be in 0 .. 2**64 - 1, got {self.seed}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"sample: dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        if self.keep is not None and self.rank is None:
            raise ValueError("sample: keep needs rank: without scores no picture is better than another.")

    @property
    def n_samples(self) -> int:
        """Of all prompts."""
        return len(self.prompts) * self.images_per_prompt

    @property
    def n_chunks(self) -> int:
        """Of all samples; the last may be shorter."""
        return -(-self.n_samples // self.batch_size)

    @property
    def companions(self) -> Companions:
        """Of the model."""
        paths = {"vae": self.vae, "yaml": self.yaml, "tokenizer": self.tokenizer}
        return Companions(**{name: None if path is None else Path(path) for name, path in paths.items()})

    @property
    def settings(self) -> dict[str, Any]:
        """How codes are chosen, as manifests and pictures say it."""
        names = ("temperature", "top_k", "top_p", "filter_thres", "cond_scale", "truncate", "known_hash")
        return {name: getattr(self, name) for name in names}

    def sample(self, index: int) -> Sample:
        """The sample of this index, 0 .. n_samples - 1."""
        prompt_index, number = divmod(index, self.images_per_prompt)
        counted = self._occurrences[prompt_index] * self.images_per_prompt + number
        seed = (self.seed + counted) % rng.SEEDS
        return Sample(index, prompt_index, number, self.prompts[prompt_index], seed)

    def samples_of(self, chunk: int) -> list[Sample]:
        """The samples of a chunk, 0 .. n_chunks - 1."""
        first = chunk * self.batch_size
        return [self.sample(index) for index in range(first, min(first + self.batch_size, self.n_samples))]

    def samples_of_prompt(self, prompt_index: int) -> list[Sample]:
        """The samples of a prompt."""
        first = prompt_index * self.images_per_prompt
        return [self.sample(index) for index in range(first, first + self.images_per_prompt)]

    def place_of(self, sample: Sample) -> tuple[int, int]:
        """The sample's chunk, and its row there."""
        return divmod(sample.index, self.batch_size)

    def chunks_of_prompt(self, prompt_index: int) -> range:
        """The chunks that hold samples of a prompt."""
        first = prompt_index * self.images_per_prompt
        return range(first // self.batch_size, (first + self.images_per_prompt - 1) // self.batch_size + 1)

    @cached_property
    def _occurrences(self) -> list[int]:
        """How often each prompt stood before; models read them in lower case."""
        seen: Counter[str] = Counter()
        counts = []
        for prompt in map(str.lower, self.prompts):
            counts.append(seen[prompt])
            seen[prompt] += 1
        return counts

    def differences(self, other: JobConfig) -> list[str]:
        """Names of the fields in which two jobs differ."""
        return [field.name for field in fields(self) if getattr(self, field.name) != getattr(other, field.name)]

    def to_yaml(self) -> str:
        """The text of config.yaml."""
        stored = asdict(self) | {"prompts": list(self.prompts)}
        return yaml.dump(stored, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)

    @classmethod
    def from_yaml(cls, text: str, where: object) -> JobConfig:
        """From the text of config.yaml.

        Args: where: the file that errors name.
        Raises: ValueError (not YAML, an unknown or missing key, a value out of its range), TypeError (of another type).
        """
        stored = read_mapping(text, where)
        known = {field.name: field for field in fields(cls)}
        for key in stored:
            if key not in known:
                raise ValueError(f"sample: {where} must be the configuration of a job, got the key {key!r}.")
        if missing := [name for name in known if name not in stored]:
            raise ValueError(f"sample: {where} must say {', '.join(missing)}. Is it the configuration of a job?")
        hints = typing.get_type_hints(cls)
        return cls(**{key: _checked(value, hints[key], key, where) for key, value in stored.items()})


_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def read_mapping(text: str, where: object) -> dict[str, Any]:
    """YAML that holds keys and values.

    Args: where: the file that errors name.
    Raises: ValueError.
    """
    try:
        stored = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"sample: {where} must be YAML, got something else ({_one_line(error)}).") from None
    if not isinstance(stored, dict) or not all(isinstance(key, str) for key in stored):
        raise ValueError(f"sample: {where} must hold keys and values, got {type(stored).__name__}.")
    return stored


def hash_model(path: Path, companions: Companions | None = None, *, draws: bool = True) -> str:
    """sha256 of what decides what a model draws: its files, their names, those of its VAE; no card, no CLIP.

    Of a file of weights: the file, without its name, and, where it `draws`, a tokenizer.json beside it. Companions that
    are files count without their names: a tokenizer as if it lay beside the model.

    Raises: FileNotFoundError (nothing there).
    """
    companions = companions or Companions()
    if not path.exists():
        raise FileNotFoundError(
            f"sample: the model must be a saved model's directory or a file of weights, found none at {path}."
        )
    files = dict(_model_files(path, draws and companions.tokenizer is None)) | dict(_companion_files(companions))
    digest = hashlib.sha256()
    for name, file in sorted(files.items()):
        digest.update(f"{name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as opened:
            while block := opened.read(_READ_AT_ONCE):
                digest.update(block)
    return digest.hexdigest()


def hash_codes(codes: Tensor) -> str:
    """sha256 of known codes [n], -1 where they are drawn."""
    return hashlib.sha256(",".join(map(str, codes.tolist())).encode()).hexdigest()


def _model_files(path: Path, draws: bool) -> Iterator[tuple[str, Path]]:
    """Name in the digest, and file."""
    if path.is_file():
        yield "", path
        if draws and (beside := path.parent / "tokenizer.json").is_file():
            yield beside.name, beside
    elif not (path / "config.json").is_file():  # of another package
        yield from ((file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file())
    else:
        for folder in ("", "vae/"):
            for name in ("config.json", "model.safetensors", "tokenizer.json"):
                if (file := path / f"{folder}{name}").is_file():
                    yield f"{folder}{name}", file


def _whole(name: str, path: Path) -> Iterator[tuple[str, Path]]:
    """A file, or all that a directory holds."""
    if path.is_file():
        yield name, path
    else:
        yield from ((f"{name}/{file.relative_to(path).as_posix()}", file) for file in path.rglob("*") if file.is_file())


def _companion_files(companions: Companions) -> Iterator[tuple[str, Path]]:
    """As `_model_files`; no file of a model has one of these names but tokenizer.json."""
    for name, path in vars(companions).items():
        if path is not None and not path.exists():
            raise FileNotFoundError(f"sample: --{name} must be a file or directory, found none at {path}.")
    yaml_file = companions.yaml
    if companions.tokenizer is not None:
        yield from _whole("tokenizer.json", companions.tokenizer)
    if companions.vae is not None:
        vae = companions.vae
        yield from ((f"--vae/{name}", file) for name, file in _model_files(vae, draws=False))
        if vae.is_file():  # with what is read from beside it
            halves = (vae.with_name(name) for name in ("encoder.pkl", "decoder.pkl"))
            yield from ((f"--vae/{file.name}", file) for file in halves if file.is_file() and file.name != vae.name)
            yaml_file = yaml_file or vae.with_suffix(".yaml")
    if yaml_file is not None and yaml_file.is_file():
        yield "--yaml", yaml_file


def _checked(value: Any, hint: Any, key: str, where: object) -> Any:
    """The value as a field of this type holds it."""
    if typing.get_origin(hint) is tuple:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise TypeError(f"sample: {where}: {key} must be a list of texts, got {value!r:.80}.")
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) in allowed:
        return value
    names = " or ".join("null" if one is type(None) else one.__name__ for one in allowed)
    raise TypeError(f"sample: {where}: {key} must be {names}, got {value!r:.80}.")


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
