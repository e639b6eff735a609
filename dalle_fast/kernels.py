"""In a checkout: makes `dalle_fast.kernels` the folder kernels/ beside this package, where setup.py maps it from.

An installed package has a folder of this name, which Python prefers to this file.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parent.parent / "kernels")]
