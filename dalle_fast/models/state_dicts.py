"""State dicts: tied tensors, tensors of a wrong shape, names in a sentence."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

_SHOWN = 4


def aliases(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """Every name of a tied tensor -> the first name of that tensor.

    Tensors without values are told apart as objects: give parameters themselves, `state_dict(keep_vars=True)`.
    """
    first: dict[tuple, str] = {}
    later = {}
    for name, tensor in state_dict.items():
        if tensor.numel() == 0:
            continue
        place = id(tensor) if tensor.is_meta else tensor.data_ptr()
        identity = (tensor.device, place, tensor.shape, tensor.stride(), tensor.dtype)
        if identity in first:
            later[name] = first[identity]
        first.setdefault(identity, name)
    return later


def tie_again(model: nn.Module, tied: Mapping[str, str]) -> None:
    """Makes parameters one object again that `load_state_dict(assign=True)` has made of one tensor.

    Args: tied: name -> name of the same parameter, as `aliases` says.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, first in tied.items():
        if name in parameters and parameters[name] is not parameters[first]:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, parameters[first])


def belongs_to(name: str, models: list[str]) -> bool:
    """Whether a tensor of that name is part of one of these models inside the model."""
    return name.split(".", 1)[0] in models


def some(items: list[str], separator: str = ", ") -> str:
    """The first few items for an error's sentence, and how many more there are."""
    if not items:
        return "none"
    more = len(items) - _SHOWN
    return separator.join(items[:_SHOWN]) + (f"{separator}and {more} more" if more > 0 else "")


def check_shapes(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Raises ValueError, in words and with both shapes, where a tensor is not of the shape the model has for it."""
    own = model.state_dict()
    wrong = [
        f"{name}: expected {list(own[name].shape)}, found {list(tensor.shape)}"
        for name, tensor in state_dict.items()
        if name in own and own[name].shape != tensor.shape
    ]
    if wrong:
        raise ValueError(
            f"load_state_dict: tensors must have the shapes of this {type(model).__name__}, got {len(wrong)} of "
            f"another shape ({some(wrong, '; ')}). Build the model with the arguments the weights were trained with."
        )
