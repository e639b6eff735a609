"""encoder.pkl and decoder.pkl as OpenAI's package writes them, without the package: whole modules, random weights."""

from __future__ import annotations

import sys
import types
import warnings
from collections import OrderedDict

import torch
from torch import nn

from dalle_fast.compat.formats.openai_dvae import our_names
from dalle_fast.models.openai_dvae import OpenAIDiscreteVAE

SIZES = {"num_tokens": 24, "hidden_dim": 8, "codebook_dim": 6, "blocks_per_group": 2}
CLASSES = {
    "dall_e.encoder": ("Encoder", "EncoderBlock"),
    "dall_e.decoder": ("Decoder", "DecoderBlock"),
    "dall_e.utils": ("Conv2d",),
}


def tiny(**changes) -> OpenAIDiscreteVAE:
    """Untrained, every bias drawn too, the logits of noise about 0 on average, so that codes differ."""
    torch.manual_seed(0)
    model = OpenAIDiscreteVAE(from_scratch=True, **{**SIZES, "image_size": 16, **changes})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.1) if name.endswith("bias") else parameter.mul_(2)
        images = torch.rand(4, model.channels, model.image_size, model.image_size)
        model.encoder.output.bias -= model(images, return_logits=True).mean((0, 2, 3))
    return model.eval()


def original_state(model: OpenAIDiscreteVAE) -> dict[str, torch.Tensor]:
    """The tensors under the original's names: enc.blocks..., dec.blocks..."""
    places = ["input", "output.conv"]
    for g in range(1, 5):
        for b in range(1, model.sizes.blocks_per_group + 1):
            places += [
                f"group_{g}.block_{b}.{path}" for path in ("id_path", *(f"res_path.conv_{n}" for n in (1, 2, 3, 4)))
            ]
    own, state = model.state_dict(), {}
    for theirs in (f"{part}.blocks.{place}.{kind}" for part in ("enc", "dec") for place in places for kind in "wb"):
        (ours,) = our_names({theirs: torch.zeros(1, 1)})
        if ours in own:
            state[theirs] = own[ours].T[:, :, None, None].clone() if ours == "codebook.weight" else own[ours].clone()
    assert len(state) == len(own)
    return state


def classes(monkeypatch) -> dict[str, type[nn.Module]]:
    """Modules dall_e.* of classes by the original's names, as long as the test runs."""
    made = {}
    for name in ("dall_e", *CLASSES):
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        for cls in CLASSES.get(name, ()):
            made[cls] = type(cls, (nn.Module,), {"__module__": name})
            setattr(module, cls, made[cls])
    return made


def write(folder, model: OpenAIDiscreteVAE, monkeypatch, *, zipped: bool = True) -> None:
    """Both files; the classes that pickled them are gone afterwards, and cannot be imported."""
    with monkeypatch.context() as patch:
        made = classes(patch)
        for part, block in (("encoder", "EncoderBlock"), ("decoder", "DecoderBlock")):
            root = made[part.capitalize()]()
            for name, value in {"n_hid": 8, "device": torch.device("cpu"), "use_mixed_precision": True}.items():
                setattr(root, name, value)
            root.blocks = _tree(original_state(model), f"{part[:3]}.blocks.", made, block)
            with warnings.catch_warnings():  # the legacy container wants the classes' source, which they have not
                warnings.simplefilter("ignore")
                torch.save(root, folder / f"{part}.pkl", _use_new_zipfile_serialization=zipped)
    for name in ("dall_e", *CLASSES):
        monkeypatch.setitem(sys.modules, name, None)


def _tree(state, prefix, made, block) -> nn.Module:
    """The modules of the tensors below `prefix`, with ReLU, pooling and identities as the original has them."""
    inside = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    if set(inside) == {"w", "b"}:
        conv = made["Conv2d"]()
        conv.w, conv.b = (nn.Parameter(inside[kind], requires_grad=False) for kind in "wb")
        conv.kw, conv.use_float16 = conv.w.shape[-1], True
        return conv
    names = list(dict.fromkeys(name.partition(".")[0] for name in inside))
    children = OrderedDict((name, _tree(state, f"{prefix}{name}.", made, block)) for name in names)
    if "res_path" in children:
        module = made[block]()
        module.post_gain = 1 / 64
        module.id_path = children.get("id_path", nn.Identity())
        module.res_path = nn.Sequential(OrderedDict(children["res_path"].named_children(), relu_1=nn.ReLU()))
        return module
    if "block_1" in children:
        children["pool" if block == "EncoderBlock" else "upsample"] = (
            nn.MaxPool2d(2) if block == "EncoderBlock" else nn.Upsample(scale_factor=2)
        )
    return nn.Sequential(children)
