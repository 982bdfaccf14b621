"""The data set of the embedded model: icon drawings with names, as training reads them.

One file holds everything: `images`, uint8 (N, 4, S, S), RGBA with straight (not premultiplied) alpha, and
in its metadata one record per picture. Background and caption are chosen at training time, so one drawing
is seen on many colours and under many wordings. `ldm.training.artwork` builds the file from the original
packages.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.formats import read, write_safetensors

RGB = tuple[int, int, int]

WHITE: RGB = (255, 255, 255)

# Backgrounds with a name that a caption can say; white is the default and is never said.
BACKGROUNDS: dict[str, RGB] = {
    "red": (220, 50, 47),
    "orange": (245, 150, 40),
    "yellow": (250, 220, 70),
    "green": (70, 170, 80),
    "cyan": (80, 205, 215),
    "blue": (50, 100, 220),
    "purple": (130, 70, 190),
    "pink": (245, 150, 190),
    "brown": (130, 85, 50),
    "gray": (150, 150, 150),
    "black": (0, 0, 0),
}


@dataclass(frozen=True, kw_only=True)
class Icon:
    """What is known about one picture. All words are lower case."""

    subject: str  # its name: "red apple"
    short: str = ""  # what people call it, if its name is longer: "apple"
    tags: tuple[str, ...] = ()  # words that go with it, none of them in the name: "fruit", "ripe"
    keywords: tuple[str, ...] = ()  # other names and what it is one of: "fruit"
    style: str  # the drawing style, as captions say it: "twemoji", "fluent flat"
    family: str  # styles that shade the same drawings are one family: "fluent"
    group: str  # "animals", "food", ...: see artwork.WEIGHTS
    weight: float = 1.0  # relative chance of being drawn
    flip: bool = True  # may be mirrored
    holdout: bool = False  # never trained on: tests a known concept in a known, but never combined, style


@dataclass(frozen=True, eq=False)
class IconSet:
    """Pictures and their records, in the same order."""

    images: Tensor  # uint8 (N, 4, S, S), RGBA
    icons: list[Icon]
    facts: dict[str, str]  # "scope" and "sources": which data these are, for the checkpoint's metadata

    @classmethod
    def load(cls, path: str | Path) -> IconSet:
        """Raises LdmError if the file is not one that `save` wrote."""
        if not Path(path).exists():
            raise LdmError(f"there is no file {path}; build it with scripts/build_dataset.py")
        file = read(path)
        if "icon set" not in file.metadata:
            raise LdmError(f"{path} is not an icon set; build one with scripts/build_dataset.py")
        stored = json.loads(file.metadata["icon set"])
        icons = [
            Icon(**{**record, "tags": tuple(record["tags"]), "keywords": tuple(record["keywords"])})
            for record in stored["icons"]
        ]
        return cls(file.tensors["images"], icons, stored["facts"])

    def save(self, path: str | Path) -> None:
        """The same pictures make the same file. An older one of this name is replaced."""
        stored = {"facts": self.facts, "icons": [asdict(icon) for icon in self.icons]}
        metadata = {"icon set": json.dumps(stored, ensure_ascii=False)}
        write_safetensors(path, {"images": self.images}, metadata, overwrite=True)

    def indices(self, *, holdout: bool) -> list[int]:
        """Positions of the pictures for training (holdout=False) or of those kept for testing."""
        return [i for i, icon in enumerate(self.icons) if icon.holdout == holdout]


def caption(icon: Icon, rng: random.Random, background: str | None = None) -> str:
    """One of many ways to describe the picture, such as "red apple, twemoji style, blue background".

    The name is the usual subject (70 %), sometimes with one or two tags (18 %) or replaced by a keyword
    (12 %); a short name is said as often as the full one, and the style mostly (85 %).
    Dropping captions for guidance is left to the training loop.
    """
    subject = icon.short if icon.short and rng.random() < 0.5 else icon.subject
    draw = rng.random()
    if draw < 0.12:
        subject = rng.choice(icon.keywords or (subject,))
    elif draw < 0.30 and icon.tags:
        tags = rng.sample(icon.tags, min(rng.randint(1, 2), len(icon.tags)))
        subject = ", ".join([subject, *tags])

    draw = rng.random()
    if draw < 0.70:
        text = f"{subject}, {icon.style} style"
    elif draw < 0.85:
        article = "an" if icon.style[0] in "aeiou" else "a"
        text = f"{article} {icon.style} icon of {subject}"
    else:
        text = subject
    return text if background is None else f"{text}, {background} background"


def composite(images: Tensor, background: Tensor | Sequence[int] | Sequence[RGB] = WHITE) -> Tensor:
    """Lay RGBA pictures on plain colours.

    images: uint8 (B, 4, S, S); background: one colour (3) or one for each picture (B, 3), 0 to 255.
    Returns float32 (B, 3, S, S) in [-1, 1].
    """
    pixels = images.float() / 255
    colour = torch.as_tensor(background, dtype=torch.float32, device=images.device) / 255
    colour = colour.expand(len(images), 3)[:, :, None, None]  # (B, 3, 1, 1)
    rgb, alpha = pixels[:, :3], pixels[:, 3:]
    return (colour + (rgb - colour) * alpha) * 2 - 1
