"""The one thing that pyproject.toml cannot say: compile the kernels, where a compiler is."""

import os
import runpy
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

NATIVE = Path("kizzasi/models/ops/native")
kernels = runpy.run_path(str(Path(__file__).parent / NATIVE / "build.py"))


class BuildWithKernels(build_py):
    """Beside the sources in an editable install, else into the wheel."""

    def run(self) -> None:
        super().run()
        folder = NATIVE if self.editable_mode else Path(self.build_lib) / NATIVE
        print(kernels["attempt"](folder, os.environ.get("CC", "")))


class WithKernels(Distribution):
    """A wheel of one platform, as it holds machine code."""

    def has_ext_modules(self) -> bool:
        return True


setup(cmdclass={"build_py": BuildWithKernels}, distclass=WithKernels)
