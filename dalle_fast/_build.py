"""Compiles csrc/cpu into one shared library: a plain C interface, built without torch or Python headers.

Imports the standard library alone: setup.py loads this file before anything is installed. A file's name tells how it
is compiled: *_amx_kernel.cpp for the instruction set amx, other *_kernel.cpp once for each of the others, every other
.cpp once. Why: docs/decisions/0001.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cpu"  # there in a checkout and in a source distribution
LIBRARY = Path(__file__).resolve().parent / "_cpu.so"

_AVX512 = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"]
# In the order of enum Isa (csrc/cpu/isa.h), each with the flags its kernels are compiled with.
INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": _AVX512,
    "amx": [*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}

# No -ffast-math, no -march=native, no contraction of a*b + c: equal bits on every instruction set and machine.
# -Wno-uninitialized: GCC 12's own AVX-512 headers trip it.
FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"),
    *("-Wall", "-Wextra", "-Wno-uninitialized"),
]
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g", "-fno-omit-frame-pointer"],
    "thread": ["-fsanitize=thread", "-O1", "-g"],
}


def compiler() -> list[str] | None:
    """The C++ compiler, as the start of a command line: $CXX, else the first of c++, g++, clang++; else None."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    return None


def why_not() -> str | None:
    """In words, what is missing to build the library; None where nothing is."""
    if compiler() is None:
        named = os.environ.get("CXX")
        what = f"the C++ compiler named by CXX, {named!r}," if named else "a C++ compiler (c++, g++ or clang++)"
        return f"{what} is not on this machine's PATH (Debian and Ubuntu: apt-get install g++)"
    return None


def source_digest() -> str | None:
    """Of every source, header and build rule; None where there are no sources (an installed package)."""
    if not SOURCES.is_dir():
        return None
    digest = hashlib.sha256()
    for path in [*sorted(SOURCES.glob("*")), Path(__file__)]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def build(
    library: Path = LIBRARY, objects: Path | None = None, *, sanitizer: str | None = None, emulate_amx: bool = False
) -> None:
    """Compiles what changed, in parallel, and links it.

    Args:
        library: the shared library to write.   objects: folder of the object files, kept between builds.
        sanitizer: None, "address" (with undefined behaviour) or "thread".
        emulate_amx: the set amx computes what its instructions would, slowly, on any machine with AVX-512: for tests.
    Raises: RuntimeError with the compiler's own words.
    """
    missing = why_not()
    if missing is not None:
        raise RuntimeError(f"build: {missing}.")
    objects = objects or SOURCES.parent.parent / "build" / "csrc"
    objects.mkdir(parents=True, exist_ok=True)
    extra = SANITIZERS[sanitizer] if sanitizer else []
    jobs = _compilations(objects, extra, emulate_amx)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_compile, jobs))
    library.parent.mkdir(parents=True, exist_ok=True)
    # Linked under another name first: a process that has the old library open keeps it.
    fresh = library.with_suffix(f".{os.getpid()}.so")
    _run([*_compiler(), *extra, "-shared", "-o", str(fresh), *(str(job[-1]) for job in jobs)])
    fresh.replace(library)


def _instruction_sets(emulate_amx: bool) -> dict[str, list[str]]:
    """Those that kernels are compiled for on this processor architecture by this compiler, with their flags."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {"baseline": []}
    sets = dict(INSTRUCTION_SETS)
    if emulate_amx:
        sets["amx"] = _AVX512
    elif not _knows_amx(sets["amx"]):  # GCC before 11, binutils before 2.36
        del sets["amx"]
    return sets


def _compilations(objects: Path, extra: Sequence[str], emulate_amx: bool) -> list[tuple[list[str], Path, Path]]:
    sets = _instruction_sets(emulate_amx)
    shared = [*FLAGS, *extra, *(["-DDALLE_FAST_HAS_AMX"] if "amx" in sets else [])]
    jobs = []
    for source in sorted(SOURCES.glob("*.cpp")):
        kernel, on_tiles = source.stem.endswith("_kernel"), source.stem.endswith("_amx_kernel")
        for isa in [isa for isa in sets if (isa == "amx") == on_tiles] if kernel else [None]:
            flags = list(shared)
            if isa is not None:
                flags += [f"-DDALLE_FAST_ISA={isa}", *sets[isa]]
            if emulate_amx and (on_tiles or source.stem == "isa"):
                flags.append("-DDALLE_FAST_EMULATE_AMX")
            if source.stem == "exports":
                flags.append(f'-DDALLE_FAST_SOURCE_DIGEST="{source_digest()}"')
            name = source.stem if isa is None else f"{source.stem}.{isa}"
            jobs.append((flags, source, objects / f"{name}.o"))
    return jobs


def _compile(job: tuple[list[str], Path, Path]) -> None:
    flags, source, object_file = job
    command = [*_compiler(), *flags, "-c", str(source)]
    # The object carries the command line and the text of every source and header it was made from.
    mark = object_file.with_suffix(".mark")
    texts = b"".join(path.read_bytes() for path in sorted(_with_headers(source)))
    made_from = hashlib.sha256(shlex.join(command).encode() + texts).hexdigest()
    if object_file.exists() and mark.exists() and mark.read_text() == made_from:
        return
    _run([*command, "-o", str(object_file)])
    mark.write_text(made_from)


def _with_headers(source: Path) -> set[Path]:
    """The source and every header of ours that it includes."""
    found, open_ends = {source}, [source]
    while open_ends:
        names = re.findall(r'^#include "(.+)"', open_ends.pop().read_text(), re.MULTILINE)
        fresh = {SOURCES / name for name in names} - found
        found |= fresh
        open_ends += fresh
    return found


def _compiler() -> list[str]:
    command = compiler()
    assert command is not None  # build() checked it
    return command


def _knows_amx(flags: Sequence[str]) -> bool:
    """The compiler takes the flags, and its assembler an instruction."""
    command = [*_compiler(), *flags, "-x", "c++", "-", "-c", "-o", os.devnull]
    return subprocess.run(command, input=b'asm("tilerelease");', capture_output=True).returncode == 0


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"build: {shlex.join(command)}\n{done.stderr.strip()}")


if __name__ == "__main__":
    if why_not() is None:
        build()
    else:
        print(f"dalle_fast runs without its compiled extension: {why_not()}.")
