"""What the command lines share: groups of flags, and what becomes of their values.

Nothing here imports torch until a value is used: `--help` and a mistyped flag are answered at once.
"""

from __future__ import annotations

import argparse
import secrets
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from ldm import Models, Request


class Parser(argparse.ArgumentParser):
    """Answers a mistake in one line, and takes flags written with _ in place of -."""

    def __init__(self, prog: str, description: str | None, epilog: str = "") -> None:
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            epilog=f"Flags may be written with _ in place of -. {epilog}".strip(),
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help lists all flags\n")

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        words = list(sys.argv[1:] if args is None else args)
        for i, word in enumerate(words):
            if word.startswith("--"):
                name, equals, value = word.partition("=")
                words[i] = name.replace("_", "-") + equals + value
        return super().parse_args(words)


def add_drawing(p: argparse.ArgumentParser) -> None:
    """What to draw, beside the prompt itself."""
    p.add_argument("--negative", "--negative-prompt", default="", metavar="TEXT", help="what to avoid")
    p.add_argument(
        "--seed", type=_seed, default=42, help="of the first picture, the next have seed + 1, ...; -1: random"
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
    p.add_argument("--clip-skip", type=int, metavar="N", help="2: the text encoder's last layer but one")
    p.add_argument("--tiling", action="store_true", help="a texture: its edges meet when it is repeated")


def _seed(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid int value: {text!r}") from None
    return secrets.randbelow(2**32) if number == -1 else number


def add_words(p: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Folders with files that a prompt names, and styles."""
    words = p.add_argument_group("files that a prompt names, see docs/prompts.md")
    words.add_argument("--lora-dir", type=Path, metavar="FOLDER", help="for <lora:name:0.8>")
    words.add_argument("--embeddings-dir", type=Path, metavar="FOLDER", help="for names of embeddings")
    words.add_argument("--hypernetwork-dir", type=Path, metavar="FOLDER", help="for <hypernet:name:1>")
    words.add_argument("--style", action="append", default=[], metavar="NAME", help="of the styles file")
    words.add_argument("--styles-file", type=Path, default=Path("styles.csv"), metavar="FILE")
    return words


def add_noise(p: argparse.ArgumentParser) -> None:
    noise = p.add_argument_group("variations, and pictures of other programs")
    noise.add_argument("--variation-seed", type=int, default=0, metavar="N", help="mix in the noise of this")
    noise.add_argument("--variation-strength", type=float, default=0.0, metavar="X", help="0 to 1")
    noise.add_argument("--seed-resize-from", metavar="WxH", help="keep the composition of this size")
    noise.add_argument("--ensd", type=int, default=0, metavar="N", help="eta noise seed delta")
    noise.add_argument("--compat", default="ldm", metavar="NAME", help="a1111, comfyui, diffusers, compvis")


def add_model(p: argparse.ArgumentParser) -> None:
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


def add_sampling(p: argparse.ArgumentParser) -> None:
    options = p.add_argument_group("options of samplers and schedules that have them")
    for name in ("eta", "s-churn", "s-tmin", "s-tmax", "s-noise", "sigma-min", "sigma-max", "rho"):
        options.add_argument(f"--{name}", type=float, metavar="X")
    options.add_argument("--order", type=int, metavar="N")


def add_output(p: argparse.ArgumentParser) -> argparse._ArgumentGroup:
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
    files.add_argument("--debug", action="store_true", help="show where an error comes from")
    return files


def request(a: argparse.Namespace, prompt: str = "", **more: Any) -> Request:
    """The request that the flags of `add_drawing`, `add_noise` and `add_sampling` make, and the styles.

    more: further fields. Raises LdmError if a value makes no sense for any model.
    """
    from ldm import Request, RequestError, styles
    from ldm.compat import profile
    from ldm.samplers import parse as parse_sampler
    from ldm.schedules import check_overrides

    for name, value in (("width", a.width), ("height", a.height)):
        if value is not None and value % 8:
            near = max(8, round(value / 8) * 8)
            raise RequestError(f"{name} must be a multiple of 8, got {value}; try {near}")
    made = Request(
        prompt=prompt,
        negative_prompt=a.negative,
        seed=a.seed,
        batch_size=a.batch_size,
        width=a.width,
        height=a.height,
        steps=a.steps,
        cfg_scale=a.cfg_scale,
        cfg_rescale=a.cfg_rescale,
        sampler=a.sampler,
        schedule=a.schedule,
        clip_skip=a.clip_skip,
        tiling=a.tiling,
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
        **more,
    )
    # Where the model chooses the sampler, any will do to read the name of the schedule.
    sampler, spacing = parse_sampler(a.sampler or "Euler", a.schedule)
    if a.sampler is not None or a.schedule is not None:
        check_overrides(spacing, sigma_min=a.sigma_min, sigma_max=a.sigma_max, rho=a.rho)
    if a.sampler is not None:
        sampler.check_options(made.sampler_options())
    return styles.apply(made, styles.read(a.styles_file) if a.style else {}, a.style)


def check(a: argparse.Namespace) -> None:
    """Raise RequestError if a file or folder of `add_model` and `add_words` does not exist."""
    exist(a.ckpt, a.vae, a.vocabulary)
    exist_folders(a.lora_dir, a.embeddings_dir, a.hypernetwork_dir)


def models(a: argparse.Namespace) -> Models:
    """Load what the flags of `add_model` and `add_words` name."""
    import torch

    import ldm
    from ldm import cli

    return ldm.load(
        a.ckpt,
        device=cli.device(a.device),
        dtype=getattr(torch, a.dtype) if a.dtype else None,
        vae=a.vae,
        prediction=a.prediction,
        ema=a.ema,
        vocabulary=a.vocabulary,
        library=ldm.Library(a.lora_dir, a.embeddings_dir, a.hypernetwork_dir),
    )


def exist(*paths: Path | None) -> None:
    """Raise RequestError for the first of these files that does not exist."""
    from ldm import RequestError

    for path in paths:
        if path is not None and not path.exists():
            raise RequestError(f"there is no file {path}")


def exist_folders(*paths: Path | None) -> None:
    """Raise RequestError for the first of these folders that does not exist."""
    from ldm import RequestError

    for path in paths:
        if path is not None and not path.is_dir():
            raise RequestError(f"there is no folder {path}")


def size(text: str) -> tuple[int, int]:
    """ "512x768" -> (512, 768). Raises RequestError."""
    from ldm import RequestError

    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise RequestError(f"a size is written as 512x768, got {text!r}")
    return int(width), int(height)


def main(
    program: str,
    parse: Callable[[Sequence[str] | None], argparse.Namespace],
    run: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None,
) -> int:
    """Parse and run; tell in one line what went wrong. Returns the exit code. Needs the flag --debug."""
    a = parse(argv)
    try:
        return run(a)
    except KeyboardInterrupt:
        print(f"{program}: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if a.debug:
            raise
        from ldm import cli

        return cli.report(program, error)


def start(main: Callable[[], int]) -> NoReturn:
    """Run a script: a polite kill is a Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
