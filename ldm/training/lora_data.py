"""Pictures with captions for training a LoRA, laid out as kohya's trainer wants them.

    photos/10_ohwx dog/one.jpg      10 times in each epoch
    photos/10_ohwx dog/one.txt      its caption; without this file it is "ohwx dog"

Everything random here is a function of a seed or a generator that the caller gives, so that a stopped
training can go on exactly where it was.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

from ldm.errors import LdmError
from ldm.families import Picture
from ldm.formats import read, write_safetensors
from ldm.images import READABLE
from ldm.models import Models
from ldm.vae import AutoencoderKL

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

Size = tuple[int, int]  # (width, height), pixels


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How pictures and captions are used."""

    resolution: int = 512  # pictures are scaled to about this many pixels squared
    buckets: bool = True  # keep the aspect ratio, roughly; otherwise cut to a square
    bucket_step: int = 64  # sides of buckets are multiples of this
    min_bucket: int = 256  # shortest and longest side of a bucket
    max_bucket: int = 1024
    upscale: bool = True  # enlarge small pictures; otherwise they get smaller buckets
    flip: bool = False  # mirror every other time
    shuffle_caption: bool = False  # in a new order each time: the parts between commas, "tags"
    keep_tokens: int = 0  # so many tags at the beginning are never shuffled or left out
    caption_dropout: float = 0.0  # share of captions left empty, which guidance needs
    tag_dropout: float = 0.0  # share of tags left out

    def __post_init__(self) -> None:
        for name in ("caption_dropout", "tag_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise LdmError(f"{name} must be 0 to 1, got {getattr(self, name):g}")
        if self.keep_tokens < 0:
            raise LdmError(f"keep_tokens must be 0 or more, got {self.keep_tokens}")
        if not 0 < self.min_bucket <= self.resolution <= self.max_bucket:
            raise LdmError(
                "need min_bucket <= resolution <= max_bucket, "
                f"got {self.min_bucket}, {self.resolution} and {self.max_bucket}"
            )

    @classmethod
    def fitting(cls, models: Models, **given: int | float | bool | None) -> DataConfig:
        """Sizes that the model was made for, where None or nothing is given. Raises LdmError."""
        chosen = {name: value for name, value in given.items() if value is not None}
        resolution = int(chosen.get("resolution", models.default_size))
        factor = pixel_factor(models)
        sizes = {
            "resolution": resolution,
            "bucket_step": 64 if resolution >= 512 else factor,
            "min_bucket": resolution // 2,
            "max_bucket": 2 * resolution,
        }
        config = cls(**(sizes | chosen))  # pyright: ignore[reportArgumentType]
        for name in ("bucket_step",) if config.buckets else ("resolution",):
            value = getattr(config, name)
            if value < 1 or value % factor:
                near = max(1, round(value / factor)) * factor
                raise LdmError(
                    f"{name} must be a multiple of {factor} for this model, got {value}; try {near}"
                )
        return config


def pixel_factor(models: Models) -> int:
    """Pixels per latent pixel of the UNet's lowest level: what the sides of pictures are multiples of."""
    assert models.vae is not None
    return models.vae.config.factor * models.unet.config.factor


@dataclass(frozen=True)
class Example:
    """A picture with its caption."""

    path: Path
    caption: str
    folder: str  # "10_ohwx dog"
    repeats: int  # how often it is seen in each epoch
    prior: bool  # a picture that keeps the model as it was: "regularisation"
    size: Size  # of the file


def examples(root: Path, *, prior: bool = False) -> list[Example]:
    """All pictures in the folders `<repeats>_<name>` of `root`, in the order of their names.

    Raises LdmError, one sentence, if the folders or one of the files are not as they should be.
    """
    if not root.is_dir():
        raise LdmError(f"there is no folder {root}")
    found: list[Example] = []
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    for folder in folders:
        match = re.fullmatch(r"(\d+)_(.+)", folder.name)
        if match is None or int(match[1]) == 0:
            raise LdmError(f"{folder}: a folder of pictures must be named <repeats>_<name>, such as 10_cat")
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
                text = _caption(path.with_suffix(".txt"), match[2])
                found.append(Example(path, text, folder.name, int(match[1]), prior, _size(path)))
    if not found:
        loose = any(path.suffix.lower() in SUFFIXES for path in root.iterdir())
        hint = "move its pictures into one" if loose else f"they end in {', '.join(SUFFIXES)}"
        raise LdmError(f"{root} holds no picture in a folder <repeats>_<name>, such as 10_cat; {hint}")
    return found


def _caption(file: Path, otherwise: str) -> str:
    if not file.exists():
        return otherwise
    try:
        return " ".join(file.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError:
        raise LdmError(f"{file} is not UTF-8 text; save it again as UTF-8") from None


def _size(path: Path) -> Size:
    """Of the picture as it is shown. Cameras store some lying on their side, with a note (EXIF)."""
    with _opened(path) as image:
        width, height = image.size
        return (height, width) if image.getexif().get(0x0112, 1) >= 5 else (width, height)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The picture, for a block of reading. Raises LdmError if it cannot be read."""
    try:
        with Image.open(path, formats=(*READABLE, "BMP")) as image:
            yield image
    # Pillow raises all of them for damaged files.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise LdmError(f"{path} is not a picture that can be read: {error}") from None


def bucket_sizes(config: DataConfig) -> list[Size]:
    """The sizes that pictures are brought to: no more pixels than resolution squared, sides in steps."""
    step, area = config.bucket_step, config.resolution**2
    if not config.buckets:
        return [(config.resolution, config.resolution)]
    square = config.resolution // step * step
    sizes = {(square, square)} if square else set()
    for side in range(-(-config.min_bucket // step) * step, config.max_bucket + 1, step):
        other = min(config.max_bucket, area // side) // step * step
        if other >= config.min_bucket:
            sizes |= {(side, other), (other, side)}
    if not sizes:
        raise LdmError(f"no bucket with sides in steps of {step} fits resolution {config.resolution}")
    return sorted(sizes)


def bucket_of(size: Size, config: DataConfig) -> Size:
    """The bucket of a picture: that of the nearest aspect ratio, the largest of them.

    Without `upscale`, a picture keeps its own ratio and gets no more pixels than it has.
    """
    width, height = size
    if config.buckets and not config.upscale:
        scale = min(1.0, config.resolution / (width * height) ** 0.5, config.max_bucket / max(size))
        w, h = (int(side * scale) // config.bucket_step * config.bucket_step for side in size)
        if min(w, h) < 1:
            raise LdmError(
                f"a picture of {width}x{height} pixels is smaller than one step of {config.bucket_step}; "
                "allow enlarging, or leave it out"
            )
        return w, h
    ratio = width / height
    return min(bucket_sizes(config), key=lambda b: (abs(b[0] / b[1] - ratio), -b[0] * b[1]))


def placed(size: Size, bucket: Size) -> tuple[Size, Size]:
    """How a picture is fitted: scaled until it covers the bucket, then cut to it around the centre.

    Returns the size after scaling and the (left, top) corner of the cut.
    """
    scale = max(wanted / side for side, wanted in zip(size, bucket, strict=True))
    w, h = (max(wanted, round(side * scale)) for side, wanted in zip(size, bucket, strict=True))
    return (w, h), ((w - bucket[0]) // 2, (h - bucket[1]) // 2)


def pixels(example: Example, bucket: Size) -> Tensor:
    """The picture at the size of its bucket, transparent parts on white. (1, 3, H, W) in [-1, 1]."""
    scaled, (left, top) = placed(example.size, bucket)
    with _opened(example.path) as image:
        image = ImageOps.exif_transpose(image).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image = image.resize(scaled, Image.Resampling.LANCZOS)
    image = image.crop((left, top, left + bucket[0], top + bucket[1]))
    levels = torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0)
    return levels.float() / 127.5 - 1


def caption(text: str, config: DataConfig, rng: random.Random) -> str:
    """The caption as it is read this time."""
    if rng.random() < config.caption_dropout:
        return ""
    if not (config.shuffle_caption or config.tag_dropout):
        return text
    tags = [tag.strip() for tag in text.split(",") if tag.strip()]
    kept, others = tags[: config.keep_tokens], tags[config.keep_tokens :]
    if config.shuffle_caption:
        rng.shuffle(others)
    return ", ".join([*kept, *(tag for tag in others if rng.random() >= config.tag_dropout)])


def tag_frequency(items: Sequence[Example]) -> dict[str, dict[str, int]]:
    """How often each tag occurs in the captions of each folder."""
    counts: dict[str, Counter[str]] = {}
    for item in items:
        tags = [tag.strip() for tag in item.caption.split(",") if tag.strip()]
        counts.setdefault(item.folder, Counter()).update(tags)
    return {folder: dict(count) for folder, count in counts.items()}


@dataclass(frozen=True)
class Drawn:
    """One picture as it is seen this time."""

    z: Tensor  # (C, h, w) float32
    caption: str
    picture: Picture
    prior: bool


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples with their latents, ready to be drawn."""

    config: DataConfig
    examples: Sequence[Example]
    buckets: Sequence[Size]
    latents: Sequence[Tensor]  # of each example: (views, C, h, w) float16; the second view is mirrored
    digest: str  # of all that was read

    @property
    def samples(self) -> list[int]:
        """The examples of one epoch, repeats included; as many prior pictures as others, if there are any."""

        def repeated(prior: bool) -> list[int]:
            return [i for i, e in enumerate(self.examples) if e.prior == prior for _ in range(e.repeats)]

        own = repeated(False)
        return own + list(islice(cycle(repeated(True)), len(own)))

    def batches(self, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
        """The examples of an epoch in a new order, in batches of one bucket each; the last may be smaller."""
        rng = random.Random(f"{seed} {epoch}")
        by_bucket: dict[Size, list[int]] = {}
        for i in self.samples:
            by_bucket.setdefault(self.buckets[i], []).append(i)
        batches: list[list[int]] = []
        for members in by_bucket.values():
            rng.shuffle(members)
            batches += [members[k : k + batch_size] for k in range(0, len(members), batch_size)]
        rng.shuffle(batches)
        return batches

    def draw(self, index: int, rng: random.Random) -> Drawn:
        example, (width, height) = self.examples[index], self.buckets[index]
        views = self.latents[index]
        mirrored = len(views) > 1 and rng.random() < 0.5
        scaled, (left, top) = placed(example.size, self.buckets[index])
        if mirrored:  # what is cut off at the left was at the right
            left = scaled[0] - width - left
        picture = Picture(
            width=width,
            height=height,
            negative=False,
            clip_skip=None,
            original=example.size,
            corner=(left, top),
        )
        return Drawn(
            views[int(mirrored)].float(), caption(example.caption, self.config, rng), picture, example.prior
        )


def load_dataset(
    models: Models, config: DataConfig, root: Path, prior: Path | None = None, cache: Path | None = None
) -> Dataset:
    """Read and encode all pictures. Raises LdmError.

    prior: folders of pictures of the general kind, which the model should not forget (prior preservation:
        Ruiz et al. 2022, arXiv:2208.12242, section 3.2).
    cache: a file that keeps the latents; it is written, or used if it is of the same pictures.
    """
    items = examples(root) + (examples(prior, prior=True) if prior else [])
    buckets = [bucket_of(item.size, config) for item in items]
    autoencoder = models.vae
    assert isinstance(autoencoder, AutoencoderKL)
    facts = [(item.path.name, item.size, bucket) for item, bucket in zip(items, buckets, strict=True)]
    seen = hashlib.sha256(repr((facts, config.flip)).encode())
    for item in items:
        seen.update(hashlib.sha256(item.path.read_bytes()).digest())
    seen.update(_digest(autoencoder))
    latents = None
    if cache is not None and cache.exists():
        kept = read(cache)
        if kept.metadata.get("pictures") == seen.hexdigest():
            latents = [kept.tensors[str(i)] for i in range(len(items))]
    if latents is None:
        latents = list(_encoded(autoencoder, items, buckets, config.flip, models.device))
        if cache is not None:
            tensors = {str(i): z for i, z in enumerate(latents)}
            write_safetensors(cache, tensors, {"pictures": seen.hexdigest()}, overwrite=True)
    texts = [(item.caption, item.folder, item.repeats, item.prior) for item in items]
    seen.update(repr(texts).encode())
    return Dataset(config, items, buckets, latents, seen.hexdigest())


@torch.no_grad()
def _encoded(
    vae: AutoencoderKL, items: Sequence[Example], buckets: Sequence[Size], flip: bool, device: torch.device
) -> Iterator[Tensor]:
    pairs = zip(items, buckets, strict=True)
    for item, bucket in tqdm(pairs, desc="encode", total=len(items), unit="picture", disable=None):
        x = pixels(item, bucket)
        views = [x, x.flip(3)] if flip else [x]
        # One at a time: the autoencoder runs once, and its memory grows with the pixels.
        yield torch.cat([vae.encode(view.to(device)).half().cpu() for view in views])


def _digest(module: nn.Module) -> bytes:
    """Of all weights of a module."""
    digest = hashlib.sha256()
    for weight in module.state_dict().values():
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.digest()
