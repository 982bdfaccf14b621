"""LDSR against the formulas of the original sampler, and the sizes and seeds it is used with."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.denoise import Denoiser, Prediction
from ldm.errors import CheckpointError, RequestError
from ldm.families.original import LDSR as FAMILY
from ldm.formats import write_safetensors
from ldm.models import Models
from ldm.upscalers import enlarged, load_latent
from ldm.upscalers.latent import padded
from ldm.upscalers.ldsr import LDSR
from tests.tiny_families import tiny


def ldsr(**settings: int | float) -> LDSR:
    return LDSR(tiny("ldsr"), **settings)  # type: ignore[arg-type]


def pattern(width: int, height: int) -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def random_small(height: int, width: int) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def knowing_models() -> Models:
    """A network in closed form: whatever the noise, it takes the picture beside it for the answer."""
    schedule = FAMILY.schedule()

    def network(
        x: Tensor,
        t: Tensor,
        context: object = None,
        y: object = None,
        control: object = None,
        adapter: object = None,
    ) -> Tensor:
        sigma = schedule.sigma(float(t[0]))
        noisy, small = x.chunk(2, dim=1)
        return (noisy * (1 + sigma**2) ** 0.5 - small) / sigma

    return replace(tiny("ldsr"), denoiser=Denoiser(network, schedule, Prediction.EPS))


@torch.no_grad()
def original(small: Tensor, steps: int, eta: float, seed: int) -> Tensor:
    """CompVis's DDIM written down from its formulas, in the variance-preserving scale, but going on to no
    noise at all: the original has abar[0] in place of the 1."""
    network = tiny("ldsr").unet
    betas = torch.linspace(0.0015**0.5, 0.0155**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, dim=0)
    times = [t + 1 for t in range(0, 1000, 1000 // steps)]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(small.shape, generator=generator)
    for i in reversed(range(len(times))):
        a, a_prev = abar[times[i]].item(), abar[times[i - 1]].item() if i else 1.0
        eps = network(torch.cat([x, small], dim=1), torch.tensor([times[i]]))
        x0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
        sigma = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)) ** 0.5
        x = a_prev**0.5 * x0 + (1 - a_prev - sigma**2) ** 0.5 * eps
        if i:
            x = x + sigma * torch.randn(small.shape, generator=generator)
    return x


@pytest.mark.parametrize(("steps", "eta"), [(5, 1.0), (5, 0.0), (20, 0.5)])
def test_drawing_follows_the_formulas_of_the_original_sampler(steps: int, eta: float) -> None:
    small = random_small(16, 24)
    mine, theirs = ldsr(steps=steps, eta=eta, seed=7).draw(small), original(small, steps, eta, seed=7)
    # Untrained weights make large numbers: the bound is relative to them, some roundings of float32.
    assert (mine - theirs).abs().max() <= 2e-6 * theirs.abs().max()


def test_a_network_that_knows_the_picture_draws_it_in_tiles_or_whole() -> None:
    """The exact answer: where the network takes every noisy latent for the small picture, that comes out."""
    small = random_small(64, 96)
    for settings in ({"tile": 0}, {"tile": 48, "overlap": 16}, {"tile": 40, "overlap": 0, "seed": 3}):
        drawn = LDSR(knowing_models(), steps=10, **settings).draw(small)
        torch.testing.assert_close(drawn, small, rtol=0, atol=1e-4)  # x - sigma eps, with sigma up to 39


def test_tiles_make_no_difference_to_a_picture_of_one_tile() -> None:
    small = random_small(16, 16)
    whole = ldsr(steps=3, tile=0).draw(small)
    assert torch.equal(ldsr(steps=3, tile=16, overlap=8).draw(small), whole)
    assert not torch.equal(ldsr(steps=3, tile=8, overlap=4).draw(small), whole)  # tiles see less


def test_the_seed_decides_the_noise() -> None:
    small = random_small(16, 16)
    first, again, other = (ldsr(steps=2, seed=seed).draw(small) for seed in (4, 4, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("size", "wanted"), [((1, 1), (128, 128)), ((129, 64), (192, 128))])
def test_pictures_are_padded_with_their_edges(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    x = torch.rand(1, 3, *size)
    larger = padded(x)
    assert larger.shape[2:] == wanted
    assert torch.equal(larger[..., : size[0], : size[1]], x)
    assert torch.equal(larger[..., -1, -1], x[..., -1, -1])


def test_any_picture_becomes_four_times_as_large() -> None:
    shares: list[float] = []
    upscaler = LDSR(knowing_models(), steps=2)
    large = upscaler(pattern(5, 131), shares.append)
    assert (large.mode, large.size) == ("RGB", (20, 524))
    # Two tiles of 128 cover the 192 rows that 131 are padded to, in two steps and once for decoding.
    assert shares == pytest.approx([i / 6 for i in range(1, 7)])


def test_any_size_is_drawn_from_a_quarter_of_it() -> None:
    shares: list[float] = []
    large = enlarged(pattern(200, 150), LDSR(knowing_models(), steps=1), 301, 222, shares.append)
    assert large.size == (301, 222)
    assert len(shares) == 2  # one tile of 128 pixels, one step, and decoding; not the four of 256 pixels


def test_the_averaged_weights_of_a_checkpoint_are_taken(tmp_path: Path) -> None:
    weights = tiny("ldsr").state_dict()
    name = "model.diffusion_model.out.2.bias"
    plain = tmp_path / "plain.safetensors"
    write_safetensors(plain, weights)
    with_averages = dict(weights) | {
        "model_ema." + key.removeprefix("model.").replace(".", ""): w
        for key, w in weights.items()
        if key.startswith("model.")
    }
    with_averages[name] = weights[name] + 1
    trained = tmp_path / "trained.safetensors"
    write_safetensors(trained, with_averages)
    small = random_small(8, 8)
    first, second = (replace(load_latent(path), steps=1).draw(small) for path in (plain, trained))
    assert torch.equal(first, second)


def test_other_models_and_numbers_that_cannot_work_are_refused(tmp_path: Path) -> None:
    tiny("unconditional").save(tmp_path / "faces.safetensors")
    with pytest.raises(CheckpointError, match=r"faces is latent diffusion, unconditional, which enlarges no"):
        load_latent(tmp_path / "faces.safetensors")
    with pytest.raises(CheckpointError, match=r"unconditional, not latent diffusion super-resolution"):
        LDSR(tiny("unconditional"))
    with pytest.raises(CheckpointError, match="no autoencoder"):
        LDSR(replace(tiny("ldsr"), vae=None))
    for settings in ({"steps": 0}, {"steps": 1001}, {"eta": 1.5}, {"seed": -1}, {"tile": 64, "overlap": 64}):
        with pytest.raises(RequestError):
            ldsr(**settings)
