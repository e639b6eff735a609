"""`python -m benchmarks.int8_loss DATA`: the loss of a saved model beside that of its weights in bfloat16 and 8 bits.

DATA is a folder of `dalle-fast data emoji`. The pictures are those held out from the VAE (the shipped transformer has
seen all of them), each with its main caption; the loss is of image codes alone, in nats a code, by teacher forcing with
float32 products of the rounded weights.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.decoding import rounded_to_int8
from dalle_fast.models.dalle import DALLE

SHIPPED = Path(__file__).resolve().parent.parent / "assets" / "emoji-64"
BATCH = 32


@torch.no_grad()
def image_loss(model: DALLE, text: Tensor, codes: Tensor) -> float:
    """Mean nats a code, for ids [n, text_seq_len] and codes [n, image_seq_len]."""
    total = 0.0
    first = model.layout.text_len - 1
    for ids, own in zip(text.split(BATCH), codes.split(BATCH), strict=True):
        logits = model(ids, own)[:, first:, model.num_text_tokens :]
        total += F.cross_entropy(logits.flatten(0, 1).double(), own.flatten(), reduction="sum").item()
    return total / codes.numel()


def losses(model: DALLE, text: Tensor, codes: Tensor) -> dict[str, float]:
    """{what the weights are held as: nats a code}."""
    own = copy.deepcopy(model).float().eval()
    held = {"float32": own, "bfloat16": copy.deepcopy(own).bfloat16().float(), "int8": rounded_to_int8(own)}
    return {name: image_loss(one, text, codes) for name, one in held.items()}


def main() -> int:
    from dalle_fast.tokenizers.hug import HugTokenizer  # tokenizers, numpy: only this command needs them
    from dalle_fast.training.emoji_data import EmojiData

    parser = argparse.ArgumentParser(prog="python -m benchmarks.int8_loss", description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", type=Path, default=SHIPPED, help="a saved model; default: the shipped one")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    options = parser.parse_args()
    data, model = EmojiData.read(options.data), DALLE.from_pretrained(options.model).float().eval()
    held_out = data.held_out
    names = [entry.caption for entry, out in zip(data.entries, held_out.tolist(), strict=True) if out]
    text = HugTokenizer(options.model / "tokenizer.json").tokenize(names, model.text_seq_len)
    found = losses(model, text, model.vae.get_codebook_indices(data.pictures[held_out].float() / 255))
    if options.json:
        print(json.dumps({"pictures": len(names)} | found))
        return 0
    print(f"{len(names)} pictures, nats a code")
    for name, loss in found.items():
        print(f"{name:>9} {loss:.5f}  {100 * (loss / found['float32'] - 1):+.3f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
