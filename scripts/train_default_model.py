"""Train the embedded model: autoencoder, text encoder and UNet, resumable, on a CPU or on GPUs.

    python scripts/build_dataset.py --scope small --out build/data
    python scripts/train_default_model.py --scope small

Ctrl-C or --minutes ends a session; the same command goes on from there, to the bit. On several GPUs:
torchrun --nproc-per-node 8 scripts/train_default_model.py --scope full
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import flags
import groups

if TYPE_CHECKING:
    from ldm import Models

MODEL = Path(__file__).parent.parent / "ldm" / "default_model.safetensors"
SAMPLE = ("apple", "dog face", "cat face", "pizza", "house", "umbrella", "car", "heart")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = flags.Parser("train_default_model", __doc__)
    p.add_argument("--scope", choices=("small", "full"), default="small")
    p.add_argument("--data", type=Path, metavar="FILE", help="default: build/data/icons-SCOPE.safetensors")
    p.add_argument("--folder", type=Path, metavar="DIR", help="state of the run; default: build/SCOPE")
    p.add_argument("--out", type=Path, default=MODEL, metavar="FILE", help="default: %(default)s")
    p.add_argument("--compile", action="store_true", help="torch.compile the networks (GPU)")
    p.add_argument(
        "--preview-every", type=int, default=500, metavar="STEPS", help="checkpoint and sheet to look at"
    )
    groups.add_session(p)
    return p.parse_args(argv)


def train(a: argparse.Namespace) -> int:
    import torch

    from ldm import cli
    from ldm.training.default_model import SCOPES, train_default_model
    from ldm.training.icons import IconSet
    from ldm.training.loop import rank_and_world

    device, scope = cli.device(a.device), SCOPES[a.scope]
    data = IconSet.load(a.data or f"build/data/icons-{a.scope}.safetensors")
    folder = a.folder or Path("build") / a.scope
    folder.mkdir(parents=True, exist_ok=True)
    models = train_default_model(
        data,
        scope,
        folder,
        device=device,
        seconds=a.minutes * 60,
        compile=a.compile,
        preview_every=a.preview_every,
        watch=lambda models: draw_sample(models, folder / "preview.png"),
    )
    if models is None:
        return flags.unfinished(a)
    if rank_and_world()[0] == 0:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout
        facts = {
            "title": "ldm embedded icon model",
            "scope": a.scope,
            "samples_seen": str(scope.loop.steps * scope.batch),
            "sources": data.facts.get("sources", ""),
            "licence": "see default_model.NOTICE.txt",
            "commit": commit.strip(),
        }
        models.save(a.out, dtype=torch.float16, metadata=facts, overwrite=True)
        print(a.out)
    return cli.Exit.DONE


def draw_sample(models: Models, path: Path) -> None:
    """A sheet of a few pictures by the model as it is."""
    from ldm import Request, txt2img
    from ldm.images import grid, save

    pictures = [txt2img(models, Request(prompt=prompt, steps=10))[0] for prompt in SAMPLE]
    save(grid(pictures, 4), path, overwrite=True)


def main(argv: Sequence[str] | None = None) -> int:
    return flags.main("train_default_model", parse, flags.together(train), argv)


if __name__ == "__main__":
    flags.start(main)
