"""Files of weights with one thing wrong, or many: each is made of a seed."""

from __future__ import annotations

import io
import json
import pickletools
import random
import struct
from collections.abc import Callable

import torch
from crafted_files import (
    archive_of,
    archive_with_pickle,
    lightning_state,
    pickled,
    records_of,
    saved,
    scripted,
    tensor_opcodes,
    text,
    training_state,
)
from openai_dvae_files import original_state, tiny
from safetensors.torch import save
from small_vqgans import small_vqgan
from torch import nn

from dalle_fast.clip.model import PretrainedCLIP
from dalle_fast.clip.names import to_openai
from dalle_fast.compat.checkpoints import upstream_checkpoint
from dalle_fast.compat.formats.taming_vqgan import taming_names
from dalle_fast.models.dalle import DALLE
from dalle_fast.models.dvae import DiscreteVAE

_CALLS = ("os\nsystem", "posix\nsystem", "builtins\neval", "builtins\ngetattr", "torch\nload", "subprocess\nPopen")
_NAMES = (
    "torch._utils\n_rebuild_tensor_v2", "torch._utils\n_rebuild_tensor_v3", "torch._utils\n_rebuild_parameter",
    "torch._tensor\n_rebuild_from_type_v2", "torch\ndevice", "torch\nFloatStorage", "torch.nn\nLinear",
    "_codecs\nencode", "collections\nOrderedDict", "builtins\nset", "copyreg\n_reconstructor",
    "numpy.core.multiarray\nscalar",
)  # fmt: skip
_ABSURD = (-1, -(1 << 31), 1 << 20, 1 << 31, (1 << 31) - 1, 1 << 40, 1 << 62, (1 << 63) - 1, 1 << 64, 1 << 500)


def corpus() -> dict[str, bytes]:
    """Good files of every container."""
    state = training_state()
    torch.manual_seed(4)
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    files = {
        "zip": saved(state),
        "zip4": saved(state, protocol=4),
        "legacy": saved(state, legacy=True),
        "module": saved(module),
        "module_legacy": saved(module, legacy=True),
        "torchscript": scripted(),
        "lightning": lightning_state(),
        "safetensors": save({"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.ones(2, dtype=torch.bfloat16)}),
    }
    return files | known_layouts() | {"deflated": archive_of(records_of(files["zip"]), deflated=True)}


def known_layouts() -> dict[str, bytes]:
    """Small files of layouts that we know, without their tensors' meaning."""
    torch.manual_seed(6)
    vae = DiscreteVAE(image_size=16, num_tokens=12, codebook_dim=6, num_layers=2, hidden_dim=4)
    dalle = DALLE(dim=16, vae=vae, num_text_tokens=9, text_seq_len=4, depth=1, heads=2, dim_head=8)
    vqgan = small_vqgan("vq")
    names = taming_names(vqgan)
    clip = PretrainedCLIP(
        embed_dim=8, image_size=16, patch_size=8, vision_width=64, vision_layers=1, vocab_size=20, context_length=5,
        text_width=64, text_layers=1,
    )  # fmt: skip
    return {
        "dalle": saved(upstream_checkpoint(dalle)),
        "vae": saved(upstream_checkpoint(vae), legacy=True),
        "openai_dvae": save({name: tensor.contiguous() for name, tensor in original_state(tiny()).items()}),
        "vqgan": saved({"state_dict": {names[name]: tensor for name, tensor in vqgan.state_dict().items()}}),
        "clip": saved(to_openai(clip.state_dict())),
    }


def mutated(files: dict[str, bytes], seed: int) -> tuple[str, bytes]:
    """What was done, and the file."""
    choose = random.Random(seed)
    name = choose.choice(sorted(files))
    mutation = choose.choice(_MUTATIONS)
    return f"{mutation.__name__.strip('_')} of {name}", mutation(files[name], choose)


def _truncated(data: bytes, choose: random.Random) -> bytes:
    return data[: choose.randrange(len(data))]


def _bits_flipped(data: bytes, choose: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(choose.choice((1, 1, 2, 8, 64))):
        changed[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
    return bytes(changed)


def _head_or_tail_flipped(data: bytes, choose: random.Random) -> bytes:
    """Where headers and directories are."""
    changed, n = bytearray(data), min(len(data), 600)
    for _ in range(choose.choice((1, 2, 4))):
        at = choose.randrange(n)
        changed[at if choose.random() < 0.5 else -1 - at] = choose.choice(
            (0, 1, 0x7F, 0x80, 0xFF, choose.randrange(256))
        )
    return bytes(changed)


def _blocks_moved(data: bytes, choose: random.Random) -> bytes:
    first, last = sorted(choose.choices(range(len(data)), k=2))
    block = data[first:last][: choose.choice((1, 8, 64, 4096))]
    at = choose.randrange(len(data))
    return choose.choice(
        (data[:first] + data[last:], data[:at] + block + data[at:], data[:at] + block + data[at + len(block) :])
    )


def _with_pickle_changed(data: bytes, choose: random.Random, change: Callable[[bytes], bytes]) -> bytes:
    """The pickle of the data changed where it is, the container whole around it."""
    if data.startswith(b"PK"):
        records = records_of(data)
        name = next(name for name in records if name.endswith("/data.pkl"))
        return archive_of({**records, name: change(records[name])}, deflated=choose.random() < 0.1)
    if data.startswith(b"\x80"):
        stream = io.BytesIO(data)
        ends = [0]
        for _ in range(5):
            for _ in pickletools.genops(stream):
                pass
            ends.append(stream.tell())
        which = choose.choice((2, 3, 3, 3, 4))
        return data[: ends[which]] + change(data[ends[which] : ends[which + 1]]) + data[ends[which + 1] :]
    return _header_changed(data, choose)


def _opcodes_changed(data: bytes, choose: random.Random) -> bytes:
    def change(stream: bytes) -> bytes:
        starts = [at for _, _, at in pickletools.genops(stream)]
        codes = [stream[a:b] for a, b in zip(starts, [*starts[1:], len(stream)], strict=True)]
        for _ in range(choose.choice((1, 1, 2, 5))):
            at, other = choose.randrange(len(codes)), choose.randrange(len(codes))
            match choose.randrange(5):
                case 0:
                    del codes[at]
                case 1:
                    codes.insert(at, codes[other])
                case 2:
                    codes[at], codes[other] = codes[other], codes[at]
                case 3:
                    codes.insert(at, _random_opcode(choose))
                case _:
                    codes[at] = _random_opcode(choose)
            codes = codes or [b"."]
        return b"".join(codes)

    return _with_pickle_changed(data, choose, change)


def _numbers_changed(data: bytes, choose: random.Random) -> bytes:
    """Shapes, strides, offsets, numbers of values: absurd ones."""

    def change(stream: bytes) -> bytes:
        ops = list(pickletools.genops(stream))
        ends = [*(at for _, _, at in ops[1:]), len(stream)]
        integers = [i for i, (op, _, _) in enumerate(ops) if op.name in ("BININT1", "BININT2", "BININT")]
        for i in sorted(choose.sample(integers, min(len(integers), choose.choice((1, 1, 3)))), reverse=True):
            value = choose.choice((*_ABSURD, choose.randrange(100))).to_bytes(70, "little", signed=True)
            stream = stream[: ops[i][2]] + b"\x8a\x46" + value + stream[ends[i] :]
        return stream

    return _with_pickle_changed(data, choose, change)


def _random_opcode(choose: random.Random) -> bytes:
    number = struct.pack("<I", choose.choice((0, 1, 5, 200, 1 << 16, (1 << 31) - 1, (1 << 32) - 1)))
    name = choose.choice(_CALLS * 2 + _NAMES * 3)
    return choose.choice(
        (
            bytes([choose.randrange(256)]), *(bytes([code]) for code in b"N(012]})aesuRbQtldo.\x81\x85\x86\x87"),
            *(bytes([code]) for code in b"\x8f\x90\x91\x92\x93\x94"),
            *(code + number for code in (b"J", b"X", b"B", b"r", b"j", b"\x8b")), b"q" + number[:1], b"h" + number[:1],
            *(code + number + number for code in (b"\x8d", b"\x8e", b"\x95", b"\x96")),
            text(choose.choice(("storage", "0", "cpu", "module", "é" * 40))),
            b"G" + bytes(choose.randrange(256) for _ in range(8)), b"c" + name.encode() + b"\n",
        )
    )  # fmt: skip


def _header_changed(data: bytes, choose: random.Random) -> bytes:
    """Of safetensors; of other files a bit."""
    if data[8:9] != b"{":
        return _bits_flipped(data, choose)
    n = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + n]), data[8 + n :]
    entry = header[choose.choice(sorted(header))]
    match choose.randrange(7):
        case 0:
            entry["shape"] = [choose.choice(_ABSURD[2:7]) for _ in range(choose.randrange(1, 5))]
        case 1:
            entry["data_offsets"] = [choose.choice((0, 8, 1 << 40)), choose.choice((0, 4, 1 << 40, 1 << 63))]
        case 2:
            entry["dtype"] = choose.choice(("F128", "F8_E4M3", "BOOL", "", "I64", "F4"))
        case 3:
            header = [header]
        case 4:
            return struct.pack("<Q", choose.choice((0, 1, len(data), len(data) - 8, 1 << 40, (1 << 64) - 1))) + data[8:]
        case 5:
            header["more"] = choose.choice((None, 1, [], {}, "x", {"dtype": "F32"}))
        case _:
            nested = b'{"a":' * 3000 + b"[" * 3000
            return struct.pack("<Q", len(nested)) + nested + rest
    stream = json.dumps(header).encode()
    return struct.pack("<Q", len(stream)) + stream + rest


def _archive_changed(data: bytes, choose: random.Random) -> bytes:
    """Records lost, added, exchanged, emptied; names that lead elsewhere."""
    if not data.startswith(b"PK"):
        return _blocks_moved(data, choose)
    records = list(records_of(data).items())
    for _ in range(choose.choice((1, 2))):
        at, other = choose.randrange(len(records)), choose.randrange(len(records))
        name, content = records[at]
        match choose.randrange(5):
            case 0 if len(records) > 1:
                del records[at]
            case 1:
                records[at] = name, records[other][1]
            case 2:
                records[at] = name, content[: choose.randrange(len(content) + 1)]
            case 3:
                records[at] = (
                    choose.choice(("../../outside", "/outside", "a\0b", "", "\\x", "archive/data/../0")),
                    content,
                )
            case _:
                records.append((choose.choice(("archive/byteorder", "archive/constants.pkl", "x/data.pkl")), b"big"))
    named = dict(records)
    return archive_of(named, deflated=choose.random() < 0.3)


def _bomb(data: bytes, choose: random.Random) -> bytes:
    n = choose.choice((50, 2000, 60_000))
    number = choose.choice(_ABSURD[2:8])
    stream = choose.choice(
        (
            b"N" + b"2\x86" * n, b"]" * n + b"a" * (n - 1), b"(" * n, b"(" + b"]" * n + b"l", b"}" + b"2N" * n + b"N2s",
            b"](" + b"N" * n + b"eq\0" + b"cbuiltins\nlist\nh\0\x85R" * 300, b"X\xff\xff\xff\x7f" + bytes(n),
            b"".join(b"]r" + struct.pack("<I", i) + b"0" for i in range(n)) + b"N", b"\x8b\xff\xff\xff\x7f" + bytes(n),
            b"ctorch.nn\nLinear\n)R" + b"q\0}X\1\0\0\0ah\0sb" * min(n, 2000),
            tensor_opcodes((number,), (0,))[:-1], tensor_opcodes((4,), (1,), n=number)[:-1],
            tensor_opcodes((number, 0), (number, number))[:-1], tensor_opcodes((2,) * 12, (0,) * 12)[:-1],
            text("n" * 60_000) + b"q\0" + b"\x8c\x08torch.nnh\0\x93" * n, text("n" * 60_000) + b"q\0" + b"h\0}" * n,
            b"V" + b"\\U0001F600" * n + b"\n", text("é" * n), b"L" + b"9" * n + b"L\n",
        )
    )  # fmt: skip
    if choose.random() < 0.15:
        magic = b"".join(pickled(value) for value in (0x1950A86A20F9469CFC6C, 1001))
        return magic + (b"\x80\x02" + stream + b".") * choose.choice((1, 3))
    if choose.random() < 0.2:
        size = choose.choice((1 << 12, 1 << 22, 1 << 25))
        content = {"archive/data.pkl": stream + b".", "archive/data/0": bytes(size)}
        return archive_of(content, deflated=True)
    return archive_with_pickle(stream + b".")


def _turned(data: bytes, choose: random.Random) -> bytes:
    """Its end first."""
    at = choose.randrange(len(data))
    return data[at:] + data[:at]


_MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _truncated, _bits_flipped, _head_or_tail_flipped, _blocks_moved, _opcodes_changed, _opcodes_changed,
    _numbers_changed, _header_changed, _archive_changed, _bomb, _turned,
)  # fmt: skip
