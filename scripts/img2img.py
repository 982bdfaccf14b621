"""Draw pictures anew, from their own colours and shapes.

    python scripts/img2img.py sketch.png "a red apple"
    python scripts/img2img.py photos/ "an oil painting" --strength 0.5 --ckpt v1-5-pruned-emaonly.safetensors
    python scripts/img2img.py photo.png "make it snow" --ckpt instruct-pix2pix-00-22000.safetensors

Saved paths go to stdout, everything else to stderr. Every PNG holds its settings, and the fingerprint of the
picture it was drawn from. To repaint a part of a picture there is inpaint.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import again
import flags
import groups

if TYPE_CHECKING:  # torch takes seconds to import: --help and a mistyped flag are answered without it
    from PIL.Image import Image

    from ldm.cli import Job
    from ldm.memory import Run


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = flags.Parser("img2img", __doc__, "picture [prompt]", "Where nothing is said, the model decides.")
    p.add_argument("picture", type=Path, help="a picture, or a folder of them")
    p.add_argument("prompt", nargs="?", default="", help="what to draw")
    p.add_argument(
        "--from-picture",
        type=Path,
        metavar="FILE",
        help="draw this picture again from PICTURE, with the settings it carries and those given",
    )
    groups.add_editing(p)
    groups.add_drawing(p)
    groups.add_words(p)
    groups.add_leading(p)
    groups.add_noise(p)
    groups.add_model(p)
    groups.add_sampling(p)
    groups.add_resume(groups.add_output(p))
    a = p.parse_args(argv)
    if a.from_picture and a.picture.is_dir():
        p.error("--from-picture needs the one picture that it was drawn from, not a folder")
    if a.from_picture and a.resume:
        p.error("--resume is for runs of many pictures, without --from-picture")
    a.given = again.given(p, argv) if a.from_picture else set()
    return a


def run(a: argparse.Namespace) -> int:
    """Check every value, then load, draw and save. Returns the exit code."""
    import ldm
    from ldm import cli
    from ldm.reproduce import prepare

    request = flags.request(a, a.prompt, **flags.editing(a))
    flags.check(a)
    flags.exist(a.depth, a.from_picture)
    pictures = flags.pictures([a.picture])
    output = cli.Output(a.out, a.overwrite)
    output.prepare(len(pictures) * a.batch_size)
    shared = ldm.Inputs(depth=ldm.read_picture(a.depth) if a.depth else None)

    def inputs(path: Path) -> ldm.Inputs:
        return replace(shared, picture=ldm.read_picture(path))

    def runs(_: ldm.Models) -> Iterator[Run]:
        """One for each picture that can be read; the others are told of when their turn comes."""
        for path in pictures:
            with suppress(ldm.LdmError) if len(pictures) > 1 else nullcontext():
                yield request, inputs(path)

    models = flags.models(a, runs)
    shared = replace(shared, controls=flags.controls(a, models))

    jobs = [cli.Job(request, lambda path=path: inputs(path), path.stem) for path in pictures]
    wanted = None  # of a batch; None: all
    if a.from_picture:
        found = prepare(
            a.from_picture, models, inputs=inputs(a.picture), change=again.changing(a.given, request)
        )
        for note in found.notes:
            print(f"img2img: {note}", file=sys.stderr)
        jobs = [cli.Job(found.request, lambda: found.inputs, a.picture.stem)]
        wanted = found.request.single(found.place)

    def name(job: Job) -> str:
        return f"{job.request.seed}-{job.name}" if len(jobs) > 1 else str(job.request.seed)

    def save(image: Image, job: Job) -> None:
        if wanted in (None, job.request):
            output.save(image, name(job), job.place)

    if a.resume:
        with output.going_on(cli.facts(models, jobs, shared)) as output:
            return cli.draw(models, jobs, save, has=lambda job: output.has(name(job), job.place))
    return cli.draw(models, jobs, save)


def main(argv: Sequence[str] | None = None) -> int:
    return flags.main("img2img", parse, run, argv)


if __name__ == "__main__":
    flags.start(main)
