"""Pages that show what a job drew: one a prompt that needs no other file, and one that links to them.

What comes from outside (prompts, names, paths) goes through jinja2's escaping; the templates have no scripts.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_SHOWN = 256  # CSS pixels that smaller pictures are enlarged to, by a whole factor
_MOST_SHOWN = 512
_SHOWN_ON_INDEX = 128
_TITLE = 80  # characters
_AT_ONCE = 32  # pieces of a page, about three pictures


@dataclass(frozen=True)
class Picture:
    """A picture on a prompt's page.

    Attributes: name, index: of its sample.   score: None without a ranker.   path: its PNG.
    """

    name: str
    index: int
    seed: int
    score: float | None
    path: Path

    def data_uri(self) -> str:
        """The file, as a page holds it; read only when the page comes to it."""
        return f"data:image/png;base64,{base64.b64encode(self.path.read_bytes()).decode()}"


@dataclass(frozen=True)
class PromptOnIndex:
    """A prompt on the page that links to them all: where its own page is, and pictures, best first, as links."""

    text: str
    page: str
    images: tuple[str, ...]


def gallery_page(
    prompt: str, pictures: list[Picture], *, n_drawn: int, ranked: bool, facts: Mapping[str, Any]
) -> Iterator[bytes]:
    """The page of one prompt, piece by piece, so that its pictures are not all in memory.

    Args:
        pictures: in the order in which they are shown, at least one, all of one size.
        n_drawn: how many there were to choose from.   ranked: whether `pictures` begins with the best.
        facts: shown as settings.
    """
    width, height = _size(pictures[0].path.read_bytes())
    kept = "all kept" if len(pictures) == n_drawn else f"the best {len(pictures)} kept"
    order = ", best first" if ranked else ""
    return _encoded(
        "gallery.html",
        title=shortened(prompt), prompt=prompt, pictures=pictures, facts=list(facts.items()),
        counted=f"{_counted(n_drawn, 'picture')} drawn, {kept}{order}", width=width, height=height,
        **_shown(width, _SHOWN, _MOST_SHOWN),
    )  # fmt: skip


def index_page(prompts: Iterable[PromptOnIndex], *, n_prompts: int, n_drawn: int, first_image: Path) -> Iterator[bytes]:
    """The page that links to the prompts' pages, piece by piece.

    Args: n_prompts: how many there are.   n_drawn: pictures of each.   first_image: any of them, all being of one size.
    """
    width, _ = _size(first_image.read_bytes())
    each = " each" if n_prompts > 1 else ""
    return _encoded(
        "index.html",
        title=_counted(n_prompts, "prompt"), prompts=prompts, counted=f"{_counted(n_drawn, 'picture')} drawn{each}",
        **_shown(width, _SHOWN_ON_INDEX, _SHOWN_ON_INDEX),
    )  # fmt: skip


def shortened(prompt: str) -> str:
    """A prompt on one line, cut where it is long."""
    line = " ".join(prompt.split())
    return line if len(line) <= _TITLE else line[: _TITLE - 3].rstrip() + "..."


def _encoded(template: str, **values: Any) -> Iterator[bytes]:
    pieces = _TEMPLATES.get_template(template).stream(**values)
    pieces.enable_buffering(_AT_ONCE)
    for piece in pieces:
        yield piece.encode()


def _shown(width: int, least: int, most: int) -> dict[str, int | bool]:
    """How wide a picture is shown, in CSS pixels, and whether that enlarges it."""
    factor = max(1, least // width)
    return {"shown": min(width * factor, most), "enlarged": factor > 1}


def _size(png: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(png)) as image:
        return image.size


def _counted(n: int, thing: str) -> str:
    return f"1 {thing}" if n == 1 else f"{n} {thing}s"
