"""What a training log of a discrete VAE says: which codes are used, and how well pictures come back.

    usage = TrainingStatistics(vae)
    for images in loader:
        loss, recons, statistics = vae(images, return_loss=True, return_recons=True, return_statistics=True)
        usage.add(images, statistics)
        ...
    row = usage.row()   # of everything since the last row

No second encoder pass: codes and the soft error come from the training step itself. The hard error (of what noiseless
codes decode to) needs a decoder pass, and is measured on one picture of every `pictures_per_hard_one`: at the default
of 16 less than a sixteenth of a third of a step, since a step costs three forward passes at least. Nothing waits for
the device before `row()`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, distributed

from dalle_fast.models.dvae import DiscreteVAE, ForwardStatistics
from dalle_fast.models.openai_dvae import OpenAIDiscreteVAE


class CodebookUsage:
    """How often each of K codes was used.

    Args: num_codes: K.   device: where codes will come from.
    """

    def __init__(self, num_codes: int, device: torch.device | str | None = None) -> None:
        self.counts = torch.zeros(num_codes, dtype=torch.int64, device=device)

    def add(self, codes: Tensor) -> None:
        """Counts int64 codes of any shape, all in 0..K-1.

        Raises: TypeError (another dtype), ValueError (a code out of range, on a CPU; a GPU would have to wait for it).
        """
        if codes.dtype != torch.int64:
            raise TypeError(
                f"CodebookUsage: codes must be int64, got {codes.dtype}. Give what the model returns as codes."
            )
        codes = codes.reshape(-1)
        if not codes.is_cuda and len(codes):
            least, most = int(codes.min()), int(codes.max())
            if least < 0 or most >= len(self.counts):
                raise ValueError(
                    f"CodebookUsage: codes must be in 0..{len(self.counts) - 1}, got {least}..{most}."
                    " Say with num_codes how many there are."
                )
        # bincount would wait for the largest code of a GPU
        self.counts.scatter_add_(0, codes, torch.ones_like(codes))

    def all_reduce(self) -> None:
        """Adds the counts of all ranks up, on all of them; call it once, before reading."""
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(self.counts)

    def clear(self) -> None:
        """Forgets everything."""
        self.counts.zero_()

    @property
    def shares(self) -> Tensor:
        """float64 [K]: the histogram, summing to 1; zeros where nothing was counted."""
        return self.counts.double() / self.counts.sum().clamp_min(1)

    @property
    def used(self) -> int:
        """Codes that occurred."""
        return int((self.counts > 0).sum())

    @property
    def dead(self) -> int:
        """Codes that did not."""
        return len(self.counts) - self.used

    @property
    def perplexity(self) -> float:
        """exp of the entropy of `shares`: K where all are used alike, 1 where one is (or none)."""
        return torch.special.entr(self.shares).sum().exp().item()


class TrainingStatistics:
    """Collects what `DiscreteVAE.forward(..., return_statistics=True)` gives, for a row of a log now and then.

    Args:
        vae: whose decoder measures the hard error; on the device where it trains.
        pictures_per_hard_one: pictures trained on for each that is measured. Not for vq, whose training step decodes
            its codes: there the two errors are one.
    Raises: TypeError (no such model), ValueError (pictures_per_hard_one below 1).
    """

    def __init__(self, vae: DiscreteVAE | OpenAIDiscreteVAE, *, pictures_per_hard_one: int = 16) -> None:
        if not hasattr(vae, "codebook"):
            raise TypeError(
                f"TrainingStatistics: vae must be a DiscreteVAE, got {type(vae).__name__}."
                " Of DistributedDataParallel and its like give the module inside."
            )
        if pictures_per_hard_one < 1:
            raise ValueError(
                "TrainingStatistics: pictures_per_hard_one must be at least 1, got"
                f" {pictures_per_hard_one}. 1 decodes every picture."
            )
        device = vae.codebook.weight.device
        self.vae = vae
        self.pictures_per_hard_one = pictures_per_hard_one
        self.codes = CodebookUsage(vae.num_tokens, device)
        self.noisy_codes = CodebookUsage(vae.num_tokens, device)
        self._since_hard_one = 0
        self._errors = torch.zeros(2, dtype=torch.float64, device=device)  # soft, hard: sums over pictures
        self._pictures = [0, 0]

    @torch.no_grad()
    def add(self, images: Tensor, statistics: ForwardStatistics) -> None:
        """One training step: the pictures it took, not normalised, and what forward said about them.

        Raises: TypeError (no ForwardStatistics), ValueError (those of another number of pictures).
        """
        if not isinstance(statistics, ForwardStatistics):
            raise TypeError(
                f"TrainingStatistics: statistics must be ForwardStatistics, got {type(statistics).__name__}."
                " forward(..., return_loss=True, return_statistics=True) returns them last."
            )
        batch = len(images)
        if batch != len(statistics.codes):
            raise ValueError(
                f"TrainingStatistics: images must be the {len(statistics.codes)} that forward took, got {batch}."
                " Give both of the same step."
            )
        if batch == 0:
            return
        self.codes.add(statistics.codes)
        self.noisy_codes.add(statistics.noisy_codes)
        self._add_error(0, statistics.reconstruction, batch)
        if self.vae.quantizer == "vq":
            self._add_error(1, statistics.reconstruction, batch)
            return
        n, self._since_hard_one = divmod(self._since_hard_one + batch, self.pictures_per_hard_one)
        if n:
            self._add_error(1, self._hard_error(images[:n], statistics.codes[:n]), n)

    def row(self) -> dict[str, float]:
        """Figures since the last row, of all ranks where torch.distributed is initialised (then all must call it).

        Returns: codes used, dead codes, perplexity of the noiseless codes and of the drawn ones; the reconstruction
            loss of training steps (soft) and of decoded codes (hard; nan where no picture was measured).
        """
        sums = torch.cat((self._errors, self._errors.new_tensor(self._pictures)))
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(sums)
        self.codes.all_reduce()
        self.noisy_codes.all_reduce()
        soft, hard, n_soft, n_hard = sums.tolist()
        figures = {
            "codes_used": float(self.codes.used),
            "codes_dead": float(self.codes.dead),
            "perplexity": self.codes.perplexity,
            "perplexity_drawn": self.noisy_codes.perplexity,
            "error_soft": soft / n_soft if n_soft else float("nan"),
            "error_hard": hard / n_hard if n_hard else float("nan"),
        }
        self.codes.clear()
        self.noisy_codes.clear()
        self._errors.zero_()
        self._pictures = [0, 0]
        return figures

    def _add_error(self, kind: int, mean: Tensor, n: int) -> None:
        self._errors[kind] += mean * n
        self._pictures[kind] += n

    def _hard_error(self, images: Tensor, codes: Tensor) -> Tensor:
        embeds = F.embedding(codes, self.vae.codebook.weight).permute(0, 3, 1, 2)
        return self.vae.loss_fn(self.vae.decoder(embeds), self.vae.norm(images))
