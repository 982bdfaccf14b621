"""From a picture to words that draw one like it: the entries of word lists that CLIP finds nearest.

Each list is a category, such as the thing shown or the colour behind it, and gives its best entry or entries.
The answer is a prompt. It says what of the *lists* fits best, not what is in the picture.

Radford et al. 2021, arXiv:2103.00020, section 3.1 (zero-shot classification); the ranking and the lists as
files are those of the web UI's interrogator.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.building import Destination, build, shapes_of
from ldm.clip_vision import ClipVisionConfig, ClipVisionModel, from_openclip
from ldm.errors import CheckpointError, LdmError
from ldm.formats import read
from ldm.formats.mapped import printable
from ldm.images import opaque
from ldm.text.clip import ClipTextConfig, ClipTextModel
from ldm.text.openclip_names import to_hf
from ldm.text.tokenizer import Tokenizer
from ldm.text_file import read_utf8

WORDS = Path(__file__).with_name("words")  # our lists, in the words of the embedded model's captions
MAX_WORDS = 1500  # of a list, the first ones; the web UI's limit

# Of the pictures that OpenAI trained CLIP on; every CLIP since has kept them.
MEAN = np.array((0.48145466, 0.4578275, 0.40821073), np.float32)
STD = np.array((0.26862954, 0.26130258, 0.27577711), np.float32)

LOGIT_SCALE = 100.0  # what cosines are multiplied by: the bound that CLIP's learned scale reaches


@dataclass(frozen=True)
class Category:
    """A word list."""

    name: str
    words: tuple[str, ...]
    top: int = 1  # how many of its words are taken


@dataclass(frozen=True)
class Clip:
    """Both encoders of a CLIP model."""

    text: ClipTextModel
    vision: ClipVisionModel
    tokenizer: Tokenizer

    @torch.no_grad()
    def see(self, image: Image.Image) -> Tensor:
        """The picture as a vector of length 1, (D,)."""
        pixels = prepared(image, self.vision.config.image_size)
        return F.normalize(self.vision(pixels.to(_device(self.vision)))[0], dim=0)

    @torch.no_grad()
    def say(self, texts: Sequence[str]) -> Tensor:
        """Texts as vectors of length 1, (n, D)."""
        return torch.cat([self._say(texts[i : i + 64]) for i in range(0, len(texts), 64)])

    def _say(self, texts: Sequence[str]) -> Tensor:
        ids = [self.tokenizer.encode(text) for text in texts]
        # A token sees only earlier ones, so nothing need be filled up beyond the longest text.
        length = min(max(map(len, ids)) + 2, self.text.config.context_length)
        rows = [self.tokenizer.pad(row, length) for row in ids]
        pooled = self.text(torch.tensor(rows, device=_device(self.text)), pooled=True).pooled
        assert pooled is not None
        return F.normalize(pooled, dim=1)


def load_clip(
    path: str | os.PathLike[str],
    *,
    quick_gelu: bool | None = None,
    device: torch.device | str = "cpu",
) -> Clip:
    """A CLIP model with a vision transformer, from a file in the layout of open_clip or of transformers.

    quick_gelu: the activation of OpenAI's models, which no weight tells. None: yes for models up to the width
        of ViT-L in the layout of transformers, in which OpenAI's are spread, else no.
    Raises CheckpointError if the file is no such model, or is damaged.
    """
    path, file = Path(path), read(path)
    weights, to = file.tensors, Destination(torch.device(device), read_once=file.read_once)
    visual = {n.removeprefix("visual."): w for n, w in weights.items() if n.startswith("visual.")}
    if visual:
        named = to_hf({n: w for n, w in weights.items() if not n.startswith("visual.")})
        named |= from_openclip(visual)
    else:
        named = dict(weights)
    parts = [
        {n: w for n, w in named.items() if n.startswith(own) and not n.endswith("position_ids")}
        for own in (("text_model.", "text_projection."), ("vision_model.", "visual_projection."))
    ]
    try:
        text, vision = text_config(shapes_of(parts[0])), vision_config(shapes_of(parts[1]))
    except (KeyError, IndexError, ValueError):  # a name or an axis that should be there is not
        raise CheckpointError(
            f"{printable(path.name)}: it holds no CLIP with a text encoder and a vision transformer; "
            "give a whole ViT model of open_clip or transformers"
        ) from None
    quick = not visual and vision.width <= 1024 if quick_gelu is None else quick_gelu
    text, vision = replace(text, quick_gelu=quick), replace(vision, quick_gelu=quick)
    try:
        return Clip(
            build(lambda: ClipTextModel(text), parts[0], "text", to),
            build(lambda: ClipVisionModel(vision), parts[1], "vision", to),
            Tokenizer(),
        )
    except CheckpointError as error:
        raise CheckpointError(printable(f"{path.name}: {error}", 200)) from None


Shapes = Mapping[str, tuple[int, ...]]


def text_config(shapes: Shapes) -> ClipTextConfig:
    """Read from the weights' shapes. Raises KeyError, IndexError or ValueError if they are not CLIP's."""
    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
    return ClipTextConfig(
        width=width,
        layers=_layers(shapes),
        heads=max(width // 64, 1),
        vocab_size=vocabulary,
        context_length=shapes["text_model.embeddings.position_embedding.weight"][0],
        projection_dim=shapes["text_projection.weight"][0],
    )


def vision_config(shapes: Shapes) -> ClipVisionConfig:
    """Read from the weights' shapes. Raises as `text_config` does."""
    width, _, patch, _ = shapes["vision_model.embeddings.patch_embedding.weight"]
    positions = shapes["vision_model.embeddings.position_embedding.weight"][0]
    return ClipVisionConfig(
        image_size=math.isqrt(max(positions - 1, 0)) * patch,
        patch=patch,
        width=width,
        mlp_width=shapes["vision_model.encoder.layers.0.mlp.fc1.weight"][0],
        layers=_layers(shapes),
        # Heads of 64 up to ViT-L; the larger ones, from ViT-H to ViT-bigG, have 16 of whatever width.
        heads=max(width // 64, 1) if width <= 1024 else 16,
        projection_dim=shapes["visual_projection.weight"][0],
    )


def _layers(shapes: Shapes) -> int:
    return 1 + max((int(match[1]) for name in shapes if (match := _LAYER.match(name))), default=-1)


_LAYER = re.compile(r"(?:text|vision)_model\.encoder\.layers\.(\d{1,4})\.")


def prepared(image: Image.Image, side: int) -> Tensor:
    """The middle square of a picture as CLIP wants it: (1, 3, side, side), about mean 0 and variance 1."""
    shorter = min(image.size)
    left, top = (image.width - shorter) / 2, (image.height - shorter) / 2
    square = (left, top, left + shorter, top + shorter)
    small = opaque(image).resize((side, side), Image.Resampling.BICUBIC, box=square)
    pixels = np.asarray(small, np.float32) / 255
    return torch.from_numpy((pixels - MEAN) / STD).permute(2, 0, 1)[None]


def read_categories(folder: str | os.PathLike[str] = WORDS) -> list[Category]:
    """The word lists of a folder, in the order of their names: one word or phrase a line.

    `colours.txt` gives the best of its words, `things.top3.txt` the best three. Raises LdmError if there are
    no lists, or if one is empty or cannot be read.
    """
    found = []
    for path in sorted(Path(folder).glob("*.txt")):
        name, _, top = path.stem.rpartition(".top")
        lines = read_utf8(path).splitlines()
        words = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))[:MAX_WORDS]
        if not words:
            raise LdmError(f"there are no words in {printable(path.name)}; write one a line")
        counted = bool(name) and top.isdecimal()
        found.append(Category(name, words, int(top[:4])) if counted else Category(path.stem, words))
    if not found:
        raise LdmError(f"there are no word lists (.txt) in {printable(str(folder))}")
    return found


def rank(clip: Clip, image: Image.Image, words: Sequence[str]) -> list[tuple[str, float]]:
    """All words, the nearest to the picture first, with their shares of the whole (they sum to 1)."""
    shares = (LOGIT_SCALE * clip.say(words) @ clip.see(image)).softmax(dim=0).tolist()
    return sorted(zip(words, shares, strict=True), key=lambda pair: -pair[1])


def interrogate(
    clip: Clip, image: Image.Image, categories: Sequence[Category], *, weights: bool = False
) -> str:
    """The best words of each category, joined by commas: a prompt.

    weights: write each with its share among the words of its list, "(red apple:0.512)".
    """
    best = [pair for category in categories for pair in rank(clip, image, category.words)[: category.top]]
    return ", ".join(f"({word}:{share:.3f})" if weights else word for word, share in best)


def _device(module: torch.nn.Module) -> torch.device:
    return next(module.parameters()).device
