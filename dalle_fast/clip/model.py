"""OpenAI's CLIP with a vision transformer: the model of their archives, of open_clip and of Hugging Face.

    logits = exp(logit_scale) <image feature / |image feature|, text feature / |text feature|>

It is not dalle_pytorch's CLIP (`dalle_fast.CLIP`): that one has means over positions where this one has a class token
and an end token, and other feed-forwards. `dalle_fast.clip.load` reads pretrained weights.

Source: Radford et al. 2021; OpenAI's CLIP, whose call `forward(image, text)` this is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dalle_fast.clip import names, preprocessing
from dalle_fast.clip.architecture import HEAD_WIDTH, why_not
from dalle_fast.clip.towers import ImageTower, TextTower
from dalle_fast.models.alone import computed_alone, each_alone, in_float32, widened
from dalle_fast.models.saving import Pretrained
from dalle_fast.models.state_dicts import check_shapes

_INITIAL_LOGIT_SCALE = 2.6592600  # log(1 / 0.07)


class PretrainedCLIP(Pretrained):
    """Scores how well pictures fit texts, with weights of OpenAI's architecture.

    Args:
        embed_dim: of the space that texts and pictures share.
        image_size, patch_size: side of a picture and of its patches, in pixels.
        vision_width, vision_layers, vision_heads, vision_hidden: C, blocks, H and the feed-forward's width of the image
            tower; None: a head for every 64 of C, 4 C.
        context_length: longest text, start and end token included.   vocab_size: of the texts.
        text_width, text_layers, text_heads, text_hidden: the same of the text tower.
        quick_gelu: x sigmoid(1.702 x) instead of the exact GELU.
        end_token: id whose first position gives a text's feature; None: the largest id in the text, as OpenAI.
        norm_eps: of every LayerNorm.
        image_mean, image_std: of the pixels the weights were trained with, channel by channel.
    Raises: ValueError (sizes that do not fit each other).
    """

    def __init__(
        self,
        *,
        embed_dim: int = 512,
        image_size: int = 224,
        patch_size: int = 32,
        vision_width: int = 768,
        vision_layers: int = 12,
        vision_heads: int | None = None,
        vision_hidden: int | None = None,
        context_length: int = 77,
        vocab_size: int = 49408,
        text_width: int = 512,
        text_layers: int = 12,
        text_heads: int | None = None,
        text_hidden: int | None = None,
        quick_gelu: bool = True,
        end_token: int | None = None,
        norm_eps: float = 1e-5,
        image_mean: Sequence[float] = preprocessing.MEAN,
        image_std: Sequence[float] = preprocessing.STD,
    ) -> None:
        super().__init__()
        if patch_size < 1 or image_size < patch_size or image_size % patch_size:
            raise ValueError(f"PretrainedCLIP: patch_size must divide image_size={image_size}, got {patch_size}.")
        if len(image_mean) != 3 or len(image_std) != 3:
            raise ValueError(
                f"PretrainedCLIP: image_mean and image_std must be three numbers each, got {list(image_mean)} and "
                f"{list(image_std)}."
            )
        self.image_size = image_size
        self.context_length = context_length
        self.vocab_size = vocab_size
        self.end_token = end_token
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)
        shared: dict[str, Any] = {"embed_dim": embed_dim, "quick_gelu": quick_gelu, "eps": norm_eps}
        self.image_tower = ImageTower(
            image_size=image_size, patch_size=patch_size, width=vision_width, layers=vision_layers,
            heads=_heads("vision", vision_width, vision_heads),
            hidden=4 * vision_width if vision_hidden is None else vision_hidden, **shared,
        )  # fmt: skip
        self.text_tower = TextTower(
            vocab_size=vocab_size, context_length=context_length, width=text_width, layers=text_layers,
            heads=_heads("text", text_width, text_heads),
            hidden=4 * text_width if text_hidden is None else text_hidden, **shared,
        )  # fmt: skip
        self.logit_scale = nn.Parameter(torch.tensor(_INITIAL_LOGIT_SCALE))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of every picture with every text, and the same turned.

        Args: as of encode_image and encode_text; their batches may differ.
        Returns: [n, m] and [m, n].
        Raises, Numerics: as encode_image; a logit does not depend on what else is compared.
        """
        images, texts = self.encode_image(image), self.encode_text(text)
        scale = self.logit_scale.to(images.dtype).exp()
        if self._together(image):
            logits = scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).t()
            return logits, logits.t()
        one, other = ([F.normalize(row, dim=0) for row in rows] for rows in (images, texts))
        products = [(a * b).sum() for a in one for b in other]
        logits = (torch.stack(products) if products else images.new_zeros(0)).view(len(one), len(other)) * scale
        return logits, logits.t()

    def encode_image(self, image: Tensor) -> Tensor:
        """Features of pictures, not normalised.

        Args: image: [B, 3, image_size, image_size], floating, as `preprocess` gives them.
        Returns: [B, embed_dim]; float32 of 16-bit weights, too.
        Raises: TypeError (dtype), ValueError (shape).
        Numerics: on CPUs 16-bit weights compute in float32, and the bits of a feature depend on its picture and the
            weights alone, not on its batch or the number of threads; not so in training mode.
        """
        self._check_image(image)
        model = in_float32(self) if image.device.type == "cpu" else self
        if self._together(image):
            return _wide(model.image_tower(image))
        return torch.cat(each_alone(lambda row: _wide(model.image_tower(image[row : row + 1])), len(image)))

    def encode_text(self, text: Tensor) -> Tensor:
        """Features of texts, not normalised.

        Args: text: ids [B, n], n <= context_length, int32 or int64, as `tokenize` gives them.
        Returns: [B, embed_dim]; float32 of 16-bit weights, too.
        Raises: TypeError (dtype), ValueError (shape, an id out of range, a text without its end token).
        Numerics: as encode_image; a text that comes again is read once, and nothing is read behind its end token.
        """
        self._check_text(text)
        ends = self._ends(text)
        model = in_float32(self) if text.device.type == "cpu" else self
        if self._together(text):
            return _wide(model.text_tower(text, ends))
        read = [tuple(ids[: end + 1]) for ids, end in zip(text.tolist(), ends.tolist(), strict=True)]
        distinct = list(dict.fromkeys(read))

        def feature(which: int) -> Tensor:
            ids = torch.tensor([distinct[which]])
            return _wide(model.text_tower(ids, torch.tensor([ids.shape[1] - 1])))

        features = dict(zip(distinct, each_alone(feature, len(distinct)), strict=True))
        return torch.cat([features[ids] for ids in read])

    def preprocess(self, pictures: Image.Image | Sequence[Image.Image] | Tensor) -> Tensor:
        """Pictures as `encode_image` takes them: see `dalle_fast.clip.preprocess`."""
        return preprocessing.preprocess(pictures, self.image_size, mean=self.image_mean, std=self.image_std)

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """nn.Module.load_state_dict that also takes OpenAI's, open_clip's and Hugging Face's names.

        Raises: ValueError (another kind of CLIP, a tensor of another shape), RuntimeError (strict: missing, unknown
            names).
        """
        reason = why_not(state_dict)
        if reason is not None:
            raise ValueError(f"PretrainedCLIP: state_dict must be of OpenAI's architecture, but {reason}.")
        ours = names.to_ours(state_dict)
        check_shapes(self, ours)
        return nn.Module.load_state_dict(self, ours, strict=strict, assign=assign)

    def _together(self, rows: Tensor) -> bool:
        return self.training or not computed_alone(rows)

    def _ends(self, text: Tensor) -> Tensor:
        """int64 [B]: where each text ends."""
        if not text.numel():
            return torch.zeros(len(text), dtype=torch.long, device=text.device)
        if self.end_token is None:
            return text.argmax(dim=-1)
        is_end = text == self.end_token
        if text.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(is_end.any(dim=-1).all()):
            row = int((~is_end.any(dim=-1)).nonzero()[0])
            raise ValueError(
                f"PretrainedCLIP: every text must have its end token, {self.end_token}, got none in row {row}. "
                "Tokenize with the model's own tokenizer."
            )
        return is_end.int().argmax(dim=-1)

    def _check_image(self, image: Tensor) -> None:
        wanted = [3, self.image_size, self.image_size]
        if not image.is_floating_point():
            raise TypeError(f"PretrainedCLIP: image must be floating, got {image.dtype}. Take model.preprocess.")
        if image.dim() != 4 or list(image.shape[1:]) != wanted:
            raise ValueError(
                f"PretrainedCLIP: image must be [B, {', '.join(map(str, wanted))}], got {list(image.shape)}. "
                "Take model.preprocess."
            )

    def _check_text(self, text: Tensor) -> None:
        if text.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"PretrainedCLIP: text must be ids of int64 or int32, got {text.dtype}. Tokenize it first.")
        if text.dim() != 2 or not 1 <= text.shape[1] <= self.context_length:
            raise ValueError(
                f"PretrainedCLIP: text must be [B, n] with 1 <= n <= context_length={self.context_length}, got "
                f"{list(text.shape)}. Did an image come first? It is forward(image, text)."
            )
        if text.device.type == "cpu" and text.numel() and not torch.compiler.is_compiling():
            low, high = int(text.min()), int(text.max())
            if low < 0 or high >= self.vocab_size:
                raise ValueError(
                    f"PretrainedCLIP: text ids must be in 0..{self.vocab_size - 1}, got {low if low < 0 else high}. "
                    "Was the text encoded with another tokenizer?"
                )


def _heads(which: str, width: int, heads: int | None) -> int:
    count = width // HEAD_WIDTH if heads is None else heads
    if count < 1 or width % count or (heads is None and width % HEAD_WIDTH):
        raise ValueError(
            f"PretrainedCLIP: {which}_heads must divide {which}_width={width}, got "
            f"{f'a head for every {HEAD_WIDTH}' if heads is None else heads}. Pass {which}_heads."
        )
    return count


def _wide(features: Tensor) -> Tensor:
    """In float32, if they have 16 bits."""
    wide = widened(features)
    assert wide is not None
    return wide
