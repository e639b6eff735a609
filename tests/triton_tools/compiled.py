"""Reads a compiled kernel: registers, spills, shared memory, what kind of products it forms, what it does to memory."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Counted in the machine code: matrix products by operand type, scalar products, local memory, atomics.
INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA", "FFMA", "LDL", "STL", "ATOM", "ATOMG", "RED", "REDG")


@dataclass(frozen=True)
class Resources:
    """What a kernel needs of one multiprocessor, a thread or a block, and which instructions it is made of.

    `dots` holds the products as written: (type of the left operand, precision) with repetitions removed; `tf32` and
    `atomics` count instructions of the PTX.
    """

    registers: int  # a thread
    stack_bytes: int  # a thread; registers spill to it
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int  # a block
    warps: int  # a block
    instructions: dict[str, int]
    dots: list[tuple[str, str]]
    tf32: int
    atomics: int
    target: int
    triton: str


def read(kernel: Any, target: int) -> Resources:
    """The resources of Triton's CompiledKernel for compute capability `target`.

    Raises: RuntimeError (a tool of Triton's wheel fails, or says what this cannot read).
    """
    import triton

    ptx = kernel.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        registers, stack = _usage(cubin)
        # Registers spill to the stack and nowhere else; assembling again to count the bytes costs up to seconds.
        spill_store, spill_load = _spills(ptx, target, Path(folder)) if stack else (0, 0)
        code = _run(_tool("cuobjdump"), "--dump-sass", str(cubin)).stdout
    return Resources(
        registers=registers,
        stack_bytes=stack,
        spill_store_bytes=spill_store,
        spill_load_bytes=spill_load,
        shared_bytes=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        instructions=count_instructions(code),
        dots=dots_of(kernel.asm["ttir"]),
        tf32=len(re.findall(r"[.:]tf32\b", ptx)),
        atomics=len(re.findall(r"^\s*(?:@!?%p\d+\s+)?(?:atom|red)\.", ptx, re.MULTILINE)),
        target=target,
        triton=triton.__version__,
    )


def count_instructions(code: str) -> dict[str, int]:
    """How often each of INSTRUCTIONS occurs in disassembled machine code; absent ones are left out."""
    found: dict[str, int] = {}
    # `/*0080*/   @!P0 HMMA.16816.F32 R4, R8, R12, R4 ;`
    for name in re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)[. ;]", code, re.MULTILINE):
        if name in INSTRUCTIONS:
            found[name] = found.get(name, 0) + 1
    return {name: found[name] for name in INSTRUCTIONS if name in found}


def dots_of(ttir: str) -> list[tuple[str, str]]:
    """(type of the left operand, input precision) of each kind of tl.dot in Triton's first representation, sorted."""
    pattern = r"tt\.dot\b([^\n]*?) : tensor<(?:\d+x)+(\w+)"
    kinds = set()
    for attributes, operand in re.findall(pattern, ttir):
        precision = re.search(r"inputPrecision = (\w+)", attributes)
        kinds.add((operand, precision[1] if precision else "ieee"))
    return sorted(kinds)


def _usage(cubin: Path) -> tuple[int, int]:
    said = _run(_tool("cuobjdump"), "--dump-resource-usage", str(cubin)).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    if found is None:
        raise RuntimeError(f"cuobjdump --dump-resource-usage must name REG and STACK, got {said!r}.")
    return int(found[1]), int(found[2])


def _spills(ptx: str, target: int, folder: Path) -> tuple[int, int]:
    """Bytes a thread stores and loads because registers are short; only the assembler's log tells them."""
    from triton.backends.nvidia.compiler import get_ptxas

    source = folder / "kernel.ptx"
    source.write_text(ptx)
    architecture = re.search(r"\.target (\w+)", ptx)
    if architecture is None:
        raise RuntimeError(f"the PTX must name its .target, begins {ptx[:200]!r}.")
    assembler = get_ptxas(target)
    log = _run(
        getattr(assembler, "path", assembler),
        "-v",
        f"--gpu-name={architecture[1]}",
        str(source),
        "-o",
        str(folder / "again.cubin"),
    ).stderr
    found = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if found is None:
        raise RuntimeError(f"ptxas -v must name spill stores and loads, got {log!r}.")
    return int(found[1]), int(found[2])


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{Path(command[0]).name} failed with status {done.returncode}: {done.stderr.strip()}")
    return done
