"""The autoencoder in strips is the whole autoencoder."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import ldm
from ldm import tiled_vae
from ldm.seamless import seamless
from ldm.vae import AutoencoderKL, Codebook, VAEConfig, VQModel

SMALL = VAEConfig(ch=32, ch_mult=(1, 1, 2), num_res_blocks=1)
CONFIGS = {
    "kl": SMALL,
    "kl, attention below": replace(SMALL, ch_mult=(1, 2), attention_levels=(1,)),
    "vq": replace(SMALL, codebook_size=64, z_channels=3, embed_dim=3),
    "vq, no attention": replace(SMALL, num_res_blocks=2, codebook_size=64, mid_attention=False),
}
STRIP = 2**12  # small enough that every map but the lowest is cut


def random_vae(config: VAEConfig, seed: int = 0) -> AutoencoderKL | VQModel:
    """No parameter is 0 or 1: as initialised, an error in a bias or norm would not show."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(config) if config.codebook_size is None else VQModel(config)
    for parameter in vae.requires_grad_(False).parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    return vae


def uneven(height: int, width: int, batch: int = 1) -> Tensor:
    """A picture whose parts differ much: half of it flat, half of it detail that grows. (B, 3, H, W)."""
    torch.manual_seed(1)
    x = torch.randn(batch, 3, height, width) * torch.linspace(0, 0.5, width)
    x[:, :, : height // 2] *= 0.01
    return (x + torch.linspace(-0.9, 0.9, height)[:, None]).clamp(-1, 1)


# The sums of a convolution or norm are taken in another order; outputs are of order 1.
ROUNDING = 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_strips_equal_the_whole(name: str):
    vae = random_vae(CONFIGS[name])
    # No side is a multiple of a strip.
    for height, width, batch in ((76, 36, 1), (20, 84, 2)):
        x = uneven(height, width, batch)
        z = vae.encode(x)
        assert (tiled_vae.encode(vae, x, strip=STRIP) - z).abs().max() < ROUNDING * z.std()
        pixels = vae.decode(z)
        assert (tiled_vae.decode(vae, z, strip=STRIP) - pixels).abs().max() < ROUNDING * pixels.std()


def test_the_embedded_autoencoder_in_strips_equals_the_whole():
    vae = ldm.load().vae
    assert vae is not None
    with torch.no_grad():
        z = vae.encode(uneven(64, 96))
        # Far below the 2/255 that is promised for large pictures.
        error = (tiled_vae.decode(vae, z, strip=2**15) - vae.decode(z)).abs().max()
    assert error < 0.01 / 255


def test_a_tile_with_its_own_norms_would_be_far_from_the_whole():
    vae = random_vae(SMALL)
    z = vae.encode(uneven(64, 64))
    tile = vae.decode(z[:, :, :8])
    whole = vae.decode(z)
    assert (tile - whole[:, :, :32]).abs().mean() > 100 * ROUNDING * whole.std()


def test_what_is_not_cut_is_the_whole_to_the_bit():
    for name in ("kl", "vq"):
        vae = random_vae(CONFIGS[name])
        x = uneven(32, 48)
        assert torch.equal(tiled_vae.encode(vae, x), vae.encode(x))
        z = vae.encode(x)
        assert torch.equal(tiled_vae.decode(vae, z), vae.decode(z))


def test_a_sample_of_the_latent_equals_that_of_the_whole():
    vae = random_vae(SMALL)
    assert isinstance(vae, AutoencoderKL)
    x = uneven(76, 36)
    noise = torch.randn(1, 4, 19, 9)
    z = vae.encode(x, noise)
    assert (tiled_vae.encode(vae, x, noise, strip=STRIP) - z).abs().max() < ROUNDING * z.std()


def test_half_precision_stays_as_near_as_its_rounding():
    vae = random_vae(SMALL)
    z = vae.encode(uneven(76, 36))
    exact = vae.decode(z)
    half = vae.bfloat16()
    whole = half.decode(z.bfloat16()).float()
    strips = tiled_vae.decode(half, z.bfloat16(), strip=STRIP)
    assert strips.dtype is torch.bfloat16
    # Norms in strips are computed in float32, so they are at least as near to the exact result.
    assert (strips.float() - exact).abs().mean() < 1.1 * (whole - exact).abs().mean()


def test_a_seamless_picture_stays_seamless_in_strips():
    for name in ("kl", "vq"):
        vae = random_vae(CONFIGS[name])
        x = uneven(64, 40)
        with seamless(vae):
            z = vae.encode(x)
            assert (tiled_vae.encode(vae, x, strip=STRIP) - z).abs().max() < ROUNDING * z.std()
            pixels = vae.decode(z)
            assert (tiled_vae.decode(vae, z, strip=STRIP) - pixels).abs().max() < ROUNDING * pixels.std()


def test_progress_rises_to_one():
    vae = random_vae(SMALL)
    shares: list[float] = []
    tiled_vae.decode(vae, torch.randn(1, 4, 8, 8), strip=STRIP, progress=shares.append)
    assert shares == sorted(set(shares))
    assert shares[-1] == 1
    assert len(shares) > 8


def test_no_convolution_sees_a_whole_map_of_pixels():
    vae = random_vae(SMALL)
    largest = 0

    def watch(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal largest
        largest = max(largest, output.numel())

    hooks = [m.register_forward_hook(watch) for m in vae.modules() if isinstance(m, nn.Conv2d)]
    z = torch.randn(1, 4, 128, 8)
    tiled_vae.decode(vae, z, strip=2**12)
    cut = largest
    vae.decode(z)
    # The latents were not cut: the first map, of 64 channels, is the largest that was whole.
    assert cut == 64 * 128 * 8
    assert largest == 8 * cut
    for hook in hooks:
        hook.remove()


def test_the_autoencoder_itself_is_left_alone():
    vae = random_vae(CONFIGS["vq"])
    assert isinstance(vae, VQModel)
    names = list(vae.state_dict())
    tiled_vae.decode(vae, torch.randn(1, 3, 16, 16), strip=STRIP)
    assert list(vae.state_dict()) == names
    assert isinstance(vae.quantize, Codebook)
