"""How commands end, what they leave in a folder, and a ranker for them."""

import json

import torch
import yaml
from PIL import Image


def redness(prompts, images):
    """A ranker: any function of pictures is one."""
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1].mean(dim=(1, 2))


RANK = "job_folders:redness"


def contents(folder):
    """Every file, by its path; but the locks."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".lock")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def manifest(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def stored(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())


def picture(path, size=16):
    """A picture in which no two codes need be alike."""
    levels = torch.randint(256, (size, size, 3), generator=torch.Generator().manual_seed(size), dtype=torch.uint8)
    Image.fromarray(levels.numpy()).save(path)
    return path


def checked(result, fails):
    """The result of a command that ended well, or with a sentence that holds `fails`."""
    assert "Traceback" not in result.output
    if fails is None:
        assert result.exit_code == 0, (result.output, result.exception)
    else:
        assert result.exit_code in (1, 2) and isinstance(result.exception, SystemExit), repr(result.exception)
        assert fails in " ".join(result.output.split()), result.output
    return result
