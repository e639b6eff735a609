"""What a known layout of weights is: how it is told apart, what it says of itself, how it becomes a model of ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dalle_fast.compat.reading import Stored


@dataclass(frozen=True)
class Companions:
    """Files that belong to the one that is read and that it does not hold.

    Attributes: vae: of a DALLE whose VAE is not in its file.   yaml: the configuration of a VQGAN.
        tokenizer: tokenizer.json and its like.
    """

    vae: Path | None = None
    yaml: Path | None = None
    tokenizer: Path | None = None


@dataclass(frozen=True)
class Description:
    """What a file is, in words and numbers.

    Attributes:
        kind: "DALLE", "DiscreteVAE", "VQGanVAE", "OpenAIDiscreteVAE" or "CLIP".
        format: name of the layout.
        architecture: arguments of the model, as far as the file tells.
        problem: why we cannot run it, a sentence; "": we can.
    """

    kind: str
    format: str
    architecture: dict[str, object] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class Format:
    """A layout.

    Attributes:
        name: as `dalle-fast info` says it, e.g. "dalle_pytorch DALLE (.pt)".
        matches: whether a file is of it: by structure and keys, never by its name; quick, and raises nothing.
        describe: raises ValueError where the file contradicts itself.
        load: the model, in evaluation mode, its dtypes those of the file; tensors may be views of the mapped file.
            Raises ValueError, FileNotFoundError (a companion), NotImplementedError (a model that we have not).
        keys: typical keys, every number in them replaced by N: "encoder.down.N.block.N.conv1.weight".
    """

    name: str
    matches: Callable[[Stored], bool]
    describe: Callable[[Stored], Description]
    load: Callable[[Stored, Companions], nn.Module]
    keys: frozenset[str]


def rows_of(tensor: Tensor) -> int:
    """The first length of a tensor of any shape; of one without, 0."""
    return tensor.shape[0] if tensor.dim() else 0
