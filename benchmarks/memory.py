"""Predicted and measured memory: each case in a process of its own.

    python -m benchmarks.memory [--quick] [--sd15 FILE] [--sdxl]

Measured is the most that the whole process ever had in memory (VmHWM, Linux) while it loaded a model, made
one guided step and decoded the picture. The larger models have the true shapes of Stable Diffusion 1.5 and XL
and random weights, in files in half precision of 2.1 and 6.9 GB, which are written for this.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ldm.files import atomic_write

RESULTS = Path(__file__).parent / "results" / "memory.json"


@dataclass(frozen=True)
class Case:
    """One run."""

    model: str = "embedded"
    size: int = 512
    batch: int = 1
    storage: str | None = None
    fast: bool = False
    control: bool = False  # with the embedded model's ControlNet
    picture: bool = False  # image to image
    hires: float | None = None  # a second pass, so many times as wide and high, by an enlarged picture
    upscaler: str = "Lanczos"  # what enlarges it; "esrgan": a network of Real-ESRGAN x4plus's shape
    lora: bool = False  # rank 32, of all attention and feed-forward layers, in float16
    strips: bool = False  # decoded in strips, and a row at a time

    def __str__(self) -> str:
        notes = {
            f"batch of {self.batch}": self.batch > 1,
            f"weights in {self.storage}": self.storage,
            "`--fast`": self.fast,
            "ControlNet": self.control,
            "image to image": self.picture,
            f"second pass x {self.hires}": self.hires,
            f"enlarged by {self.upscaler}": self.upscaler != "Lanczos",
            "LoRA": self.lora,
            "in strips, a row at a time": self.strips,
        }
        return f"{self.model} | {self.size} | {', '.join(note for note, holds in notes.items() if holds)}"


EMBEDDED = [
    *(Case(size=size) for size in (256, 512, 768)),
    Case(batch=4),
    Case(fast=True),
    Case(control=True),
    Case(picture=True),
    Case(size=256, hires=2),
    Case(size=256, hires=2, upscaler="esrgan"),
    Case(size=256, lora=True),
    Case(size=768, strips=True),
    Case(storage="float16"),
]
SD15 = [
    *(Case("SD 1.5", size) for size in (256, 512, 768)),
    Case("SD 1.5", storage="float16"),
    Case("SD 1.5", 256, fast=True),
    Case("SD 1.5", fast=True),
    Case("SD 1.5", 256, batch=4),
    Case("SD 1.5", 256, hires=2),
    Case("SD 1.5", 256, lora=True),
    Case("SD 1.5", 256, hires=2, upscaler="esrgan", lora=True),
    Case("SD 1.5", storage="float16", lora=True),
    Case("SD 1.5", 768, storage="float16", strips=True),
]
SDXL = [Case("SDXL", storage="float16", strips=True)]


def resident(field: str) -> int:
    """Bytes: VmRSS, now; VmHWM, the most so far (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def run(case: Case, path: str | None, folder: str | None, predicting: bool) -> float:
    """Make the run, or only predict it; MB. folder: with the files of `write_files`."""
    import torch
    from PIL import Image

    import ldm
    from ldm import memory
    from ldm.models import Limits

    way = memory.Way(
        storage=getattr(torch, case.storage) if case.storage else None,
        fast=case.fast,
        limits=Limits(1, 0) if case.strips else Limits(),
    )
    request = ldm.Request(
        prompt="a cat <lora:lora:0.8>" if case.lora else "a cat",
        width=case.size,
        height=case.size,
        batch_size=case.batch,
        steps=1,
        sampler="Euler",
        hires=ldm.Hires(scale=case.hires, upscaler=case.upscaler, strength=0.5) if case.hires else None,
        edit=ldm.Edit(strength=1.0) if case.picture else None,
    )
    picture = Image.new("RGB", (case.size, case.size)) if case.picture else None
    files = Path(folder) if folder else None
    library = ldm.Library(loras=files, upscalers=files)
    models = (
        ldm.load(path, device="meta", dtype=way.dtype, storage=way.storage, library=library)
        if predicting
        else way.load(path, library=library)
    )
    nets = [ldm.load_controlnet("canny", models)] if case.control else []
    inputs = ldm.Inputs(picture=picture)
    if predicting:
        return memory.predict(models, request, way, inputs, nets) / 2**20
    controls = tuple(ldm.Control(net, Image.new("RGB", (case.size, case.size))) for net in nets)
    ldm.txt2img(models, request, ldm.Inputs(picture=picture, controls=controls))
    return resident("VmHWM") / 2**20


def write_model(path: Path, name: str) -> None:
    """A model of the true shapes with random weights, in float16."""
    import torch
    from torch import nn

    from ldm.denoise import Denoiser, Prediction
    from ldm.families import FAMILIES
    from ldm.models import Models
    from ldm.text.clip import CLIP_L, OPENCLIP_BIGG, ClipTextModel
    from ldm.unet import SD1_UNET, SDXL_UNET, UNet
    from ldm.vae import KL_F8, AutoencoderKL

    family = next(family for family in FAMILIES if family.name == name)
    configs = [CLIP_L, OPENCLIP_BIGG] if name == "sdxl" else [CLIP_L]
    with torch.device("meta"):
        unet = UNet(SDXL_UNET if name == "sdxl" else SD1_UNET)
        vae, *text = AutoencoderKL(KL_F8), *(ClipTextModel(config) for config in configs)

    def filled(module: nn.Module) -> nn.Module:
        module.half().to_empty(device="cpu")
        for weight in module.parameters():  # a million different numbers are enough
            numbers = torch.empty(2**20).normal_(std=0.02).half()
            repeats = -(-weight.numel() // len(numbers))
            weight.data = numbers.repeat(repeats)[: weight.numel()].view(weight.shape)
        return module

    for network in (unet, vae):
        filled(network)
    denoiser = Denoiser(unet, family.schedule(), Prediction.EPS)
    Models(family, denoiser, vae, tuple(filled(encoder) for encoder in text)).save(path)


def write_files(folder: Path, path: Path | None) -> None:
    """What cases call beside the model at `path`: a LoRA for it, and an ESRGAN; both with random weights."""
    import torch

    import ldm
    from ldm.formats import write_safetensors
    from ldm.lora_names import kohya_key, parts, trained
    from ldm.upscalers.esrgan import RRDBConfig, RRDBNet

    models, rank, tensors = ldm.load(path, device="meta"), 32, {}
    for place in trained(models):
        shape = parts(models)[place.part].get_parameter(f"{place.name}.weight").shape
        key, kernel = kohya_key(models, place), [1] * len(shape[2:])
        tensors[f"{key}.lora_up.weight"] = torch.full((shape[0], rank, *kernel), 1e-4).half()
        tensors[f"{key}.lora_down.weight"] = torch.full((rank, *shape[1:]), 1e-4).half()
    write_safetensors(folder / "lora.safetensors", tensors, {})
    write_safetensors(folder / "esrgan.safetensors", RRDBNet(RRDBConfig()).state_dict(), {})


def in_process(case: Case, path: Path | None, predicting: bool, folder: Path | None = None) -> float:
    facts = json.dumps([asdict(case), path and str(path), folder and str(folder), predicting])
    command = [sys.executable, "-m", "benchmarks.memory", "--case", facts]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def measured(cases: list[Case], path: Path | None) -> Iterator[Mapping[str, object]]:
    """The cases, and what was found; a line of the table is printed for each."""
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), path)
        for case in cases:
            predicted, found = (
                in_process(case, path, predicting, Path(folder)) for predicting in (True, False)
            )
            print(f"| {case} | {predicted:.0f} MB | {found:.0f} MB | {predicted / found:.2f} |", flush=True)
            yield asdict(case) | {"predicted": round(predicted), "measured": round(found)}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="only the embedded model, without keeping the result")
    p.add_argument("--sd15", type=Path, metavar="FILE", help="a Stable Diffusion 1.5 to take instead")
    p.add_argument("--sdxl", action="store_true", help="Stable Diffusion XL, too")
    p.add_argument("--case", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.case:
        case, *rest = json.loads(a.case)
        print(run(Case(**case), *rest))
        return
    print("| model | size | | predicted | measured | ratio |")
    print("|---" * 6 + "|")
    rows = [*measured(EMBEDDED, None)]
    with tempfile.TemporaryDirectory() as folder:
        if not a.quick:
            path = a.sd15 or Path(folder, "sd15.safetensors")
            if not a.sd15:
                write_model(path, "sd1")
            rows += measured(SD15, path)
        if a.sdxl:
            path = Path(folder, "sdxl.safetensors")
            write_model(path, "sdxl")
            rows += measured(SDXL, path)
    if not a.quick:
        with atomic_write(RESULTS, overwrite=True) as file:
            file.write((json.dumps(rows, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
