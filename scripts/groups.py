"""The flags of the command lines, in groups. What becomes of their values is in flags.py."""

from __future__ import annotations

import argparse
import re
import secrets
from pathlib import Path


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
        "--fast",
        action="store_true",
        help="faster networks, see docs/performance.md; on CUDA it compiles for a minute first",
    )
    model.add_argument(
        "--prediction", choices=("eps", "v"), help="what the UNet predicts, where its file says it wrongly"
    )
    model.add_argument("--ema", action="store_true", help="use the averaged weights of a training checkpoint")
    model.add_argument(
        "--vocabulary", type=Path, metavar="FILE", help="BERT's vocab.txt, for text2image-large"
    )
    model.add_argument(
        "--budget",
        type=_bytes,
        metavar="4GB",
        help="fit into this memory (free: what there is), by the means of docs/memory.md",
    )


def add_session(p: argparse.ArgumentParser) -> None:
    """Where and how long to train."""
    p.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    p.add_argument(
        "--minutes",
        type=float,
        default=float("inf"),
        metavar="N",
        help="stop after this time, to go on later",
    )
    p.add_argument("--debug", action="store_true", help="show where an error comes from")


def _bytes(text: str) -> int:
    """ "4GB" -> 4 * 2**30; "free" -> 0."""
    if text == "free":
        return 0
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(m|g)b?", text.lower())
    if found is None:
        raise argparse.ArgumentTypeError(f"memory is written as 4GB, 900MB or free, got {text!r}")
    return int(float(found[1]) * (2**20 if found[2] == "m" else 2**30))


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
    faster.add_argument(
        "--token-merging",
        type=float,
        default=0.0,
        metavar="X",
        help="merge this share of tokens, such as 0.5",
    )
    faster.add_argument(
        "--token-merging-downsample",
        type=int,
        default=1,
        metavar="N",
        help="2: on the next smaller maps, too",
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
    hires.add_argument("--hires-steps", type=int, metavar="N", help="0, the default: as in the first pass")
    hires.add_argument("--hires-strength", type=float, metavar="X", help="0 keep to 1 invent (default: 0.7)")
    hires.add_argument("--hires-prompt", metavar="TEXT")
    hires.add_argument("--hires-negative", metavar="TEXT")
    hires.add_argument("--hires-sampler", metavar="NAME")
    hires.add_argument("--hires-schedule", metavar="NAME")
    hires.add_argument("--hires-cfg-scale", type=float, metavar="X")
    hires.add_argument("--hires-token-merging", type=float, metavar="X")
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
