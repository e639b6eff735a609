"""Small models for the sampler's tests: every path matters, so nothing is left at its initial value."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from dalle_fast.models.dalle import DALLE
from dalle_fast.models.dvae import DiscreteVAE

ALL_TYPES = ("full", "axial_row", "axial_col", "conv_like")


def small_dalle(dtype=torch.float64, **options) -> DALLE:
    """5 text tokens, 8 x 8 image tokens of 30 codes."""
    torch.manual_seed(7)
    vae = DiscreteVAE(image_size=16, num_tokens=30, codebook_dim=8, num_layers=1, hidden_dim=8)
    settings = {
        "dim": 32,
        "num_text_tokens": 20,
        "text_seq_len": 5,
        "depth": 4,
        "heads": 2,
        "dim_head": 16,
        "attn_types": ALL_TYPES,
    }
    model = DALLE(vae=vae, **{**settings, **options})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".scale"):
                parameter.uniform_(0.3, 0.8)
            elif name.startswith(("to_logits.weight", "image_emb", "text_emb")):
                parameter.mul_(3)  # logits far enough apart that a wrong cache changes the tokens
    return model.to(dtype).eval()


def prompts(batch: int) -> torch.Tensor:
    """Text ids [batch, 5], one with padding."""
    text = torch.randint(1, 20, (batch, 5), generator=torch.Generator().manual_seed(batch))
    text[-1:, 3:] = 0
    return text


def small_tokenizer(*more: str) -> Tokenizer:
    """Of six words, and those that are given."""
    words = ["[PAD]", "red", "green", "apple", "a", "flag", *more]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def saved_model(directory: Path, **options) -> Path:
    """`small_dalle` in float32, saved with `small_tokenizer`, captions and examples; returns the directory."""
    small_dalle(torch.float32, **options).save_pretrained(directory, tokenizer=small_tokenizer())
    (directory / "captions.txt").write_text("red apple\ngreen apple\n")
    (directory / "examples.txt").write_text("red apple\na flag\n")
    return directory
