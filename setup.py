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


def find(name: str) -> str | None:
    """Path of a build tool: that of the Python package if it is there, else the first on PATH."""
    try:
        folder = getattr(importlib.import_module(name), FOLDERS[name], None)
    except ImportError:
        folder = None
    return shutil.which(name, path=folder) or shutil.which(name)


def program(name: str) -> str:
    """Path of a build tool that has to be there."""
    found = find(name)
    if found is None:
        raise RuntimeError(f"fastvol's extension is built with {name}: `pip install {name}` first")
    return found


def generator() -> list[str]:
    """CMake's options for Ninja; where only make is there, for that."""
    if find("ninja") is None and shutil.which("make") is not None:
        return ["-G", "Unix Makefiles"]
    return ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={program('ninja')}"]


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
            *generator(),
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFASTVOL_MODULE_DIR={target.parent}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        subprocess.run(configure, check=True)
        # Ninja takes what the machine has by itself; make one core.
        jobs = [] if "Ninja" in configure else ["--parallel", str(os.cpu_count() or 1)]
        subprocess.run([program("cmake"), "--build", str(build), *jobs], check=True)
        if not target.exists():
            raise RuntimeError(f"CMake did not build {target}")


setup(ext_modules=[Extension("fastvol._core", sources=[])], cmdclass={"build_ext": CMakeBuild})
