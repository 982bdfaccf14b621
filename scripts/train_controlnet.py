"""Train the embedded model's ControlNet for canny edges: minutes on a CPU, resumable.

    python scripts/build_dataset.py --scope small --out build/data
    python scripts/train_controlnet.py

Ctrl-C or --minutes ends a session; the same command goes on from there, to the bit. docs/controlnet.md
tells how well the result steers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import flags
import groups

CANNY = Path(__file__).parent.parent / "ldm" / "controlnet_canny.safetensors"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = flags.Parser("train_controlnet", __doc__)
    p.add_argument("--ckpt", type=Path, metavar="FILE", help="default: the embedded model")
    p.add_argument("--scope", choices=("small", "full"), default="small", help="that it was trained on")
    p.add_argument("--data", type=Path, metavar="FILE", help="default: build/data/icons-SCOPE.safetensors")
    p.add_argument(
        "--folder", type=Path, default=Path("build/controlnet"), metavar="DIR", help="state of the run"
    )
    p.add_argument("--out", type=Path, default=CANNY, metavar="FILE", help="default: %(default)s")
    groups.add_session(p)
    return p.parse_args(argv)


def train(a: argparse.Namespace) -> int:
    import torch

    import ldm
    from ldm import cli
    from ldm.formats import write_safetensors
    from ldm.training.controlnet import BATCH, LOOP, train_controlnet
    from ldm.training.default_model import SCOPES, latent_views
    from ldm.training.icons import IconSet
    from ldm.vae import AutoencoderKL

    data = IconSet.load(a.data or f"build/data/icons-{a.scope}.safetensors")
    models = ldm.load(a.ckpt, device=cli.device(a.device), dtype=torch.float32)
    if not isinstance(models.vae, AutoencoderKL):
        raise ldm.RequestError(
            f"{models.name} has no autoencoder of Stable Diffusion's kind; choose another model"
        )
    a.folder.mkdir(parents=True, exist_ok=True)
    views = latent_views(models.vae, data, SCOPES[a.scope], a.folder)
    network = train_controlnet(models, data, views, LOOP, a.folder, batch_size=BATCH, seconds=a.minutes * 60)
    if network is None:
        return flags.unfinished(a)
    facts = {
        "title": "ldm ControlNet for canny edges, for the embedded icon model",
        "samples_seen": str(LOOP.steps * BATCH),
        "sources": data.facts.get("sources", ""),
        "licence": "see default_model.NOTICE.txt",
    }
    weights = {name: w.half() for name, w in network.state_dict().items()}
    write_safetensors(a.out, weights, facts, overwrite=True)
    print(a.out)
    return cli.Exit.DONE


def main(argv: Sequence[str] | None = None) -> int:
    return flags.main("train_controlnet", parse, train, argv)


if __name__ == "__main__":
    flags.start(main)
