"""The demo's data in memory: pictures without skin tone of a folder that `dalle-fast data emoji` wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dalle_fast.training.emoji import EmojiEntry, captions_of, read_index, read_pictures


@dataclass(frozen=True)
class EmojiData:
    """The pictures without skin tone: `pictures` is uint8 [n, 3, S, S], in the order of `entries`."""

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
