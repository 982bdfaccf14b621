"""What the command lines share: the parser, and what becomes of the flags that groups.py adds to it.

Nothing here imports torch until a value is used: `--help` and a mistyped flag are answered at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import streams

if TYPE_CHECKING:
    from ldm import Control, Hires, Models, Request
    from ldm.memory import Run


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


def editing(a: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """The fields of a request that the flags of `groups.add_editing` make. more: further fields of `Edit`."""
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
        "steps": a.hires_steps or None,
        "strength": a.hires_strength,
        "prompt": a.hires_prompt,
        "negative_prompt": a.hires_negative,
        "sampler": a.hires_sampler,
        "schedule": a.hires_schedule,
        "cfg_scale": a.hires_cfg_scale,
        "token_merging": a.hires_token_merging,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    if a.hires_size:
        width, height = size(a.hires_size)
        if not (width or height):
            raise RequestError("--hires-size needs a width or a height, as in 1024x1024 or 0x768")
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
    """The request that the flags for drawing, noise and sampling make (`groups`), with its styles.

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
        token_merging=a.token_merging,
        token_merging_downsample=a.token_merging_downsample,
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
    """Raise RequestError if a file or folder that a flag names does not exist, or flags contradict."""
    from ldm import RequestError
    from ldm.controlnet_file import BUILT_IN

    against = ("dtype", "storage", "lowvram", "refiner", "from_picture")
    if a.budget is not None and any(getattr(a, name, None) for name in against):
        raise RequestError(
            "--budget goes without --dtype, --storage, --lowvram, --refiner and --from-picture"
        )
    if a.budget == 0 and getattr(a, "resume", False):  # the way chosen may change the pictures
        raise RequestError("free memory changes; with --resume say how much: --budget 4GB")

    exist(a.ckpt, a.vae, a.vocabulary, a.refiner)
    exist(*(path for pair in a.control for path in pair if str(path) not in BUILT_IN))
    exist_folders(a.lora_dir, a.embeddings_dir, a.hypernetwork_dir, getattr(a, "upscalers_dir", None))


def models(a: argparse.Namespace, runs: Callable[[Models], Iterable[Run]]) -> Models:
    """Load what the flags of `groups.add_model`, `groups.add_words` and `groups.add_leading` name.

    runs: for --budget, what will be drawn, see `ldm.memory.plan_all`.
    """
    from dataclasses import replace

    import torch

    import ldm
    from ldm import cli
    from ldm.compiled import fast
    from ldm.memory import plan_all
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
    options = {
        "vae": a.vae,
        "prediction": a.prediction,
        "ema": a.ema,
        "vocabulary": a.vocabulary,
        "library": library,
    }
    if a.budget is not None:
        plan = plan_all(
            a.ckpt,
            runs,
            budget=a.budget or None,
            device=device,
            fast=a.fast,
            controls=[path for path, _ in a.control],
            **options,
        )
        print(f"memory: {plan}", file=sys.stderr)
        loaded = plan.load(a.ckpt, **options)
        compiles = a.fast and plan.way.lowvram is None
    else:
        storage = getattr(torch, a.storage) if a.storage else None
        loaded = ldm.load(a.ckpt, device=home, dtype=dtype, storage=storage, **options)
        if a.refiner is not None:
            loaded = replace(loaded, refiner=ldm.load(a.refiner, device=home, dtype=dtype, storage=storage))
        if a.lowvram:
            loaded = offloaded(loaded, device, blocks=a.lowvram == "blocks")
        if a.fast and device.type == "cpu":
            ldm.optimize(loaded)
        compiles = a.fast
    if compiles and device.type != "cpu":
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


def together(train: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """`train`, in a group of processes if torchrun started this one, each with a graphics card of its own."""

    def work(a: argparse.Namespace) -> int:
        if "RANK" not in os.environ:
            return train(a)
        import torch
        import torch.distributed as dist

        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            if a.device in ("auto", "cuda"):
                a.device = f"cuda:{os.environ['LOCAL_RANK']}"
        dist.init_process_group(timeout=timedelta(hours=12))  # encoding the pictures may take long
        try:
            return train(a)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    return work


def unfinished(a: argparse.Namespace) -> int:
    """Say that a training goes on another time; the exit code: its --minutes were over, or it was stopped."""
    from ldm import cli
    from ldm.training.loop import rank_and_world

    if rank_and_world()[0] == 0:
        print("not finished; the same command goes on from here", file=sys.stderr)
    return cli.Exit.DONE if a.minutes < float("inf") else cli.Exit.STOPPED


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
    """Run a script: a polite kill is a Ctrl-C, and a standard stream that goes away ends nothing."""
    streams.protect()

    def stop(number: int, frame: object) -> None:
        stopping.set()
        raise KeyboardInterrupt

    try:
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)
        code = main()
    except KeyboardInterrupt:  # once more, while the first was being answered
        code = 130
    sys.stdout.flush()
    if code == 0 and streams.full():
        print("not all that was to be told could be written to stdout", file=sys.stderr)
        code = 3
    sys.exit(code)
