"""Enlarge pictures.

    python scripts/upscale.py picture.png
    python scripts/upscale.py photos/ --upscaler RealESRGAN_x4plus.pth --size 1920x1080 --crop --out large/
    python scripts/upscale.py picture.png --ldsr last.ckpt --scale 2

Each picture keeps its name, its transparency and the settings it carries. Saved paths go to stdout,
everything else to stderr. Of several pictures, those that are there already are passed over: the same
command goes on after Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import flags

if TYPE_CHECKING:  # torch takes seconds to import: --help and a mistyped flag are answered without it
    from ldm.cli import Exit, Output
    from ldm.extras import Extras
    from ldm.upscalers import Upscaler

LATENT_SETTINGS = ("steps", "eta", "seed", "prompt", "negative_prompt", "cfg_scale", "noise_level")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = flags.Parser("upscale", __doc__, "picture ...")
    p.add_argument("pictures", nargs="+", type=Path, metavar="picture", help="files, and folders of them")

    how = p.add_argument_group("how large")
    how.add_argument("--scale", type=float, metavar="X", help="times as wide and high (default: 4)")
    how.add_argument("--max-side", type=int, metavar="N", help="pixels: scale less where a side gets longer")
    how.add_argument("--size", metavar="WxH", help="scale until the picture covers this, instead of --scale")
    how.add_argument("--crop", action="store_true", help="cut off what lies beyond --size")

    what = p.add_argument_group("by what, see docs/upscaling.md")
    what.add_argument(
        "--upscaler",
        metavar="NAME",
        help="a file of weights or its name in --upscalers-dir, Lanczos, Nearest; default: the embedded one",
    )
    what.add_argument("--upscaler2", metavar="NAME", help="lay the picture of another one over the first")
    what.add_argument("--visibility", type=float, metavar="X", help="of that picture, 0 to 1 (default: 0.5)")
    what.add_argument("--upscalers-dir", type=Path, metavar="FOLDER", help="with files of weights")
    what.add_argument(
        "--tile", type=int, metavar="N", help="pixels seen at once: fewer take less memory; 0: all"
    )
    what.add_argument("--overlap", type=int, metavar="N", help="pixels that neighbouring tiles share")
    what.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")

    latent = p.add_argument_group("upscalers that draw by latent diffusion")
    latent.add_argument("--ldsr", type=Path, metavar="FILE", help="the same as --upscaler")
    latent.add_argument("--steps", type=int, metavar="N", help="default: LDSR 100, Stable Diffusion x4 75")
    latent.add_argument("--eta", type=float, metavar="X", help="0 smooth, 1 detailed; default: LDSR 1, x4 0")
    latent.add_argument("--seed", type=int, metavar="N", help="of the noise (default: 0)")
    latent.add_argument("--prompt", metavar="TEXT", help="x4: what the picture shows")
    latent.add_argument("--negative-prompt", metavar="TEXT", help="x4: what to avoid")
    latent.add_argument(
        "--cfg-scale", type=float, metavar="X", help="x4: how closely to follow the prompt (default: 9)"
    )
    latent.add_argument("--noise-level", type=int, metavar="N", help="x4: 0 keep to 350 invent (default: 20)")

    files = p.add_argument_group("files")
    files.add_argument(
        "--out",
        type=Path,
        default=Path("outputs/upscaled"),
        metavar="PATH",
        help="folder (default: outputs/upscaled), or the file of a single picture: .png, .jpg, .webp",
    )
    files.add_argument("--overwrite", action="store_true", help="replace what is there already")
    files.add_argument("--debug", action="store_true", help="show where an error comes from")
    a = p.parse_args(argv)

    if a.ldsr is not None and a.upscaler is not None:
        p.error("--ldsr is another word for --upscaler; give one of both, and the second with --upscaler2")
    if a.size is not None and (a.scale is not None or a.max_side is not None):
        p.error("--size stands in place of --scale and --max-side")
    if a.crop and a.size is None:
        p.error("--crop needs --size")
    if a.visibility is not None and a.upscaler2 is None:
        p.error("--visibility needs --upscaler2")
    return a


def upscalers(a: argparse.Namespace) -> list[Upscaler]:
    """The one or two upscalers, each with those flags that it knows.

    Raises RequestError for flags that neither knows, LdmError for upscalers that are not found or damaged.
    """
    from dataclasses import fields, replace

    from ldm import Library, RequestError, cli
    from ldm.upscalers import DEFAULT, load_upscaler
    from ldm.upscalers.latent import LatentUpscaler

    library, device = Library(upscalers=a.upscalers_dir), cli.device(a.device)
    names = [a.ldsr or a.upscaler or DEFAULT, *([] if a.upscaler2 is None else [a.upscaler2])]
    found = [load_upscaler(name, library, device=device, tile=a.tile, overlap=a.overlap) for name in names]
    given = {name: getattr(a, name) for name in LATENT_SETTINGS if getattr(a, name) is not None}
    for i, upscaler in enumerate(found):
        if isinstance(upscaler, LatentUpscaler):
            known = {field.name for field in fields(upscaler)}
            found[i] = replace(upscaler, **{name: value for name, value in given.items() if name in known})
    for name in given:
        if not any(hasattr(upscaler, name) for upscaler in found):
            flag = name.replace("_", "-")
            raise RequestError(f"{' and '.join(u.name for u in found)} cannot use --{flag}; leave it out")
    return found


def targets(a: argparse.Namespace, pictures: Sequence[Path]) -> list[Path]:
    """Where each picture goes. Raises RequestError where two would be one file, or one its own source."""
    from ldm import RequestError
    from ldm.images import ENDINGS

    if a.out.suffix.lower() in ENDINGS:
        wanted = [a.out] * len(pictures)
    else:
        stems = Counter(path.stem for path in pictures)
        # Names that differ in their endings alone keep them.
        names = (path.stem if stems[path.stem] == 1 else path.name for path in pictures)
        wanted = [a.out / f"{name}.png" for name in names]
    given = {path.resolve() for path in pictures}
    for target, number in Counter(wanted).items():
        if number > 1:
            raise RequestError(f"{target} would be the file of {number} pictures; give each its own --out")
        if target.resolve() in given:
            raise RequestError(f"{target} is one of the pictures itself; choose another place with --out")
    return wanted


def run(a: argparse.Namespace) -> int:
    """Check every value, then load, enlarge and save. Returns the exit code."""
    from ldm import cli
    from ldm.extras import Extras, Target

    flags.exist(a.ldsr)
    flags.exist_folders(a.upscalers_dir)
    pictures = flags.pictures(a.pictures)
    cli.Output(a.out, a.overwrite).prepare(len(pictures))
    outputs = [cli.Output(target, a.overwrite) for target in targets(a, pictures)]
    jobs = list(zip(pictures, outputs, strict=True))
    if len(jobs) > 1 and not a.overwrite:
        jobs = [job for job in jobs if not job[1].path.exists()]
        if len(jobs) < len(pictures):
            print(f"upscale: {len(pictures) - len(jobs)} pictures are there already", file=sys.stderr)
    if not jobs:
        return cli.Exit.DONE
    target = Target(
        scale=4.0 if a.scale is None else a.scale,
        max_side=a.max_side,
        size=None if a.size is None else flags.size(a.size),
        crop=a.crop,
    )
    jobs[0][1].prepare(1)
    first, *second = upscalers(a)
    extras = Extras(
        target=target,
        upscaler=first,
        second=second[0] if second else None,
        visibility=0.5 if a.visibility is None else a.visibility,
    )
    return enlarge(extras, jobs)


def enlarge(extras: Extras, jobs: Sequence[tuple[Path, Output]]) -> Exit:
    """Enlarge and save pictures under a progress bar. Of several, one that fails does not stop the others."""
    from tqdm import tqdm

    from ldm.cli import Exit, told
    from ldm.errors import LdmError
    from ldm.extras import enlarged_file
    from ldm.formats.mapped import printable
    from ldm.interrupts import patient

    done, failed = 0, 0
    layout = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with patient() as asked, tqdm(total=len(jobs), bar_format=layout, dynamic_ncols=True) as bar:
        for i, (path, output) in enumerate(jobs):

            def advance(share: float) -> None:
                bar.update(i + share - bar.n)  # noqa: B023 (called within this turn of the loop)
                if asked():
                    raise KeyboardInterrupt

            bar.set_description(f"{printable(path.name, 40)} ({i + 1} of {len(jobs)})")
            try:
                output.prepare(1)
                output.save(enlarged_file(path, extras, advance), path.stem)
                done += 1
                advance(1)
            except (LdmError, RuntimeError, MemoryError) as error:  # the last two: out of memory
                if len(jobs) == 1:
                    raise
                failed += 1
                about = "" if isinstance(error, LdmError) else f"{printable(path.name)}: "
                bar.write(f"upscale: {about}{told(error)}", file=sys.stderr)
            except KeyboardInterrupt:
                bar.close()
                print(
                    f"stopped; {done} of {len(jobs)} pictures are done, the same command goes on",
                    file=sys.stderr,
                )
                return Exit.STOPPED
    if failed:
        print(f"{done} of {len(jobs)} pictures are done, {failed} failed", file=sys.stderr)
        return Exit.FAILED
    return Exit.DONE


def main(argv: Sequence[str] | None = None) -> int:
    return flags.main("upscale", parse, run, argv)


if __name__ == "__main__":
    flags.start(main)
