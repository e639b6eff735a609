"""OpenAI's CLIP: pretrained weights in any of their files, pictures and texts as it reads them.

model = dalle_fast.clip.load("ViT-B-32.pt")
per_image, per_text = model(model.preprocess(pictures), dalle_fast.clip.tokenize(["a red apple", "a flag"]))
"""

from dalle_fast.clip.export import hugging_face_config, hugging_face_state_dict, openai_state_dict
from dalle_fast.clip.loading import load
from dalle_fast.clip.model import PretrainedCLIP
from dalle_fast.clip.preprocessing import preprocess
from dalle_fast.clip.text import ClipTokenizer, tokenize

__all__ = [
    "ClipTokenizer",
    "PretrainedCLIP",
    "hugging_face_config",
    "hugging_face_state_dict",
    "load",
    "openai_state_dict",
    "preprocess",
    "tokenize",
]
