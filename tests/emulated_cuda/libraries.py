"""Emulated CUDA libraries, compiled once and loaded in front of torch's.

- A library that is loaded globally before torch is found first, so torch's own CUDA libraries call
  it. No environment variable is needed, and a forked process has it too.
- Triton is hidden: its kernels could not run.
"""

import ctypes
import hashlib
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
COMPILER = ("gcc", "-shared", "-fPIC", "-O1")
LIBRARIES = {"cuda_runtime.c": "libemulatedcudart.so", "cuda_driver.c": "libcuda.so.1"}
"""Source -> name that the library is looked up by."""


def build() -> list[Path]:
    """Return the compiled libraries, made anew when a source has changed."""
    sources = [HERE / name for name in LIBRARIES]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"k2train-emulated-cuda-{os.getuid()}-{digest}"
    folder.mkdir(mode=0o700, exist_ok=True)

    built = []
    for source, name in zip(sources, LIBRARIES.values(), strict=True):
        library = folder / name
        if not library.exists():
            # Processes may compile at the same time: each moves a complete file into place.
            made = folder / f"{name}.{os.getpid()}"
            command = [
                *COMPILER,
                source,
                "-o",
                made,
                f"-Wl,-soname,{name}",
                "-lpthread",
            ]
            subprocess.run(command, check=True)
            made.replace(library)
        built.append(library)
    return built


@cache
def load() -> ctypes.CDLL:
    """Load the libraries into this process, once, and return the runtime.

    The process must not have imported torch before.
    """
    assert "torch" not in sys.modules, "torch is loaded, and with it the real CUDA runtime"
    runtime, _ = (ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL) for library in build())
    sys.modules["triton"] = None  # type: ignore[assignment]
    return runtime
