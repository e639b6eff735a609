"""Tiny configurations, tokenizers and batches for the tests of what is trained."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from dalle_fast.models.dvae import DiscreteVAE
from dalle_fast.tokenizers.hug import HugTokenizer
from dalle_fast.training.config import ClipConfig, DalleConfig, VaeConfig

WORDS = ["[PAD]", "a", "red", "green", "apple", "owl", "flag"]
VAE = {"image_size": 16, "num_tokens": 12, "codebook_dim": 5, "num_layers": 2, "num_resnet_blocks": 1, "hidden_dim": 6}
DALLE = {"dim": 16, "depth": 2, "heads": 2, "dim_head": 12, "text_seq_len": 5, "attn_types": ["full", "axial_row"]}
CLIP = {
    "dim_text": 16, "dim_image": 16, "dim_latent": 8, "text_enc_depth": 1, "text_heads": 1, "text_seq_len": 5,
    "visual_enc_depth": 1, "visual_heads": 1, "visual_image_size": 16, "visual_patch_size": 8,
}  # fmt: skip
_SHARED = {"data": {"source": "nowhere"}}


def vae_config(*, model=None, batch=4, **settings) -> VaeConfig:
    loop = {"steps": 100, "batch": batch, "seed": 3}
    return VaeConfig.of({**_SHARED, "model": {**VAE, **(model or {})}, "loop": loop, **settings}, "a test")


def dalle_config(*, model=None, batch=4, **settings) -> DalleConfig:
    loop = {"steps": 100, "batch": batch, "seed": 3}
    return DalleConfig.of({**_SHARED, "model": {**DALLE, **(model or {})}, "loop": loop, **settings}, "a test")


def clip_config(*, model=None, batch=4, **settings) -> ClipConfig:
    loop = {"steps": 100, "batch": batch, "seed": 3}
    return ClipConfig.of({**_SHARED, "model": {**CLIP, **(model or {})}, "loop": loop, **settings}, "a test")


def vae(**changes) -> DiscreteVAE:
    torch.manual_seed(0)
    return DiscreteVAE(**{**VAE, **changes})


def tokenizer_file(folder):
    """tokenizer.json of six words; id 0 is padding."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def tokenizer(folder) -> HugTokenizer:
    return HugTokenizer(tokenizer_file(folder))


def batch_of(n=4, *, first=0, codes=False):
    """Samples `first` .. `first + n - 1`: each is the same whatever the others."""
    rows = []
    for position in range(first, first + n):
        generator = torch.Generator().manual_seed(100 + position)
        pixels = torch.randint(0, 256, (3, 16, 16), generator=generator, dtype=torch.uint8)
        text = torch.randint(1, len(WORDS), (5,), generator=generator)
        text[1 + position % 4 :] = 0
        rows.append((pixels, text, torch.randint(0, 12, (16,), generator=generator)))
    pixels, text, ids = (torch.stack(column) for column in zip(*rows, strict=True))
    batch = {"pixels": pixels, "text": text, "position": torch.arange(first, first + n)}
    if codes:
        batch["codes"] = ids
        del batch["pixels"]
    return batch


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before):
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
