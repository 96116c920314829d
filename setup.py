"""Builds the C++ extension ``fastvol._core`` with CMake; all metadata is in pyproject.toml."""

import importlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Where the packages of these names keep their programs.
FOLDERS = {"cmake": "CMAKE_BIN_DIR", "ninja": "BIN_DIR"}


def program(name: str) -> str:
    """Path of a build tool: that of the Python package if it is there, else the first on PATH."""
    try:
        folder = getattr(importlib.import_module(name), FOLDERS[name], None)
    except ImportError:
        folder = None
    found = shutil.which(name, path=folder) or shutil.which(name)
    if found is None:
        raise RuntimeError(f"fastvol's extension is built with {name}: `pip install {name}` first")
    return found


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        source = Path(__file__).resolve().parent
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        configure = [
            program("cmake"),
            "-S",
            str(source),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={program('ninja')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFASTVOL_MODULE_DIR={target.parent}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        subprocess.run(configure, check=True)
        subprocess.run([program("cmake"), "--build", str(build)], check=True)
        if not target.exists():
            raise RuntimeError(f"CMake did not build {target}")


setup(ext_modules=[Extension("fastvol._core", sources=[])], cmdclass={"build_ext": CMakeBuild})
