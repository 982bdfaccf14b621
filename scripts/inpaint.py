"""Draw a part of a picture anew, or more picture around it.

    python scripts/inpaint.py photo.png "a straw hat" --box 120,10,300,120
    python scripts/inpaint.py photo.png "a straw hat" --mask mask.png --only-masked
    python scripts/inpaint.py erased.png "a straw hat"
    python scripts/inpaint.py photo.png "a wide beach" --outpaint left=128,right=128

What to repaint is white in the mask, inside the box, new at the sides or, without any of these flags,
transparent in the picture. All other pixels stay as they are, to the byte. Saved paths go to stdout,
everything else to stderr. Every PNG holds its settings.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import again
import flags
import groups

if TYPE_CHECKING:  # torch takes seconds to import: --help and a mistyped flag are answered without it
    from PIL.Image import Image

    from ldm.cli import Job

SIDES = ("left", "top", "right", "bottom")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = flags.Parser("inpaint", __doc__, "picture [prompt]", "Where nothing is said, the model decides.")
    p.add_argument("picture", type=Path, help="a PNG, JPEG, WebP, AVIF or GIF")
    p.add_argument("prompt", nargs="?", default="", help="what the new part shows")
    p.add_argument(
        "--from-picture",
        type=Path,
        metavar="FILE",
        help="draw this picture again from PICTURE, with its settings and those given, and the same mask",
    )
    where = p.add_argument_group("what to repaint, see docs/inpainting.md")
    where.add_argument("--mask", type=Path, metavar="PICTURE", help="white: repaint, black: keep")
    where.add_argument("--box", metavar="X0,Y0,X1,Y1", help="in pixels from the left and the top")
    where.add_argument(
        "--outpaint", metavar="SIDES", help="a larger picture: left=64,top=32, or 64 for all sides"
    )
    where.add_argument("--outpaint-fill", metavar="NAME", help="what it starts from: edges (default), noise")
    where.add_argument(
        "--overlap", type=int, metavar="N", help="pixels of the picture to join on (default: 8)"
    )
    where.add_argument("--invert", action="store_true", help="repaint what the mask or the box keeps")
    where.add_argument(
        "--blur", type=int, default=4, metavar="N", help="softens the edge (default: 4 pixels)"
    )
    how = p.add_argument_group("how to repaint")
    how.add_argument(
        "--content",
        default="original",
        metavar="NAME",
        help="behind the mask at first: original (default), fill, latent-noise, latent-nothing",
    )
    how.add_argument("--only-masked", action="store_true", help="work on the part around the mask, enlarged")
    how.add_argument("--padding", type=int, default=32, metavar="N", help="pixels around it (default: 32)")
    how.add_argument("--soft", action="store_true", help="soft inpainting, for a wide --blur such as 16")
    how.add_argument(
        "--soft-settings", metavar="NAME=X,...", help="preservation=0.5,schedule_bias=1,contrast_boost=4,..."
    )
    how.add_argument(
        "--mask-weight", type=float, default=1.0, metavar="X", help="inpainting models: 0 shows all to them"
    )
    groups.add_editing(p)
    groups.add_drawing(p)
    groups.add_words(p)
    groups.add_leading(p)
    groups.add_noise(p)
    groups.add_model(p)
    groups.add_sampling(p)
    groups.add_output(p)
    a = p.parse_args(argv)
    if sum(source is not None for source in (a.mask, a.box, a.outpaint)) > 1:
        p.error("give one of --mask, --box and --outpaint")
    if a.outpaint and a.invert:
        p.error("--invert would leave the new part of --outpaint empty")
    if not a.outpaint and (a.outpaint_fill or a.overlap is not None):
        p.error("--outpaint-fill and --overlap belong to --outpaint")
    if a.outpaint and a.strength is None:
        a.strength = 1.0  # nothing of the new part is worth keeping
    a.given = again.given(p, argv) if a.from_picture else set()
    return a


def editing(a: argparse.Namespace) -> dict[str, Any]:
    """The fields of the request that the flags make. Raises RequestError."""
    from ldm import Soft

    soft = numbers(a.soft_settings, tuple(vars(Soft())), float) if a.soft_settings else {}
    return flags.editing(
        a,
        mask_blur=a.blur,
        mask_invert=a.invert,
        masked_content=a.content.replace("-", " "),
        only_masked=a.only_masked,
        padding=a.padding,
        mask_weight=a.mask_weight,
        soft=Soft(**soft) if a.soft or soft else None,
    )


def numbers(text: str, names: Sequence[str], kind: type) -> dict[str, Any]:
    """ "left=64,top=32" -> {"left": 64, "top": 32}. Raises RequestError."""
    from ldm import RequestError

    found = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        name = name.strip().replace("-", "_")
        try:
            found[name] = kind(value)
        except ValueError:
            name = ""
        if name not in names:
            raise RequestError(f"{text!r} is not understood; write name=number,..., with {', '.join(names)}")
    return found


def pictures(a: argparse.Namespace) -> tuple[Image, Image]:
    """The picture and its mask; for outpainting, both larger. Raises LdmError."""
    from ldm import masks, read_picture
    from ldm.outpaint import extended

    picture = read_picture(a.picture)
    if a.mask is not None:
        return picture, read_picture(a.mask)
    if a.box is not None:
        return picture, masks.from_box(a.box, picture.size)
    if a.outpaint is None:
        return picture, masks.from_alpha(picture)
    all_sides = a.outpaint.isdecimal()
    sides = dict.fromkeys(SIDES, int(a.outpaint)) if all_sides else numbers(a.outpaint, SIDES, int)
    overlap = 8 if a.overlap is None else a.overlap
    return extended(picture, **sides, fill=a.outpaint_fill or "edges", overlap=overlap, seed=a.seed)


def run(a: argparse.Namespace) -> int:
    """Check every value, then load, draw and save. Returns the exit code."""
    import ldm
    from ldm import cli
    from ldm.reproduce import prepare

    request = flags.request(a, a.prompt, **editing(a))
    flags.check(a)
    flags.exist(a.depth, a.from_picture)
    picture, mask = pictures(a)
    output = cli.Output(a.out, a.overwrite)
    output.prepare(a.batch_size)
    depth = ldm.read_picture(a.depth) if a.depth else None
    inputs = ldm.Inputs(picture=picture, mask=mask, depth=depth)
    models = flags.models(a, lambda _: [(request, inputs)])
    inputs = replace(inputs, controls=flags.controls(a, models))
    wanted = None  # of a batch; None: all
    if a.from_picture:
        found = prepare(a.from_picture, models, inputs=inputs, change=again.changing(a.given, request))
        for note in found.notes:
            print(f"inpaint: {note}", file=sys.stderr)
        request, inputs, wanted = found.request, found.inputs, found.request.single(found.place)

    def save(image: Image, job: Job) -> None:
        if wanted in (None, job.request):
            output.save(image, str(job.request.seed))

    return cli.draw(models, [cli.Job(request, lambda: inputs)], save)


def main(argv: Sequence[str] | None = None) -> int:
    return flags.main("inpaint", parse, run, argv)


if __name__ == "__main__":
    flags.start(main)
