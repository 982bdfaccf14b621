"""Measure the embedded model: does it draw what was asked, and is it more than a memory of its training?

    python -m benchmarks.evaluate                            # the model inside the package
    python -m benchmarks.evaluate --model build/small/x.safetensors

Writes benchmarks/results/embedded-model.json and prints it as a table. Needs the data set
(`python scripts/build_dataset.py --scope small`). docs/embedded-model.md explains the numbers.

The split, the captions, the seeds, the judge and the measures of this file were fixed before any model had
been evaluated with it. Whoever changes one of them raises PROTOCOL, and figures of two protocols are not to
be compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import ldm
from benchmarks import judge as judges
from benchmarks.judge import Judge, JudgeConfig, Verdict, gate, verdict
from benchmarks.metrics import Estimate, mean, nearest, psnr, ratio
from ldm.errors import LdmError
from ldm.formats import read
from ldm.models import Models
from ldm.training.icons import Icon, IconSet, composite

PROTOCOL = 1
SPLIT = "7ec9e21a922383153041e204f0217cfb55d84dd0fcc7e7153b6652c6e2dee741"  # sha256 of the held-out captions
HELD_OUT_SEED = 1_000_000  # caption i has this seed + PICTURES * i and the following
TRAINED_SEED = 2_000_000
PICTURES = 2  # for each caption
SHIFT = 37  # shuffled: the picture of caption i is judged by caption i + SHIFT


def prompt(icon: Icon) -> str:
    """The one wording that is evaluated, the most frequent one of training."""
    return f"{icon.subject}, {icon.style} style"


def held_out(data: IconSet) -> list[int]:
    """Positions of the held-out pictures, by name. Raises LdmError if it is not the frozen split."""
    indices = sorted(data.indices(holdout=True), key=lambda i: prompt(data.icons[i]))
    text = "\n".join(prompt(data.icons[i]) for i in indices)
    if hashlib.sha256(text.encode()).hexdigest() != SPLIT:
        raise LdmError(
            "these are not the held-out pictures of this protocol; "
            "build the data set with scripts/build_dataset.py --scope small"
        )
    return indices


def trained_partners(data: IconSet, indices: Sequence[int]) -> list[int]:
    """For each held-out picture, the same thing in the next style by alphabet, which was trained."""
    _, styles = judges.names_of(data)
    position = {(icon.subject, icon.style): i for i, icon in enumerate(data.icons)}
    partners = []
    for icon in (data.icons[i] for i in indices):
        following = styles[(styles.index(icon.style) + 1) % len(styles)]
        partners.append(position[icon.subject, following])
    return partners


def generate(models: Models, icons: Sequence[Icon], first_seed: int) -> Tensor:
    """PICTURES for each caption, default settings. Returns (captions * PICTURES, 3, 64, 64) in [-1, 1]."""
    drawn = []
    start = time.monotonic()
    for i, icon in enumerate(icons):
        seed = first_seed + PICTURES * i
        request = ldm.Request(prompt=prompt(icon), seed=seed, batch_size=PICTURES)
        drawn += [pixels(picture) for picture in ldm.txt2img(models, request)]
        if i % 10 == 9:
            left = (time.monotonic() - start) / (i + 1) * (len(icons) - i - 1)
            print(f"drawing: {i + 1}/{len(icons)} captions  {left:.0f} s left", file=sys.stderr, flush=True)
    return torch.stack(drawn)


def pixels(picture: Image.Image) -> Tensor:
    """(3, 64, 64) in [-1, 1], whatever the picture's size: the judge and the data have 64 pixels."""
    x = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1
    return F.interpolate(x[None], size=(64, 64), mode="area")[0]


def per_caption(values: Tensor, captions: int) -> Tensor:
    """Mean over the pictures of each caption. values: (captions * k,); returns (captions,)."""
    return values.reshape(captions, -1).mean(dim=1)


def repeated(captions: Sequence[Icon], count: int) -> list[Icon]:
    """The caption of each of `count` pictures, as many for every caption."""
    return [icon for icon in captions for _ in range(count // len(captions))]


def scores(judged: Verdict, captions: int) -> dict[str, Tensor]:
    """Each measure of a verdict as one value for each caption (captions,)."""
    return {name: per_caption(getattr(judged, name), captions) for name in ("top1", "top5", "style")}


Drawn = tuple[Tensor, list[Icon]]  # pictures (captions * k, 3, 64, 64), and the captions asked for


def judge_all(judge: Judge, reference: Verdict, sets: Mapping[str, Drawn]) -> dict[str, dict[str, Estimate]]:
    """Scores of the real held-out pictures and of each set, and each set's ratio to the real ones.

    reference: the verdict on the real pictures; every set asks for the same things in the same order.
    """
    count = len(reference.top1)
    scale = scores(reference, count)
    report = {"real": {name: mean(values) for name, values in scale.items()}}
    for name, (pictures, captions) in sets.items():
        reached = scores(verdict(judge, pictures, repeated(captions, len(pictures))), count)
        report[name] = {key: mean(values) for key, values in reached.items()}
        report[f"{name} / real"] = {key: ratio(values, scale[key]) for key, values in reached.items()}
    return report


def novelty(data: IconSet, sets: Mapping[str, Drawn], real: Tensor) -> dict[str, dict[str, Estimate | float]]:
    """How near the pictures are to the training pictures, against how near unseen real ones are."""
    train = data.indices(holdout=False)
    references = composite(data.images[train])
    usual, _ = nearest(real, references)
    limit = usual.quantile(0.05).item()
    report: dict[str, dict[str, Estimate | float]] = {
        "real": {"distance": mean(usual), "distance of the closest 5 %": limit}
    }
    for name, (pictures, captions) in sets.items():
        distance, position = nearest(pictures, references)
        found = [data.icons[train[i]] for i in position.tolist()]
        asked = repeated(captions, len(pictures))
        same = torch.tensor([a.subject == b.subject for a, b in zip(found, asked, strict=True)])
        count = len(captions)
        report[name] = {
            "distance": mean(per_caption(distance, count)),
            "distance / real": ratio(per_caption(distance, count), usual),
            "share closer than 95 % of real": mean(per_caption((distance < limit).float(), count)),
            "share whose nearest shows the same thing": mean(per_caption(same.float(), count)),
        }
    return report


@torch.no_grad()
def reconstruct(models: Models, real: Tensor) -> Tensor:
    """Real pictures (B, 3, 64, 64), encoded and decoded by the model's autoencoder, at its own size."""
    assert models.vae is not None
    decoded = [models.vae.decode(models.vae.encode(x)) for x in real.to(models.device).split(16)]
    return torch.cat(decoded).clamp(-1, 1).cpu()


def evaluate(models: Models, data: IconSet, judge: Judge) -> dict:
    """All measures of one model. Raises LdmError if the judge does not pass its gate."""
    indices = held_out(data)
    asked = [data.icons[i] for i in indices]
    known = [data.icons[i] for i in trained_partners(data, indices)]
    real = composite(data.images[indices])
    reference = verdict(judge, real, asked)
    gate(reference)

    rebuilt = reconstruct(models, real)
    drawn = generate(models, asked, HELD_OUT_SEED)
    remembered = generate(models, known, TRAINED_SEED)
    shuffled = asked[SHIFT:] + asked[:SHIFT]
    sets: dict[str, Drawn] = {
        "autoencoder": (rebuilt, asked),
        "held out": (drawn, asked),
        "trained": (remembered, known),
        "shuffled": (drawn, shuffled),
    }
    return {
        "judged": judge_all(judge, reference, sets),
        "novelty": novelty(data, {name: sets[name] for name in ("held out", "trained")}, real),
        "autoencoder PSNR, dB": mean(psnr(real, rebuilt)),
    }


def facts(models: Models, data: IconSet, judge: Judge) -> dict:
    """What was measured with what. Raises LdmError for a model that knows the pictures held out here."""
    metadata = dict(read(models.path).metadata) if models.path else {}
    if metadata.get("scope", "small") != "small":
        raise LdmError("this model was trained on the full scope, which holds out other pictures")
    count = len(data.indices(holdout=True))
    return {
        "protocol": PROTOCOL,
        "model": models.describe(),
        "model hash": models.hash,
        "model metadata": metadata,
        "captions": count,
        "pictures per caption": PICTURES,
        "seeds": {
            "held out": [HELD_OUT_SEED, HELD_OUT_SEED + PICTURES * count - 1],
            "trained": [TRAINED_SEED, TRAINED_SEED + PICTURES * count - 1],
        },
        "split sha256": SPLIT,
        "judge": asdict(judge.config),
        "chance": {
            "top1": 1 / len(judge.things),
            "top5": 5 / len(judge.things),
            "style": 1 / len(judge.styles),
        },
        "torch": torch.__version__,
    }


def table(report: dict) -> str:
    """The report for people."""
    lines = [f"{'':26}{'top-1':>20}{'top-5':>20}{'style':>20}"]
    for name, row in report["judged"].items():
        lines.append(f"{name:26}" + "".join(f"{row[key]!s:>20}" for key in ("top1", "top5", "style")))
    lines.append("")
    for name, row in report["novelty"].items():
        for key, value in row.items():
            shown = f"{value:.2f}" if isinstance(value, float) else str(value)
            lines.append(f"{name}, nearest training picture: {key}: {shown}")
    lines.append(f"autoencoder PSNR, dB: {report['autoencoder PSNR, dB']}")
    return "\n".join(lines)


def plain(value: object) -> object:
    """For JSON: estimates as dictionaries, four digits."""
    if isinstance(value, Estimate):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return round(value, 4) if isinstance(value, float) and math.isfinite(value) else value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="checkpoint; default: the embedded model")
    parser.add_argument("--data", type=Path, default=Path("build/data/icons-small.safetensors"))
    parser.add_argument("--judge", type=Path, default=Path("build/judge.safetensors"), help="kept here")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/embedded-model.json"))
    arguments = parser.parse_args()

    if not arguments.data.exists():
        parser.exit(
            1, f"{arguments.data} is missing; python scripts/build_dataset.py --scope small makes it\n"
        )
    start = time.process_time()
    data = IconSet.load(arguments.data)
    judge = judges.load(data, arguments.judge, JudgeConfig())
    models = ldm.load(arguments.model)
    try:
        report = facts(models, data, judge) | evaluate(models, data, judge)
    except LdmError as error:
        parser.exit(1, f"{error}\n")
    report["CPU seconds"] = time.process_time() - start
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(plain(report), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(report))


if __name__ == "__main__":
    main()
