"""Train the embedded model's ControlNet for canny edges: minutes on a CPU, resumable.

    python scripts/build_dataset.py --scope small --out build/data
    python scripts/train_controlnet.py

Ctrl-C or --minutes ends a session; the same command goes on from there, to the bit. docs/controlnet.md
tells how well the result steers.
"""

import argparse
import sys
from pathlib import Path

import torch

import ldm
from ldm.controlnet_file import BUILT_IN
from ldm.formats import write_safetensors
from ldm.training.controlnet import BATCH, LOOP, train_controlnet
from ldm.training.default_model import SCOPES, latent_views
from ldm.training.icons import IconSet
from ldm.vae import AutoencoderKL


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ckpt", type=Path, help="default: the embedded model")
    parser.add_argument("--scope", choices=SCOPES, default="small", help="that it was trained on")
    parser.add_argument("--data", type=Path, help="default: build/data/icons-SCOPE.safetensors")
    parser.add_argument("--folder", type=Path, default=Path("build/controlnet"), help="state of the run")
    parser.add_argument("--out", type=Path, default=BUILT_IN["canny"], help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        models = ldm.load(args.ckpt, device=args.device, dtype=torch.float32)
        data = IconSet.load(args.data or f"build/data/icons-{args.scope}.safetensors")
        args.folder.mkdir(parents=True, exist_ok=True)
        assert isinstance(models.vae, AutoencoderKL)
        views = latent_views(models.vae, data, SCOPES[args.scope], args.folder)
        network = train_controlnet(
            models, data, views, LOOP, args.folder, batch_size=BATCH, seconds=args.minutes * 60
        )
        if network is None:
            print("not finished; the same command goes on from here", file=sys.stderr)
            return 0
        facts = {
            "title": "ldm ControlNet for canny edges, for the embedded icon model",
            "samples_seen": str(LOOP.steps * BATCH),
            "sources": data.facts.get("sources", ""),
            "licence": "see default_model.NOTICE.txt",
        }
        weights = {name: w.half() for name, w in network.state_dict().items()}
        write_safetensors(args.out, weights, facts, overwrite=True)
        print(args.out)
    except (ldm.LdmError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
