"""The compiled inner loops (kernels.cpp): built once by the compiler that is there, kept in a cache folder.

A few seconds' work of `c++`, without the headers of torch or Python; the functions take pointers and sizes.
Where there is no compiler, there are no kernels, and torch does the work.
"""

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from ldm.files import atomic_write

SOURCE = Path(__file__).with_name("kernels.cpp")

LANES = 16  # the kernels take channels in vectors of that many

# Not -march=native: a home folder, and the cache in it, may be shared by unlike processors.
FLAGS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}
"""Compiler flags by what torch.backends.cpu says of the processor; others: none."""

logger = logging.getLogger(__name__)


@cache
def kernels() -> ctypes.CDLL | None:
    """The functions of kernels.cpp. None: there is no compiler, or the environment has LDM_KERNELS=0."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")  # such as "ccache g++"
    if os.environ.get("LDM_KERNELS") == "0" or shutil.which(compiler[0]) is None or sys.platform != "linux":
        return None
    processor = torch.backends.cpu.get_cpu_capability()
    flags = ("-O3", "-ffast-math", "-fopenmp", "-fPIC", *FLAGS.get(processor, ()))
    try:
        return _library(compiler, flags)
    except (OSError, subprocess.SubprocessError) as error:
        logger.info("no compiled kernels: %s", error)
        return None


def _library(compiler: Sequence[str], flags: tuple[str, ...]) -> ctypes.CDLL:
    recipe = "\n".join([*compiler, *flags, SOURCE.read_text()])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "ldm"
    path = folder / f"kernels-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            built = Path(scratch) / path.name
            compiled = built.with_suffix(".o")
            subprocess.run(
                [*compiler, *flags, "-c", SOURCE, "-o", compiled],
                check=True,
                capture_output=True,
                timeout=120,
            )
            # Linked without -fopenmp, so that the loops run on the threads of torch's own OpenMP library.
            subprocess.run([*compiler, "-shared", compiled, "-o", built], check=True, capture_output=True)
            with atomic_write(path, overwrite=True) as file:
                file.write(built.read_bytes())
    library = ctypes.CDLL(os.fspath(path))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.winograd_filter.argtypes = (pointer, pointer, number, number)
    library.winograd_input.argtypes = (pointer, pointer, *(number,) * 5, pointer)
    library.winograd_output.argtypes = (pointer, pointer, pointer, *(number,) * 5)
    return library
