"""The model that draws tells what a picture shows: the words with which it removes noise best."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import ldm
from ldm import diffusion_classifier
from ldm.denoise import Denoiser, Prediction
from ldm.diffusion_classifier import SIGMA, interrogate, rank
from ldm.errors import RequestError
from ldm.interrogate import Category
from ldm.models import Models
from scripts import interrogate as script
from tests.tiny_families import tiny


def believing(models: Models, latent: Tensor, wrong: dict[str, float]) -> Models:
    """With a network in closed form, which restores `latent` shifted by what `wrong` says of a text."""
    pairs = [
        (diffusion_classifier._conditioning(models, text).context, shift) for text, shift in wrong.items()
    ]

    def network(x: Tensor, t: Tensor, context: Tensor | None = None, *_: object) -> Tensor:
        assert context is not None

        def shift(row: Tensor) -> float:
            return next(s for c, s in pairs if c is not None and torch.allclose(c[0], row))

        noisy = x * math.sqrt(1 + SIGMA**2)
        shifts = torch.tensor([shift(row) for row in context])[:, None, None, None]
        return (noisy - latent - shifts) / SIGMA

    denoiser = Denoiser(network, models.denoiser.schedule, Prediction.EPS)  # type: ignore[arg-type]
    return Models(models.family, denoiser, models.vae, models.text, models.tokenizer)


def test_texts_are_ranked_by_the_error_of_what_they_restore():
    models = tiny("sd1")
    texts = [f"number {i}" for i in range(40)]  # more than one batch
    shifts = {text: 0.1 * ((7 * i) % 40 + 1) for i, text in enumerate(texts)}
    latent = torch.randn(1, 4, 8, 8)
    shares: list[float] = []
    places = rank(believing(models, latent, shifts), latent, texts, shares.append)
    assert [texts[place] for place in places] == sorted(texts, key=lambda text: shifts[text])
    assert shares == sorted(shares)
    assert shares[-1] == 1


@pytest.fixture(scope="module")
def embedded() -> Models:
    return ldm.load()


CATEGORIES: Sequence[Category] = (
    Category("thing", ("red apple", "fish", "house", "umbrella")),
    Category("background", ("red background", "blue background")),
)


def test_the_embedded_model_recognises_what_it_drew(embedded: Models):
    request = ldm.Request(prompt="red apple, twemoji style", seed=7, steps=8)
    shares: list[float] = []
    drawn = ldm.txt2img(embedded, request)[0]
    assert interrogate(embedded, drawn, CATEGORIES, shares.append) == "red apple"
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_a_plain_colour_is_told_whatever_the_size(embedded: Models):
    blue = Image.new("RGB", (90, 70), (50, 100, 220))
    assert interrogate(embedded, blue, CATEGORIES[1:]) == "blue background"


def test_a_model_that_needs_a_picture_is_refused():
    with pytest.raises(RequestError, match="not led by words alone"):
        interrogate(tiny("sd1-inpaint"), Image.new("RGB", (64, 64)), CATEGORIES)


def test_the_script_asks_the_embedded_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = tmp_path / "words"
    words.mkdir()
    (words / "background.txt").write_text("white background\nblue background\n")
    Image.new("RGB", (64, 64), (50, 100, 220)).save(tmp_path / "blue.png")
    assert script.main([str(tmp_path / "blue.png"), "--words", str(words)]) == 0
    assert capsys.readouterr().out == "blue background\n"
