"""The house: what importing costs, what is said when something is missing, how it is built and installed."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dalle_fast
from dalle_fast import _build, _extension

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("triton", "torchvision", "matplotlib", "transformers")  # imported by nothing that a user's import reaches


def run(command: list[str], *, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | environment)


def python(code: str, **options) -> str:
    """Standard output of code in a fresh Python."""
    done = run([sys.executable, "-c", code], **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def setup_venv():
    """tools/setup_venv.py as a module."""
    spec = importlib.util.spec_from_file_location("setup_venv", ROOT / "tools" / "setup_venv.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- importing


def test_import_is_quick_and_loads_nothing_heavy():
    """Attempts count, too: a missing triton or torchvision must not be looked for."""
    code = f"""if True:
        import sys, time
        import torch
        before = time.process_time()
        asked = []
        class Watch:
            def find_spec(self, name, path=None, target=None):
                if name in {HEAVY!r}:
                    asked.append(name)
        sys.meta_path.insert(0, Watch())
        import dalle_fast
        seconds = time.process_time() - before
        from dalle_fast import CLIP, DALLE, DiscreteVAE, TokenLayout, functional, patterns
        from dalle_fast import _extension
        print(seconds < 0.3, asked, _extension._open.cache_info().currsize)
    """
    assert python(code) == "True [] 0"


def test_import_alone_does_not_load_torch():
    assert python("import sys, dalle_fast; print(dalle_fast.__version__, 'torch' in sys.modules)").endswith("False")


def test_public_names():
    for name in dalle_fast.__all__:
        assert getattr(dalle_fast, name) is not None
    assert set(dalle_fast.__all__) <= set(dir(dalle_fast))
    with pytest.raises(AttributeError, match="module 'dalle_fast' has no attribute 'NoSuchModel'"):
        _ = dalle_fast.NoSuchModel


def test_explain_names_every_op():
    with pytest.raises(ValueError, match=r"gumbel_codebook, gumbel_noise, .*sparse_attention.*got 'flash'"):
        dalle_fast.explain("flash")
    for op in dalle_fast.functional.__all__:
        assert callable(getattr(dalle_fast.functional, op))


def test_kernels_are_the_folder_beside_the_package():
    code = "import dalle_fast.kernels, kernels; print([*dalle_fast.kernels.__path__, *kernels.__path__]); "
    code += "print([name for name in vars(kernels) if not name.startswith('__')])"
    where, names = python(code).splitlines()
    assert where == str([str(ROOT / "kernels")] * 2)
    assert names == "[]"  # other libraries probe a top-level `kernels`: nothing to find, nothing imported


@pytest.mark.long
def test_other_libraries_import_from_the_root():
    """transformers probes for a package called kernels, and finds ours on sys.path."""
    code = "import sys; sys.path.insert(0, '.'); import kernels, accelerate, transformers; "
    code += "from transformers import AutoModel, GPT2Model; print('imported')"
    assert python(code).endswith("imported")


# -- the extension


def test_missing_library_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(_build, "LIBRARY", tmp_path / "_cpu.so")
    monkeypatch.setattr(_build, "why_not", lambda: None)
    assert _extension._open.__wrapped__() == (
        None,
        "the compiled extension is not built. Build it: `make setup`, or `python -m dalle_fast._build` in a checkout.",
    )
    monkeypatch.undo()
    monkeypatch.setattr(_build, "LIBRARY", tmp_path / "_cpu.so")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert _extension._open.__wrapped__()[1].startswith(
        "the compiled extension is not built: the C++ compiler named by CXX, 'no-such-compiler', is not on this"
    )


@pytest.mark.skipif(_extension.missing() is not None, reason=str(_extension.missing()))
def test_library_of_other_sources_is_refused(monkeypatch):
    monkeypatch.setattr(_build, "source_digest", lambda: "0" * 16)
    assert _extension._open.__wrapped__()[1].startswith("the compiled extension was built from other sources")


def test_build_without_compiler_says_what_is_missing():
    done = run([sys.executable, "-m", "dalle_fast._build"], CXX="no-such-compiler")
    assert done.returncode == 0
    assert done.stdout.startswith("dalle_fast runs without its compiled extension: the C++ compiler named by CXX")
    assert "apt-get install g++" in done.stdout


@pytest.mark.skipif(_build.why_not() is not None, reason=str(_build.why_not()))
def test_build_repeats_nothing_and_reports_errors(monkeypatch, tmp_path):
    sources = tmp_path / "csrc" / "cpu"
    sources.mkdir(parents=True)
    (sources / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    monkeypatch.setattr(_build, "SOURCES", sources)
    library, objects = tmp_path / "lib.so", tmp_path / "objects"
    _build.build(library, objects)
    built = (objects / "one.o").stat().st_mtime_ns
    _build.build(library, objects)
    assert (objects / "one.o").stat().st_mtime_ns == built
    (sources / "one.cpp").write_text("int one() { return unknown; }\n")
    with pytest.raises(RuntimeError, match=r"unknown.*was not declared|undeclared identifier"):
        _build.build(library, objects)


@pytest.mark.long
@pytest.mark.skipif(_build.why_not() is not None, reason=str(_build.why_not()))
@pytest.mark.parametrize("sanitizer", list(_build.SANITIZERS))
def test_extension_is_clean_under_sanitizers(sanitizer, tmp_path):
    library, driver = tmp_path / "library.so", tmp_path / "drive"
    _build.build(library, tmp_path / "objects", sanitizer=sanitizer, emulate_amx=True)
    compiler = _build.compiler()
    command = [
        *compiler,
        "-std=c++17",
        *_build.SANITIZERS[sanitizer],
        f"-I{_build.SOURCES}",
        "-pthread",
        "-o",
        str(driver),
    ]
    built = run([*command, str(ROOT / "tests" / "csrc" / "drive.cpp"), str(library), f"-Wl,-rpath,{tmp_path}"])
    assert built.returncode == 0, built.stderr
    done = run([str(driver)])
    assert (done.stdout.strip(), done.returncode) == ("ok", 0), done.stderr


# -- setting up


def test_make_knows_its_targets():
    for target in ("setup", "demo", "test", "test-long", "check", "bench", "gpu", "clean"):
        done = run(["make", "-n", target])
        assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_make_gpu_says_what_is_absent():
    done = run(["make", "gpu", f"PYTHON={sys.executable}"])
    assert done.returncode != 0
    assert "make gpu: " in done.stderr
    assert "sees no GPU on this machine; nothing was run." in done.stderr or "has no triton" in done.stderr


def test_setup_keeps_what_is_there_and_pins_the_rest(setup_venv):
    pins = setup_venv.read_pins()
    assert set(pins) >= {"torch", "triton", "numpy", "ruff"}
    fresh = setup_venv.constraint_lines(pins, kept=None, own_torch=False)
    assert pins["torch"] in fresh
    kept = setup_venv.constraint_lines(pins, kept=torch.__version__, own_torch=False)
    assert f"torch=={torch.__version__}" in kept
    assert pins["torch"] == f"torch=={torch.__version__}" or pins["torch"] not in kept
    named = setup_venv.constraint_lines(pins, kept=None, own_torch=True)
    assert not any(line.startswith(("torch", "triton")) for line in named)


def test_setup_announces_what_it_downloads(setup_venv, capsys):
    setup_venv.announce(Path(".venv"), None, "torch==2.13.0")
    assert "torch==2.13.0: about 0.2 GB" in capsys.readouterr().out
    setup_venv.announce(Path(".venv"), "2.12.0", "torch==2.13.0")
    assert "torch 2.12.0: the one this Python sees, kept as it is, nothing to download" in capsys.readouterr().out


def test_setup_names_what_is_missing(setup_venv, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(setup_venv.sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    assert setup_venv.what_is_missing() is None
    said = capsys.readouterr().out
    assert "apt-get install g++" in said
    assert f"apt-get install python{sys.version_info.major}.{sys.version_info.minor}-dev" in said
    monkeypatch.setattr(setup_venv.importlib.util, "find_spec", lambda name: None)
    assert "-venv" in setup_venv.what_is_missing()


@pytest.mark.long
def test_setup_takes_over_an_environment_that_is_there(setup_venv, tmp_path):
    assert run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path)]).returncode == 0
    setup_venv.make_environment(tmp_path, see_this_python=False)
    assert run([str(setup_venv.python_of(tmp_path)), "-m", "pip", "--version"]).returncode == 0


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what git tracks: building in place would leave its traces here."""
    copy = tmp_path_factory.mktemp("copy") / "checkout"
    tracked = run(["git", "ls-files", "-z"])
    if tracked.returncode != 0:
        pytest.skip("not a git checkout: no list of the files to copy")
    for name in tracked.stdout.split("\0"):
        # The shipped model is no part of the package.
        if name and not name.startswith("assets/") and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def beside_torch(tmp_path_factory):
    """The Python of a new environment that sees the packages of this one, torch among them."""
    folder = tmp_path_factory.mktemp("beside") / "venv"
    assert run([sys.executable, "-m", "venv", str(folder)]).returncode == 0
    site_packages = next(folder.glob("lib/python*/site-packages"))
    here = Path(torch.__file__).resolve().parent.parent
    (site_packages / "beside.pth").write_text(f"{here}\n")
    return str(folder / "bin" / "python")


@pytest.mark.long
def test_installation_beside_a_torch_leaves_it_alone(checkout, beside_torch, tmp_path):
    before = run([beside_torch, "-c", "import torch; print(torch.__version__, torch.__file__)"]).stdout
    install = [beside_torch, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    done = run([*install, "--ignore-installed", str(checkout)], cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert run([beside_torch, "-c", "import torch; print(torch.__version__, torch.__file__)"]).stdout == before
    code = """if True:
        import dalle_fast, dalle_fast.kernels, torch
        from dalle_fast import _extension, functional, rng
        print(dalle_fast.__file__); print(dalle_fast.kernels.__file__); print(_extension.missing())
        print(functional.gumbel_noise(1, torch.arange(2), rng.Stream.VAE, 5).shape)
    """
    done = run([beside_torch, "-c", code], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    package, kernels, missing, shape = done.stdout.splitlines()
    folder = Path(package).parent
    assert Path(beside_torch).parent.parent in folder.parents
    assert Path(kernels) == folder / "kernels" / "__init__.py"
    assert missing == "None" or _build.why_not() is not None
    assert shape == "torch.Size([2, 5])"
    assert run([str(Path(beside_torch).parent / "dalle-fast"), "--help"], cwd=tmp_path).returncode == 0


@pytest.mark.long
def test_no_extra_changes_torch(setup_venv, checkout, beside_torch, tmp_path):
    report = tmp_path / "report.json"
    command = [beside_torch, "-m", "pip", "install", "--dry-run", "--no-build-isolation", "--report", str(report)]
    done = run([*command, f"{checkout}[{setup_venv.EXTRAS}]"], cwd=tmp_path)
    if done.returncode != 0 and "No matching distribution" in done.stderr:
        pytest.skip(f"pip reaches no package index from here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    installed = {item["metadata"]["name"].lower() for item in json.loads(report.read_text())["install"]}
    assert not installed & {"torch", "triton", "torchvision"}
