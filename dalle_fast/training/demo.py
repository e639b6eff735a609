"""The demo's recipe: sizes of its models and the data they see, in one place.

Folders: `data` is what `dalle-fast data emoji` wrote; `run` collects a training: vae/ (a saved DiscreteVAE),
tokenizer.json, codes.safetensors (every picture encoded once), checkpoints, logs and model/ (the saved DALLE).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from dalle_fast.models.dalle import DALLE
from dalle_fast.models.dvae import DiscreteVAE
from dalle_fast.training.captions import VOCABULARY
from dalle_fast.training.emoji import PICTURE_SIZE, EmojiEntry, captions_of, read_index, read_pictures

TEXT_SEQ_LEN = 16
ATTENTION_TYPES = ("full", "axial_row", "axial_col", "conv_like")


@dataclass(frozen=True)
class EmojiData:
    """The pictures without skin tone: `pictures` is uint8 [n, 3, 64, 64], in the order of `entries`."""

    entries: list[EmojiEntry]
    pictures: Tensor

    @classmethod
    def read(cls, folder: Path) -> EmojiData:
        """From a folder of `write_folder`.

        Raises: ValueError (no index, or no picture without skin tone).
        """
        entries = [entry for entry in read_index(folder) if not entry.skin_tone]
        if not entries:
            raise ValueError(f"EmojiData: folder must hold pictures without skin tone, got none in {folder}.")
        return cls(entries, torch.from_numpy(read_pictures(folder, entries)))

    @property
    def held_out(self) -> Tensor:
        """bool [n]: kept from the dVAE's training."""
        return torch.tensor([entry.held_out for entry in self.entries])

    @property
    def captions(self) -> list[list[str]]:
        """The caption lines of every picture, its name first."""
        return [captions_of(entry) for entry in self.entries]


def build_vae() -> DiscreteVAE:
    """64x64 pictures, 16x16 codes out of 512, 0.6 M parameters."""
    return DiscreteVAE(
        image_size=PICTURE_SIZE, num_tokens=512, codebook_dim=32, num_layers=2, num_resnet_blocks=2, hidden_dim=64
    )


def build_dalle(vae: DiscreteVAE, tokenizer: Tokenizer) -> DALLE:
    """Four layers, one of each of the original's attention types, 256 wide: 5.2 M parameters beside the VAE's."""
    size = tokenizer.get_vocab_size()
    if size > VOCABULARY:
        raise ValueError(f"build_dalle: tokenizer must have at most {VOCABULARY} entries, got {size}. Train it again.")
    return DALLE(
        dim=256,
        vae=vae,
        num_text_tokens=VOCABULARY,
        text_seq_len=TEXT_SEQ_LEN,
        depth=4,
        heads=4,
        dim_head=64,
        attn_types=ATTENTION_TYPES,
    )
