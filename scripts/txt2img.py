"""Draw pictures from words.

    python scripts/txt2img.py "a red apple"
    python scripts/txt2img.py "an astronaut riding a horse" --ckpt v1-5-pruned-emaonly.safetensors --steps 30

Saved paths go to stdout, everything else to stderr. The same command draws the same pictures: without --seed,
the seed is 42. Every PNG holds its settings.
"""

from __future__ import annotations

import argparse
import secrets
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:  # torch takes seconds to import: --help and a mistyped flag are answered without it
    from PIL.Image import Image

    from ldm import Request

MAX_GRID = 100  # pictures on one sheet
LAION400M = Path("models/ldm/text2img-large/model.ckpt")  # where the original script looks for it


class Parser(argparse.ArgumentParser):
    """Answers a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help lists all flags\n")


def parser() -> Parser:
    p = Parser(
        prog="txt2img",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Flags may be written with _ in place of -. Where nothing is said, the model decides.",
    )
    p.add_argument("positional", metavar="prompt", nargs="?", help="what to draw")
    p.add_argument("--prompt", help="the same as a flag")
    p.add_argument("--from-file", type=Path, metavar="FILE", help="draw each line of a text file")
    p.add_argument(
        "--from-picture", type=Path, metavar="FILE", help="draw a picture again, from the settings it carries"
    )
    p.add_argument("--negative", "--negative-prompt", default="", metavar="TEXT", help="what to avoid")
    p.add_argument(
        "--seed", type=int, default=42, help="of the first picture, the next have seed + 1, ...; -1: random"
    )
    p.add_argument("--steps", type=int)
    p.add_argument("--sampler", metavar="NAME", help='such as "Euler a" or "DPM++ 2M Karras"')
    p.add_argument("--schedule", metavar="NAME", help="spacing of the noise levels: karras, exponential, ...")
    p.add_argument("--cfg-scale", "--scale", type=float, metavar="X", help="how closely to follow the prompt")
    p.add_argument(
        "--cfg-rescale", type=float, default=0.0, metavar="X", help="0 to 1, against burnt colours"
    )
    p.add_argument("--width", "--W", type=int, help="pixels")
    p.add_argument("--height", "--H", type=int, help="pixels")
    p.add_argument(
        "--batch-size", "--n-samples", type=int, default=1, metavar="N", help="pictures drawn at once"
    )
    p.add_argument("--n-iter", type=int, default=1, metavar="N", help="batches for each prompt")
    p.add_argument("--clip-skip", type=int, metavar="N", help="2: the text encoder's last layer but one")
    p.add_argument(
        "--explain", action="store_true", help="tell tokens, weights, levels and files, and draw nothing"
    )

    words = p.add_argument_group("files that a prompt names, see docs/prompts.md")
    words.add_argument(
        "--models-dir", type=Path, metavar="FOLDER", help="where --from-picture finds files by their hashes"
    )
    words.add_argument("--lora-dir", type=Path, metavar="FOLDER", help="for <lora:name:0.8>")
    words.add_argument("--embeddings-dir", type=Path, metavar="FOLDER", help="for names of embeddings")
    words.add_argument("--hypernetwork-dir", type=Path, metavar="FOLDER", help="for <hypernet:name:1>")
    words.add_argument("--style", action="append", default=[], metavar="NAME", help="of the styles file")
    words.add_argument("--styles-file", type=Path, default=Path("styles.csv"), metavar="FILE")

    noise = p.add_argument_group("variations, and pictures of other programs")
    noise.add_argument("--variation-seed", type=int, default=0, metavar="N", help="mix in the noise of this")
    noise.add_argument("--variation-strength", type=float, default=0.0, metavar="X", help="0 to 1")
    noise.add_argument("--seed-resize-from", metavar="WxH", help="keep the composition of this size")
    noise.add_argument("--ensd", type=int, default=0, metavar="N", help="eta noise seed delta")
    noise.add_argument("--compat", default="ldm", metavar="NAME", help="a1111, comfyui, diffusers, compvis")

    model = p.add_argument_group("model")
    model.add_argument(
        "--ckpt", type=Path, metavar="FILE", help=".safetensors or .ckpt; default: the embedded model"
    )
    model.add_argument("--vae", type=Path, metavar="FILE", help="take the autoencoder from this file")
    model.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    model.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="of the UNet and the text encoder"
    )
    model.add_argument(
        "--prediction", choices=("eps", "v"), help="what the UNet predicts, where its file says it wrongly"
    )
    model.add_argument("--ema", action="store_true", help="use the averaged weights of a training checkpoint")
    model.add_argument(
        "--vocabulary", type=Path, metavar="FILE", help="BERT's vocab.txt, for text2image-large"
    )

    options = p.add_argument_group("options of samplers and schedules that have them")
    for name in ("eta", "s-churn", "s-tmin", "s-tmax", "s-noise", "sigma-min", "sigma-max", "rho"):
        options.add_argument(f"--{name}", type=float, metavar="X")
    options.add_argument("--order", type=int, metavar="N")

    files = p.add_argument_group("files")
    files.add_argument(
        "--out",
        "--outdir",
        type=Path,
        default=Path("outputs"),
        metavar="PATH",
        help="folder (default: outputs), or the .png file of a single picture",
    )
    files.add_argument("--overwrite", action="store_true", help="let --out replace an existing file")
    files.add_argument(
        "--no-grid", "--skip-grid", action="store_true", help=f"no sheet of all pictures (up to {MAX_GRID})"
    )
    files.add_argument("--skip-save", action="store_true", help="save only the sheet")
    files.add_argument("--debug", action="store_true", help="show where an error comes from")

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
    words = list(sys.argv[1:] if argv is None else argv)
    for i, word in enumerate(words):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            words[i] = name.replace("_", "-") + equals + value
    p = parser()
    a = p.parse_args(words)

    sources = (a.positional, a.prompt, a.from_file, a.from_picture)
    if sum(source is not None for source in sources) != 1:
        p.error("give one prompt, a file of prompts with --from-file, or a picture with --from-picture")
    a.prompt = a.positional if a.prompt is None else a.prompt

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
    ignored = [f"--{name}" for name in ("config", "C", "f") if getattr(a, name) is not None]
    if ignored:
        print(f"txt2img: ignoring {', '.join(ignored)}", file=sys.stderr)
    return a


def requests(a: argparse.Namespace) -> list[Request]:
    """One request for each batch. Raises LdmError if a value makes no sense for any model."""
    from ldm import Request, RequestError, styles
    from ldm.compat import profile
    from ldm.samplers import parse as parse_sampler
    from ldm.schedules import check_overrides

    for name, value in (("--n-iter", a.n_iter), ("--n-rows", a.n_rows)):
        if value is not None and value < 1:
            raise RequestError(f"{name} must be at least 1, got {value}")
    for name, value in (("width", a.width), ("height", a.height)):
        if value is not None and value % 8:
            near = max(8, round(value / 8) * 8)
            raise RequestError(f"{name} must be a multiple of 8, got {value}; try {near}")
    first = Request(
        negative_prompt=a.negative,
        seed=secrets.randbelow(2**32) if a.seed == -1 else a.seed,
        batch_size=a.batch_size,
        width=a.width,
        height=a.height,
        steps=a.steps,
        cfg_scale=a.cfg_scale,
        cfg_rescale=a.cfg_rescale,
        sampler=a.sampler,
        schedule=a.schedule,
        clip_skip=a.clip_skip,
        eta=a.eta,
        s_churn=a.s_churn,
        s_tmin=a.s_tmin,
        s_tmax=a.s_tmax,
        s_noise=a.s_noise,
        order=a.order,
        sigma_min=a.sigma_min,
        sigma_max=a.sigma_max,
        rho=a.rho,
        variation_seed=a.variation_seed,
        variation_strength=a.variation_strength,
        seed_resize_from=size(a.seed_resize_from) if a.seed_resize_from else None,
        ensd=a.ensd,
        compat=profile(a.compat),
    )
    # Where the model chooses the sampler, any will do to read the name of the schedule.
    sampler, spacing = parse_sampler(a.sampler or "Euler", a.schedule)
    if a.sampler is not None or a.schedule is not None:
        check_overrides(spacing, sigma_min=a.sigma_min, sigma_max=a.sigma_max, rho=a.rho)
    if a.sampler is not None:
        sampler.check_options(first.sampler_options())

    prompts = [a.prompt] if a.from_file is None else read_prompts(a.from_file)
    batches = [prompt for prompt in prompts for _ in range(a.n_iter)]
    stride = 0 if a.fixed_code else a.batch_size
    found = [replace(first, prompt=prompt, seed=first.seed + i * stride) for i, prompt in enumerate(batches)]
    known = styles.read(a.styles_file) if a.style else {}
    return [styles.apply(request, known, a.style) for request in found]


def size(text: str) -> tuple[int, int]:
    """ "512x768" -> (512, 768). Raises RequestError."""
    from ldm import RequestError

    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise RequestError(f"a size is written as 512x768, got {text!r}")
    return int(width), int(height)


def read_prompts(path: Path) -> list[str]:
    from ldm import RequestError

    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read prompts from {path}: {error}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise RequestError(f"there are no prompts in {path}")
    return prompts


def draw(a: argparse.Namespace) -> int:
    """Check every value, then load, draw and save. Returns the exit code."""
    import torch

    import ldm
    from ldm import cli
    from ldm.images import grid
    from ldm.reproduce import prepare

    todo = [] if a.from_picture else requests(a)
    for path in (a.ckpt, a.vae, a.vocabulary, a.from_picture):
        if path is not None and not path.exists():
            raise ldm.RequestError(f"there is no file {path}")
    for path in (a.lora_dir, a.embeddings_dir, a.hypernetwork_dir, a.models_dir):
        if path is not None and not path.is_dir():
            raise ldm.RequestError(f"there is no folder {path}")
    pictures = len(todo) * a.batch_size or 1
    output = cli.Output(a.out, a.overwrite)
    if not a.explain:
        output.prepare(pictures)
    device = cli.device(a.device)
    models = None
    if a.ckpt or not a.from_picture:
        models = ldm.load(
            a.ckpt,
            device=device,
            dtype=getattr(torch, a.dtype) if a.dtype else None,
            vae=a.vae,
            prediction=a.prediction,
            ema=a.ema,
            vocabulary=a.vocabulary,
            library=ldm.Library(a.lora_dir, a.embeddings_dir, a.hypernetwork_dir),
        )
    wanted = None  # of a batch; None: all
    if a.from_picture:
        folders = (a.models_dir, a.lora_dir, a.embeddings_dir, a.hypernetwork_dir)
        found = prepare(a.from_picture, models, [f for f in folders if f is not None], device=device)
        for note in found.notes:
            print(f"txt2img: {note}", file=sys.stderr)
        models, todo, wanted = found.models, [found.request], found.request.single(found.place)
    assert models is not None
    if a.explain:
        print("\n\n".join(str(ldm.explain(models, request)) for request in todo))
        return 0
    sheet: list[Image] = []

    def save(image: Image, request: Request) -> None:
        if wanted not in (None, request):
            return
        if not a.skip_save:
            output.save(image, str(request.seed))
        if 1 < pictures <= MAX_GRID and not a.no_grid:
            sheet.append(image)

    code = cli.draw(models, todo, save)
    if sheet and code is not cli.Exit.STOPPED:
        output.save(grid(sheet, a.n_rows), "grid")
    return code


def main(argv: Sequence[str] | None = None) -> int:
    a = parse(argv)
    try:
        return draw(a)
    except KeyboardInterrupt:
        print("txt2img: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if a.debug:
            raise
        from ldm import cli

        return cli.report("txt2img", error)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill is a Ctrl-C
    sys.exit(main())
