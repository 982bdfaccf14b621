"""Training of the autoencoder: what it sees, what it minimises, that it learns, and its normalised latent."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ldm.training import autoencoder as training
from ldm.training.autoencoder import draw_crops, normalise_latent, reconstruction_loss, train_autoencoder
from ldm.training.icons import composite
from ldm.training.loop import LoopConfig
from ldm.vae import AutoencoderKL, VAEConfig
from tests.training.icon_set import icon_set

DATA = icon_set()
TRAIN = torch.tensor(DATA.indices(holdout=False))
TINY = VAEConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, mid_attention=False)
# Without a decay, the rate does not depend on the number of steps: a short run is the start of a long one.
LOOP = LoopConfig(steps=30, lr=3e-3, warmup=1, decay=0.0, ema_decay=0.8, weight_decay=0.0)
CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def train(folder: Path, steps: int) -> AutoencoderKL:
    loop = replace(LOOP, steps=steps)
    model = train_autoencoder(
        DATA, TINY, loop, folder, batch_size=8, crop=16, device=CPU, seconds=float("inf")
    )
    assert model is not None
    return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> AutoencoderKL:
    return train(tmp_path_factory.mktemp("vae"), 30)


def test_crops_are_windows_of_training_pictures():
    crops = draw_crops(DATA, TRAIN, 64, 32, generator())
    assert crops.shape == (64, 3, 32, 32)
    assert (crops.min() >= -1).item()
    assert (crops.max() <= 1).item()
    # At full size, a picture on white is one of those given; the one kept for testing is not among them.
    pictures = composite(DATA.images[TRAIN])
    known = sum(bool((crop == pictures).flatten(1).all(1).any()) for crop in crops)
    assert 16 <= known <= 48  # half of them are on white
    kept = composite(DATA.images[DATA.indices(holdout=True)])
    assert not any(torch.equal(crop, kept[0]) for crop in draw_crops(DATA, TRAIN, 500, 32, generator(1)))


def test_crops_follow_from_the_generator_alone():
    assert torch.equal(*(draw_crops(DATA, TRAIN, 4, 16, generator(3)) for _ in range(2)))
    assert not torch.equal(*(draw_crops(DATA, TRAIN, 4, 16, generator(seed)) for seed in (3, 4)))


def test_the_loss_counts_pixels_and_edges():
    x = torch.rand(2, 3, 8, 8, generator=generator())
    assert reconstruction_loss(x, x).item() == 0
    # A wrong brightness has no wrong edge.
    torch.testing.assert_close(reconstruction_loss(x, x + 0.25), torch.tensor(0.25))
    stripes = torch.tensor([0.0, 1.0]).repeat(4).expand(2, 3, 8, 8)  # changes along x, not along y
    torch.testing.assert_close(reconstruction_loss(x, x + stripes), torch.tensor(0.5 + (1.0 + 0.0) / 2))


def test_the_divergence_is_that_of_normal_distributions():
    mean, logvar = torch.randn(2, 4, 3, 3, generator=generator()), torch.full((2, 4, 3, 3), 0.7)
    expected = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(training.kl_divergence(mean, logvar), expected)
    assert training.kl_divergence(torch.zeros(3), torch.zeros(3)).item() == 0


def test_thirty_steps_already_teach_something(trained: AutoencoderKL):
    torch.manual_seed(LOOP.seed)
    start = AutoencoderKL(TINY)
    pictures = composite(DATA.images)
    with torch.no_grad():
        before, after = (
            reconstruction_loss(pictures, vae.decode(vae.encode(pictures))) for vae in (start, trained)
        )
    assert after < 0.8 * before


def test_the_normalised_latent_has_zero_mean_and_unit_variance(trained: AutoencoderKL):
    with torch.no_grad():
        z = trained.encode(composite(DATA.images[TRAIN]))
    assert not trained.training
    torch.testing.assert_close(z.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)


def test_normalising_changes_no_picture():
    torch.manual_seed(0)
    vae = AutoencoderKL(TINY).requires_grad_(False)
    vae.quant_conv.weight *= 5
    pictures = composite(DATA.images)
    noise = torch.randn(len(pictures), 4, 16, 16, generator=generator())
    plain, sampled = vae.decode(vae.encode(pictures)), vae.decode(vae.encode(pictures, noise))
    normal = deepcopy(vae)
    normalise_latent(normal, pictures.split(5))
    # The same numbers, multiplied and divided: rounding only. With noise, the log variance has to follow.
    torch.testing.assert_close(normal.decode(normal.encode(pictures)), plain, atol=1e-4, rtol=0)
    torch.testing.assert_close(normal.decode(normal.encode(pictures, noise)), sampled, atol=1e-4, rtol=0)
    assert not torch.allclose(normal.encode(pictures), vae.encode(pictures), atol=0.1)
    assert normal.config.scale == 0.18215


def test_a_run_in_pieces_gives_the_same_model_to_the_bit(tmp_path: Path):
    whole = train(tmp_path / "whole", 6)
    train(tmp_path / "pieces", 2)
    parts = train(tmp_path / "pieces", 6)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, parts.state_dict()[name]), name


def test_an_unfinished_run_gives_no_model(tmp_path: Path):
    assert (
        train_autoencoder(DATA, TINY, LOOP, tmp_path, batch_size=8, crop=16, device=CPU, seconds=0.0) is None
    )
