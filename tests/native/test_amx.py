"""The instruction set amx, tiles for bfloat16: emulated, in a library of the tests' own, where a processor has none."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from attention_cases import make_angles, make_qkv
from tolerance import check_against_oracle

from dalle_fast import _build, _extension, patterns
from dalle_fast.functional import sparse_attention

missing = _extension.missing() or _build.why_not()
if missing is None and "avx512" not in _extension.instruction_sets():
    missing = "this processor has no AVX-512, which the emulation of AMX is made of"
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))

CSRC = Path(__file__).resolve().parent.parent / "csrc"
PROCESSOR_FLAGS = {"amx_tile", "amx_bf16", "avx512_bf16"}  # as /proc/cpuinfo calls them
PATTERNS = [
    patterns.make(name, text_len=75, grid=(11, 26), **options)
    for name, options in [
        *(("full", {}), ("axial_row", {}), ("axial_col", {}), ("conv_like", {"dilation": 2}), ("bidirectional", {})),
        *(("paper_conv", {"wrap": "torus"}), ("block_sparse", {"block": 8})),
    ]
]


@pytest.fixture(scope="module")
def emulated_library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulated")
    objects = _build.SOURCES.parent.parent / "build" / "csrc"
    if objects.is_dir():  # most are the same
        shutil.copytree(objects, folder / "objects")
    _build.build(folder / "_cpu.so", folder / "objects", emulate_amx=True)
    return folder / "_cpu.so"


@pytest.fixture
def emulated(emulated_library, monkeypatch):
    """The extension is one that emulates tiles, and amx is in force."""
    monkeypatch.setattr(_build, "LIBRARY", emulated_library)
    opened = _extension._open.__wrapped__()
    monkeypatch.setattr(_extension, "_open", lambda: opened)
    _extension.set_isa("amx")


def attention(pattern, impl="cpu", **options):
    return lambda q, k, v: sparse_attention(q, k, v, pattern=pattern, impl=impl, **options)


def outputs_and_gradients(pattern, inputs, **options):
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = attention(pattern, **options)(*leaves)
    return [out, *torch.autograd.grad(out, leaves, out.detach())]


def mask_for(pattern, n, batch=2):
    """A key mask that leaves queries of the first sample without a legal key, where a pattern masks every query."""
    length = n if pattern.masks_every_query else pattern.layout.text_len
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(0)) > 0.3
    mask[0, :40] = False
    return mask


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)
def test_tiles_are_within_the_oracles_budget(pattern, emulated):
    n = pattern.layout.max_inputs
    options = {"key_mask": mask_for(pattern, n), "rotary": make_angles(n, 18)}
    function, oracle = attention(pattern, **options), attention(pattern, "reference", **options)
    check_against_oracle(function, oracle, make_qkv(2, 3, n, 24), torch.bfloat16)
    check_against_oracle(attention(pattern), attention(pattern, "reference"), make_qkv(1, 2, n, 64), torch.bfloat16)


@pytest.mark.parametrize("width", [16, 17, 32, 80, 130])
@pytest.mark.parametrize("n", [1, 33, 64, 200])
def test_tiles_take_any_width_and_length(width, n, emulated):
    pattern = PATTERNS[1]
    check_against_oracle(
        attention(pattern, scale=-0.2),
        attention(pattern, "reference", scale=-0.2),
        make_qkv(3, 4, n, width),
        torch.bfloat16,
    )


def test_tiles_give_the_same_bits_on_any_number_of_threads(emulated):
    before = torch.get_num_threads()
    inputs = make_qkv(2, 3, 300, 48, torch.bfloat16)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append([outputs_and_gradients(pattern, inputs) for pattern in PATTERNS[:3]])
    torch.set_num_threads(before)
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("width", [15, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_tiles_are_for_bfloat16_heads_that_fill_them(dtype, width, emulated):
    inputs = make_qkv(1, 2, 200, width, dtype)
    results = []
    for isa in ("avx512", "amx"):
        _extension.set_isa(isa)
        results.append(outputs_and_gradients(PATTERNS[0], inputs))
    same = [torch.equal(x, y) for x, y in zip(*results, strict=True)]
    assert same == [dtype != torch.bfloat16 or width < 16] * 4


def test_tiles_leave_future_keys_out(emulated):
    """Keys are filled up to squares: not with what lies behind them, which may be anything."""
    q, k, v = make_qkv(1, 1, PATTERNS[0].length, 32, torch.bfloat16)
    out = attention(PATTERNS[0])(q, k, v)
    known = 75 + 64  # text and one tile of the image
    k[..., known:, :] = v[..., known:, :] = torch.nan
    assert torch.equal(attention(PATTERNS[0])(q, k, v)[..., :known, :], out[..., :known, :])


def test_processor_and_compiler_decide_whether_tiles_are_offered():
    flags = set(Path("/proc/cpuinfo").read_text().split())
    compiled = "amx" in _build._instruction_sets(emulate_amx=False)
    assert ("amx" in _extension.instruction_sets()) == (compiled and flags >= PROCESSOR_FLAGS)


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not on this machine")
def test_the_library_holds_the_instructions(emulated_library):
    def instructions(library):
        return subprocess.run(["objdump", "-d", library], capture_output=True, text=True, check=True).stdout

    if "amx" not in _build._instruction_sets(emulate_amx=False):
        pytest.skip("this compiler does not know AMX: the library is built without it")
    shipped = instructions(_build.LIBRARY)
    for name in ("tdpbf16ps", "tileloadd", "tilestored", "tilerelease", "ldtilecfg", "vcvtneps2bf16"):
        assert name in shipped
    assert "tdpbf16ps" not in instructions(emulated_library)


def test_processors_with_tiles_agree_with_the_emulation_bit_for_bit(request):
    if "amx" not in _extension.instruction_sets():
        pytest.skip("this processor has no AMX")
    inputs = make_qkv(2, 2, 300, 48, torch.bfloat16)
    before = _extension.isa()
    _extension.set_isa("amx")
    own = outputs_and_gradients(PATTERNS[3], inputs)
    _extension.set_isa(before)
    request.getfixturevalue("emulated")
    assert all(torch.equal(x, y) for x, y in zip(own, outputs_and_gradients(PATTERNS[3], inputs), strict=True))


@pytest.mark.parametrize("real", [False, True], ids=["emulated", "real"])
def test_one_product_is_rounded_as_the_manual_says(real, tmp_path):
    if real and "amx" not in _extension.instruction_sets():
        pytest.skip("this processor has no AMX")
    sets = _build._instruction_sets(emulate_amx=not real)
    defines = ["-DDALLE_FAST_ISA=amx", *([] if real else ["-DDALLE_FAST_EMULATE_AMX"])]
    command = [*_build.compiler(), *_build.FLAGS, *sets["amx"], *defines, f"-I{_build.SOURCES}"]
    driver = tmp_path / "tiles"
    built = subprocess.run([*command, "-o", driver, CSRC / "tiles.cpp"], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([driver], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("ok", 0)
