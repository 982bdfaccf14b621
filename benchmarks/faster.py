"""What the options of docs/faster.md save, and what they cost: the embedded model, with and without each.

    python -m benchmarks.faster             # ten minutes and 4 GB
    python -m benchmarks.faster --quick     # few pictures and a small network: whether it runs

Writes benchmarks/results/faster.json and prints it as tables. Every picture is drawn with all options in
turn, from the same prompt and seed, so that whatever else the machine does falls on all of them. Its cost is
the distance from the picture drawn in full, and how many pictures the judge of benchmarks/evaluate.py still
finds right; for that, it needs the data set (`python scripts/build_dataset.py --scope small`).

The embedded model's maps are so small that merging tokens saves nothing. So the time of one guided evaluation
is measured on a UNet of Stable Diffusion 1.5's shape at 512 pixels, too, with random weights.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import ldm
from benchmarks import judge as judges
from benchmarks.evaluate import HELD_OUT_SEED, PICTURES, held_out, pixels, plain, prompt
from benchmarks.judge import JudgeConfig, verdict
from benchmarks.metrics import mean
from benchmarks.speed_networks import Setting, our_unet
from ldm.faster import Evaluations, Reusing
from ldm.token_merging import merging
from ldm.training.icons import IconSet

RESULTS = Path(__file__).parent / "results" / "faster.json"
CAPTIONS = 40  # of the held-out ones, evenly spread, one picture each
FULL = ldm.Request(steps=20, cfg_scale=4.0)

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "in full": {},
    "--steps 10": {"steps": 10},
    "--guidance-low 0.3": {"guidance_low": 0.3},
    "--guidance-high 5.5": {"guidance_high": 5.5},
    "--guidance-low 0.3 --guidance-high 5.5": {"guidance_low": 0.3, "guidance_high": 5.5},
    "--guidance-skip 0.2": {"guidance_skip": 0.2},
    "--reuse 2": {"reuse": 2},
    "--reuse 3": {"reuse": 3},
    "--reuse 2 --guidance-low 0.3": {"reuse": 2, "guidance_low": 0.3},
    "--token-merging 0.5 --token-merging-downsample 2": {
        "token_merging": 0.5,
        "token_merging_downsample": 2,
    },
    "--token-merging 0.5 --token-merging-downsample 4": {
        "token_merging": 0.5,
        "token_merging_downsample": 4,
    },
}


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """A result, and the processor's time for it in seconds."""
    start = time.process_time()
    return work(), time.process_time() - start


def quality(data: IconSet, judge: judges.Judge, count: int) -> dict[str, dict[str, Any]]:
    """Each option against the full run, on `count` captions."""
    models = ldm.load()
    positions = held_out(data)
    chosen = range(0, len(positions), max(len(positions) // count, 1))[:count]
    asked = [data.icons[positions[i]] for i in chosen]
    drawn: dict[str, list[torch.Tensor]] = {name: [] for name in OPTIONS}
    seconds = dict.fromkeys(OPTIONS, 0.0)
    ldm.txt2img(models, replace(FULL, prompt="a warming up", steps=2))
    for i, icon in zip(chosen, asked, strict=True):
        request = replace(FULL, prompt=prompt(icon), seed=HELD_OUT_SEED + PICTURES * i)
        for name, settings in OPTIONS.items():
            images, spent = timed(partial(ldm.txt2img, models, replace(request, **settings)))
            drawn[name].append(pixels(images[0]))
            seconds[name] += spent
        print(f"drawing: {len(drawn['in full'])}/{count}", flush=True)
    full = torch.stack(drawn["in full"])
    report = {}
    for name, pictures in drawn.items():
        found = torch.stack(pictures)
        squares = ((found - full) / 2).square().mean(dim=(1, 2, 3))  # of values from 0 to 1
        judged = verdict(judge, found, asked)
        error = math.sqrt(squares.mean())
        report[name] = {
            "error, of 255": 255 * error,
            "PSNR, dB": -20 * math.log10(error) if error else None,
            "time": seconds[name] / seconds["in full"],
            **{key: mean(getattr(judged, key)) for key in ("top1", "top5", "style")},
        }
    return report


@torch.no_grad()
def large(quick: bool, rounds: int = 2) -> dict[str, float]:
    """Time of one guided evaluation at 512 pixels, as a share of that in full; the fastest of some rounds."""
    setting = Setting(rounds, quick)
    unet, side = our_unet(setting), setting.side(512)
    x, t, context = torch.randn(2, 4, side, side), torch.full((2,), 500.0), torch.randn(2, 77, 768)

    def merged(ratio: float) -> None:
        with merging(unet, ratio, (side, side)):
            unet(x, t, context)

    evaluations = Evaluations()
    reusing = Reusing(unet, 2, evaluations)
    reusing(x, t, context)
    ways: dict[str, Callable[[], Any]] = {
        "in full": lambda: unet(x, t, context),
        "--token-merging 0.5": lambda: merged(0.5),
        "--token-merging 0.75": lambda: merged(0.75),
        "with reused features": lambda: reusing(x, t, context),
    }
    times = {name: min(timed(way)[1] for _ in range(rounds)) for name, way in ways.items()}
    return {name: one / times["in full"] for name, one in times.items()} | {"seconds": times["in full"]}


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"{'':50}{'error':>7}{'PSNR':>7}{'time':>7}{'top-1':>20}{'top-5':>20}{'style':>20}"]
    for name, row in report["embedded model"].items():
        psnr = "" if row["PSNR, dB"] is None else f"{row['PSNR, dB']:.1f}"
        judged = "".join(f"{row[key]!s:>20}" for key in ("top1", "top5", "style"))
        lines.append(f"{name:50}{row['error, of 255']:7.1f}{psnr:>7}{row['time']:7.2f}{judged}")
    lines += ["", *(f"{name:50}{share:7.2f}" for name, share in report["one evaluation at 512 px"].items())]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few pictures, a small network, nothing written")
    parser.add_argument("--data", type=Path, default=Path("build/data/icons-small.safetensors"))
    parser.add_argument("--judge", type=Path, default=Path("build/judge.safetensors"), help="kept here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # so that the processor's time does not depend on who else waits for it
    data = IconSet.load(arguments.data)
    judge = judges.load(data, arguments.judge, JudgeConfig())
    count = 2 if arguments.quick else CAPTIONS
    report: dict[str, Any] = {
        "pictures": count,
        "request": {"steps": FULL.steps, "cfg_scale": FULL.cfg_scale},
        "torch": torch.__version__,
        "embedded model": quality(data, judge, count),
        "one evaluation at 512 px": large(arguments.quick),
    }
    print(table(report))
    if not arguments.quick:
        RESULTS.write_text(json.dumps(plain(report), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
