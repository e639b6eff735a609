"""What the C++ engine remembers: of prompts, which their samples share, and of samples."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from dalle_fast.native import decode
from dalle_fast.native.decode import DecodeCaches, DecodeDraw, DecodeLayerCache, DecodeModel, Rows, layer_caches
from dalle_fast.native.packing import in_arena
from dalle_fast.sampling.packed import PackedDALLE, ReadPrompt

ROWS_AT_ONCE = 512  # of texts, and of known codes, that one call reads: bounds its workspace


class Workspace:
    """Activations of calls, one after the other: memory for the call of most rows."""

    def __init__(self) -> None:
        self._memory, self._rows = torch.empty(0), 0

    def of(self, model: DecodeModel, rows: int) -> Tensor:
        """For a call with this many rows."""
        if rows != self._rows:  # it is laid out by the number of rows, with zeros between them
            floats = decode.workspace_floats(model, rows)
            if floats > len(self._memory):
                self._memory = torch.zeros(floats)
            else:
                self._memory[:floats].zero_()
            self._rows = rows
        return self._memory


class Texts:
    """Keys and values of prompts, and the logits behind each. Complete texts are shared, others go on by themselves.

    Args:
        model: with its text head where texts are not complete.
        texts: [P, n] ids, `<bos>` first; distinct where complete.
        known: some of them, read before.
        slack: longest step - 1 + longest rollback.
        workspace: of the engine.
    """

    def __init__(
        self, model: PackedDALLE, texts: Tensor, known: Mapping[bytes, ReadPrompt], slack: int, workspace: Workspace
    ) -> None:
        n = texts.shape[1]
        self.model, self._workspace = model, workspace
        self.shared = n == model.layout.text_len
        at_once = max(1, ROWS_AT_ONCE // n)
        self._ring_slots = 2 + max(slack, n - 1 + slack)
        n_rings = min(at_once, len(texts)) if self.shared else len(texts)
        sizes = model.sizes(0)
        (self.keys, self.values), self._arena = in_arena(lambda arena: sizes.text(len(texts), arena))
        self._rings, _ = in_arena(lambda arena: sizes.shift(n_rings, self._ring_slots, False, arena))
        names = prompt_names(texts)
        order = sorted(range(len(texts)), key=lambda i: names[i] not in known) if self.shared else range(len(texts))
        texts = texts[list(order)]
        self.index = {names[i]: place for place, i in enumerate(order)}
        self.logits = torch.empty(len(texts), model.n_codes if self.shared else model.n_text_ids)
        n_known = len(known) if self.shared else 0
        for place in range(n_known):
            prompt = known[names[order[place]]]
            self.keys[:, place], self.values[:, place], self.logits[place] = prompt.keys, prompt.values, prompt.logits
        for first in range(n_known, len(texts), at_once):
            some = texts[first : first + at_once]
            self.logits[first : first + len(some)] = self.read(first, some, 0, last_only=True)
        if self.shared:  # the image has no use for them
            self._rings = []

    @property
    def nbytes(self) -> int:
        return self._arena.used

    def prompt(self, name: bytes) -> ReadPrompt:
        """A copy of what is kept of one prompt."""
        i = self.index[name]
        return ReadPrompt(self.keys[:, i].clone(), self.values[:, i].clone(), self.logits[i].clone())

    def read(self, first: int, tokens: Tensor, start: int, *, last_only: bool) -> Tensor:
        """Reads tokens [k, M] at positions start .. of prompts first .. first + k - 1.

        Returns: logits of the last, or of all of them, one behind the other; image codes behind the end of the text.
        """
        k, m = tokens.shape
        model = self.model.structure(0)
        of_text = start + m < self.model.layout.text_len
        sequence, position = torch.arange(k)[:, None].expand(k, m), torch.arange(start, start + m).expand(k, m)
        rows = Rows(sequence, position, tokens, last_only=last_only, text_logits=of_text)
        logits = torch.empty(rows.wanted, self.model.n_text_ids if of_text else self.model.n_codes)
        text = self.keys[:, first : first + k], self.values[:, first : first + k]
        rings = [[ring[0 if self.shared else first :] for ring in layer] for layer in self._rings]
        layers = layer_caches(text, [], rings, [])
        none = torch.zeros(1, dtype=torch.long)
        caches = _caches(layers, none, self._ring_slots, 0)
        decode.run(model, caches, rows, logits, self._workspace.of(model, k * m))
        return logits


class Samples:
    """Image rings of sequences, and calls over them.

    Args:
        model: as of the texts.
        slack: longest call - 1 + longest rollback, in image tokens.
        room: sequences there is memory for.
        workspace: of the engine.
    """

    def __init__(self, model: PackedDALLE, slack: int, room: int, workspace: Workspace) -> None:
        self.model, self.slack, self.room, self._workspace = model, slack, room, workspace
        self._structure = model.structure(slack)
        self._ring_slots = model.layout.grid_cols + 1 + slack
        sizes = model.sizes(slack)
        (self._image, self._rings), self._arena = in_arena(
            lambda arena: (sizes.image(room, arena), sizes.shift(room, self._ring_slots, True, arena))
        )
        self._fresh = True

    @property
    def nbytes(self) -> int:
        return self._arena.used

    def begin(self, texts: Texts, prompt_of: Tensor) -> None:
        """Starts sequences behind these texts, which the caller keeps alive: one for each of `prompt_of`."""
        if not self._fresh:
            self._arena.clear()
        self._fresh = False
        self._prompt_of = prompt_of.contiguous()
        text = texts.keys, texts.values
        self._layers = layer_caches(text, self._image, [], self._rings)
        self._caches = _caches(self._layers, self._prompt_of, 0, self._ring_slots)

    def read(self, tokens: Tensor, start: int, *, last_only: bool) -> Tensor:
        """Reads codes [S, M], image tokens start .. start + M - 1. Returns: logits of the last, or of all of them."""
        s, m = tokens.shape
        first = self.model.layout.text_len + start
        sequence, position = torch.arange(s)[:, None].expand(s, m), torch.arange(first, first + m).expand(s, m)
        rows = Rows(sequence, position, tokens, last_only=last_only)
        logits = torch.empty(rows.wanted, self.model.n_codes)
        decode.run(self._structure, self._caches, rows, logits, self._workspace.of(self._structure, s * m))
        return logits

    def draw(self, draw: DecodeDraw, logits: Tensor) -> None:
        """Draws from logits [S, K] behind the prefix; leaves those behind what was drawn."""
        rows = Rows.to_draw(logits.shape[0])
        decode.run(
            self._structure, self._caches, rows, logits, self._workspace.of(self._structure, logits.shape[0]), draw
        )


def prompt_names(texts: Tensor) -> list[bytes]:
    """The ids of each text [P, n] as bytes."""
    return [text.tobytes() for text in texts.numpy()]


def _caches(
    layers: ctypes.Array[DecodeLayerCache], prompt_of: Tensor, text_slots: int, image_slots: int
) -> DecodeCaches:
    pointer = ctypes.cast(layers, ctypes.POINTER(DecodeLayerCache))
    return DecodeCaches(pointer, prompt_of.data_ptr(), text_slots, image_slots)
