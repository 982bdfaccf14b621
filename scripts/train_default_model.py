"""Train the embedded model: autoencoder, text encoder and UNet, resumable, on a CPU or on GPUs.

    python scripts/build_dataset.py --scope small --out build/data
    python scripts/train_default_model.py --scope small

Ctrl-C or --minutes ends a session; the same command goes on from there, to the bit. On several GPUs:
torchrun --nproc-per-node 8 scripts/train_default_model.py --scope full
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from ldm import LdmError, Models, Request, txt2img
from ldm.checkpoint import DEFAULT_MODEL
from ldm.images import grid, save
from ldm.training.default_model import SCOPES, train_default_model
from ldm.training.icons import IconSet

SAMPLE = ("apple", "dog face", "cat face", "pizza", "house", "umbrella", "car", "heart")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scope", choices=SCOPES, default="small")
    parser.add_argument("--data", type=Path, help="default: build/data/icons-SCOPE.safetensors")
    parser.add_argument("--folder", type=Path, help="state of the run; default: build/SCOPE")
    parser.add_argument("--out", type=Path, default=DEFAULT_MODEL, help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks (GPU)")
    parser.add_argument(
        "--preview-every", type=int, default=500, metavar="STEPS", help="checkpoint and sheet to look at"
    )
    args = parser.parse_args()

    if "RANK" in os.environ:  # started by torchrun
        dist.init_process_group()
        args.device = f"cuda:{os.environ['LOCAL_RANK']}" if args.device == "cuda" else args.device
    folder = args.folder or Path("build") / args.scope
    folder.mkdir(parents=True, exist_ok=True)
    scope = SCOPES[args.scope]
    try:
        data = IconSet.load(args.data or f"build/data/icons-{args.scope}.safetensors")
        models = train_default_model(
            data,
            scope,
            folder,
            device=torch.device(args.device),
            seconds=args.minutes * 60,
            compile=args.compile,
            preview_every=args.preview_every,
            watch=lambda models: draw_sample(models, folder / "preview.png"),
        )
        if models is None:
            print("not finished; the same command goes on from here", file=sys.stderr)
            return 0
        if not dist.is_initialized() or dist.get_rank() == 0:
            commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout
            facts = {
                "title": "ldm embedded icon model",
                "scope": args.scope,
                "samples_seen": str(scope.loop.steps * scope.batch),
                "sources": data.facts.get("sources", ""),
                "licence": "see default_model.NOTICE.txt",
                "commit": commit.strip(),
            }
            models.save(args.out, dtype=torch.float16, metadata=facts, overwrite=True)
            print(args.out)
    except (LdmError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def draw_sample(models: Models, path: Path) -> None:
    """A sheet of a few pictures by the model as it is."""
    pictures = [txt2img(models, Request(prompt=prompt, steps=10))[0] for prompt in SAMPLE]
    save(grid(pictures, 4), path, overwrite=True)


if __name__ == "__main__":
    sys.exit(main())
