"""What the command lines share: groups of flags, and what becomes of their values.

Nothing here imports torch until a value is used: `--help` and a mistyped flag are answered at once.
"""

from __future__ import annotations

import argparse
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from ldm import Control, Hires, Models, Request


class Parser(argparse.ArgumentParser):
    """Answers a mistake in one line, and takes flags written with _ in place of -."""

    def __init__(self, prog: str, description: str | None, words: str = "", epilog: str = "") -> None:
        """words: the arguments without a flag, for the first line of the help."""
        super().__init__(
            prog=prog,
            usage=f"{prog} [flags] {words}".strip(),
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
        "--storage",
        choices=("float16", "bfloat16", "float8_e4m3fn"),
        help="hold weights in this, and compute in --dtype, see docs/memory.md",
    )
    model.add_argument(
        "--lowvram",
        nargs="?",
        const="parts",
        choices=("parts", "blocks"),
        help="hold only the running part of the model on the device, or the running block of its UNet",
    )
    model.add_argument(
        "--fast", action="store_true", help="compile the UNet: a minute at first, then faster (CUDA)"
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
    faster = p.add_argument_group("faster, and not quite the same picture, see docs/faster.md")
    faster.add_argument(
        "--guidance-low", type=float, default=0.0, metavar="X", help="no guidance up to this noise level"
    )
    faster.add_argument("--guidance-high", type=float, metavar="X", help="no guidance above this noise level")
    faster.add_argument(
        "--guidance-skip", type=float, default=0.0, metavar="X", help="nor in this share of the steps"
    )
    faster.add_argument(
        "--reuse", type=int, default=1, metavar="N", help="make deep features in every N-th step only"
    )


def add_output(p: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    files = p.add_argument_group("files")
    files.add_argument(
        "-o",
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


def add_resume(files: argparse._ArgumentGroup) -> None:
    files.add_argument(
        "--resume",
        action="store_true",
        help="for long runs: the same command goes on where it was ended, see docs/reliability.md",
    )


def add_second_pass(p: argparse.ArgumentParser) -> None:
    """A larger second pass."""
    hires = p.add_argument_group("a second pass, larger (hires fix), see docs/hires.md")
    hires.add_argument("--hires", type=float, metavar="X", help="times as wide and high, such as 2")
    hires.add_argument("--hires-size", metavar="WxH", help="or this size; 0x768: as wide as fits")
    hires.add_argument(
        "--hires-upscaler", metavar="NAME", help="Latent (default), Lanczos, a file in --upscalers-dir, ..."
    )
    hires.add_argument("--hires-steps", type=int, metavar="N", help="default: as in the first pass")
    hires.add_argument("--hires-strength", type=float, metavar="X", help="0 keep to 1 invent (default: 0.7)")
    hires.add_argument("--hires-prompt", metavar="TEXT")
    hires.add_argument("--hires-negative", metavar="TEXT")
    hires.add_argument("--hires-sampler", metavar="NAME")
    hires.add_argument("--hires-schedule", metavar="NAME")
    hires.add_argument("--hires-cfg-scale", type=float, metavar="X")
    hires.add_argument("--upscalers-dir", type=Path, metavar="FOLDER", help="with files of upscalers")


def add_leading(p: argparse.ArgumentParser) -> None:
    """What leads a run beside the prompt: hints, a second model."""
    lead = p.add_argument_group("hints and refiners, see docs/controlnet.md")
    lead.add_argument(
        "--control",
        nargs=2,
        type=Path,
        action="append",
        default=[],
        metavar=("FILE", "PICTURE"),
        help="a ControlNet (canny: the embedded model's) and its hint; may be repeated, like those below",
    )
    lead.add_argument(
        "--control-hint",
        action="append",
        default=[],
        metavar="NAME",
        help="make the hint of the picture: canny, invert, tile, threshold; none (default): it is one",
    )
    lead.add_argument("--control-weight", type=float, action="append", default=[], metavar="X")
    lead.add_argument("--control-start", type=float, action="append", default=[], metavar="X", help="0 to 1")
    lead.add_argument("--control-end", type=float, action="append", default=[], metavar="X", help="0 to 1")
    lead.add_argument(
        "--control-mode", action="append", default=[], metavar="NAME", help="balanced, prompt, control"
    )
    lead.add_argument("--refiner", type=Path, metavar="FILE", help="the model that ends the run (SDXL)")
    lead.add_argument("--refiner-switch", type=float, default=0.8, metavar="X", help="when (default: 0.8)")


def add_editing(p: argparse.ArgumentParser) -> None:
    """How a given picture is used."""
    edit = p.add_argument_group("how the picture is used")
    edit.add_argument(
        "--strength",
        "--denoising-strength",
        type=float,
        metavar="X",
        help="above 0 (hardly a change) to 1 (hardly a trace of it); default: 0.75, InstructPix2Pix 1",
    )
    edit.add_argument(
        "--exact-steps", action="store_true", help="make all --steps, spread over the part of the run"
    )
    edit.add_argument(
        "--resize",
        choices=("resize", "crop", "fill", "latent"),
        default="resize",
        help="to --width and --height: stretch, cut, stretch the edges, or stretch the latent",
    )
    edit.add_argument("--color-correction", action="store_true", help="keep the colours of the picture")
    edit.add_argument("--noise-multiplier", type=float, default=1.0, metavar="X", help="default: 1")
    edit.add_argument(
        "--extra-noise", type=float, default=0.0, metavar="X", help="for more detail, such as 0.05"
    )
    edit.add_argument(
        "--image-cfg-scale",
        type=float,
        default=1.5,
        metavar="X",
        help="InstructPix2Pix: how closely to keep to the picture (default: 1.5)",
    )
    edit.add_argument("--depth", type=Path, metavar="PICTURE", help="for depth models: white is near")


def editing(a: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """The fields of a request that the flags of `add_editing` make. more: further fields of `Edit`."""
    from dataclasses import replace

    from ldm import Edit
    from ldm.compat import profile

    compat = profile(a.compat)
    edit = Edit(
        strength=a.strength,
        resize=a.resize,
        noise_multiplier=a.noise_multiplier,
        extra_noise=a.extra_noise,
        color_correction=a.color_correction,
        **more,
    )
    return {
        "edit": edit,
        "image_cfg_scale": a.image_cfg_scale,
        "compat": replace(compat, strength="exact") if a.exact_steps else compat,
    }


def hires(a: argparse.Namespace) -> Hires | None:
    """The second pass that the flags ask for."""
    from ldm import Hires, RequestError

    given = {
        "scale": a.hires,
        "upscaler": a.hires_upscaler,
        "steps": a.hires_steps,
        "strength": a.hires_strength,
        "prompt": a.hires_prompt,
        "negative_prompt": a.hires_negative,
        "sampler": a.hires_sampler,
        "schedule": a.hires_schedule,
        "cfg_scale": a.hires_cfg_scale,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    if a.hires_size:
        width, height = size(a.hires_size)
        chosen |= {"width": width or None, "height": height or None}
    elif chosen and a.hires is None:
        raise RequestError("say how large the second pass is, with --hires 2 or --hires-size 1024x1024")
    return Hires(**chosen) if chosen else None


def controls(a: argparse.Namespace, models: Models) -> tuple[Control, ...]:
    """Load the ControlNets and their hints."""
    from ldm import Control, RequestError, load_controlnet, read_picture

    def of_each(flag: str, default: Any) -> list[Any]:
        given = getattr(a, flag)
        if len(given) not in (0, 1, len(a.control)):
            name = flag.replace("_", "-")
            raise RequestError(f"--{name} stands {len(given)} times for {len(a.control)} controls")
        return (given or [default]) * (len(a.control) if len(given) < 2 else 1)

    each = zip(
        a.control,
        of_each("control_hint", "none"),
        of_each("control_weight", 1.0),
        of_each("control_start", 0.0),
        of_each("control_end", 1.0),
        of_each("control_mode", "balanced"),
        strict=True,
    )
    found = []
    for (path, picture), hint, weight, start, end, mode in each:
        found.append(
            Control(
                load_controlnet(path, models),
                read_picture(picture),
                preprocessor=hint,
                weight=weight,
                start=start,
                end=end,
                mode=mode,
                name=path.stem,
            )
        )
    return tuple(found)


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
    fields: dict[str, Any] = {"compat": profile(a.compat), **more}
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
        refiner_switch=a.refiner_switch,
        guidance_low=a.guidance_low,
        guidance_high=a.guidance_high,
        guidance_skip=a.guidance_skip,
        reuse=a.reuse,
        **fields,
    )
    # Where the model chooses the sampler, any will do to read the name of the schedule.
    sampler, spacing = parse_sampler(a.sampler or "Euler", a.schedule)
    if a.sampler is not None or a.schedule is not None:
        check_overrides(spacing, sigma_min=a.sigma_min, sigma_max=a.sigma_max, rho=a.rho)
    if a.sampler is not None:
        sampler.check_options(made.sampler_options())
    return styles.apply(made, styles.read(a.styles_file) if a.style else {}, a.style)


def check(a: argparse.Namespace) -> None:
    """Raise RequestError if a file or folder that a flag names does not exist."""
    from ldm.controlnet_file import BUILT_IN

    exist(a.ckpt, a.vae, a.vocabulary, a.refiner)
    exist(*(path for pair in a.control for path in pair if str(path) not in BUILT_IN))
    exist_folders(a.lora_dir, a.embeddings_dir, a.hypernetwork_dir, getattr(a, "upscalers_dir", None))


def models(a: argparse.Namespace) -> Models:
    """Load what the flags of `add_model`, `add_words` and `add_leading` name."""
    from dataclasses import replace

    import torch

    import ldm
    from ldm import cli
    from ldm.compiled import fast
    from ldm.offload import offloaded

    device, dtype = cli.device(a.device), getattr(torch, a.dtype) if a.dtype else None
    home = device
    if a.lowvram:
        if device.type == "cpu":
            raise ldm.RequestError("--lowvram is for a graphics card; for main memory see --storage")
        home, dtype = torch.device("cpu"), dtype or torch.float16
    library = ldm.Library(
        a.lora_dir, a.embeddings_dir, a.hypernetwork_dir, upscalers=getattr(a, "upscalers_dir", None)
    )
    loaded = ldm.load(
        a.ckpt,
        device=home,
        dtype=dtype,
        storage=getattr(torch, a.storage) if a.storage else None,
        vae=a.vae,
        prediction=a.prediction,
        ema=a.ema,
        vocabulary=a.vocabulary,
        library=library,
    )
    if a.refiner is not None:
        loaded = replace(loaded, refiner=ldm.load(a.refiner, device=home, dtype=dtype))
    if a.lowvram:
        loaded = offloaded(loaded, device, blocks=a.lowvram == "blocks")
    if a.fast:
        usual, rows = loaded.default_size, a.batch_size * (1 if a.cfg_scale == 1 else 2)
        loaded = fast(loaded, sizes=[(a.width or usual, a.height or usual, rows)])
    return loaded


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


PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".avif")  # what is taken from a folder


def pictures(paths: Sequence[Path]) -> list[Path]:
    """The pictures named, those of folders by name. Raises RequestError if there are none."""
    from ldm import RequestError

    exist(*paths)
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)
        if not inside:
            raise RequestError(f"there are no pictures in {path}")
        found += inside
    return found


def size(text: str) -> tuple[int, int]:
    """ "512x768" -> (512, 768). Raises RequestError."""
    from ldm import RequestError

    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise RequestError(f"a size is written as 512x768, got {text!r}")
    return int(width), int(height)


stopping = threading.Event()
"""Somebody asked for the end of the program."""


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
        pass
    except Exception as error:
        # Within torch, an interrupt can come out as another error.
        if a.debug and not stopping.is_set():
            raise
        if not stopping.is_set():
            from ldm import cli

            return cli.report(program, error)
    print(f"{program}: stopped", file=sys.stderr)
    return 130


def start(main: Callable[[], int]) -> NoReturn:
    """Run a script: a polite kill is a Ctrl-C."""

    def stop(number: int, frame: object) -> None:
        stopping.set()
        raise KeyboardInterrupt

    try:
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)
        code = main()
    except KeyboardInterrupt:  # once more, while the first was being answered
        code = 130
    sys.exit(code)
