"""How much memory `dalle-fast convert` takes: a synthetic file of 16 bits is made, then converted in a fresh process.

    python tests/compat/convert_memory.py FOLDER --dim 2048 --depth 18    # 1.3 billion values

Prints one line of JSON: values, bytes of the file, bytes that converting and that loading took above what the process
had before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

_MEASURED = """
import json, sys
from pathlib import Path
from dalle_fast.cli.__main__ import main
from dalle_fast.compat import load

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))

def taken(action):
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    result = action()
    return status("VmHWM") - before, result

small, large, out = map(Path, sys.argv[1:])
convert = lambda path, to: main(["convert", str(path), str(to)], standalone_mode=False)
convert(small, out / "small")
loading, loaded = taken(lambda: load(large))
del loaded
converting, _ = taken(lambda: convert(large, out / "large"))
print(json.dumps({"loading": loading, "converting": converting}))
"""


def write_file(path: Path, *, dim: int, depth: int) -> int:
    """A dalle.pt of random values in float16. Returns: how many."""
    import torch

    from dalle_fast import DALLE, DiscreteVAE
    from dalle_fast.compat.checkpoints import upstream_checkpoint
    from dalle_fast.models.unfilled import unfilled

    vae = DiscreteVAE(image_size=64, num_layers=3, num_tokens=8192, codebook_dim=16, hidden_dim=8)
    with unfilled():
        model = DALLE(
            dim=dim, vae=vae, depth=depth, heads=dim // 64, dim_head=64, num_text_tokens=16384, text_seq_len=64,
            attn_types=("full", "axial_row"),
        )  # fmt: skip
    drawn = {name: torch.empty(p.shape, dtype=torch.float16).normal_(0, 0.02) for name, p in model.named_parameters()}
    kept = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}
    model.load_state_dict(drawn | kept, assign=True)
    torch.save(upstream_checkpoint(model), path)
    return sum(tensor.numel() for tensor in drawn.values())


def measure(folder: Path, *, dim: int, depth: int) -> dict[str, int]:
    """Bytes of the file and those that loading and converting it took."""
    write_file(folder / "small.pt", dim=64, depth=1)
    large = folder / "large.pt"
    script = "import sys; from pathlib import Path; from convert_memory import write_file; "
    script += f"print(write_file(Path(sys.argv[1]), dim={dim}, depth={depth}))"
    values = _python("-c", script, large)  # in a process of its own, which gives its memory back
    measured = json.loads(_python("-c", _MEASURED, folder / "small.pt", large, folder).splitlines()[-1])
    return {"values": int(values), "bytes": large.stat().st_size, **measured}


def _python(*arguments: object) -> str:
    here = Path(__file__).resolve()
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], check=True, capture_output=True, text=True,
        env={"PYTHONPATH": f"{here.parent}:{here.parents[2]}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    return done.stdout


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=6)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    print(json.dumps(measure(options.folder, dim=options.dim, depth=options.depth)))
