"""The options of `dalle-fast sample`, in groups, with the flags of the original's generate.py. Imports no torch."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click

from dalle_fast.cli.companions import COMPANIONS
from dalle_fast.cli.sentences import in_sentences

# As they are in jobs.job and sampling.engine, which import torch.
DTYPES = ("float32", "bfloat16", "float16", "int8")
ENGINES = ("auto", "cpu", "eager")

_TOLD_APART = "refused: what a tokenizer or a VAE is, its file says; --tokenizer and --vae name one"
# Flag of the original's generate.py -> what it means here.
ORIGINAL_FLAGS = {
    "--dalle_path": "--model, such a file or a saved model's directory",
    "--text": "prompts, separated by |",
    "--num_images": "--images-per-prompt",
    "--batch_size": "--batch-size",
    "--top_k": "a share of the vocabulary to drop, 0..1 (filter_thres); not --top-k, which is a number of codes",
    "--outputs_dir": "--out",
    "--gentxt": "the model first continues each prompt; what it writes is the prompt that is drawn and recorded",
    "--bpe_path": "--tokenizer",
    "--vqgan_model_path": "--vae",
    "--vqgan_config_path": "--yaml",
    "--hug": _TOLD_APART,
    "--chinese": _TOLD_APART,
    "--taming": _TOLD_APART,
}
_UNITS = {"": 1, "B": 1} | {
    letter + suffix: base ** (power + 1)
    for power, letter in enumerate("KMGT")
    for suffix, base in (("B", 1000), ("iB", 1024))
}


@dataclass(frozen=True)
class SampleOptions:
    """What the command was given, by the names of its options; None: not given, and no default."""

    prompts: tuple[str, ...]
    prompt_file: str | None
    text: str | None
    gentxt: bool
    truncate: bool
    out: Path
    images_per_prompt: int
    seed: int
    config: Path | None
    model: Path | None
    tokenizer: Path | None
    vae: Path | None
    yaml: Path | None
    model_hash: str | None  # this and the next are in the configuration of a job alone
    known_hash: str | None
    device: str
    dtype: str
    engine: str
    temperature: float | None
    top_k: int | None
    filter_thres: float | None
    top_p: float | None
    cond_scale: float | None
    prime: Path | None
    prime_rows: int | None
    inpaint: Path | None
    mask: Path | None
    rank: str | None
    keep: int | None
    batch_size: int | None
    max_memory: int | None
    workers: int | None
    shard: tuple[int, int] | None
    ray: str | None
    preview: int | None
    json: bool
    quiet: bool
    from_manifest: Path | None
    index: int | None

    def check(self, given: frozenset[str]) -> None:
        """Refuses options that do not go together. Raises: click.UsageError."""
        for name, other in _NEEDS:
            if getattr(self, name) is not None and getattr(self, other) is None:
                raise click.UsageError(f"sample: {_flag(name)} needs {_flag(other)}, got it alone.")
        for name, other, why in _APART:
            if name in given and other in given and (other != "workers" or self.workers != 1):
                raise click.UsageError(f"sample: {_flag(name)} and {_flag(other)} do not go together. {why}")
        more = sorted(given - {"from_manifest", "index", "out", "model", *COMPANIONS, "json", "quiet"})
        if self.from_manifest is not None and more:
            raise click.UsageError(
                f"sample: --from-manifest draws as the manifest says, so {_flag(more[0])} must be left out."
            )


_NEEDS = (
    ("mask", "inpaint"), ("inpaint", "mask"), ("prime_rows", "prime"),
    ("index", "from_manifest"), ("from_manifest", "index"),
)  # fmt: skip
_APART = (
    ("prime", "inpaint", "Mark the rows to keep in a mask instead."),
    ("top_k", "filter_thres", "One is a number of codes, the other the original's share of the vocabulary."),
    ("preview", "workers", "It shows what one process draws, row by row."),
    ("preview", "ray", "It shows what one process draws, row by row."),
)


def _flag(name: str) -> str:
    return {"filter_thres": "--top_k", "prompt_file": "--prompts"}.get(name, f"--{name.replace('_', '-')}")


# --- what values may be -----------------------------------------------------------------------------------------------


class _Size(click.ParamType):
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)", str(value).strip())
        if match is None or match[2] not in _UNITS or (n := int(float(match[1]) * _UNITS[match[2]])) < 1:
            self.fail(f"{value!r} is no size. Write it like 4GiB, 512MB or 4000000000 (bytes).", param, ctx)
        return n


class _Automatic(click.ParamType):
    """A number of at least 1, or "auto", which is None."""

    name = "auto|N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if value == "auto":
            return None
        return click.IntRange(1).convert(value, param, ctx)


class _Shard(click.ParamType):
    name = "I/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        match = re.fullmatch(r"(\d+)/(\d+)", str(value))
        if match is None or not int(match[1]) < int(match[2]):
            self.fail(f"{value!r} is no shard. Write I/N with I in 0 .. N - 1, like 0/4.", param, ctx)
        return int(match[1]), int(match[2])


class _Share(click.ParamType):
    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        share = click.FLOAT.convert(value, param, ctx)
        if not 0 <= share <= 1:
            self.fail(f"{value} is no share in 0..1. A number of codes to keep is --top-k, with a hyphen.", param, ctx)
        return share


# --- options ----------------------------------------------------------------------------------------------------------


class _Option(click.Option):
    """An option of a group. Names that the original has for it are taken, and told in a table of their own."""

    def __init__(self, *names: str, group: str, **settings: Any) -> None:
        super().__init__(names, **settings)
        self.group = group

    def get_help_extra(self, ctx: click.Context) -> Any:
        extra = super().get_help_extra(ctx)
        extra.pop("range", None)  # an N counts from 1, and errors tell ranges
        return extra

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        shown = copy.copy(self)
        shown.opts = [name for name in self.opts if name not in ORIGINAL_FLAGS]
        return click.Option.get_help_record(shown, ctx) if shown.opts else None


def _refuse(ctx: click.Context, param: click.Parameter, value: object) -> None:
    if value:
        raise click.UsageError(
            f"sample: {param.opts[0]} must be left out: what a tokenizer or a VAE is, its file says. "
            "Name one that is not in or beside the model's file with --tokenizer or --vae."
        )


def _refused(flag: str) -> _Option:
    return _Option(flag, group=_ORIGINAL, is_flag=True, expose_value=False, callback=_refuse)


_PROMPTS, _JOB, _MODEL, _DRAWING = "Prompts", "The job", "The model", "Drawing"
_BEST, _MANY, _TOLD, _AGAIN = "The best", "Many", "What is told", "One picture again"
_ORIGINAL = "Flags of the original's generate.py"
_FILE = click.Path(dir_okay=False, path_type=Path)
_N = click.IntRange(1)

PARAMETERS: list[click.Parameter] = [
    click.Argument(["prompts"], nargs=-1),
    _Option("--prompts", "prompt_file", group=_PROMPTS, metavar="FILE",
            help="A prompt a line, drawn after those given as arguments; - is standard input."),
    _Option("--text", group=_PROMPTS),
    _Option("--gentxt", group=_PROMPTS, is_flag=True),
    _Option("--truncate", group=_PROMPTS, is_flag=True, help="Cut prompts that are too long for the model."),
    _Option("--out", "--outputs_dir", group=_JOB, type=click.Path(path_type=Path), metavar="DIR",
            default=Path("drawn"), show_default=True,
            help="Where everything goes. What is there already is not drawn again: the same command goes on."),
    _Option("--images-per-prompt", "--num_images", group=_JOB, type=_N, metavar="N", default=4, show_default=True),
    _Option("--seed", group=_JOB, type=click.IntRange(0, 2**64 - 1), metavar="N", default=0, show_default=True,
            help="Of a prompt's first picture; the others count on."),
    _Option("--config", group=_JOB, type=_FILE, metavar="FILE", is_eager=True,
            callback=lambda ctx, param, value: read_config(ctx, value),
            help="YAML with names of options (underscores) and values, such as the config.yaml of a job; "
                 "the command line wins."),
    _Option("--model", "--dalle_path", group=_MODEL, type=click.Path(path_type=Path), metavar="DIR|FILE",
            help="A saved model, or a DALLE of another package; default: the shipped one."),
    _Option("--tokenizer", "--bpe_path", group=_MODEL, **COMPANIONS["tokenizer"]),
    _Option("--vae", "--vqgan_model_path", group=_MODEL, **COMPANIONS["vae"]),
    _Option("--yaml", "--vqgan_config_path", group=_MODEL, **COMPANIONS["yaml"]),
    _Option("--device", group=_MODEL, metavar="NAME", default="cpu", show_default=True,
            help="Torch's name of one, such as cuda."),
    _Option("--dtype", group=_MODEL, type=click.Choice(DTYPES), default="float32", show_default=True,
            help="What weights are held as."),
    _Option("--engine", group=_MODEL, type=click.Choice(ENGINES), default="auto", show_default=True,
            help="auto: cpu where it can run the model, otherwise eager."),
    _Option("--temperature", group=_DRAWING, type=float,
            help="0 draws the most likely picture. Default of this and the next three: the model's own."),
    _Option("--top-k", group=_DRAWING, type=_N, metavar="N", help="Choose among this many codes."),
    _Option("--top_k", "filter_thres", group=_DRAWING, type=_Share()),
    _Option("--top-p", group=_DRAWING, type=float, help="Choose among the fewest codes of this probability."),
    _Option("--cond-scale", group=_DRAWING, type=float, help="Guidance by the prompt; 1 is none."),
    _Option("--prime", group=_DRAWING, type=_FILE, metavar="IMAGE", help="Keep its upper rows, draw the others."),
    _Option("--prime-rows", group=_DRAWING, type=_N, metavar="N", help="Rows of codes to keep; default: 7/16 of them."),
    _Option("--inpaint", group=_DRAWING, type=_FILE, metavar="IMAGE", help="Keep it where the mask is black."),
    _Option("--mask", group=_DRAWING, type=_FILE, metavar="IMAGE", help="White where to draw anew, of the same size."),
    _Option("--rank", group=_BEST, metavar="CLIP|MODULE:FUNCTION",
            help="What scores pictures: a CLIP's directory or file (OpenAI's, open_clip's, Hugging Face's), or a "
                 "function (prompts, images in 0..1) -> scores."),
    _Option("--keep", group=_BEST, type=_N, metavar="N",
            help="Keep the best N pictures a prompt; codes and scores of all of them stay. "
                 "Without --rank the model's own CLIP ranks."),
    _Option("--batch-size", "--batch_size", group=_MANY, type=_Automatic(), default="auto", show_default=True,
            help="Samples that are drawn, and stored, at a time."),
    _Option("--max-memory", group=_MANY, type=_Size(), metavar="SIZE",
            help="Memory that a process may take, such as 4GiB (engine cpu)."),
    _Option("--workers", group=_MANY, type=_N, metavar="N", help="Processes that draw; with --ray actors."),
    _Option("--shard", group=_MANY, type=_Shard(), help="Draw this part alone; `dalle-fast merge` puts them together."),
    _Option("--ray", group=_MANY, metavar="ADDRESS", help="Draw on a Ray cluster; local starts one here."),
    _Option("--preview", group=_TOLD, type=_N, metavar="ROWS",
            help="Write OUT/preview.png whenever this many more rows are drawn; not with --workers or --ray."),
    _Option("--json", group=_TOLD, is_flag=True, help="End with one line of JSON."),
    _Option("--quiet", group=_TOLD, is_flag=True, help="Tell nothing but what is wrong."),
    _Option("--from-manifest", group=_AGAIN, type=_FILE, metavar="FILE",
            help="Draw one sample of a manifest.jsonl once more, into --out."),
    _Option("--index", group=_AGAIN, type=click.IntRange(0), metavar="I", help="Its index there."),
    _Option("--model-hash", group=_MODEL, hidden=True),
    _Option("--known-hash", group=_DRAWING, hidden=True),
    *(_refused(flag) for flag, meaning in ORIGINAL_FLAGS.items() if meaning == _TOLD_APART),
]  # fmt: skip


class GroupedCommand(click.Command):
    """A command whose help shows its options in their groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {_PROMPTS: [("PROMPTS", "What to draw, a text each.")]}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and isinstance(param, click.Option):
                groups.setdefault(getattr(param, "group", _TOLD), []).append(record)
        meanings = [(flag, meaning) for flag, meaning in ORIGINAL_FLAGS.items() if meaning != _TOLD_APART]
        refused = ", ".join(flag for flag, meaning in ORIGINAL_FLAGS.items() if meaning == _TOLD_APART)
        groups[_ORIGINAL] = [*meanings, (refused, _TOLD_APART)]
        for group, records in groups.items():
            with formatter.section(group):
                formatter.write_dl(records)


def read_config(ctx: click.Context, path: Path | None) -> Path | None:
    """Makes the values of a YAML file the defaults of the command; null is as if it were not there.

    Raises: click.ClickException (unreadable, an unknown key, a value of the wrong kind).
    """
    if path is None:
        return None
    with in_sentences():
        from dalle_fast.jobs.job import read_mapping  # at call time: it imports torch

        try:
            stored = read_mapping(path.read_text(encoding="utf-8"), path)
        except UnicodeDecodeError as error:
            raise ValueError(f"sample: {path} must be YAML in UTF-8, got something else ({error}).") from None
        flags = {str(param.name): getattr(param, "is_flag", False) for param in ctx.command.params}
        known = {field.name for field in fields(SampleOptions)} - {"prompt_file", "config"}
        for key, value in stored.items():
            _check_value(path, key, value, known, flags)
    if isinstance(stored.get("prompts"), str):  # as behind --prompts
        stored["prompt_file"] = stored.pop("prompts")
    ctx.default_map = {key: value for key, value in stored.items() if value is not None}
    return path


def _check_value(path: Path, key: str, value: object, known: set[str], flags: Mapping[str, bool]) -> None:
    if key not in known:
        near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.0)
        raise ValueError(f"sample: {path} must name options, got {key!r}. Did you mean {near[0]}?")
    if key == "prompts" and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return
    if key == "prompts" and not isinstance(value, str):
        raise ValueError(f"sample: {path}: prompts must be a list of texts or a file's name, got {value!r:.80}.")
    if value is not None and (not isinstance(value, str | int | float) or isinstance(value, bool) != flags[key]):
        kind = "true or false" if flags[key] else "one value"
        raise ValueError(f"sample: {path}: {key} must be {kind}, got {value!r:.80}.")
