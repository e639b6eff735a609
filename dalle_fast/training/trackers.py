"""Where figures and pictures go: the console, log.csv, TensorBoard; pictures to pictures/ and TensorBoard.

CSV and TensorBoard are trackers of Accelerate, so `accelerator.log` reaches both.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import GeneralTracker, TensorBoardTracker, on_main_process
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dalle_fast.whole_files import make_folder, write_whole

_SHOWN = {"loss": "loss {:.4g}", "learning_rate": "lr {:.3g}", "images_per_second": "{:.1f} images/s"}


class CsvTracker(GeneralTracker):
    """A row a log, a column a figure; a figure that comes later gets a column then.

    Args: path: rows of later steps than `first_step`, of a run that was killed, are cut off it.
    """

    name = "csv"
    requires_logging_directory = False

    def __init__(self, path: Path, first_step: int) -> None:
        super().__init__()
        self._path, self._first_step = path, first_step
        self._columns: list[str] = []

    @property
    def tracker(self) -> Path:
        """The file."""
        return self._path

    @on_main_process
    def start(self) -> None:
        """Reads what is there."""
        if self._path.is_file():
            rows = [row for row in self._read() if row["step"].isdigit() and int(row["step"]) <= self._first_step]
            self._rewrite(rows)

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Appends a row; numbers with six digits."""
        row: dict[str, Any] = {"step": step}
        row |= {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in values.items()}
        if new := [key for key in row if key not in self._columns]:
            rows = self._read() if self._path.is_file() else []
            self._columns += new
            self._rewrite(rows)
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns, restval="").writerow(row)

    def _read(self) -> list[dict[str, str]]:
        with self._path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, restval="")
            rows = [{key: value for key, value in row.items() if key is not None} for row in reader]
            self._columns = list(reader.fieldnames or [])
        return [row for row in rows if "step" in row]

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self._path, [text.getvalue().encode()])


def tensorboard_tracker(folder: Path, first_step: int) -> TensorBoardTracker:
    """Of Accelerate; what a killed run wrote of later steps than `first_step` is not shown.

    Raises: RuntimeError (tensorboard is not installed).
    """
    try:
        import tensorboard  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "tensorboard":
            raise
        raise RuntimeError("train: tensorboard must be installed, got none. `pip install dalle-fast[train]`") from None
    return TensorBoardTracker("", folder, purge_step=first_step + 1)


class Console:
    """A progress bar where standard error is a terminal, else a line a log.

    Args: shown: False says nothing.
    """

    def __init__(self, title: str, first_step: int, steps: int, *, shown: bool) -> None:
        self._bar = None
        self._title, self._steps, self._lines = title, steps, shown and not sys.stderr.isatty()
        if shown and not self._lines:
            self._bar = tqdm(desc=title, initial=first_step, total=steps, unit="step", dynamic_ncols=True)

    def stepped(self) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.update()

    def log(self, row: Mapping[str, Any]) -> None:
        """Shows the figures that tell whether it goes well."""
        words = ", ".join(form.format(row[key]) for key, form in _SHOWN.items() if key in row)
        if self._bar is not None:
            self._bar.set_postfix_str(words)
        elif self._lines:
            print(f"{self._title}: step {row['step']} of {self._steps}, {words}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A text above the bar."""
        if self._bar is not None or self._lines:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def write_pictures(folder: Path, pictures: Mapping[str, Tensor], step: int, writer: Any) -> None:
    """Pictures uint8 [1 or 3, H, W] as PNG files of `folder`, and to a SummaryWriter."""
    make_folder(folder)
    for name, pixels in pictures.items():
        pixels = pixels.cpu()
        rows = pixels.permute(1, 2, 0) if len(pixels) == 3 else pixels[0]
        png = io.BytesIO()
        Image.fromarray(rows.to(torch.uint8).numpy()).save(png, "PNG")
        write_whole(folder / f"step-{step:08d}-{name}.png", [png.getvalue()], durable=False)
        writer.add_image(name, pixels, step)
