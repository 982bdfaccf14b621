"""A small contrastive judge: does a picture show this thing, in this style?

Pictures and words share one space, as in CLIP (Radford et al. 2021, arXiv:2103.00020). What a picture shows
is read by a small convolutional network, how it is drawn by its palette: a set of drawings is coloured from
one box of crayons. Names are bags of words. The judge is trained on real pictures only, never on held-out
ones, and has nothing in common with the model that it judges. Before it may judge, it must find the names of
real pictures that it has never seen (`gate`): that is its own limit, and the scale for everything else.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.formats import write_safetensors
from ldm.training.icons import Icon, IconSet, composite

# The gate, chosen before the first judge was trained. Guessing finds 5 of 329 things and 1 of 4 styles.
MIN_TOP5 = 0.70
MIN_STYLE = 0.70


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    width: int = 24  # channels of the first convolution
    dim: int = 96  # of the space that pictures and words share
    bins: int = 10  # of the palette, for each of red, green and blue
    dropout: float = 0.3
    epochs: int = 60
    batch_size: int = 55
    lr: float = 3e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    seed: int = 0


def words_of(name: str) -> list[str]:
    return name.lower().split()


def palette(x: Tensor, bins: int) -> Tensor:
    """Which colours a picture on white is made of: the square root of each colour's share, white left out.

    x: (B, 3, H, W) in [-1, 1]. Returns (B, bins^3 - 1). Each pixel is shared among the eight nearest bins, so
    that a colour that is slightly off still counts.
    """
    place = (x.clamp(-1, 1) + 1) / 2 * (bins - 1)
    place = place.flatten(2).transpose(1, 2)  # (B, H * W, 3)
    low = place.floor().clamp(max=bins - 2).long()
    part = place - low
    strides = torch.tensor([bins * bins, bins, 1])
    counts = x.new_zeros(len(x), bins**3)
    for corner in itertools.product((0, 1), repeat=3):
        up = torch.tensor(corner)
        weight = torch.where(up.bool(), part, 1 - part).prod(dim=2)  # (B, H * W)
        counts.scatter_add_(1, ((low + up) * strides).sum(dim=2), weight)
    colours = counts[:, :-1]
    return (colours / colours.sum(dim=1, keepdim=True).clamp(min=1)).sqrt()


class Judge(nn.Module):
    """Scores of pictures against every thing and every style of a data set."""

    def __init__(self, config: JudgeConfig, things: Sequence[str], styles: Sequence[str]) -> None:
        """things, styles: all names that pictures are compared with, in the order of the scores."""
        super().__init__()
        self.config, self.things, self.styles = config, list(things), list(styles)
        names = self.things + self.styles
        vocabulary = {word: i for i, word in enumerate(sorted({w for name in names for w in words_of(name)}))}
        self.bags = [[vocabulary[word] for word in words_of(name)] for name in names]
        self.words = nn.EmbeddingBag(len(vocabulary), config.dim, mode="mean")

        c = config.width

        def block(inner: int, outer: int, kernel: int, stride: int) -> list[nn.Module]:
            conv = nn.Conv2d(inner, outer, kernel, stride, kernel // 2, bias=False)
            return [conv, nn.BatchNorm2d(outer), nn.ReLU()]

        self.image = nn.Sequential(
            *block(3, c, 5, 2),  # (B, c, 32, 32)
            *block(c, 2 * c, 3, 2),  # (B, 2c, 16, 16)
            *block(2 * c, 4 * c, 3, 2),  # (B, 4c, 8, 8)
            *block(4 * c, 4 * c, 3, 1),
            *block(4 * c, 8 * c, 3, 2),  # (B, 8c, 4, 4)
            # No pooling: icons are centred, so where something is helps to tell what it is.
            nn.Flatten(),
            nn.Dropout(config.dropout),
        )
        self.thing_head = nn.Linear(8 * c * 16, config.dim)
        colours = config.bins**3 - 1
        # The large eps keeps colours that hardly occur from being scaled up to importance.
        self.style_head = nn.Sequential(nn.BatchNorm1d(colours, eps=4e-4), nn.Linear(colours, config.dim))
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))  # inverse temperature, learned

    def forward(self, x: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, things) and (B, styles).

        x, true: (B, 3, 64, 64) in [-1, 1], on white. `x` tells the thing and may have altered colours, `true`
        tells the style.
        """
        shown = self.thing_head(self.image(x))
        drawn = self.style_head(palette(true[:, :, ::2, ::2], self.config.bins))
        offsets = torch.tensor([0] + [len(bag) for bag in self.bags[:-1]]).cumsum(0)
        names = self.words(torch.tensor([word for bag in self.bags for word in bag]), offsets)
        things, styles = F.normalize(names, dim=1).split([len(self.things), len(self.styles)])
        scale = self.log_scale.exp()
        return (
            scale * F.normalize(shown, dim=1) @ things.T,
            scale * F.normalize(drawn, dim=1) @ styles.T,
        )

    @torch.no_grad()
    def look(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, for judging: (B, 3, 64, 64), each picture and its mirror image together."""
        self.eval()
        things, styles = [], []
        for batch in x.split(64):
            mirrored = batch.flip(3)
            for scores, upright, other in zip(
                (things, styles), self(batch, batch), self(mirrored, mirrored), strict=True
            ):
                scores.append((upright + other) / 2)
        return torch.cat(things), torch.cat(styles)


def augment(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Make real pictures as varied, and now and then as unsharp, as a small model's are.

    images: uint8 (B, 4, S, S) RGBA. Returns two (B, 3, S, S) in [-1, 1], on white: one with colours altered,
    since drawings of one thing differ in them, and one with its colours, by which styles are told.
    """
    count, side = len(images), images.shape[-1]

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    angle, zoom, mirror = uniform(-0.2, 0.2), uniform(0.9, 1.2), uniform(-1, 1).sign()
    affine = torch.zeros(count, 2, 3)
    affine[:, 0, 0], affine[:, 0, 1] = zoom * angle.cos() * mirror, -zoom * angle.sin()
    affine[:, 1, 0], affine[:, 1, 1] = zoom * angle.sin() * mirror, zoom * angle.cos()
    affine[:, :, 2] = uniform(-0.12, 0.12, 2)  # about 4 px
    grid = F.affine_grid(affine, [count, 3, side, side], align_corners=False)
    x = F.grid_sample(composite(images), grid, padding_mode="border", align_corners=False)

    small = F.interpolate(x, size=(side // 2, side // 2), mode="area")
    soft = F.interpolate(small, size=(side, side), mode="bilinear")
    x = torch.lerp(x, soft, uniform(0, 1, 1, 1, 1))
    altered = x * uniform(0.8, 1.2, 3, 1, 1) + uniform(-0.15, 0.15, 3, 1, 1)
    altered = altered + 0.05 * torch.randn(x.shape, generator=generator)
    return altered, x + uniform(-0.03, 0.03, 3, 1, 1)  # the colours of a decoded picture are slightly off


def train(data: IconSet, config: JudgeConfig) -> Judge:
    """Train on all pictures that are not held out. InfoNCE with every name of the data set as a candidate."""
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    judge = Judge(config, *names_of(data))
    indices = torch.tensor(data.indices(holdout=False))
    thing = torch.tensor([judge.things.index(icon.subject) for icon in data.icons])
    style = torch.tensor([judge.styles.index(icon.style) for icon in data.icons])
    optimizer = torch.optim.AdamW(judge.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    steps = config.epochs * (len(indices) // config.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=steps)
    start = time.monotonic()
    for epoch in range(config.epochs):
        judge.train()
        total = 0.0
        order = indices[torch.randperm(len(indices), generator=generator)]
        batches = [batch for batch in order.split(config.batch_size) if len(batch) == config.batch_size]
        for batch in batches:
            things, styles = judge(*augment(data.images[batch], generator))
            loss = F.cross_entropy(things, thing[batch], label_smoothing=config.label_smoothing)
            loss = loss + F.cross_entropy(styles, style[batch], label_smoothing=config.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() / len(batches)
        if epoch % 5 == 4:
            left = (time.monotonic() - start) / (epoch + 1) * (config.epochs - epoch - 1)
            print(
                f"judge: pass {epoch + 1}/{config.epochs}  loss {total:.3f}  {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
    return judge.eval()


def names_of(data: IconSet) -> tuple[list[str], list[str]]:
    """All things and all styles of a data set, sorted."""
    return sorted({icon.subject for icon in data.icons}), sorted({icon.style for icon in data.icons})


def load(data: IconSet, path: Path, config: JudgeConfig | None = None) -> Judge:
    """The judge kept at `path`, or a new one, kept there, if it was made from other data or settings."""
    config = config or JudgeConfig()
    records = json.dumps([asdict(icon) for icon in data.icons]).encode()
    digest = hashlib.sha256(records + data.images.numpy().tobytes()).hexdigest()
    facts = {"config": json.dumps(asdict(config)), "data": digest}
    if path.exists():
        with safe_open(path, framework="pt") as file:
            known = file.metadata()
        if known == facts:
            judge = Judge(config, *names_of(data))
            judge.load_state_dict(load_file(path))
            return judge.eval()
    judge = train(data, config)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, judge.state_dict(), facts, overwrite=True)
    return judge


@dataclass(frozen=True)
class Verdict:
    """Per picture: 1.0 where the judge finds the asked one first / among five / the asked style first."""

    top1: Tensor  # (B,) float
    top5: Tensor
    style: Tensor


def verdict(judge: Judge, pictures: Tensor, asked: Sequence[Icon]) -> Verdict:
    """Judge whether each picture shows the thing, and has the style, of its icon's record.

    pictures: (B, 3, 64, 64) in [-1, 1]; asked: B records, of which only subject and style are read.
    """
    things, styles = judge.look(pictures)
    rank = rank_of(things, torch.tensor([judge.things.index(icon.subject) for icon in asked]))
    style = rank_of(styles, torch.tensor([judge.styles.index(icon.style) for icon in asked]))
    return Verdict((rank < 1).float(), (rank < 5).float(), (style < 1).float())


def rank_of(scores: Tensor, right: Tensor) -> Tensor:
    """How many candidates score at least as high as the right one, itself excluded; ties count against it.

    scores: (B, N); right: (B,) int64. Returns (B,) int64, 0 for the best.
    """
    return (scores >= scores.gather(1, right[:, None])).sum(dim=1) - 1


def gate(real: Verdict) -> None:
    """Raises LdmError if the judge cannot read real pictures that it has not seen.

    real: its verdict on the real held-out pictures.
    """
    top5, style = real.top5.mean().item(), real.style.mean().item()
    if top5 < MIN_TOP5 or style < MIN_STYLE:
        raise LdmError(
            f"the judge names only {top5:.0%} of the real held-out pictures within five guesses and "
            f"{style:.0%} of their styles; it needs {MIN_TOP5:.0%} and {MIN_STYLE:.0%} to judge anything"
        )
