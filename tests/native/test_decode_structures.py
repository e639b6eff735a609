"""The structures that Python repeats have the sizes and offsets of the C++ headers'."""

import ctypes
import subprocess

import pytest

from dalle_fast import _build
from dalle_fast.native import choose_token, decode, packing

STRUCTURES = {
    "DecodeBranch": decode.DecodeBranch,
    "DecodeWindows": decode.DecodeWindows,
    "DecodeLayer": decode.DecodeLayer,
    "DecodeTable": decode.DecodeTable,
    "DecodeModel": decode.DecodeModel,
    "DecodeLayerCache": decode.DecodeLayerCache,
    "DecodeCaches": decode.DecodeCaches,
    "DecodeRows": decode.DecodeRows,
    "DecodeDraw": decode.DecodeDraw,
    "Decode": decode.Decode,
    "TokenChoice": choose_token.TokenChoice,
    "PackedMatrix": packing.PackedMatrix,
    "PackedProduct": packing.PackedProduct,
}


@pytest.mark.skipif(_build.why_not() is not None, reason=str(_build.why_not()))
def test_structures_lie_as_in_the_headers(tmp_path):
    lines, expected = [], []
    for name, structure in STRUCTURES.items():
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        expected.append(f"{name} {ctypes.sizeof(structure)}")
        for field, _ in structure._fields_:
            lines.append(f'printf("{name}.{field} %zu\\n", offsetof({name}, {field}));')
            expected.append(f"{name}.{field} {getattr(structure, field).offset}")
    source, program = tmp_path / "layout.cpp", tmp_path / "layout"
    source.write_text(
        '#define DALLE_FAST_ISA baseline\n#include <cstddef>\n#include <cstdio>\n#include "decode.h"\n'
        "using namespace dalle_fast;\nint main() {\n" + "\n".join(lines) + "\n}\n"
    )
    command = [*_build.compiler(), "-std=c++17", "-w", f"-I{_build.SOURCES}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    printed = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == expected
