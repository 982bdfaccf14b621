"""Train a LoRA on pictures of your own: a style, a thing, a character.

    photos/10_ohwx dog/one.jpg      each picture is seen 10 times in an epoch
    photos/10_ohwx dog/one.txt      its caption; without this file it is "ohwx dog"

    python scripts/train_lora.py --data photos --out loras/dog.safetensors --ckpt model.safetensors
    python scripts/txt2img.py "ohwx dog in a boat <lora:dog:1>" --lora-dir loras --ckpt model.safetensors

Ctrl-C ends a session; the same command goes on from there, to the bit. On several GPUs:
torchrun --nproc-per-node 8 scripts/train_lora.py ...
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import flags
import groups


def parser() -> flags.Parser:
    p = flags.Parser("train_lora", __doc__, "--data DIR --out FILE")
    add = p.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="with folders <repeats>_<name> of pictures")
    add("--out", type=Path, required=True, metavar="FILE", help="the LoRA, a .safetensors file")
    add("--reg-data", type=Path, metavar="DIR", help="the same for pictures that keep what the model knows")
    add("--ckpt", type=Path, metavar="FILE", help="what to train on; default: the embedded model")
    add("--vae", type=Path, metavar="FILE", help="take the autoencoder from this file")
    add("--prediction", choices=("eps", "v"), help="what the UNet predicts, where its file says it wrongly")
    add("--dtype", choices=("bfloat16", "float32"), help="of the model; default: bfloat16 on CUDA")
    add("--folder", type=Path, metavar="DIR", help="state, losses, samples; default: OUT without its ending")
    groups.add_session(p)

    size = p.add_argument_group("network")
    add = size.add_argument
    add("--network-dim", type=int, metavar="N", default=16, help="rank: how much can be learned (16)")
    add("--network-alpha", type=float, metavar="X", help="strength is alpha / dim; default: half of dim")
    add("--conv-dim", type=int, metavar="N", default=0, help="LoCon: rank for 3x3 convolutions, too")
    add("--conv-alpha", type=float, metavar="X", help="default: half of the conv dim")
    add("--dora", action="store_true", help="train the norms of the weights apart from their directions")

    training = p.add_argument_group("training")
    add = training.add_argument
    add("--unet-lr", type=float, default=1e-4, metavar="X", help="learning rate (1e-4); 0: not trained")
    add("--text-encoder-lr", type=float, default=5e-5, metavar="X", help="the same (5e-5)")
    add("--epochs", type=int, default=10, metavar="N", help="times through all pictures and repeats (10)")
    add("--batch-size", type=int, default=1, metavar="N", help="pictures at once, on each GPU (1)")
    add("--gradient-accumulation", type=int, default=1, metavar="N", help="batches for each step (1)")
    add("--scheduler", choices=("constant", "cosine"), default="constant", help="of the rates (constant)")
    add("--warmup", type=int, default=0, metavar="STEPS", help="steps of linear rise (0)")
    add("--optimizer", choices=("adamw", "adamw8bit"), default="adamw", help="adamw8bit: with bitsandbytes")
    add("--weight-decay", type=float, default=0.01, metavar="X", help="(0.01)")
    add("--max-grad-norm", type=float, default=1.0, metavar="X", help="longer gradients are cut (1)")
    add("--min-snr-gamma", type=float, default=0.0, metavar="X", help="5: less weight to low noise (0: off)")
    add("--noise-offset", type=float, default=0.0, metavar="X", help="0.05 to 0.1 for darker pictures (0)")
    add("--prior-loss-weight", type=float, default=1.0, metavar="X", help="of --reg-data (1)")
    add("--clip-skip", type=int, metavar="N", help="2: the text encoder's last layer but one")
    add("--ema-decay", type=float, default=0.0, metavar="X", help="keep an average, such as 0.999 (off)")
    add("--seed", type=int, default=0, metavar="N", help="(0)")
    add("--gradient-checkpointing", action="store_true", help="slower, but needs far less memory")

    data = p.add_argument_group("pictures and captions")
    add = data.add_argument
    add("--resolution", type=int, metavar="PIXELS", help="default: what the model was made for")
    add("--no-buckets", action="store_true", help="cut all pictures to a square")
    add("--bucket-step", type=int, metavar="PIXELS", help="sides of buckets are multiples of it (64)")
    add("--min-bucket", type=int, metavar="PIXELS", help="shortest side (half the resolution)")
    add("--max-bucket", type=int, metavar="PIXELS", help="longest side (twice the resolution)")
    add("--no-upscale", action="store_true", help="do not enlarge small pictures")
    add("--flip", action="store_true", help="mirror every other time")
    add("--shuffle-caption", action="store_true", help="mix the tags, the parts between commas")
    add("--keep-tokens", type=int, default=0, metavar="N", help="first tags that stay in place (0)")
    add("--caption-dropout", type=float, default=0.0, metavar="X", help="share of empty captions (0)")
    add("--tag-dropout", type=float, default=0.0, metavar="X", help="share of tags left out (0)")

    saving = p.add_argument_group("during training")
    add = saving.add_argument
    add("--save-every", type=int, metavar="EPOCHS", help="also save OUT-000002.safetensors and so on")
    add("--save-dtype", choices=("float16", "bfloat16", "float32"), default="float16", help="(float16)")
    add("--sample-prompt", action="append", default=[], metavar="TEXT", help="draw this; may be repeated")
    add("--sample-every", type=int, default=1, metavar="EPOCHS", help="how often (1)")
    return p


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = parser()
    a = p.parse_args(argv)
    if a.out.suffix != ".safetensors":
        p.error(f"--out must end in .safetensors, got {a.out}")
    for name in ("save_every", "sample_every"):
        if (getattr(a, name) or 1) < 1:
            p.error(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(a, name)}")
    a.network_alpha = a.network_dim / 2 if a.network_alpha is None else a.network_alpha
    a.conv_alpha = max(1, a.conv_dim) / 2 if a.conv_alpha is None else a.conv_alpha
    return a


def train(a: argparse.Namespace) -> int:
    """Read everything, train, save. Returns the exit code."""
    import torch
    import torch.distributed as dist

    import ldm
    from ldm import cli, images
    from ldm.files import remove_unfinished
    from ldm.training.loop import rank_and_world
    from ldm.training.lora import (
        LoraConfig,
        Snapshot,
        check_trainable,
        cut_captions,
        steps_per_epoch,
        train_lora,
    )
    from ldm.training.lora_data import DataConfig, load_dataset
    from ldm.training.lora_metadata import metadata
    from ldm.training.lora_network import NetworkConfig

    def given(record: type) -> dict[str, Any]:
        return {field.name: getattr(a, field.name) for field in fields(record) if hasattr(a, field.name)}

    network, config = NetworkConfig(**given(NetworkConfig)), LoraConfig(**given(LoraConfig))
    device = cli.device(a.device)
    dtype = getattr(torch, a.dtype) if a.dtype else torch.bfloat16 if device.type == "cuda" else torch.float32
    models = ldm.load(a.ckpt, device=device, dtype=dtype, vae=a.vae, prediction=a.prediction)
    check_trainable(models)
    sizes = given(DataConfig) | {"buckets": not a.no_buckets, "upscale": not a.no_upscale}
    data_config = DataConfig.fitting(models, **sizes)

    folder = a.folder or a.out.with_suffix("")
    if a.out.exists() and not any(folder.glob("state*.safetensors")):  # it is not of this run
        raise ldm.RequestError(f"{a.out} exists already; choose another name for --out")
    folder.mkdir(parents=True, exist_ok=True)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    for place in (a.out.parent, folder / "samples"):
        remove_unfinished(place)
    rank, world = rank_and_world()
    if rank > 0:
        dist.barrier()  # the first process encodes the pictures, the others read what it wrote
    data = load_dataset(models, data_config, a.data, a.reg_data, folder / "latents.safetensors")
    if rank == 0 and world > 1:
        dist.barrier()
    steps = steps_per_epoch(data, config)
    if rank == 0:
        samples, batches = data.samples, len(data.batches(config.batch_size, config.seed, 0))
        print(f"{models.name}: {models.describe()}", file=sys.stderr)
        print(
            f"{len(data.examples)} pictures, {len(samples)} with repeats; buckets: {len(set(data.buckets))}; "
            f"batches: {batches}; {steps} steps an epoch, {config.epochs * steps} in all",
            file=sys.stderr,
        )
        cut, limit = cut_captions(models, data)
        if cut:
            print(f"{cut} captions are cut off after {limit} tokens", file=sys.stderr)

    def save(snapshot: Snapshot, path: Path) -> None:
        facts = metadata(models, data, network, config, snapshot, a.out.stem)
        snapshot.save(path, facts, getattr(torch, a.save_dtype))

    def after_epoch(snapshot: Snapshot) -> None:
        if a.save_every and snapshot.epoch % a.save_every == 0 and snapshot.epoch < config.epochs:
            save(snapshot, a.out.with_name(f"{a.out.stem}-{snapshot.epoch:06d}.safetensors"))
        if snapshot.epoch % a.sample_every == 0:
            for i, prompt in enumerate(a.sample_prompt):
                image = ldm.txt2img(models, ldm.Request(prompt=prompt, seed=config.seed))[0]
                path = folder / "samples" / f"{snapshot.epoch:06d}-{i}.png"
                path.parent.mkdir(exist_ok=True)
                images.save(image, path, overwrite=True)

    finished = train_lora(
        models, data, network, config, folder, seconds=a.minutes * 60, after_epoch=after_epoch
    )
    if finished is None:
        return flags.unfinished(a)
    if rank == 0:
        save(finished, a.out)
        print(a.out)
    return cli.Exit.DONE


def main(argv: Sequence[str] | None = None) -> int:
    return flags.main("train_lora", parse, flags.together(train), argv)


if __name__ == "__main__":
    flags.start(main)
