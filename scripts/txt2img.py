"""Draw pictures from words.

    python scripts/txt2img.py "a red apple"
    python scripts/txt2img.py "an astronaut riding a horse" --ckpt v1-5-pruned-emaonly.safetensors --steps 30

Saved paths go to stdout, everything else to stderr. The same command draws the same pictures: without --seed,
the seed is 42. Every PNG holds its settings.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import again
import flags
import groups

if TYPE_CHECKING:  # torch takes seconds to import: --help and a mistyped flag are answered without it
    from PIL.Image import Image

    from ldm import Request

MAX_GRID = 100  # pictures on one sheet
LAION400M = Path("models/ldm/text2img-large/model.ckpt")  # where the original script looks for it


def parser() -> flags.Parser:
    p = flags.Parser("txt2img", __doc__, "prompt", "Where nothing is said, the model decides.")
    p.add_argument("positional", metavar="prompt", nargs="?", help="what to draw")
    p.add_argument("--prompt", help="the same as a flag")
    p.add_argument(
        "--from-file",
        type=Path,
        metavar="FILE",
        help="draw each line of a text file: prompts, or flags as --prompt 'a cat' --steps 7",
    )
    p.add_argument(
        "--from-picture",
        type=Path,
        metavar="FILE",
        help="draw a picture again, from the settings it carries and those given beside it",
    )
    groups.add_drawing(p)
    p.add_argument("--n-iter", type=int, default=1, metavar="N", help="batches for each prompt")
    p.add_argument(
        "--explain", action="store_true", help="tell tokens, weights, levels and files, and draw nothing"
    )
    words = groups.add_words(p)
    words.add_argument(
        "--models-dir", type=Path, metavar="FOLDER", help="where --from-picture finds files by their hashes"
    )
    groups.add_second_pass(p)
    groups.add_leading(p)
    p.add_argument("--depth", type=Path, metavar="PICTURE", help="for depth models: white is near")
    groups.add_noise(p)
    groups.add_model(p)
    groups.add_sampling(p)
    files = groups.add_output(p)
    files.add_argument(
        "--no-grid", "--skip-grid", action="store_true", help=f"no sheet of all pictures (up to {MAX_GRID})"
    )
    files.add_argument("--skip-save", action="store_true", help="save only the sheet")
    groups.add_resume(files)

    old = p.add_argument_group(
        "flags of the original script",
        "Beside these, --n_samples, --scale, --H, --W, --outdir, --skip_grid and --skip_save.",
    )
    old.add_argument(
        "--ddim-steps", type=int, metavar="N", help="--steps, and --sampler DDIM if none is named"
    )
    old.add_argument("--ddim-eta", type=float, metavar="X", help="--eta, and --sampler DDIM if none is named")
    old.add_argument("--plms", action="store_true", help="--sampler PLMS")
    old.add_argument("--dpm-solver", action="store_true", help='--sampler "DPM++ 2M SGM Uniform"')
    old.add_argument(
        "--fixed-code", action="store_true", help="start each prompt and batch from the same noise"
    )
    old.add_argument("--precision", choices=("full", "autocast"), help="full: --dtype float32")
    old.add_argument("--n-rows", type=int, metavar="N", help="pictures in a row of the sheet")
    old.add_argument("--laion400m", action="store_true", help=f"--ckpt {LAION400M}, if none is named")
    old.add_argument("--config", help="ignored, as the weights tell it")
    old.add_argument("--C", type=int, help="ignored, as the weights tell it")
    old.add_argument("--f", type=int, help="ignored, as the weights tell it")
    return p


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags of today, those of the original script translated into them."""
    p = parser()
    a = p.parse_args(argv)

    prompts = sum(source is not None for source in (a.positional, a.prompt, a.from_file))
    if prompts > 1 or (prompts == 0 and a.from_picture is None):
        p.error("give one prompt, a file of prompts with --from-file, or a picture with --from-picture")
    if a.resume and (a.from_picture or a.skip_save):
        p.error("--resume is for runs that save many pictures, without --from-picture and --skip-save")
    a.given = again.given(p, argv) if a.from_picture else set()
    a.prompt = (a.positional or "") if a.prompt is None else a.prompt

    if a.plms:
        a.sampler = a.sampler or "PLMS"
    elif a.dpm_solver:
        a.sampler = a.sampler or "DPM++ 2M SGM Uniform"
    elif a.ddim_steps is not None or a.ddim_eta is not None:
        a.sampler = a.sampler or "DDIM"
    a.steps = a.ddim_steps if a.steps is None else a.steps
    # The original script had --ddim_eta 0 as default for all its samplers.
    a.eta = (a.ddim_eta or None) if a.eta is None else a.eta
    if a.precision == "full":
        a.dtype = a.dtype or "float32"
    if a.laion400m:
        a.ckpt = a.ckpt or LAION400M
    if a.from_picture and not a.ckpt:
        again.check_loading(p, a.given)
    ignored = [f"--{name}" for name in ("config", "C", "f") if getattr(a, name) is not None]
    if ignored:
        print(f"txt2img: ignoring {', '.join(ignored)}", file=sys.stderr)
    return a


def requests(a: argparse.Namespace) -> list[Request]:
    """One request for each batch. Raises LdmError if a value makes no sense for any model."""
    from ldm import RequestError, prompt_file, styles
    from ldm.text_file import read_utf8

    for name, value in (("--n-iter", a.n_iter), ("--n-rows", a.n_rows)):
        if value is not None and value < 1:
            raise RequestError(f"{name} must be at least 1, got {value}")
    hires = flags.hires(a)
    if a.from_file is None:
        first = flags.request(a, a.prompt, hires=hires)
        return [first if a.fixed_code else first.later(i * a.batch_size) for i in range(a.n_iter)]
    base = flags.request(argparse.Namespace(**(vars(a) | {"style": []})), hires=hires)
    found, notes = prompt_file.read(
        read_utf8(a.from_file),
        base,
        n_iter=a.n_iter,
        iterate=not a.fixed_code,
        known=styles.read(a.styles_file) if a.style or a.styles_file.exists() else {},
        names=a.style,
    )
    for note in notes:
        print(f"txt2img: {note}", file=sys.stderr)
    return found


def draw(a: argparse.Namespace) -> int:
    """Check every value, then load, draw and save. Returns the exit code."""
    import ldm
    from ldm import cli
    from ldm.images import grid
    from ldm.reproduce import prepare

    todo = requests(a)
    flags.check(a)
    flags.exist(a.from_picture, a.depth)
    flags.exist_folders(a.models_dir)
    pictures = sum(request.batch_size for request in todo)
    output = cli.Output(a.out, a.overwrite)
    if not a.explain:
        output.prepare(pictures)
    inputs = ldm.Inputs(depth=ldm.read_picture(a.depth) if a.depth else None)
    models = None
    if a.ckpt or not a.from_picture:
        models = flags.models(a, lambda _: [(request, inputs) for request in todo])
    wanted = None  # of a batch; None: all
    if a.from_picture:
        folders = (a.models_dir, a.lora_dir, a.embeddings_dir, a.hypernetwork_dir)
        places, change = [f for f in folders if f], again.changing(a.given, todo[0])
        found = prepare(a.from_picture, models, places, device=cli.device(a.device), change=change)
        for note in found.notes:
            print(f"txt2img: {note}", file=sys.stderr)
        models, todo, wanted = found.models, [found.request], found.request.single(found.place)
    assert models is not None
    if a.explain:
        print("\n\n".join(str(ldm.explain(models, request)) for request in todo))
        return 0
    inputs = replace(inputs, controls=flags.controls(a, models))
    sheet: list[Image] = []

    def save(image: Image, job: cli.Job) -> None:
        if wanted not in (None, job.request):
            return
        if not a.skip_save:
            output.save(image, str(job.request.seed), job.place)
        if 1 < pictures <= MAX_GRID and not (a.no_grid or a.resume):
            sheet.append(image)

    jobs = [cli.Job(request, lambda: inputs) for request in todo]
    if a.resume:
        with output.going_on(cli.facts(models, jobs, inputs)) as output:
            return cli.draw(models, jobs, save, has=lambda job: output.has(str(job.request.seed), job.place))
    code = cli.draw(models, jobs, save)
    if sheet and code is not cli.Exit.STOPPED:
        output.save(grid(sheet, a.n_rows), "grid")
    return code


def main(argv: Sequence[str] | None = None) -> int:
    return flags.main("txt2img", parse, draw, argv)


if __name__ == "__main__":
    flags.start(main)
