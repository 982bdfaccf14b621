"""What a picture shows, asked of the model that draws: told the right words, it removes noise best.

Noise is laid over the picture, and the model restores it, told one text after another. The text with the
smallest error fits best: the error bounds how likely the picture is given the text. This needs no second
model, and knows just the words that the model itself understands.

Li et al. 2023, "Your Diffusion Model is Secretly a Zero-Shot Classifier", arXiv:2303.16203, equation 5.
"""

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm.denoise import Conditioning
from ldm.errors import RequestError
from ldm.families import Picture
from ldm.images import opaque
from ldm.interrogate import Category
from ldm.latents import encode
from ldm.models import Models

Progress = Callable[[float], object]

SIGMA = 5.0
"""Noise that leaves only the gist of a picture to be seen: with the embedded model, better than 2 or 3."""

FINALISTS = 12  # of all texts, those that are compared with further noises
NOISES = 6  # ... so many
BATCH = 32  # texts at once


@torch.no_grad()
def interrogate(
    models: Models, image: Image.Image, categories: Sequence[Category], progress: Progress | None = None
) -> str:
    """The best words of each category, joined by commas: a prompt for this model.

    The last category comes first: what lies behind a thing fills more of the picture than the thing, and no
    word for the thing fits before that is told. The others are compared in front of what is found already.
    A category of which no word fits better than none is left out.
    progress: called with the share done, up to 1.
    Raises RequestError if the model is not drawn from texts alone.
    """
    if not models.family.parts or models.family.concat is not None:
        raise RequestError(f"{models.family.title} is not led by words alone; give a text to image model")
    side = models.default_size
    latent = encode(models, [ImageOps.fit(opaque(image), (side, side))])
    found: list[str] = []
    for i, category in enumerate(reversed(categories)):

        def advance(share: float) -> None:
            if progress is not None:
                progress((i + share) / len(categories))  # noqa: B023 (called within this turn of the loop)

        words = [*category.words, ""]
        texts = [", ".join(filter(None, [word, *found])) for word in words]
        best = rank(models, latent, texts, advance)[: category.top]
        found = [*(words[place] for place in best if words[place]), *found]
    return ", ".join(found)


@torch.no_grad()
def rank(models: Models, latent: Tensor, texts: Sequence[str], progress: Progress | None = None) -> list[int]:
    """The places of all texts, the one that fits best first.

    latent: (1, C, h, w). Every text meets the same noises: what differs is the text alone.
    """
    generator = torch.Generator().manual_seed(0)
    told = [_conditioning(models, text) for text in texts]
    total = len(texts) + NOISES * min(FINALISTS, len(texts))
    done = 0

    def errors(places: Sequence[int]) -> Tensor:
        nonlocal done
        noise = torch.randn(latent.shape, generator=generator).to(latent)
        found = []
        for start in range(0, len(places), BATCH):
            batch = reduce(Conditioning.joined, (told[place] for place in places[start : start + BATCH]))
            count = min(BATCH, len(places) - start)
            denoised = models.denoiser((latent + SIGMA * noise).expand(count, -1, -1, -1), SIGMA, batch)
            found.append((denoised - latent).square().mean(dim=(1, 2, 3)))
            done += count
            if progress is not None:
                progress(done / total)
        return torch.cat(found)

    order = errors(range(len(texts))).argsort().tolist()
    finalists, rest = order[:FINALISTS], order[FINALISTS:]
    means = torch.stack([errors(finalists) for _ in range(NOISES)]).mean(dim=0)
    return [finalists[place] for place in means.argsort().tolist()] + rest


def _conditioning(models: Models, text: str) -> Conditioning:
    side = models.default_size
    picture = Picture(width=side, height=side, negative=False, clip_skip=None)
    return models.family.condition(models.text, models.tokenizer, text, picture)
