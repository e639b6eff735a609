"""The original's `vae` module: image tokenizers, and the pixel range that OpenAI's was trained with."""

from __future__ import annotations

from dalle_fast.models.dvae import DiscreteVAE
from dalle_fast.models.logit_laplace import map_pixels, unmap_pixels
from dalle_fast.models.openai_dvae import OpenAIDiscreteVAE
from dalle_fast.models.vqgan import VQGanVAE

__all__ = ["DiscreteVAE", "OpenAIDiscreteVAE", "VQGanVAE", "map_pixels", "unmap_pixels"]
