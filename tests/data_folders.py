"""Folders, shards and settings that the tests of training data share."""

import io
import json
import tarfile
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from dalle_fast.tokenizers.hug import HugTokenizer
from dalle_fast.tokenizers.training import train_tokenizer
from dalle_fast.training.data import open_source

WORDS = ("red", "green", "small", "bird", "apple", "flag", "on", "a", "the", "house")
SIZE = 8


def picture(i: int, width: int = SIZE, height: int = SIZE) -> Image.Image:
    """A picture of noise that i decides."""
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(i: int, kind: str = "png", **size: int) -> bytes:
    """The file of `picture(i)`."""
    buffer = io.BytesIO()
    picture(i, **size).save(buffer, kind)
    return buffer.getvalue()


def captions(i: int, n: int = 3) -> list[str]:
    """n captions that i decides, each of at least three words."""
    return [f"{WORDS[i % 3]} {WORDS[3 + (i + line) % 3]} on the house" for line in range(n)]


def write_pair(folder: Path, name: str, i: int, *, text: str | None = None, **size: int) -> None:
    """name.png and name.txt."""
    path = folder / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(i, **size))
    path.with_suffix(".txt").write_text("\n".join(captions(i)) if text is None else text)


def write_folder(folder: Path, n: int = 6, **size: int) -> Path:
    """n pairs, half of them a folder deeper."""
    for i in range(n):
        write_pair(folder, f"{i:03d}" if i < n // 2 else f"deeper/{i:03d}", i, **size)
    return folder


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """A tar of these files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_shards(folder: Path, n: int = 6, shards: int = 2) -> str:
    """The samples of `write_folder` in tars, captions as text in the first, as JSON in the others; their pattern."""
    for shard in range(shards):
        members = {}
        for i in range(shard * n // shards, (shard + 1) * n // shards):
            members[f"{i:03d}.png"] = encoded(i)
            if shard:
                members[f"{i:03d}.json"] = json.dumps({"caption": captions(i), "url": "of it"}).encode()
            else:
                members[f"{i:03d}.txt"] = "\n".join(captions(i)).encode()
        write_tar(folder / f"{shard:03d}.tar", members)
    return f"{folder}/{{000..{shards - 1:03d}}}.tar"


def tokenizer(folder: Path) -> HugTokenizer:
    """A BPE over the captions."""
    path = folder / "tokenizer.json"
    train_tokenizer([line for i in range(9) for line in captions(i)], 290).save(str(path))
    return HugTokenizer(path)


def config(source, **options) -> SimpleNamespace:
    """A DataConfig in all but its checks, which need pydantic."""
    settings = {
        "source": str(source),
        "resize": "upstream",
        "smallest_crop": 0.5,
        "truncate": False,
        "first_caption": None,
        "word_dropout": 0.3,
        "bpe_dropout": 0.2,
        "flip": True,
        "augment": "none",
        "held_out": 0.0,
        "workers": 0,
    }
    return SimpleNamespace(**{**settings, **options})


def opened(source, tokenizer=None, *, need=("pixels", "text"), text_seq_len=24, image_size=SIZE, **options):
    """The source, for pictures of 8 x 8; keywords of `open_source` or else of the configuration."""
    names = {"vae", "num_tokens", "image_seq_len"} & options.keys()
    model = {name: options.pop(name) for name in names}
    if tokenizer is None:
        need = set(need) - {"text"}
    return open_source(
        config(source, **options),
        image_size=image_size,
        channels=3,
        tokenizer=tokenizer,
        text_seq_len=text_seq_len if tokenizer else None,
        need=need,
        **model,
    )


def batches(source, *, rank=0, world=1, batch=4, micro_batch=4, first_step=0, steps=3, seed=0, workers=0):
    """The micro-batches of a few steps."""
    loader = source.loader(
        rank=rank,
        world=world,
        batch=batch,
        micro_batch=micro_batch,
        first_step=first_step,
        steps=steps,
        seed=seed,
        workers=workers,
        pin_memory=False,
    )
    return list(loader)


def assert_same(first, second):
    """Two lists of micro-batches hold the same samples in the same order, however they are cut."""
    for field in first[0].keys() | second[0].keys():
        ours, theirs = ([batch[field] for batch in side] for side in (first, second))
        if field == "names":
            assert [*chain(*ours)] == [*chain(*theirs)]
        else:
            assert torch.equal(torch.cat(ours), torch.cat(theirs)), field
