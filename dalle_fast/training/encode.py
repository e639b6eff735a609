"""Pictures become codes once: `dalle-fast encode`. What is written is described in data/codes.py.

Shard k holds the pictures k shard_size .. (k + 1) shard_size - 1 of the source, `crops` times each. It appears whole or
not at all; the same call again goes on with those that are missing, and codes.json says in the end that all are there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from dalle_fast.compat.loading import load_vae
from dalle_fast.jobs.drawing_model import check_device
from dalle_fast.jobs.job import hash_model
from dalle_fast.training.data import open_samples
from dalle_fast.training.data.codes import MANIFEST, CodesManifest, count_samples, shard_paths
from dalle_fast.training.data.pictures import Pixels
from dalle_fast.training.data.samples import Samples, Unusable
from dalle_fast.training.data.source import Reads, SampleSource
from dalle_fast.training.order import Draw
from dalle_fast.whole_files import make_folder, remove_temporary, write_whole

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LARGEST_INT16 = 2**15  # codes of a larger codebook need 32 bits


def encode(
    source: str,
    vae: Path,
    out: Path,
    *,
    batch: int = 64,
    crops: int = 1,
    resize: str = "none",
    smallest_crop: float = 0.75,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    shard_size: int = 10_000,
    workers: int = 0,
    on_batch: Callable[[int, int], None] | None = None,
) -> CodesManifest:
    """Encodes pictures, with or without captions, into a folder of codes; the same call again goes on.

    Args:
        source: a folder of pictures, or shards.   vae: a saved VAE, or old weights.   out: the folder of codes.
        batch: pictures encoded together.   shard_size: pictures of a file.
        resize, smallest_crop: as in data/pictures.py ("paper" as for the transformer); crops: how often a picture is
            read, with draws of its own each time; seed: of these draws.
        device, dtype: of the VAE's arithmetic; dtype one of DTYPES.   workers: processes that read.
        on_batch: called with (samples done, samples of all shards).
    Returns: what codes.json says.
    Raises: FileNotFoundError, ValueError (data, sizes, other settings than the codes there have), TypeError (no VAE),
        OSError (disk).
    """
    if min(batch, crops, shard_size) < 1:
        raise ValueError(
            f"encode: batch, crops and shard_size must be at least 1, got {batch}, {crops} and {shard_size}."
        )
    if crops > 1 and resize == "none":
        raise ValueError(f"encode: resize must be upstream or paper for crops={crops}, got none. None draws nothing.")
    samples = open_samples(source, captioned=False)
    if samples.has_codes:
        raise ValueError(f"encode: the data must be pictures, got codes in {source}.")
    check_device(device)
    model = load_vae(vae, op="encode", dtype=DTYPES[dtype], device=device)
    manifest = CodesManifest(
        source=source,
        vae=str(vae),
        vae_hash=hash_model(vae, draws=False),
        num_tokens=model.num_tokens,
        image_seq_len=(model.image_size // 2**model.num_layers) ** 2,
        image_size=model.image_size,
        channels=model.channels,
        resize=resize,
        smallest_crop=smallest_crop,
        crops=crops,
        seed=seed,
        dtype=dtype,
        shard_size=shard_size,
        n_pictures=len(samples),
        keys_hash=_hash_keys(samples),
    )
    _start(out, manifest)
    return _encode_missing(samples, model, out, manifest, batch=batch, workers=workers, on_batch=on_batch)


def _hash_keys(samples: Samples) -> str:
    digest = hashlib.sha256()
    for index in range(len(samples)):
        digest.update(samples.key(index).encode() + b"\0")
    return digest.hexdigest()


def _start(out: Path, manifest: CodesManifest) -> None:
    """Makes the folder, or checks that the codes there are of the same call.

    Raises: ValueError (they are not, or the folder holds something else).
    """
    make_folder(out)
    remove_temporary(out)
    if not (out / MANIFEST).is_file():
        if any(out.iterdir()):
            raise ValueError(f"encode: out must be empty or hold codes, got other files in {out}. Name a new folder.")
        write_whole(out / MANIFEST, [manifest.to_json()])
        return
    there = asdict(replace(CodesManifest.read(out), counts=[], skipped=0, complete=False))
    # Where data and VAE lie may change; which pictures and which weights may not.
    now = {name: value for name, value in asdict(manifest).items() if name not in ("source", "vae")}
    different = [name for name, value in now.items() if there[name] != value]
    if different:
        pairs = ", ".join(f"{name} {there[name]!r}, now {now[name]!r}" for name in different)
        raise ValueError(f"encode: {out} must hold codes of the same call, got {pairs}. Name a new folder.")


def _encode_missing(
    samples: Samples,
    model: Any,
    out: Path,
    manifest: CodesManifest,
    *,
    batch: int,
    workers: int,
    on_batch: Callable[[int, int], None] | None,
) -> CodesManifest:
    n_shards = -(-manifest.n_pictures // manifest.shard_size)
    counts = [count_samples(out, number) for number in range(n_shards)]
    missing = [number for number, count in enumerate(counts) if count is None]
    parts = {number: _draws(manifest, number, batch) for number in missing}
    order = [draws for number in missing for draws in parts[number]]
    pixels = Pixels(
        manifest.image_size,
        manifest.channels,
        resize=manifest.resize,
        smallest_crop=manifest.smallest_crop,
        captioned=True,
    )
    reads = Reads(samples, torch.arange(len(samples)), pixels, None, seed=manifest.seed, replace=False)
    batches = SampleSource(samples).read(reads, order, workers=workers, pin_memory=next(model.parameters()).is_cuda)
    total = manifest.n_pictures * manifest.crops
    done = total - sum(len(draws) for draws in order)
    for number in missing:
        codes: list[Tensor] = []
        lines: list[dict[str, Any]] = []
        for draws in parts[number]:
            read = next(batches)
            if read["names"]:
                codes.append(_codes_of(model, read["pixels"]))
                lines.extend(_lines(samples, read, manifest.crops))
            done += len(draws)
            if on_batch is not None:
                on_batch(done, total)
        counts[number] = _write_shard(out, number, codes, lines, manifest)
    found = [count or 0 for count in counts]
    finished = replace(manifest, counts=found, skipped=total - sum(found), complete=True)
    if not sum(found):
        raise ValueError(
            f"encode: the data must hold a picture that opens, got {manifest.n_pictures} that do not. The log names "
            "each file and what is wrong with it."
        )
    write_whole(out / MANIFEST, [finished.to_json()])
    return finished


def _draws(manifest: CodesManifest, number: int, batch: int) -> list[list[Draw]]:
    """The batches of a shard: the crops of a picture follow one another."""
    pictures = range(number * manifest.shard_size, min((number + 1) * manifest.shard_size, manifest.n_pictures))
    draws = [Draw(index, index * manifest.crops + crop) for index in pictures for crop in range(manifest.crops)]
    return [draws[start : start + batch] for start in range(0, len(draws), batch)]


@torch.no_grad()
def _codes_of(model: Any, pixels: Tensor) -> Tensor:
    """uint8 [b, C, S, S] -> long [b, image_seq_len], on the CPU."""
    weight = next(model.parameters())
    return model.get_codebook_indices(pixels.to(weight.device, weight.dtype) / 255).cpu()


def _lines(samples: Samples, read: dict[str, Any], crops: int) -> Iterator[dict[str, Any]]:
    """What is kept beside the codes of a batch."""
    for index, position in zip(read["index"].tolist(), read["position"].tolist(), strict=True):
        try:
            captions = samples.captions(index)
        except Unusable:
            captions = []
        yield {
            "key": samples.key(index),
            "name": samples.name(index),
            "crop": position % crops,
            "captions": captions,
        }


def _write_shard(
    out: Path, number: int, codes: list[Tensor], lines: list[dict[str, Any]], manifest: CodesManifest
) -> int:
    dtype = torch.int16 if manifest.num_tokens <= _LARGEST_INT16 else torch.int32
    empty = torch.zeros(0, manifest.image_seq_len, dtype=torch.long)
    tensors = {
        "codes": torch.cat([empty, *codes]).to(dtype),
        "captioned": torch.tensor([bool(line["captions"]) for line in lines], dtype=torch.bool),
    }
    path, beside = shard_paths(out, number)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_whole(beside, [text.encode()])
    write_whole(path, [save(tensors)])
    return len(lines)
