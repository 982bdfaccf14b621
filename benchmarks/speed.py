"""How fast and how small: ours against diffusers and others, on the same weights, turn by turn.

    make peers                                  # once: the environments of the others
    python -m benchmarks.speed                  # all, at the size of Stable Diffusion 1.5: some 20 minutes
    python -m benchmarks.speed --only "UNet 256 px" import
    python -m benchmarks.speed --quick          # small networks: does the measurement itself work?

Writes benchmarks/results/speed.json and the tables of docs/performance.md, which explains them. Weights are
random: the time does not depend on them. Every case runs in a process of its own; the rivals, in it or in
environments of their own, take turns, one at a time. The figure is the fastest of all rounds, in seconds of
the processor (all threads) and of the clock. Believe a ratio only where the two agree.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks import speed_processes, speed_table, speed_turns
from benchmarks.peers import PEERS, present
from benchmarks.speed_networks import Setting
from benchmarks.speed_table import RESULTS, ROOT
from ldm.files import atomic_write

CASES: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "UNet 256 px": lambda setting: speed_turns.unet(256, 1, setting),
    "UNet 512 px": lambda setting: speed_turns.unet(512, -1, setting),
    "UNet growth": speed_turns.growth,
    "VAE decode 256 px": lambda setting: speed_turns.vae("decode", 256, setting),
    "VAE encode 256 px": lambda setting: speed_turns.vae("encode", 256, setting),
    "CLIP text": speed_turns.clip,
    "overhead": speed_turns.overhead,
    "import": speed_processes.imports,
    "load": speed_processes.load,
    "picture": speed_processes.picture,
}
"""Each runs in a process of its own."""

NOT_QUICK = ("load", "UNet 512 px", "CLIP text")


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
        "peers": {"diffusers": version("diffusers")} | {name: PEERS[name].version for name in present()},
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

    if missing := PEERS.keys() - set(present()):
        print(f"Without {', '.join(sorted(missing))}: `make peers` gets them.", file=sys.stderr)
    results: dict[str, Any] = {"machine": machine(), "cases": {}}
    if arguments.only and not arguments.quick and RESULTS.exists():  # the others stay as they were
        results["cases"] = json.loads(RESULTS.read_text())["cases"]
    failed: list[str] = []
    for name in arguments.only or CASES:
        if arguments.quick and name in NOT_QUICK and not arguments.only:
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        facts = {"load": os.getloadavg()[0], "threads": torch.get_num_threads()}
        try:
            results["cases"][name] = run_alone(name, arguments) | facts
        except subprocess.CalledProcessError:
            failed.append(name)
            continue
        if not arguments.quick:
            with atomic_write(RESULTS, overwrite=True) as file:
                file.write((json.dumps(results, indent=1) + "\n").encode())
            speed_table.main()
    print(speed_table.tables(results))
    if failed:
        sys.exit(f"Failed, see above: {', '.join(failed)}")


if __name__ == "__main__":
    main()
