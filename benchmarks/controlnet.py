"""Measure how well the embedded model's ControlNet steers: are the edges of a result those of its hint?

    python -m benchmarks.controlnet                     # the one inside the package

Writes benchmarks/results/controlnet.json and prints it as a table. Needs the data set
(`python scripts/build_dataset.py --scope small`). docs/controlnet.md explains the numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import ldm
from benchmarks.evaluate import HELD_OUT_SEED, PICTURES, SHIFT, held_out, prompt
from benchmarks.metrics import mean
from ldm.controlnet import Mode
from ldm.hints import canny
from ldm.images import to_pil
from ldm.training.icons import IconSet, composite

TOLERANCE = 1  # pixels by which an edge may be off


def agreement(picture: Image.Image, hint: Image.Image) -> float:
    """The F-score of the picture's edges as a detection of the hint's, from 0 to 1.

    Precision: the share of the picture's edge pixels that are within TOLERANCE of one of the hint's; recall:
    the other way round. Martin, Fowlkes and Malik 2004, IEEE PAMI 26(5), section 3, without their matching of
    pixels one to one.
    """
    found, wanted = (np.asarray(image.convert("L")) > 0 for image in (canny(picture), hint))
    if not found.any() or not wanted.any():
        return float(found.any() == wanted.any())
    precision, recall = widened(wanted)[found].mean(), widened(found)[wanted].mean()
    return float(2 * precision * recall / max(precision + recall, 1e-9))


def widened(edges: np.ndarray) -> np.ndarray:
    """All pixels within TOLERANCE of an edge, also along the diagonals."""
    height, width = edges.shape
    padded, reach = np.pad(edges, TOLERANCE), range(2 * TOLERANCE + 1)
    return np.any([padded[y : y + height, x : x + width] for y in reach for x in reach], axis=0)


def measure(models: ldm.Models, data: IconSet, controlnet: str) -> dict[str, object]:
    """All figures: the edges of each held-out picture are a hint, and its caption is the prompt.

    Of every second one, for the sake of time.
    """
    indices = held_out(data)[::2]
    pixels = composite(data.images[indices])
    hints = [canny(to_pil(picture)) for picture in pixels]
    prompts = [prompt(data.icons[i]) for i in indices]
    others = [*prompts[SHIFT:], *prompts[:SHIFT]]
    network = ldm.load_controlnet(controlnet, models)

    def drawn(prompts: Sequence[str], weight: float = 1.0, mode: Mode = "balanced") -> list[Image.Image]:
        pictures = []
        for i, (words, hint) in enumerate(zip(prompts, hints, strict=True)):
            controls = (ldm.Control(network, hint, weight, mode=mode),) if weight else ()
            request = ldm.Request(prompt=words, seed=HELD_OUT_SEED + PICTURES * i)
            pictures += ldm.txt2img(models, request, ldm.Inputs(controls=controls))
            print(f"\r{i + 1}/{len(hints)}", end="", file=sys.stderr, flush=True)
        return pictures

    def scores(pictures: Sequence[Image.Image], hints: Sequence[Image.Image]) -> torch.Tensor:
        return torch.tensor([agreement(p, h) for p, h in zip(pictures, hints, strict=True)])

    assert models.vae is not None
    with torch.no_grad():
        again = [to_pil(models.vae.decode(models.vae.encode(picture[None]))[0]) for picture in pixels]
    free, led = drawn(prompts, 0.0), drawn(prompts)
    sets = {
        "autoencoder": scores(again, hints),
        "without": scores(free, hints),
        "with": scores(led, hints),
        "with, judged by other hints": scores(led, [*hints[SHIFT:], *hints[:SHIFT]]),
        "with, weight 0.5": scores(drawn(prompts, 0.5), hints),
        'with, mode "control"': scores(drawn(prompts, mode="control"), hints),
        "without, prompt of another thing": scores([*free[SHIFT:], *free[:SHIFT]], hints),
        "with, prompt of another thing": scores(drawn(others), hints),
        "with, no prompt": scores(drawn([""] * len(hints)), hints),
    }
    return {name: asdict(mean(values)) for name, values in sets.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="checkpoint; default: the embedded model")
    parser.add_argument(
        "--controlnet", default="canny", metavar="FILE", help="default: the one in the package"
    )
    parser.add_argument("--data", type=Path, default=Path("build/data/icons-small.safetensors"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/controlnet.json"))
    arguments = parser.parse_args()
    figures = measure(ldm.load(arguments.model), IconSet.load(arguments.data), arguments.controlnet)
    arguments.out.write_text(json.dumps(figures, indent=1) + "\n")
    for name, figure in figures.items():
        assert isinstance(figure, dict)
        print(f"| {name} | {figure['value']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}] |")


if __name__ == "__main__":
    main()
