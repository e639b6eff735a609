"""What a training does, all of it: resolved from a preset, a file and single settings, written to config.yaml, reread.

    resolve("vae", preset="small", file=None, overrides=["data.source=pictures", "loop.steps=100"])

Later ones win, key by key. Unknown keys and wrong values are refused, each in one sentence.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

Kind = Literal["vae", "dalle", "clip"]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
# These may differ from the run that a folder holds: they change no step that was made, nor any that is to come.
FREE = frozenset(
    ("loop.steps", "loop.save_steps", "loop.keep", "loop.log_steps", "loop.picture_steps", "loop.evaluate_steps")
) | {"data.workers", "checkpointing"}


class Section(BaseModel):
    """Settings that belong together; frozen, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(Section):
    """What is read, and what is drawn at random from it.

    source: a folder of pictures with texts, shards as "shards/{000..009}.tar", or a folder that `encode` wrote.
    resize: "upstream": a random crop of `smallest_crop` to 1 of the area; "paper": as the DALL-E paper; "none": the
        middle square.
    truncate: cut captions that are too long; False refuses them.
    first_caption: probability of a caption file's first line; None: all lines are as likely.
    word_dropout, bpe_dropout: probability that a word is left out, that a merge of the tokenizer is.
    flip: mirror half of the pictures.   augment: "emoji": flips, transpositions and shifts of up to 3 pixels, on white.
    held_out: share of the samples, by a hash of their names, that is kept from training.
    workers: processes that read, for each that trains; 0: none.
    """

    source: str
    resize: Literal["upstream", "paper", "none"] = "upstream"
    smallest_crop: Annotated[float, Field(gt=0, le=1)] = 0.75
    truncate: bool = False
    first_caption: Share | None = None
    word_dropout: Share = 0.0
    bpe_dropout: Share = 0.0
    flip: bool = False
    augment: Literal["none", "emoji"] = "none"
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    workers: Annotated[int, Field(ge=0)] = 2


class OptimiserConfig(Section):
    """How gradients become steps (training/optimisers.py).

    weight_decay: of weight matrices; norms, biases and embeddings have none.   clip_norm: of all gradients together.
    """

    name: Literal["adamw", "adam", "muon"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] | None = None


class ScheduleConfig(Section):
    """The learning rate over the steps: a linear warm-up, times one of

    "constant"; "cosine": half a wave to `final_share`, reached after `steps` (None: loop.steps); "exponential": times
    `factor` every `every` steps (None: 1); "plateau": times `factor` when the mean loss of `every` steps (None: an
    epoch) has not fallen for `patience` readings, after which `cooldown` readings are not counted. None goes below
    `final_share` of optimiser.learning_rate.
    """

    learning_rate: Literal["constant", "cosine", "exponential", "plateau"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    final_share: Share = 0.0
    steps: Count | None = None
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    every: Count | None = None
    patience: Annotated[int, Field(ge=0)] = 10
    cooldown: Annotated[int, Field(ge=0)] = 10


class LoopConfig(Section):
    """How long, how much at a time, what is written when.

    batch: samples of an optimiser step, of all processes together.   micro_batch: of a process and forward; None: all
    of its share.   ema_decay: of a moving average of the weights, taken every `ema_steps`; None: none is kept.
    keep: checkpoints that stay.   picture_steps, evaluate_steps: None: never.
    """

    steps: Count
    batch: Count
    micro_batch: Count | None = None
    # YAML reads a bare `no` as false.
    precision: Annotated[Literal["no", "bf16", "fp16"], BeforeValidator(lambda v: "no" if v is False else v)] = "no"
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    ema_steps: Count = 1
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    save_steps: Count = 1000
    keep: Count = 2
    log_steps: Count = 10
    picture_steps: Count | None = None
    evaluate_steps: Count | None = None


class Ramp(Section):
    """A number that goes from `start` to `end` in `steps`, then stays (training/schedules.py)."""

    start: float
    end: float
    steps: Count
    shape: Literal["cosine", "exponential", "linear", "constant"] = "cosine"


class CodeNoise(Section):
    """In this share of the samples, codes that are read are replaced, each with a probability from 0..rate."""

    share: Share = 0.0
    rate: Share = 0.0


class TrainConfig(Section):
    """What all trainings have. model: keyword arguments of the model, checked by building it."""

    model: dict[str, Any] = Field(default_factory=dict)
    data: DataConfig
    optimiser: OptimiserConfig = OptimiserConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loop: LoopConfig

    def to_yaml(self) -> str:
        """Text that `from_yaml` reads back to the same."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_yaml(cls: type[AnyConfig], text: str, where: str | Path) -> AnyConfig:
        """Raises: ValueError (no YAML, an unknown key, a wrong value); `where` names the text in its sentence."""
        return cls.of(_parse(text, where), where)

    @classmethod
    def of(cls: type[AnyConfig], settings: Mapping[str, Any], where: str | Path) -> AnyConfig:
        """From a nest of settings. Raises: ValueError, one sentence."""
        try:
            return cls.model_validate({"data": {}, "loop": {}} | dict(settings))
        except ValidationError as error:
            raise ValueError(_sentence(error, cls, where)) from None

    def differences(self, other: TrainConfig) -> list[str]:
        """Keys as "loop.batch" whose values are not the same, but for those in FREE."""
        ours, theirs = dict(_leaves(self.model_dump())), dict(_leaves(other.model_dump()))
        keys = [*ours, *(key for key in theirs if key not in ours)]
        return [key for key in keys if key not in FREE and ours.get(key, keys) != theirs.get(key, keys)]


AnyConfig = TypeVar("AnyConfig", bound=TrainConfig)


class VaeConfig(TrainConfig):
    """Of a VAE.

    arch: "discrete", a DiscreteVAE; "openai", the paper's: an OpenAIDiscreteVAE, with its logit-Laplace loss.
    temperature: of the gumbel softmax.   kl: weight of the KL term.   entropy_weight: of a bonus on the entropy of the
    mean code usage in a micro-batch.   l1_weight: of the absolute error beside the model's own.   plain_steps: before
    anything is quantised (VQ only).   fold: save a VQ model as a gumbel one of the same codes.
    """

    kind: Literal["vae"] = "vae"
    arch: Literal["discrete", "openai"] = "discrete"
    temperature: Ramp = Ramp(start=1.0, end=1.0, steps=1, shape="constant")
    kl: Ramp = Ramp(start=0.0, end=0.0, steps=1, shape="constant")
    entropy_weight: Annotated[float, Field(ge=0)] = 0.0
    l1_weight: Annotated[float, Field(ge=0)] = 0.0
    plain_steps: Annotated[int, Field(ge=0)] = 0
    fold: bool = False


class DalleConfig(TrainConfig):
    """Of a DALLE.

    vae: directory of the saved VAE.   tokenizer: file, "clip" or "chinese".
    null_cond_prob: of an empty caption, for guidance.
    padding_loss: which text positions behind a caption count: "all", as in the original, or the "first", its end.
    end_to_end: gradients of the token loss reach the VAE's encoder.
    checkpointing: compute blocks again in the backward pass, for less memory; the same bits.
    """

    kind: Literal["dalle"] = "dalle"
    vae: str | None = None
    tokenizer: str = "clip"
    null_cond_prob: Share = 0.0
    code_noise: CodeNoise = CodeNoise()
    padding_loss: Literal["first", "all"] = "first"
    end_to_end: bool = False
    checkpointing: bool = False


class ClipConfig(TrainConfig):
    """Of a CLIP. tokenizer: file, "clip" or "chinese"."""

    kind: Literal["clip"] = "clip"
    tokenizer: str = "clip"


CONFIGS: dict[Kind, type[TrainConfig]] = {"vae": VaeConfig, "dalle": DalleConfig, "clip": ClipConfig}


def resolve(
    kind: Kind, *, preset: str | None = None, file: Path | None = None, overrides: Sequence[str] = ()
) -> VaeConfig | DalleConfig | ClipConfig:
    """A configuration from a preset, over it a file, over it single settings as "loop.steps=100" (values are YAML).

    Raises: ValueError (an unknown preset or key, with the nearest known one; a wrong value), OSError (no such file).
    """
    settings: dict[str, Any] = {}
    where: list[str] = []
    if preset is not None:
        settings = _parse(preset_text(kind, preset), f"preset {preset}")
        where.append(f"preset {preset}")
    if file is not None:
        settings = _merged(settings, _parse(file.read_text(encoding="utf-8"), file))
        where.append(str(file))
    for override in overrides:
        settings = _merged(settings, _setting(override))
    where += ["the options"] if overrides or not where else []
    config = CONFIGS[kind].of(settings, ", ".join(where))
    assert isinstance(config, (VaeConfig, DalleConfig, ClipConfig))
    return config


def presets(kind: Kind) -> list[str]:
    """Names of the presets there are."""
    names = (entry.name for entry in resources.files("dalle_fast.training").joinpath("presets").iterdir())
    return sorted(name[len(kind) + 1 : -5] for name in names if name.startswith(f"{kind}-") and name.endswith(".yaml"))


def preset_text(kind: Kind, name: str) -> str:
    """The YAML of a preset. Raises: ValueError (an unknown one)."""
    if name not in (known := presets(kind)):
        raise ValueError(f"train: preset must be one of {', '.join(known)}, got {name!r}.")
    folder = resources.files("dalle_fast.training").joinpath("presets")
    return folder.joinpath(f"{kind}-{name}.yaml").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------- nests of keys


def _parse(text: str, where: str | Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"train: {where} must be YAML, got something else ({' '.join(str(error).split())}).") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise ValueError(f"train: {where} must hold keys and values, got {settings!r:.80}.")
    return settings


def _setting(override: str) -> dict[str, Any]:
    """ "loop.steps=100" -> {"loop": {"steps": 100}}."""
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"train: a setting must be KEY=VALUE, as loop.steps=100, got {override!r}.")
    nest: Any = _parse(f"value: {value}", f"the value of {key}")["value"]
    for name in reversed(key.strip().split(".")):
        nest = {name: nest}
    return nest


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both; where both have a value, that of `above`; nests are merged key by key."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _leaves(nest: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in nest.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# ----------------------------------------------------------------------------------------------------------- sentences


def _sentence(error: ValidationError, config: type[TrainConfig], where: str | Path) -> str:
    """One of pydantic's complaints, an unknown key first: what is meant by it may be what is missing."""
    complaints = error.errors(include_url=False)
    first = next((complaint for complaint in complaints if complaint["type"] == "extra_forbidden"), complaints[0])
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"train: {where} must have known keys, got {key!r}. {_nearest(key, list(_known_keys(config)))}"
    if first["type"] == "missing":
        return f"train: {key} must be given, got none in {where}. Add it, in a file or as {key}=VALUE."
    what = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return f"train: {key} must be {what}, got {first['input']!r:.80} in {where}."


def _known_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _known_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _nearest(key: str, known: list[str]) -> str:
    """What may have been meant: a key that looks like it, or one of that name elsewhere."""
    ends = {name.rpartition(".")[2]: name for name in reversed(known)}
    last = key.rpartition(".")[2]
    for word, names in ((last, ends), (key, known), (last, list(ends))):
        cutoff = 1.0 if names is ends else 0.6
        if near := difflib.get_close_matches(word, names, n=1, cutoff=cutoff):
            return f"Did you mean {ends.get(near[0], near[0])}?"
    return f"Known are {', '.join(known)}."
