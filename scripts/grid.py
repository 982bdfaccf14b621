"""Draw many pictures on one sheet, with titles: to compare settings, or parts of a prompt.

    python scripts/grid.py "a red apple" --x "seed=1-4" --y "cfg scale=2, 4, 8"
    python scripts/grid.py "a red apple" --x "prompt s/r=red, green, blue" --y "sampler=Euler a, DPM++ 2M"
    python scripts/grid.py "dog face|crying|blue background|green hat" --matrix
    python scripts/grid.py --sheet outputs/ --out contact.png

Each picture of a plot is a file, too, and what is there already is not drawn again: after Ctrl-C, the same
command goes on. Saved paths go to stdout, everything else to stderr. docs/grids.md lists the axes.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import flags
import groups

if TYPE_CHECKING:  # torch takes seconds to import: --help and a mistyped flag are answered without it
    from PIL.Image import Image

    from ldm import Models
    from ldm.cli import Output
    from ldm.inputs import Inputs
    from ldm.sheets.cells import Layout


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = flags.Parser("grid", __doc__, "[prompt]", "Where nothing is said, the model decides.")
    p.add_argument("positional", metavar="prompt", nargs="?", help="what to draw")
    p.add_argument("--prompt", help="the same as a flag")

    kind = p.add_argument_group("what kind of sheet")
    for name, place in (("x", "along the columns"), ("y", "along the rows"), ("z", "from sheet to sheet")):
        kind.add_argument(f"--{name}", metavar="AXIS=VALUES", help=f"what changes {place}")
    kind.add_argument(
        "--matrix", action="store_true", help="every combination of the prompt's parts, which | separates"
    )
    kind.add_argument(
        "--sheet",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="pictures that exist: files, and folders of them",
    )
    kind.add_argument("--axes", action="store_true", help="list the names of all axes, and draw nothing")

    matrix = p.add_argument_group("with --matrix")
    matrix.add_argument("--negative-parts", action="store_true", help="combine those of --negative instead")
    matrix.add_argument("--at-start", action="store_true", help="put the parts before the first one")
    matrix.add_argument("--spaces", action="store_true", help="join parts by spaces, not by commas")
    matrix.add_argument("--different-seeds", action="store_true", help="let each picture have its own seed")

    look = p.add_argument_group("the sheet")
    look.add_argument(
        "--margin", type=int, default=4, metavar="N", help="pixels between pictures (default: 4)"
    )
    look.add_argument(
        "--cell", type=int, metavar="N", help="pixels, longest side of a picture on the sheet (contacts: 256)"
    )
    look.add_argument("--columns", type=int, default=6, metavar="N", help="of a contact sheet (default: 6)")

    groups.add_drawing(p)
    words = groups.add_words(p)
    words.add_argument(
        "--models-dir", type=Path, metavar="FOLDER", help="where checkpoints and VAE are found by their names"
    )
    start = p.add_argument_group("a picture to start from, see docs/img2img.md")
    start.add_argument("--picture", type=Path, metavar="FILE", help="given to every picture of the plot")
    start.add_argument("--mask", type=Path, metavar="FILE", help="white is repainted, black is kept")
    groups.add_editing(p)
    groups.add_second_pass(p)
    groups.add_leading(p)
    groups.add_noise(p)
    groups.add_model(p)
    groups.add_sampling(p)
    groups.add_output(p)
    a = p.parse_args(argv)

    plot = any((a.x, a.y, a.z))
    if plot + a.matrix + (a.sheet is not None) + a.axes != 1:
        p.error("give axes (--x, --y, --z), or --matrix, or --sheet with pictures")
    if (a.positional is None) == (a.prompt is None) and (plot or a.matrix):
        p.error("give one prompt")
    a.prompt = a.positional if a.prompt is None else a.prompt
    if a.picture is None and (a.mask is not None or a.strength is not None):
        p.error("--mask and --strength need a picture to start from, --picture")
    if a.batch_size != 1:
        p.error("each picture of a sheet is drawn by itself; use the axis seed in place of --batch-size")
    for name, value, low, high in (
        ("--margin", a.margin, 0, 500),
        ("--cell", a.cell, 16, 4096),
        ("--columns", a.columns, 1, 1000),
    ):
        if value is not None and not low <= value <= high:
            p.error(f"{name} must be {low} to {high}, got {value}")
    return a


def layout(a: argparse.Namespace) -> Layout:
    """What to draw. Raises LdmError if a value makes no sense for any model."""
    from ldm import styles
    from ldm.sheets.matrix import matrix
    from ldm.sheets.xyz import NOTHING, chosen, plot

    # A style belongs to the finished prompt, not to one of its parts.
    names, unstyled = a.style, argparse.Namespace(**(vars(a) | {"style": []}))
    edit = flags.editing(a) if a.picture else {}
    request = flags.request(unstyled, a.prompt, hires=flags.hires(a), **edit)
    known = styles.read(a.styles_file) if names or a.styles_file.exists() else {}
    if a.matrix:
        return matrix(
            request,
            negative=a.negative_parts,
            at_start=a.at_start,
            different_seeds=a.different_seeds,
            delimiter=" " if a.spaces else ", ",
            names=names,
            known=known,
        )
    x, y, z = (chosen(text) if text else NOTHING for text in (a.x, a.y, a.z))
    return plot(request, x, y, z, names=names, known=known, models=a.models_dir)


def draw(a: argparse.Namespace) -> int:
    """Check every value, then load, draw and save. Returns the exit code."""
    from ldm import cli
    from ldm.images import ENDINGS, read_picture
    from ldm.inputs import Inputs
    from ldm.sheets import cells
    from ldm.sheets.axes import AXES

    if a.axes:
        print("\n".join(AXES))
        return cli.Exit.DONE
    output = cli.Output(a.out, a.overwrite)
    if a.sheet is not None:
        return contacts(a, output)
    todo = layout(a)
    flags.check(a)
    flags.exist(a.picture, a.mask, a.depth)
    flags.exist_folders(a.models_dir)
    output.prepare(1)
    file = a.out.suffix.lower() in ENDINGS
    folder = a.out.with_name(f"{a.out.stem}-cells") if file else a.out / "cells"
    folder.mkdir(exist_ok=True)

    def load(checkpoint: Path | None) -> tuple[Models, Inputs]:
        picture, mask, depth = (path and read_picture(path) for path in (a.picture, a.mask, a.depth))
        inputs = Inputs(picture, mask, depth)
        own = [cell for cell in todo.cells if isinstance(cell, cells.Cell) and cell.checkpoint == checkpoint]
        chosen = argparse.Namespace(**(vars(a) | {"ckpt": checkpoint or a.ckpt}))
        models = flags.models(chosen, lambda _: [(cell.request, inputs) for cell in own])
        return models, replace(inputs, controls=flags.controls(a, models))

    outcomes = cells.draw(todo, load, folder)
    if outcomes is None:
        return cli.Exit.STOPPED
    done = sum(isinstance(outcome, Path) for outcome in outcomes)
    if done < len(outcomes):
        print(f"{done} of {len(outcomes)} pictures are done", file=sys.stderr)
    if not done:
        return cli.Exit.USAGE
    save(output, cells.assembled(todo, outcomes, margin=a.margin, side=a.cell))
    return cli.Exit.DONE if done == len(outcomes) else cli.Exit.FAILED


def contacts(a: argparse.Namespace, output: Output) -> int:
    """A sheet of pictures that exist."""
    from ldm import cli
    from ldm.formats.mapped import printable
    from ldm.sheets.contact import contact_sheet

    paths = flags.pictures(a.sheet)
    output.prepare(1)
    whole, failed = contact_sheet(paths, a.columns, side=a.cell or 256, margin=a.margin)
    for path, error in failed.items():
        print(f"{printable(str(path.parent), 150)}: {error}", file=sys.stderr)
    save(output, whole)
    return cli.Exit.FAILED if failed else cli.Exit.DONE


def save(output: Output, sheet: Image) -> None:
    """Save the sheet and print its path. In a folder, its pixels name it: the same command, the same file."""
    from ldm import images

    path = output.path
    if path.suffix.lower() not in images.ENDINGS:
        path = path / f"sheet-{hashlib.sha256(sheet.tobytes()).hexdigest()[:12]}.png"
    if path == output.path or not path.exists():
        images.save(sheet, path, overwrite=output.overwrite)
    print(path)


def main(argv: Sequence[str] | None = None) -> int:
    return flags.main("grid", parse, draw, argv)


if __name__ == "__main__":
    flags.start(main)
