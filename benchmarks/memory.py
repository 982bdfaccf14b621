"""Predicted and measured memory: each case in a process of its own.

    python -m benchmarks.memory [--quick]

Measured is the peak of the resident set during a run, above what the process had after its imports (Linux).
The larger model has the true shapes of Stable Diffusion 1.5 and random weights, in a file of 2.1 GB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "memory.json"


def resident(field: str) -> int:
    """Bytes: VmRSS, now; VmHWM, the most so far (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(path: str, size: int, storage: str | None, whole: int, rows: int | None) -> dict[str, float]:
    """One step of a guided run and the decoding of its picture, with a loaded model; in MB."""
    import torch

    import ldm
    from ldm import memory
    from ldm.models import Limits

    request = ldm.Request(prompt="a cat", width=size, height=size, steps=1, sampler="Euler")
    way = memory.Way(storage=getattr(torch, storage) if storage else None, limits=Limits(rows, whole))
    model = memory.sizes(path or None)
    before = resident("VmRSS")
    models = way.load(path or None)
    Path("/proc/self/clear_refs").write_text(
        "5"
    )  # VmHWM starts anew: while loading, pages of the file count too
    ldm.txt2img(models, request)
    found = resident("VmHWM") - before
    return {"predicted": memory.predict(model, request, way) / 2**20, "measured": found / 2**20}


def write_model(path: Path) -> None:
    """Stable Diffusion 1.5 with random weights, in float16."""
    import torch
    from torch import nn

    from ldm.denoise import Denoiser, Prediction
    from ldm.families.sd1 import SD1
    from ldm.models import Models
    from ldm.text.clip import ClipTextConfig, ClipTextModel
    from ldm.text.tokenizer import Tokenizer
    from ldm.unet import SD1_UNET, UNet
    from ldm.vae import KL_F8, AutoencoderKL

    def fill(module: nn.Module) -> None:
        module.half().to_empty(device="cpu")
        for weight in module.parameters():
            weight.data.normal_(std=0.02)

    with torch.device("meta"):
        unet, vae = UNet(SD1_UNET), AutoencoderKL(KL_F8)
        text = ClipTextModel(ClipTextConfig(width=768, layers=12, heads=12, quick_gelu=True))
    for module in (unet, vae, text):
        fill(module)
    Models(SD1, Denoiser(unet, SD1.schedule(), Prediction.EPS), vae, (text,), Tokenizer()).save(path)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="only the embedded model")
    p.add_argument("--case", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.case:
        print(json.dumps(measure(*json.loads(a.case))))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sd15.safetensors"
        cases = [("", size, None, 6 * 2**30, None) for size in (256, 512, 768)]
        if not a.quick:
            write_model(path)
            cases += [(str(path), size, None, 6 * 2**30, None) for size in (256, 512, 768)]
            cases += [(str(path), 512, "float16", 6 * 2**30, None), (str(path), 768, "float16", 0, 1)]
        rows = []
        print("| model | size | weights held in | decoding | predicted | measured | ratio |")
        print("|---" * 7 + "|")
        for case in cases:
            command = [sys.executable, "-m", "benchmarks.memory", "--case", json.dumps(case)]
            found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            name = "Stable Diffusion 1.5" if case[0] else "embedded"
            row = {
                "model": name,
                "size": case[1],
                "storage": case[2] or "float32",
                "whole": case[3] > 0,
            } | found
            rows.append(row)
            how = "whole" if case[3] else "in strips, UNet batch of 1"
            print(
                f"| {name} | {case[1]} | {row['storage']} | {how} | {found['predicted']:.0f} MB "
                f"| {found['measured']:.0f} MB | {found['predicted'] / found['measured']:.2f} |",
                flush=True,
            )
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
