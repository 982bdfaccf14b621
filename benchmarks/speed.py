"""How fast and how small: ours against diffusers, on the same weights, turn by turn.

    python -m benchmarks.speed                  # all, at the size of Stable Diffusion 1.5: some 15 minutes
    python -m benchmarks.speed --only "UNet 256 px" import
    python -m benchmarks.speed --quick          # small networks: does the measurement itself work?

Writes benchmarks/results/speed.json and prints it as a table. Weights are random: the time does not depend on
them. Every case runs in a process of its own, in which the rivals take turns; the figure is the fastest of
all rounds, in seconds of the processor (all threads) and of the clock. Believe a ratio only where the two
agree: on a machine with other work, the clock lies. docs/performance.md explains the table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import speed_processes, speed_turns
from benchmarks.speed_networks import Setting
from ldm.files import atomic_write

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "speed.json"

CASES: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "UNet 256 px": partial(speed_turns.unet, 256),
    "UNet 512 px": partial(speed_turns.unet, 512),
    "UNet growth": speed_turns.growth,
    "VAE decode 256 px": partial(speed_turns.vae, "decode", 256),
    "VAE decode 512 px": partial(speed_turns.vae, "decode", 512),
    "VAE encode 256 px": partial(speed_turns.vae, "encode", 256),
    "VAE encode 512 px": partial(speed_turns.vae, "encode", 512),
    "CLIP text": speed_turns.clip,
    "overhead": speed_turns.overhead,
    "import": speed_processes.imports,
    "load": speed_processes.load,
    "picture": speed_processes.picture,
}
"""Each runs in a process of its own."""

NOT_QUICK = ("load", "VAE encode 512 px", "VAE decode 512 px", "UNet 512 px", "CLIP text")


class Target(NamedTuple):
    case: str
    what: str
    figure: Callable[[dict[str, Any]], float]
    most: bool  # whether the bound is an upper one
    bound: float


def _faster(key: str, ours: str = "optimized") -> Callable[[dict[str, Any]], float]:
    return lambda figures: figures["diffusers"][key] / figures[ours][key]


TARGETS = (
    Target("UNet 256 px", "times as fast as diffusers", _faster("cpu"), False, 1.25),
    Target("UNet 512 px", "times as fast as diffusers", _faster("cpu"), False, 1.15),
    Target("VAE decode 256 px", "times as fast as diffusers", _faster("cpu"), False, 1.05),
    Target("VAE decode 512 px", "times as fast as diffusers", _faster("cpu"), False, 1.05),
    Target("load", "of diffusers' memory", lambda f: f["memory against diffusers"], True, 0.70),
    Target("load", "times as fast as diffusers", _faster("load cpu", "plain"), False, 1.0),
    Target("import", "of torch's time", lambda f: f["against torch"], True, 1.15),
    Target("overhead", "ms per step", lambda f: f["plain, ms per step"], True, 0.10),
    Target("UNet growth", "times the time of 256 px at 512 px", lambda f: f["growth"], True, 4.6),
)
"""What must hold, from the project's table of targets (docs/performance.md)."""


def machine() -> dict[str, Any]:
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load before": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def run_alone(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One case, in a process of its own: memory and caches of one do not disturb the next."""
    command = [sys.executable, "-m", "benchmarks.speed", "--case", name, f"--rounds={arguments.rounds}"]
    run = subprocess.run(
        [*command, *["--quick"] * arguments.quick], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(run.stdout.splitlines()[-1])


def table(results: Mapping[str, Any]) -> str:
    """The results for people."""
    cases = results["cases"]
    lines = [
        "| | plain | optimized | diffusers | ratio, cpu | ratio, wall | of GEMM peak |",
        "|---|" + "---|" * 6,
    ]
    for name, figures in cases.items():
        if not any(isinstance(one, dict) and "cpu" in one for one in figures.values()):
            continue
        cells = [
            f"{figures[who]['cpu']:.3f} s" if who in figures else ""
            for who in ("plain", "optimized", "diffusers")
        ]
        ours = "optimized" if "optimized" in figures else "plain"
        for key in ("cpu", "wall"):
            both = ours in figures and "diffusers" in figures
            cells.append(f"{figures['diffusers'][key] / figures[ours][key]:.2f}" if both else "")
        share = ""
        if "GFLOP" in figures:
            share = f"{figures['GFLOP'] / figures[ours]['cpu'] / figures['gemm GFLOP per cpu s']:.0%}"
        if any(cells):
            lines.append(f"| {name} | {' | '.join([*cells, share])} |")
    lines += ["", "| target | must | found | |", "|---|---|---|---|"]
    for target in TARGETS:
        if target.case in cases:
            found = target.figure(cases[target.case])
            met = found <= target.bound if target.most else found >= target.bound
            bound = f"{'at most' if target.most else 'at least'} {target.bound:g}"
            verdict = "met" if met else "MISSED"
            lines.append(f"| {target.case}: {target.what} | {bound} | {found:.2f} | {verdict} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.speed", description="Measure speed and memory.")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each rival; the fastest counts")
    parser.add_argument("--quick", action="store_true", help="small networks, nothing is written")
    parser.add_argument("--only", nargs="+", choices=tuple(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        speed_processes.write(arguments.write)
        return
    if arguments.case:
        with torch.no_grad():
            figures = CASES[arguments.case](Setting(arguments.rounds, arguments.quick))
        print(json.dumps(figures))
        return

    results: dict[str, Any] = {"machine": machine(), "cases": {}}
    if arguments.only and not arguments.quick and RESULTS.exists():  # the others stay as they were
        results["cases"] = json.loads(RESULTS.read_text())["cases"]
    for name in arguments.only or CASES:
        if arguments.quick and name in NOT_QUICK and not arguments.only:
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        results["cases"][name] = run_alone(name, arguments) | {"load": os.getloadavg()[0]}
        if not arguments.quick:
            with atomic_write(RESULTS, overwrite=True) as file:
                file.write((json.dumps(results, indent=1) + "\n").encode())
    print(table(results))


if __name__ == "__main__":
    main()
