"""Enlarge a picture and draw it anew, tile by tile ("SD upscale"): any size, with the detail of a model.

    python scripts/sd_upscale.py picture.png "a red apple"
    python scripts/sd_upscale.py photo.png "stone walls" --ckpt v1-5-pruned-emaonly.safetensors --scale 3

The prompt is drawn into each tile: keep --strength low, or hold the picture together with a ControlNet.
--width and --height are those of a tile. Drawn tiles are kept until the picture is done: after Ctrl-C, the
same command goes on. The saved path goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import flags
import groups

if TYPE_CHECKING:
    from ldm.memory import Run

STRENGTH = 0.3  # where none is given: that of image to image would draw the prompt into each tile


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = flags.Parser("sd_upscale", __doc__, "picture [prompt]", "Where nothing is said, the model decides.")
    p.add_argument("picture", type=Path)
    p.add_argument("prompt", nargs="?", default="", help="what to draw, in each tile")
    p.add_argument(
        "--from-picture",
        type=Path,
        metavar="FILE",
        help="draw this large picture again from PICTURE, with the settings it carries",
    )
    groups.add_editing(p)
    groups.add_drawing(p)
    p.conflict_handler = "resolve"  # elsewhere, --scale is an old word for --cfg-scale
    tiles = p.add_argument_group("how large, and in which tiles")
    tiles.add_argument("--scale", type=float, default=2.0, metavar="X", help="times as wide (default: 2)")
    tiles.add_argument(
        "--upscaler",
        metavar="NAME",
        help="what enlarges it first: a file, its name in --upscalers-dir, Lanczos (default: embedded one)",
    )
    tiles.add_argument("--upscalers-dir", type=Path, metavar="FOLDER", help="with files of upscalers")
    tiles.add_argument("--overlap", type=int, metavar="N", help="pixels that tiles share (SD: 64)")
    groups.add_words(p)
    groups.add_leading(p)
    groups.add_noise(p)
    groups.add_model(p)
    groups.add_sampling(p)
    groups.add_output(p)
    a = p.parse_args(argv)
    a.strength = STRENGTH if a.strength is None else a.strength
    return a


def run(a: argparse.Namespace) -> int:
    """Check every value, then load, draw and save. Returns the exit code."""
    import ldm
    from ldm import cli
    from ldm.images import ENDINGS, save
    from ldm.reproduce import prepare, settings
    from ldm.sd_upscale import chosen, tiles, whole_size
    from ldm.upscalers import DEFAULT, load_upscaler, upscaler_named

    request = flags.request(a, a.prompt, **flags.editing(a))
    flags.check(a)
    flags.exist(a.picture, a.depth, a.from_picture)
    flags.exist_folders(a.upscalers_dir)
    output = cli.Output(a.out, a.overwrite)
    output.prepare(1)
    picture = ldm.read_picture(a.picture)
    depth = ldm.read_picture(a.depth) if a.depth else None
    inputs = ldm.Inputs(picture=picture, depth=depth)

    def tile(models: ldm.Models) -> Iterator[Run]:
        asked = (request.width or models.default_size, request.height or models.default_size)
        width, height = map(min, asked, whole_size(models, picture.size, a.scale))
        yield replace(request, width=width, height=height), inputs

    models = flags.models(a, tile)
    inputs = replace(inputs, controls=flags.controls(a, models))
    library, device = ldm.Library(upscalers=a.upscalers_dir), cli.device(a.device)
    if a.from_picture:
        info = settings(a.from_picture)
        name, a.scale, a.overlap = chosen(info)
        upscaler = upscaler_named(name, library, device=device)  # a name from a file is never a path
        found = prepare(info, models, inputs=inputs)
        models, request = found.models, found.request
        for note in found.notes:
            if not note.startswith("SD upscale"):
                print(f"sd_upscale: {note}", file=sys.stderr)
    else:
        upscaler = load_upscaler(a.upscaler or DEFAULT, library, device=device)
    parts = tiles(models, request, inputs, upscaler, scale=a.scale, overlap=a.overlap)
    file = a.out.suffix.lower() in ENDINGS
    folder = a.out.with_name(f"{a.out.stem}-tiles") if file else a.out / "tiles"
    paths = {one.seed: folder / name for (one, _), name in zip(parts.runs, parts.names(models), strict=True)}
    jobs = [
        cli.Job(one, lambda inputs=inputs: inputs, f"tile {i} of {len(parts.runs)}")
        for i, (one, inputs) in enumerate(parts.runs, start=1)
    ]
    cli.Output(folder).prepare(len(jobs))
    code = cli.draw(
        models,
        jobs,
        save=lambda image, job: save(image, paths[job.request.seed], overwrite=True),
        has=lambda job: paths[job.request.seed].exists(),
    )
    if code is not cli.Exit.DONE:
        print(f"sd_upscale: the tiles that are drawn wait in {folder}", file=sys.stderr)
        return code
    output.save(parts.joined(map(ldm.read_picture, paths.values())), f"{request.seed}-{a.picture.stem}")
    for path in paths.values():
        path.unlink(missing_ok=True)
    with suppress(OSError):  # tiles of another run wait there
        folder.rmdir()
    return cli.Exit.DONE


def main(argv: Sequence[str] | None = None) -> int:
    return flags.main("sd_upscale", parse, run, argv)


if __name__ == "__main__":
    flags.start(main)
