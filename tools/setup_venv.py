"""`make setup`: a virtual environment with dalle_fast, its extension and what its tests and demo need.

Runs on the standard library of the Python it is started with. A torch that this Python sees is kept and used; anything
else is installed into the environment alone. Says first what it will download; says what is missing with the command
that installs it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "requirements-dev.txt"
OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 11)
EXTRAS = "dev,demo,bench,train"
# What the tests compare numbers with; the first has CLIP's merges file, too. Their dependencies would change torch.
TWINS = (
    "clip-anytorch", "dall-e", "open-clip-torch", "taming-transformers-rom1504", "dalle-pytorch",
    "rotary-embedding-torch", "axial-positional-embedding",
)  # fmt: skip


def main() -> int:
    """Parses the command line, says what will happen, does it. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("venv", type=Path, help="the environment's folder")
    parser.add_argument("--torch", default="", help="pip spec of torch, instead of the one seen or the tested one")
    parser.add_argument("--pip-args", default="", help="more arguments for every pip install, one string")
    arguments = parser.parse_args()
    problem = what_is_missing()
    if problem:
        print(f"make setup: {problem}", file=sys.stderr)
        return 1
    kept = None if arguments.torch else visible_torch()
    pins = read_pins()
    spec = arguments.torch or pins["torch"]
    announce(arguments.venv, kept, spec)
    make_environment(arguments.venv, see_this_python=kept is not None)
    constraints = arguments.venv / "constraints.txt"
    constraints.write_text("\n".join(constraint_lines(pins, kept, bool(arguments.torch))) + "\n")
    pip = [
        str(python_of(arguments.venv)),
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "-c",
        str(constraints),
    ]
    pip += shlex.split(arguments.pip_args)
    if kept is None:
        run([*pip, spec])
    run([*pip, "setuptools>=64", "wheel"])
    # Without build isolation: nothing is fetched a second time to build with.
    run([*pip, "--no-build-isolation", "-e", f"{ROOT}[{EXTRAS}]"])
    run([*pip, "--no-build-isolation", "--no-deps", *TWINS])
    run([str(python_of(arguments.venv)), "-m", "dalle_fast._build"], cwd=ROOT)
    report = "import torch, dalle_fast._extension as e; print('torch', torch.__version__, '| extension:', "
    report += "e.missing() or 'built, runs on ' + e.isa())"
    run([str(python_of(arguments.venv)), "-c", report], cwd=ROOT)
    return 0


def what_is_missing() -> str | None:
    """What this Python lacks, with the command that installs it; None where all is there. Notes go to the screen."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        return f"Python must be {oldest} or newer, got {version} ({sys.executable}). Name one: make setup PYTHON=..."
    if importlib.util.find_spec("ensurepip") is None:
        return (
            f"the venv module of Python {version} cannot install pip (ensurepip is missing)."
            f" Debian and Ubuntu: apt-get install python{version}-venv"
        )
    rules = importlib.util.spec_from_file_location("_build", ROOT / "dalle_fast" / "_build.py")
    assert rules is not None and rules.loader is not None
    build = importlib.util.module_from_spec(rules)
    rules.loader.exec_module(build)
    no_compiler = build.why_not()
    if no_compiler:
        print(f"Note: {no_compiler}. Going on without the compiled extension: everything runs, slower.")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        print(
            f"Note: the headers of Python {version} (Python.h) are missing; only Triton on a GPU needs them."
            f" Debian and Ubuntu: apt-get install python{version}-dev"
        )
    return None


def visible_torch() -> str | None:
    """The version of the torch that this Python sees and dalle_fast can use; None where there is none."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
    found = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if found >= OLDEST_TORCH:
        return version
    oldest = ".".join(map(str, OLDEST_TORCH))
    print(f"Note: this Python sees torch {version}, older than {oldest}: it stays as it is, the venv gets a newer one.")
    return None


def read_pins() -> dict[str, str]:
    """requirements-dev.txt: package -> its line."""
    lines = [line.partition("#")[0].strip() for line in PINS.read_text().splitlines()]
    return {re.split(r"[=<> ;]", line)[0].lower(): line for line in lines if line}


def constraint_lines(pins: dict[str, str], kept: str | None, own_torch: bool) -> list[str]:
    """The tested versions; where this Python's packages are seen, what is there already stays as it is.

    Args:
        own_torch: the user named a torch: nothing may be said about it or its triton.
    """
    lines = []
    for name, line in pins.items():
        if name in ("torch", "triton") and own_torch:
            continue
        if kept is not None:
            try:
                line = f"{name}=={importlib.metadata.version(name)}"
            except importlib.metadata.PackageNotFoundError:
                if name == "triton":
                    continue
        lines.append(line)
    return lines


def announce(folder: Path, kept: str | None, spec: str) -> None:
    """Says what will be made and downloaded, before anything is."""
    print(f"This makes {folder}/ and puts into it, for Python {sys.version.split()[0]} ({sys.executable}):")
    if kept is not None:
        print(f"  torch {kept}: the one this Python sees, kept as it is, nothing to download")
    else:
        print(f"  {spec}: about 0.2 GB where pip finds the CPU build, 3 GB and more for the CUDA build, which the")
        print("    default index gives on Linux; `make setup TORCH=... PIP_ARGS=...` chooses another one or index")
    print("  dalle_fast itself, editable, and its compiled extension")
    print(f"  its requirements with the extras {EXTRAS}: about 0.7 GB, most of it Triton and Ray")
    sys.stdout.flush()


def make_environment(folder: Path, *, see_this_python: bool) -> None:
    """A venv; one that sees the packages of this Python where that is itself a venv, too."""
    inside_venv = sys.prefix != sys.base_prefix
    # Links, as `python -m venv` makes them: copies would fail over an environment that is already there.
    builder = venv.EnvBuilder(
        system_site_packages=see_this_python and not inside_venv, with_pip=True, symlinks=os.name != "nt"
    )
    builder.create(folder)
    if see_this_python and inside_venv:
        # --system-site-packages would show the Python below this venv instead.
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        link = folder / "lib" / version / "site-packages" / "parent_environment.pth"
        link.write_text(f"import site; site.addsitedir({sysconfig.get_paths()['purelib']!r})\n")


def python_of(folder: Path) -> Path:
    """The Python of an environment."""
    return folder.absolute() / "bin" / "python"


def run(command: list[str], cwd: Path | None = None) -> None:
    """Runs a command; ends this script with its status where it fails."""
    print("+", shlex.join(command), flush=True)
    done = subprocess.run(command, cwd=cwd)
    if done.returncode != 0:
        raise SystemExit(f"make setup: the command above failed with status {done.returncode}.")


if __name__ == "__main__":
    sys.exit(main())
