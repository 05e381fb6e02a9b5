"""Installs the peers from their packages, once, into a directory of their own.

A virtual environment for Transformers, accelerate and gguf, and one for kt-kernel; llama.cpp from
the sources that the source package of llama-cpp-python carries, configured for this CPU, two tools
built, and a small program that times its products. Nothing of the project's own environment
changes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

PACKAGES = (
    "torch==2.13.0",
    "transformers==5.23.0",
    "accelerate==1.15.0",
    "gguf==0.19.0",
    "numpy>=1.26",
)
KT_KERNEL_PACKAGE = "kt-kernel==0.7.2"
"""Installed without what it asks for: an older torch and triton, which its kernels do not use."""
KT_KERNEL_NEEDS = ("torch==2.13.0", "gguf==0.19.0", "safetensors>=0.4", "numpy>=1.26")
GGML_PEER = Path(__file__).with_name("ggml_peer.cc")
LLAMA_CPP_PACKAGE = "llama-cpp-python==0.3.36"
LLAMA_TOOLS = ("llama-batched-bench", "llama-completion")
LLAMA_CPP_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_NATIVE=ON",
    "-DGGML_BLAS=OFF",
    "-DLLAMA_BUILD_TOOLS=ON",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
)


@dataclass(frozen=True)
class PeerInstallation:
    """Where the peers lie; each ``ensure_`` installs what is not there yet."""

    directory: Path
    num_jobs: int = 2
    """Compilers that run at once."""

    def ensure_python(self) -> Path:
        """Return the interpreter of the peers' environment."""
        return self._ensure_environment("venv", [PACKAGES])

    def ensure_kt_kernel(self) -> Path:
        """Return the interpreter of kt-kernel's environment."""
        alone = ("--no-deps", KT_KERNEL_PACKAGE)
        return self._ensure_environment("venv-kt-kernel", [KT_KERNEL_NEEDS, alone])

    def _ensure_environment(self, name: str, steps: Sequence[Sequence[str]]) -> Path:
        """Return the interpreter of an environment; each step is the arguments of a pip install."""
        environment = self.directory / name
        python = environment / "bin" / "python"
        marker = environment / "installed.txt"
        wanted = "\n".join(word for step in steps for word in step) + "\n"
        if marker.is_file() and marker.read_text() == wanted:
            return python
        _say(f"installing {', '.join(word for step in steps for word in step)} in {environment}")
        venv.create(environment, with_pip=True, clear=True)
        for step in steps:
            _run([python, "-m", "pip", "install", "--quiet", *step])
        marker.write_text(wanted)
        return python

    def ensure_llama_cpp(self) -> Path:
        """Return the directory of llama.cpp's tools."""
        build = self.directory / "build" / "llama.cpp"
        tools = build / "bin"
        if all((tools / tool).is_file() for tool in LLAMA_TOOLS):
            return tools
        source = self._llama_cpp_source()
        _say(f"building llama.cpp in {build}; this takes some 10 minutes on 2 cores")
        generator = ["-G", "Ninja"] if _program("ninja") else []
        cmake = _program("cmake")
        if cmake is None:
            raise SystemExit("llama.cpp needs cmake to build: pip install cmake")
        _run([cmake, "-S", source, "-B", build, *generator, *LLAMA_CPP_OPTIONS])
        _run([cmake, "--build", build, "-j", self.num_jobs, "--target", *LLAMA_TOOLS])
        return tools

    def ensure_ggml_peer(self) -> Path:
        """Return the program of ggml_peer.cc, linked with llama.cpp's libraries."""
        self.ensure_llama_cpp()
        program = self.directory / "build" / "ggml-peer"
        if program.is_file() and program.stat().st_mtime > GGML_PEER.stat().st_mtime:
            return program
        include = self._llama_cpp_source() / "ggml" / "include"
        libraries = self.directory / "build" / "llama.cpp" / "ggml" / "src"
        archives = [libraries / f"lib{name}.a" for name in ("ggml-cpu", "ggml-base")]
        compiler = [os.environ.get("CXX", "c++"), "-std=c++17", "-O2", "-fopenmp"]
        _run([*compiler, "-I", include, GGML_PEER, *archives, "-ldl", "-lpthread", "-o", program])
        return program

    def _llama_cpp_source(self) -> Path:
        directory = self.directory / "src"
        directory.mkdir(parents=True, exist_ok=True)
        name, version = LLAMA_CPP_PACKAGE.split("==")
        root = directory / f"{name.replace('-', '_')}-{version}"
        if not (root / "pyproject.toml").is_file():
            _say(f"downloading the sources of {LLAMA_CPP_PACKAGE} (77 MB)")
            download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            _run([*download, "--no-binary", ":all:", "--dest", directory, LLAMA_CPP_PACKAGE])
            with tarfile.open(directory / f"{root.name}.tar.gz") as archive:
                archive.extractall(directory, filter="data")
        return root / "vendor" / "llama.cpp"


def _program(name: str) -> str | None:
    """Find a program beside this interpreter, where pip puts it, or on the PATH."""
    here = Path(sys.executable).parent
    return shutil.which(name, path=f"{here}{os.pathsep}{os.environ.get('PATH', '')}")


def _run(command: Sequence[object]) -> None:
    words = [str(word) for word in command]
    try:
        subprocess.run(words, check=True, stdout=sys.stderr)
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"installing a peer failed, exit code {error.returncode}: {' '.join(words)}"
        ) from error


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
