"""`dalle-fast info`: what a file of weights is, without running anything of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dalle_fast.cli.sentences import in_sentences

if TYPE_CHECKING:
    from dalle_fast.compat.reading import Stored

_SHOWN_VALUE, _SHOWN_LINE = 100, 4000


@click.command()
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
def info(path: Path, as_json: bool) -> None:
    """Say what FILE is: its layout, its architecture, whether we can run it, how many values it holds.

    FILE: .pt, .pth, .ckpt, .bin, .pkl, .safetensors, or a directory. Nothing that it holds is run.
    """
    with in_sentences():
        from dalle_fast.compat.formats.recognise import recognise  # at call time: --help needs none of it
        from dalle_fast.compat.reading import read

        stored = read(path)
        try:
            description = recognise(stored).describe(stored)
        except ValueError:
            # What is known of an unknown layout is said before the sentence that ends the command.
            if stored.container != "directory":
                _tell({"path": str(path)} | _sizes(stored), as_json)
            raise
        named = {
            "path": str(path), "kind": description.kind, "format": description.format,
            "runs": not description.problem, "problem": description.problem,
        }  # fmt: skip
        architecture = {str(key): _plain(value) for key, value in description.architecture.items()}
        _tell(named | _sizes(stored) | {"architecture": architecture}, as_json)


def _sizes(stored: Stored) -> dict[str, Any]:
    """How many values there are, and of what."""
    from dalle_fast.compat.measuring import tensors_in

    tensors, others = tensors_in(stored)
    dtypes: dict[str, int] = {}
    for tensor in tensors:
        name = str(tensor.dtype).removeprefix("torch.")
        dtypes[name] = dtypes.get(name, 0) + tensor.numel()
    files = [stored.path] if stored.path.is_file() else [path for path in stored.path.rglob("*") if path.is_file()]
    return {
        "container": stored.container, "bytes": sum(path.stat().st_size for path in files),
        "tensors": len(tensors), "values": sum(dtypes.values()), "dtypes": dtypes,
        "other_values": sum(tensor.numel() for tensor in others),
    }  # fmt: skip


def _tell(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(facts))
        return
    from dalle_fast.compat.nodes import printable  # at call time: its package imports torch

    lines = {"layout": facts.get("format", "unknown")}
    if "kind" in facts:
        lines["model"] = facts["kind"]
        lines["runs"] = "yes" if facts["runs"] else f"no: {facts['problem']}"
    lines["container"] = f"{facts['container']}, {facts['bytes']:,} bytes"
    dtypes = ", ".join(f"{n:,} {dtype}" for dtype, n in facts["dtypes"].items())
    lines["values"] = f"{facts['values']:,} in {facts['tensors']:,} tensors" + (f": {dtypes}" if dtypes else "")
    if facts["other_values"]:
        lines["values"] += f"; {facts['other_values']:,} others, of a trainer's state"
    if facts.get("architecture"):
        lines["arguments"] = ", ".join(f"{key}={_short(value)}" for key, value in facts["architecture"].items())
    click.echo(facts["path"])
    for name, text in lines.items():
        click.echo(f"  {name:<10} {printable(text, _SHOWN_LINE)}")


def _plain(value: object) -> object:
    """A value as JSON has it."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN_VALUE else text[:_SHOWN_VALUE] + "..."
