"""VQGAN: the image tokenizer of taming-transformers, read from its files or from a saved model, to encode and decode.

    pictures [B, c, S, S] in 0..1 -> encoder -> 1x1 convolution -> z [B, D, S/2^L, S/2^L]
    vq:     the nearest of K codes by L2     gumbel: the code of the largest logit of a 1x1 convolution, without noise
    codes -> codebook [K, D] -> 1x1 convolution -> decoder -> clamped to -1..1, returned in 0..1

It is not trained here: it has no loss, and the dropout of its training is left out.
Source: VQGAN, arXiv 2012.09841; DALLE-pytorch VQGanVAE, whose gumbel codes were noisy even in evaluation.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from dalle_fast.models.alone import computed_alone, each_alone, in_float32
from dalle_fast.models.saving import Pretrained
from dalle_fast.models.state_dicts import some
from dalle_fast.models.unfilled import unfilled
from dalle_fast.models.vae_protocol import check_pictures, side_of_codes
from dalle_fast.models.vqgan_blocks import GROUPS, Decoder, Encoder
from dalle_fast.ops.codebook_indices import codebook_indices
from dalle_fast.ops.nearest_code import nearest_code

# where dalle_pytorch kept what it downloaded
_CACHE = "~/.cache/dalle"
_MODEL, _CONFIG = "vqgan.1024.model.ckpt", "vqgan.1024.config.yml"
WHERE_FROM = (
    "Nothing is downloaded here: the README of github.com/CompVis/taming-transformers has a table of pretrained models,"
    " each with its last.ckpt and model.yaml (the one that dalle_pytorch took is VQGAN ImageNet f=16, 1024)."
)


@dataclass(frozen=True)
class VQGanArchitecture:
    """What the weights of a VQGAN fit.

    Attributes:
        image_size: S.   channels: of a picture.   num_tokens: K, codes.   codebook_dim: D.
        quantizer: "vq" or "gumbel".
        z_channels: between the encoder or decoder and its 1x1 convolution; of gumbel, equal to codebook_dim.
        hidden_dim: the first width.   multipliers: width / hidden_dim, one a level; each level but the last halves S.
        num_res_blocks: a level of the encoder.   attention_levels: numbers of those that have attention, from 0.
        norm_eps: of the group norms.
    Raises: ValueError (an attribute out of range, in words).
    """

    image_size: int
    channels: int
    num_tokens: int
    codebook_dim: int
    quantizer: str
    z_channels: int
    hidden_dim: int
    multipliers: tuple[int, ...]
    num_res_blocks: int
    attention_levels: tuple[int, ...]
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("multipliers", "attention_levels"):
            if not isinstance(getattr(self, name), list | tuple):
                self._refuse(name, "a list of integers")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for field in fields(self):
            self._check_integers(field.name)
        if self.quantizer not in ("vq", "gumbel"):
            self._refuse("quantizer", "'vq' or 'gumbel'")
        if not self.multipliers:
            self._refuse("multipliers", "one number a level")
        if self.hidden_dim % GROUPS:
            self._refuse("hidden_dim", f"a multiple of {GROUPS}, the groups of its norms")
        if not all(0 <= level < len(self.multipliers) for level in self.attention_levels):
            self._refuse("attention_levels", f"of 0..{len(self.multipliers) - 1}")
        if self.image_size % 2**self.num_layers:
            self._refuse("image_size", f"a multiple of {2**self.num_layers}, which one code's side is")
        if self.quantizer == "gumbel" and self.z_channels != self.codebook_dim:
            self._refuse("z_channels", f"codebook_dim = {self.codebook_dim} with quantizer='gumbel'")

    @property
    def num_layers(self) -> int:
        """L, halvings of S."""
        return len(self.multipliers) - 1

    @property
    def widths(self) -> tuple[int, ...]:
        """Of each level."""
        return tuple(self.hidden_dim * multiplier for multiplier in self.multipliers)

    def _check_integers(self, name: str) -> None:
        if name in ("quantizer", "norm_eps"):
            return
        value = getattr(self, name)
        least = 0 if name == "attention_levels" else 1
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                self._refuse(name, f"integers from {least}" if isinstance(value, tuple) else "an integer from 1")

    def _refuse(self, name: str, rule: str) -> NoReturn:
        raise ValueError(f"VQGanVAE: {name} must be {rule}, got {getattr(self, name)!r}.")


class VQGanVAE(Pretrained):
    """A pretrained VQGAN as DALLE's VAE.

    Args:
        vqgan_model_path: the .ckpt that taming-transformers wrote; None: dalle_pytorch's in ~/.cache/dalle.
        vqgan_config_path: the .yaml that belongs to it.
        image_size: S of the pictures; None: the yaml's resolution. The original says 256 whatever the yaml says: a
            DALLE that was trained so needs 256 here.
        architecture: instead of files, a VQGanArchitecture or a dict of its attributes: weights at random, to load.
    Attributes: image_size, num_tokens, num_layers, channels: what DALLE asks of a VAE.   is_gumbel: bool.
    Raises: FileNotFoundError (with where people get the file), ValueError (a file that is no VQGAN of taming, a yaml
        of another one, an argument out of range).
    """

    def __init__(
        self,
        vqgan_model_path: str | os.PathLike[str] | None = None,
        vqgan_config_path: str | os.PathLike[str] | None = None,
        *,
        image_size: int | None = None,
        architecture: VQGanArchitecture | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if architecture is None:
            self._read(*_files(vqgan_model_path, vqgan_config_path), image_size)
            return
        if (vqgan_model_path, vqgan_config_path, image_size) != (None, None, None):
            raise ValueError("VQGanVAE: architecture must come without paths and image_size, got both. Leave one out.")
        self._build(_checked(architecture))

    def _build(self, architecture: VQGanArchitecture) -> None:
        self.architecture = a = architecture
        self.image_size = a.image_size
        self.num_tokens = a.num_tokens
        self.num_layers = a.num_layers
        self.channels = a.channels
        self.is_gumbel = a.quantizer == "gumbel"
        rest = (a.widths, a.num_res_blocks, a.attention_levels, a.norm_eps)
        self.encoder = Encoder(a.channels, a.z_channels, a.hidden_dim, *rest)
        self.to_codebook = nn.Conv2d(a.z_channels, a.codebook_dim, 1)
        self.to_logits = nn.Conv2d(a.codebook_dim, a.num_tokens, 1) if self.is_gumbel else None
        self.codebook = nn.Embedding(a.num_tokens, a.codebook_dim)
        self.from_codebook = nn.Conv2d(a.codebook_dim, a.z_channels, 1)
        self.decoder = Decoder(a.channels, a.z_channels, *rest)

    def _read(self, model_path: Path, config_path: Path, image_size: int | None) -> None:
        # at call time: compat stands above models
        from dalle_fast.compat.formats import taming_vqgan
        from dalle_fast.compat.reading import read

        config = taming_vqgan.read_config(config_path)
        state_dict = taming_vqgan.weights_of(read(model_path))
        with unfilled():
            self._build(taming_vqgan.architecture_of(state_dict, config, image_size=image_size))
        taming_vqgan.check_names(self, state_dict)
        self.load_state_dict(state_dict, assign=True)
        self.float().eval()

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that build it without its files, as JSON holds them."""
        stored = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self.architecture).items()}
        return {"architecture": stored}

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """As `Pretrained.load_state_dict`; also takes the names of taming-transformers, after `model.` or without.

        Of those, what belongs to the loss of the training is left out.
        """
        from dalle_fast.compat.formats.taming_vqgan import own_names  # at call time: compat stands above models

        if isinstance(state_dict, Mapping):
            state_dict = own_names(self, state_dict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    @torch.no_grad()
    def get_codebook_indices(self, img: Tensor) -> Tensor:
        """The codes of pictures, without noise.

        Args: img: [B, c, S, S] in 0..1.
        Returns: int64 [B, n], raster order.
        Numerics: on CPUs the codes of a picture depend on it and the weights alone; 16-bit models compute in float32.
        """
        check_pictures("VQGanVAE", img, self.channels, self.image_size)
        if len(img) == 0:
            return img.new_empty(0, (self.image_size >> self.num_layers) ** 2, dtype=torch.int64)
        if not computed_alone(img):
            return self._codes(img)
        twin, rows = in_float32(self), img.contiguous().split(1)
        return torch.cat(each_alone(lambda i: twin._codes(rows[i]), len(rows)))

    def decode(self, img_seq: Tensor) -> Tensor:
        """Pictures of code grids.

        Args: img_seq: int64 or int32 [B, n], n a square number, ids below num_tokens.
        Returns: [B, c, sqrt(n) 2^L, sqrt(n) 2^L], in 0..1.
        Numerics: on CPUs a picture's bits depend on its codes and the weights alone; 16-bit models compute in float32.
        """
        side = side_of_codes("VQGanVAE", img_seq, self.num_tokens)
        dtype = self.codebook.weight.dtype
        if len(img_seq) == 0:
            size = side * 2**self.num_layers
            return self.codebook.weight.new_empty(0, self.channels, size, size)
        if not computed_alone(img_seq):
            return self._pictures(img_seq, side)
        twin, rows = in_float32(self), img_seq.split(1)
        return torch.cat(each_alone(lambda i: twin._pictures(rows[i], side).to(dtype), len(rows)))

    def forward(self, img: Tensor) -> NoReturn:
        """Raises NotImplementedError, as the original means to: a VQGAN is not trained here."""
        raise NotImplementedError(
            "VQGanVAE: a VQGAN is not trained here. Call get_codebook_indices and decode; "
            "train a DiscreteVAE for a tokenizer of your own."
        )

    def _codes(self, img: Tensor) -> Tensor:
        """[B, c, height, width] in 0..1 -> int64 [B, n], in the dtype of the weights."""
        z = self.to_codebook(self.encoder(2 * img.to(self.codebook.weight.dtype) - 1))
        if self.to_logits is not None:
            return codebook_indices(z, self.to_logits.weight.flatten(1), self.to_logits.bias).flatten(1)
        codebook = self.codebook.weight
        return nearest_code(z.movedim(1, -1).to(codebook.dtype), codebook).flatten(1)

    def _pictures(self, img_seq: Tensor, side: int) -> Tensor:
        """int [B, n] -> [B, c, height, width] in 0..1."""
        z = self.codebook(img_seq).unflatten(1, (side, side)).movedim(-1, 1)
        return (self.decoder(self.from_codebook(z)).clamp(-1, 1) + 1) / 2


def _checked(architecture: VQGanArchitecture | Mapping[str, Any]) -> VQGanArchitecture:
    """An architecture of a dict, whose names are checked."""
    if isinstance(architecture, VQGanArchitecture):
        return architecture
    names = [field.name for field in fields(VQGanArchitecture)]
    unknown = sorted(set(architecture) - set(names))
    missing = [name for name in names if name not in architecture and name != "norm_eps"]
    if unknown or missing:
        raise ValueError(
            f"VQGanVAE: architecture must have {', '.join(names)}; unknown: {some(unknown)}; missing: {some(missing)}."
        )
    return VQGanArchitecture(**architecture)


def _files(model_path: str | os.PathLike[str] | None, config_path: str | os.PathLike[str] | None) -> tuple[Path, Path]:
    """The paths of weights and yaml; both are files. Raises FileNotFoundError, ValueError (one of two is missing)."""
    if (model_path is None) != (config_path is None):
        given, missing = ("model", "config") if config_path is None else ("config", "model")
        raise ValueError(
            f"VQGanVAE: vqgan_{missing}_path must be given with vqgan_{given}_path, got None. "
            "A VQGAN is two files, weights (.ckpt) and configuration (.yaml)."
        )
    cache = Path(_CACHE).expanduser()
    paths = {
        "vqgan_model_path": cache / _MODEL if model_path is None else Path(model_path),
        "vqgan_config_path": cache / _CONFIG if config_path is None else Path(config_path),
    }
    for name, path in paths.items():
        if not path.is_file():
            raise FileNotFoundError(f"VQGanVAE: {name} must be a file, got {path}, which is not there. {WHERE_FROM}")
    return paths["vqgan_model_path"], paths["vqgan_config_path"]
