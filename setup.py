"""Builds csrc/cpu into the package where a C++ compiler is present; installs without it, and says so, where none is."""

import importlib.util
import logging
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def _load_build_rules():
    # By path: importing the package would need what it depends on, torch for one, in the build environment.
    spec = importlib.util.spec_from_file_location("_dalle_fast_build", ROOT / "dalle_fast" / "_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildExtension(build_ext):
    """Hands the extension to dalle_fast/_build.py, which compiles each kernel once for every instruction set."""

    def build_extension(self, ext):
        rules = _load_build_rules()
        objects = Path(self.build_temp).resolve() / "csrc"
        try:
            rules.build(Path(self.get_ext_fullpath(ext.name)).resolve(), objects)
        except RuntimeError as error:
            # Everything runs without it, on plain torch; dalle_fast/_extension.py says the same at run time.
            logging.getLogger("dalle_fast").warning("dalle_fast is installed without its compiled extension: %s", error)
            self.extensions.remove(ext)

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split("."))) + ".so"  # a plain C library: nothing of this Python is in its name


setup(
    packages=[*find_packages(include=["dalle_fast", "dalle_fast.*"]), "dalle_fast.kernels"],
    package_dir={"dalle_fast.kernels": "kernels"},
    ext_modules=[Extension("dalle_fast._cpu", sources=[])],
    cmdclass={"build_ext": BuildExtension},
)
