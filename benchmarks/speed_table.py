"""The measurements of benchmarks.speed for people: tables, and what became of the targets.

    python -m benchmarks.speed_table            # writes them into docs/performance.md

They stand there between two marks, and a test holds that they say what benchmarks/results/speed.json says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ldm.files import atomic_write

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "speed.json"
PAGE = ROOT / "docs" / "performance.md"
MARKS = "<!-- from speed.json -->\n", "<!-- end -->\n"

OURS = ("plain", "optimized")
PEERS = ("diffusers", "ComfyUI", "CompVis", "refiners")
Figures = Mapping[str, Any]


def ratio(figures: Figures, key: str, ours: str, peers: Iterable[str] = PEERS) -> float:
    """How many times as fast as the best of the peers that took part."""
    return min(figures[name][key] for name in peers if name in figures) / figures[ours][key]


class Target(NamedTuple):
    case: str
    what: str
    figure: Callable[[Figures], float]
    most: bool  # whether the bound is an upper one
    bound: float


def faster(peers: Iterable[str] = PEERS) -> Callable[[Figures], float]:
    """By the processor or by the clock, whichever says less."""
    return lambda figures: min(ratio(figures, key, "optimized", peers) for key in ("cpu", "wall"))


TARGETS = (
    Target("UNet 256 px", "times as fast as the best peer", faster(), False, 1.25),
    Target("UNet 512 px", "times as fast as diffusers", faster(["diffusers"]), False, 1.15),
    Target("VAE decode 256 px", "times as fast as the best peer", faster(), False, 1.05),
    Target("load", "of diffusers' memory", lambda f: f["plain"]["MB"] / f["diffusers"]["MB"], True, 0.70),
    Target(
        "load",
        "times as fast as diffusers, imports aside",
        lambda f: ratio(f, "load cpu", "plain", ["diffusers"]),
        False,
        1.0,
    ),
    Target("import", "of torch's time", lambda f: f["plain"]["cpu"] / f["torch"]["cpu"], True, 1.15),
    Target("overhead", "ms per step", lambda f: f["plain, ms per step"], True, 0.10),
    Target(
        "UNet growth",
        "times the time of 256 px at 512 px",
        lambda f: max(f["batch 2, 512 px"][key] / f["batch 2"][key] for key in ("cpu", "wall")),
        True,
        4.6,
    ),
)
"""What must hold: the project's table of targets."""


def rows(lines: Iterable[Iterable[str]]) -> str:
    """A table; the first line is its head."""
    head, *body = [list(line) for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, ["---"] * len(head), *body])


def turns(cases: Figures) -> str:
    """Ours against peers, in one process or in turns with it: seconds of the processor."""
    chosen = {name: one for name, one in cases.items() if "diffusers" in one and "MB" not in one["diffusers"]}
    who = [name for name in (*OURS, *PEERS) if any(name in one for one in chosen.values())]
    lines = [["", *who, "ratio, cpu", "ratio, wall", "of GEMM peak"]]
    for name, figures in chosen.items():
        ours = "optimized" if "optimized" in figures else "plain"
        share = ""
        if "GFLOP" in figures:
            share = f"{figures['GFLOP'] / figures[ours]['cpu'] / figures['gemm GFLOP per cpu s']:.0%}"
        seconds = [f"{figures[one]['cpu']:.3f}" if one in figures else "" for one in who]
        lines.append(
            [name, *seconds, *(f"{ratio(figures, key, ours):.2f}" for key in ("cpu", "wall")), share]
        )
    return rows(lines)


def growth(figures: Figures) -> str:
    """The optimized UNet at other sizes, with the time of a pair at 256 px as the unit."""
    timed = {name: one for name, one in figures.items() if isinstance(one, Mapping) and "cpu" in one}
    lines = [["UNet", "cpu, s", "wall, s", "cpu, times batch 2", "wall, times batch 2"]]
    for name, one in timed.items():
        both = [one[key] / timed["batch 2"][key] for key in ("cpu", "wall")]
        lines.append([name, f"{one['cpu']:.2f}", f"{one['wall']:.2f}", *(f"{n:.2f}" for n in both)])
    return rows(lines)


def processes(cases: Figures) -> str:
    """Whole processes: time and largest memory."""
    lines = [["whole process", "cpu, s", "wall, s", "MB"]]
    for case, figures in cases.items():
        for name, one in figures.items():
            if isinstance(one, Mapping) and "MB" in one:
                values = f"{one['cpu']:.2f}", f"{one['wall']:.2f}", f"{one['MB']:.0f}"
                lines.append([f"{case}: {name}", *values])
    return rows(lines)


def targets(cases: Figures) -> str:
    lines = [["target", "must", "found", ""]]
    for target in TARGETS:
        if target.case in cases:
            found = target.figure(cases[target.case])
            met = found <= target.bound if target.most else found >= target.bound
            bound = f"{'at most' if target.most else 'at least'} {target.bound:g}"
            verdict = "met" if met else "MISSED"
            lines.append([f"{target.case}: {target.what}", bound, f"{found:.2f}", verdict])
    return rows(lines)


def tables(results: Figures) -> str:
    machine, cases = results["machine"], results["cases"]
    facts = f"{machine['date']}, torch {machine['torch']}, {machine['processor']} ({machine['instructions']})"
    peers = ", ".join(f"{name} ({version})" for name, version in machine.get("peers", {}).items())
    parts = [
        f"{facts}, threads: {machine['threads']}.{f' Peers: {peers}.' if peers else ''}\n",
        turns(cases),
        *([growth(cases["UNet growth"])] if "UNet growth" in cases else []),
        processes(cases),
        targets(cases),
    ]
    return "\n".join(parts)


def written(page: str, results: Figures) -> str:
    """The page with these results."""
    before, _, rest = page.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return f"{before}{MARKS[0]}\n{tables(results)}\n{MARKS[1]}{after}"


def main() -> None:
    page = written(PAGE.read_text(), json.loads(RESULTS.read_text()))
    with atomic_write(PAGE, overwrite=True) as file:
        file.write(page.encode())


if __name__ == "__main__":
    main()
