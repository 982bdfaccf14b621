"""Tell in words what pictures show, as a prompt.

    python scripts/interrogate.py apple.png
    python scripts/interrogate.py photos/ --clip open_clip_model.safetensors --words my-lists/ --weights
    python scripts/interrogate.py picture.png --tagger wd-v1-4-tagger.onnx

A model that draws, the embedded one if none is named, or CLIP chooses among word lists: those for the
embedded model, or your own. A tagger brings its own words. One line a picture goes to stdout, with the
picture's path before it if there are several.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import flags

if TYPE_CHECKING:
    from PIL.Image import Image


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = flags.Parser("interrogate", __doc__, "picture ...")
    p.add_argument("pictures", nargs="+", type=Path, metavar="picture", help="files, and folders of them")

    lists = p.add_argument_group("among word lists, see docs/interrogate.md")
    lists.add_argument("--ckpt", type=Path, metavar="FILE", help="ask a model that draws (default: embedded)")
    lists.add_argument(
        "--clip", type=Path, metavar="FILE", help="ask CLIP: a file of open_clip, transformers"
    )
    lists.add_argument("--words", type=Path, metavar="FOLDER", help="of word lists (default: our own)")
    lists.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")

    clip = p.add_argument_group("only with CLIP")
    clip.add_argument("--weights", action="store_true", help="write each word with its share of its list")
    clip.add_argument(
        "--quick-gelu",
        action=argparse.BooleanOptionalAction,
        help="the activation of OpenAI's models (default: yes in the layout of transformers up to ViT-L)",
    )

    tagger = p.add_argument_group("by a tagger")
    tagger.add_argument("--tagger", type=Path, metavar="FILE", help=".onnx, with its list of tags beside it")
    tagger.add_argument("--tags", type=Path, metavar="FILE", help="that list (default: the .csv beside it)")
    tagger.add_argument(
        "--threshold", type=float, default=0.35, metavar="X", help="take tags that are surer (default: 0.35)"
    )
    tagger.add_argument("--leave-out", default="", metavar="TAGS", help="never these, separated by commas")

    p.add_argument("--debug", action="store_true", help="show where an error comes from")
    a = p.parse_args(argv)
    if sum(file is not None for file in (a.ckpt, a.clip, a.tagger)) > 1:
        p.error("give one of --ckpt, --clip and --tagger")
    if a.clip is None and (a.weights or a.quick_gelu is not None):
        p.error("--weights and --quick-gelu need --clip")
    return a


def reader(a: argparse.Namespace) -> Callable[[Image], str]:
    """What turns a picture into words. Raises LdmError if a file does not fit."""
    import ldm
    from ldm import cli, diffusion_classifier, interrogate
    from ldm.tagger import load_tagger

    if a.tagger is not None:
        tagger = load_tagger(a.tagger, a.tags)
        left_out = [tag.strip() for tag in a.leave_out.split(",") if tag.strip()]
        return lambda image: tagger.prompt(image, threshold=a.threshold, leave_out=left_out)
    categories, device = interrogate.read_categories(a.words or interrogate.WORDS), cli.device(a.device)
    if a.clip is not None:
        clip = interrogate.load_clip(a.clip, quick_gelu=a.quick_gelu, device=device)
        return lambda image: interrogate.interrogate(clip, image, categories, weights=a.weights)
    models = ldm.load(a.ckpt, device=device)
    return lambda image: diffusion_classifier.interrogate(models, image, categories)


def run(a: argparse.Namespace) -> int:
    """Read every picture. Of several, one that fails is reported and the others go on."""
    from ldm.cli import Exit, report
    from ldm.errors import LdmError
    from ldm.images import read_picture

    flags.exist(a.ckpt, a.clip, a.tagger, a.tags)
    flags.exist_folders(a.words)
    pictures = flags.pictures(a.pictures)
    read, failed = reader(a), 0
    for path in pictures:
        try:
            words = read(read_picture(path))
        except LdmError as error:
            if len(pictures) == 1:
                raise
            failed += 1
            report("interrogate", error)
            continue
        print(f"{path}: {words}" if len(pictures) > 1 else words, flush=True)
    if failed:
        print(f"{failed} of {len(pictures)} pictures failed", file=sys.stderr)
        return Exit.FAILED
    return Exit.DONE


def main(argv: Sequence[str] | None = None) -> int:
    return flags.main("interrogate", parse, run, argv)


if __name__ == "__main__":
    flags.start(main)
