"""Models on disk: a directory with `config.json`, `model.safetensors` and one subdirectory per model inside the model.

    config.json         format_version, class, arguments (of the constructor), preprocessing
    model.safetensors   parameters under our own names, tied tensors once
    vae/                the same again, for every constructor argument that is a model
    clip/               optional: another saved model that belongs to this one
    tokenizer.json      optional
    README.md           the card

A directory appears whole or not at all (it is written beside its place, then renamed), and nothing here opens a
network connection.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import dalle_fast
from dalle_fast.models.state_dicts import aliases, belongs_to, check_shapes, some, tie_again
from dalle_fast.models.unfilled import unfilled
from dalle_fast.models.weights_file import read_weights, write_weights

FORMAT_VERSION = 1
CONFIG, WEIGHTS, TOKENIZER, CARD = "config.json", "model.safetensors", "tokenizer.json", "README.md"

Model = TypeVar("Model", bound="Pretrained")
PathLike = str | os.PathLike[str]


class Pretrained(nn.Module):
    """An nn.Module that remembers its constructor's arguments, saves and loads itself, and reads upstream names.

    A subclass does nothing for it: its `__init__` is wrapped so that `config` holds the arguments it was called with.
    An argument that is itself a model must be kept as the attribute of the same name; it is saved as a subdirectory.
    `__init__` must not look at the values of parameters: where weights follow, they have none yet (`unfilled`).
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = _recording(cls.__init__)  # type: ignore[method-assign]

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, models left out, as JSON holds them.

        Raises: TypeError (an argument that JSON cannot hold).
        """
        arguments: dict[str, Any] = self.__dict__.get("_arguments", {})
        where = type(self).__name__
        return {k: _plain(v, f"{where}: argument {k}") for k, v in arguments.items() if v is not _IsAModel}

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """nn.Module.load_state_dict that also takes dalle_pytorch's names (every release since 0.8.0).

        Raises: ValueError (a tensor of another shape, with both shapes), RuntimeError (strict: missing, unknown names).
        """
        from dalle_fast.compat.names import translate  # at call time: compat stands above models

        translated = translate(self, state_dict)
        check_shapes(self, translated)
        return super().load_state_dict(translated, strict=strict, assign=assign)

    def save_pretrained(
        self,
        directory: PathLike,
        *,
        dtype: torch.dtype | None = None,
        tokenizer: Any = None,
        clip: Pretrained | None = None,
        card: str | None = None,
    ) -> None:
        """Writes the model to `directory`, replacing a model saved there before; other files in it stay.

        Args:
            dtype: floating dtype of the stored tensors, e.g. torch.float16; None keeps each tensor's own. The model in
                memory does not change.
            tokenizer: path of a tokenizer.json, or an object whose `save(path)` (or whose `.tokenizer.save(path)`)
                writes one.
            clip: a CLIP to keep beside the model, in `clip/`.
            card: text of README.md; None writes a few lines of its own.
        Raises: ValueError (the directory holds something else), TypeError (an argument that cannot be stored).
        """
        target = Path(directory).absolute()
        if target.is_file() or (target.is_dir() and any(target.iterdir()) and not (target / CONFIG).is_file()):
            raise ValueError(
                f"save_pretrained: directory must be new, empty or a saved model, got {target}, which holds something "
                "else. Name another directory."
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = _beside(target)
        try:
            _write(self, scratch, dtype, card)
            if clip is not None:
                _write(clip, scratch / "clip", dtype, None)
            if tokenizer is not None:
                _write_tokenizer(tokenizer, scratch / TOKENIZER)
            _swap(scratch, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    @classmethod
    def from_pretrained(
        cls: type[Model], path: PathLike, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Model:
        """Reads a model that `save_pretrained` wrote. It comes in evaluation mode; torch's random state is untouched.

        Args:
            path: a local directory. Nothing is ever downloaded.
            dtype: floating dtype of the model, None means float32, whatever the file holds; the VAE of a DALLE is
                float32 under a dtype of 16 bits, too.
            device: where the model goes; None means the CPU.
        Raises: FileNotFoundError (no such directory or file), ValueError (unreadable file, unknown class or argument,
            another class than this one, tensors missing or of another shape).
        """
        directory = Path(path)
        config = _read_config(directory)
        found = _class_named(config["class"], directory)
        if not issubclass(found, cls):
            raise ValueError(
                f"from_pretrained: {directory} must hold a {cls.__name__}, got a {found.__name__}. "
                f"Call {found.__name__}.from_pretrained instead."
            )
        arguments = _checked_arguments(found, config["arguments"], directory)
        for name in config["models"]:
            arguments[name] = Pretrained.from_pretrained(directory / name)
        dtype = torch.float32 if dtype is None else dtype
        with unfilled():
            model = found(**arguments)
        _load_weights(model, directory, config["models"], dtype)
        return model.to(device=device, dtype=dtype).eval()


# --- the constructor's arguments --------------------------------------------------------------------------------------


class _IsAModel:
    """Stands for an argument that is a model: a class, because copies and pickles of a class are itself."""


def _recording(init: Callable[..., None]) -> Callable[..., None]:
    """`init`, then `self._arguments` = what it was called with. The outermost constructor has the last word."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def recorded(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        arguments: dict[str, Any] = {}
        for name, value in list(bound.arguments.items())[1:]:
            if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                arguments.update(value)
            else:
                arguments[name] = _IsAModel if isinstance(value, nn.Module) else value
        self.__dict__["_arguments"] = arguments

    return recorded


def _plain(value: Any, where: str) -> Any:
    """`value` as JSON gives it back: sequences as lists, numbers as int or float."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, list | tuple | range):
        return [_plain(item, where) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, where) for key, item in value.items()}
    raise TypeError(
        f"{where} must be numbers, strings, None or sequences of them to be saved, got {type(value).__name__}. "
        "Build the model with such values."
    )


# --- writing ----------------------------------------------------------------------------------------------------------


def _write(model: Pretrained, directory: Path, dtype: torch.dtype | None, card: str | None) -> None:
    directory.mkdir(parents=True)
    models = [name for name, value in model.__dict__["_arguments"].items() if value is _IsAModel]
    config = {
        "format_version": FORMAT_VERSION,
        "class": type(model).__name__,
        "arguments": model.config,
        "models": models,
        "preprocessing": _preprocessing(model),
    }
    for name in models:
        inner = getattr(model, name)
        if not isinstance(inner, Pretrained):
            raise TypeError(
                f"save_pretrained: {name} must be a model of dalle_fast, got {type(inner).__name__}. "
                "Save its state_dict yourself."
            )
        _write(inner, directory / name, dtype, None)
    state_dict = model.state_dict()
    left_out = aliases(state_dict)
    tensors = {
        name: tensor for name, tensor in state_dict.items() if name not in left_out and not belongs_to(name, models)
    }
    write_weights(directory / WEIGHTS, tensors, dtype)
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (directory / CARD).write_text(card if card is not None else _card(model), encoding="utf-8")


def _write_tokenizer(tokenizer: Any, target: Path) -> None:
    if isinstance(tokenizer, str | os.PathLike):
        source = Path(tokenizer)
        if not source.is_file():
            raise FileNotFoundError(f"save_pretrained: tokenizer must be an existing file, got {source}.")
        shutil.copyfile(source, target)
        return
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    if not callable(getattr(inner, "save", None)):
        raise TypeError(
            "save_pretrained: tokenizer must be a path or have a save(path) method, "
            f"got {type(tokenizer).__name__}. Pass the path of its tokenizer.json."
        )
    inner.save(str(target))


def _preprocessing(model: nn.Module) -> dict[str, Any]:
    """What a picture must be before the model sees it; empty for a model that takes none."""
    vae = getattr(model, "vae", model)
    if not hasattr(vae, "image_size") or not hasattr(vae, "channels"):
        return {}
    return {"image_size": vae.image_size, "channels": vae.channels, "value_range": [0.0, 1.0]}


def _card(model: nn.Module) -> str:
    name, n_parameters = type(model).__name__, sum(p.numel() for p in model.parameters())
    return (
        f"# {name}\n\nA {name} of dalle_fast with {n_parameters:,} parameters.\n\n"
        f'```python\nfrom dalle_fast import {name}\n\nmodel = {name}.from_pretrained(".")\n```\n'
    )


def _beside(target: Path) -> Path:
    return target.parent / f".{target.name}.{uuid.uuid4().hex[:12]}.tmp"


def _swap(scratch: Path, target: Path) -> None:
    """Puts `scratch` in the place of `target`; what `target` held besides a model moves along."""
    if not target.exists():
        os.rename(scratch, target)
        return
    old = _beside(target)
    os.rename(target, old)
    try:
        os.rename(scratch, target)
    except OSError:
        os.rename(old, target)
        raise
    for entry in old.iterdir():
        if not (target / entry.name).exists():
            os.rename(entry, target / entry.name)
    shutil.rmtree(old)


# --- reading ----------------------------------------------------------------------------------------------------------


def _read_config(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise FileNotFoundError(
            f"from_pretrained: path must be a directory written by save_pretrained, got {directory}, which is "
            f"{'a file' if directory.exists() else 'not there'}. Nothing is downloaded: give a local directory."
        )
    path = directory / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"from_pretrained: {directory} must hold {CONFIG}, got none. Is it a saved model?")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(
            f"from_pretrained: {path} must be JSON, got something else ({error}). Save it again."
        ) from error
    missing = {"format_version", "class", "arguments"} - set(config if isinstance(config, dict) else ())
    if missing:
        raise ValueError(f"from_pretrained: {path} must name {', '.join(sorted(missing))}, got none. Save it again.")
    if config["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"from_pretrained: {path} must have format_version {FORMAT_VERSION}, got {config['format_version']}. "
            "Update dalle_fast."
        )
    models = config.setdefault("models", [])
    # They are folders inside this one: a path could lead anywhere.
    if not isinstance(models, list) or not all(isinstance(name, str) and name.isidentifier() for name in models):
        raise ValueError(
            f"from_pretrained: models in {path} must be names of arguments, got {str(models)[:80]!r}. Save it again."
        )
    return config


def _class_named(name: str, directory: Path) -> type[Pretrained]:
    if name in dalle_fast.__all__:
        getattr(dalle_fast, name)  # public names are imported at first use
    classes = {cls.__name__: cls for cls in _descendants(Pretrained)}
    if name not in classes:
        raise ValueError(
            f"from_pretrained: the class in {directory / CONFIG} must be one of {', '.join(sorted(classes))}, "
            f"got {name!r}. Import the module that defines it first."
        )
    return classes[name]


def _descendants(cls: type[Pretrained]) -> Iterator[type[Pretrained]]:
    for child in cls.__subclasses__():
        yield child
        yield from _descendants(child)


def _checked_arguments(cls: type[Pretrained], arguments: dict[str, Any], directory: Path) -> dict[str, Any]:
    parameters = inspect.signature(cls.__init__).parameters
    unknown = sorted(set(arguments) - set(parameters))
    if unknown and not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        raise ValueError(
            f"from_pretrained: {directory / CONFIG} must hold arguments of {cls.__name__}, got {', '.join(unknown)}. "
            "Update dalle_fast, or remove them."
        )
    return dict(arguments)


def _load_weights(model: Pretrained, directory: Path, models: list[str], dtype: torch.dtype) -> None:
    """Gives an unfilled model its weights, which are then of that dtype; models inside it have theirs."""
    path = directory / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"from_pretrained: {directory} must hold {WEIGHTS}, got none. Copy it there.")
    try:
        stored = read_weights(path, dtype)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"from_pretrained: {path} must be a safetensors file, got something unreadable ({error}). "
            "Copy it again; it may be cut short."
        ) from error
    own = model.state_dict(keep_vars=True)
    tied = aliases(own)
    complete = {name: tensor.detach() for name, tensor in own.items() if belongs_to(name, models)}
    complete.update(stored)
    complete.update({name: stored[first] for name, first in tied.items() if name not in stored and first in stored})
    missing, unknown = sorted(set(own) - set(complete)), sorted(set(complete) - set(own))
    if missing or unknown:
        raise ValueError(
            f"from_pretrained: {path} must hold the tensors of {type(model).__name__}; missing: {some(missing)}; "
            f"unknown: {some(unknown)}. Do {CONFIG} and {WEIGHTS} belong together?"
        )
    model.load_state_dict(complete, assign=True)
    tie_again(model, tied)
