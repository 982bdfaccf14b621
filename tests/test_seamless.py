"""Seamless networks commute with shifts around the torus, and are ordinary again afterwards."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

from ldm.seamless import seamless
from ldm.unet import UNet, UNetConfig
from ldm.vae import AutoencoderKL, VAEConfig, VQModel

VAE = VAEConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1)
UNET = UNetConfig(model_channels=32, channel_mult=(1, 1, 1), num_res_blocks=1, depth=(0, 1, 1), context_dim=8)
UNETS = {
    "transformer": UNET,
    "attention": replace(UNET, context_dim=None, head_dim=16),
    "updown": replace(UNET, resblock_updown=True, scale_shift_norm=True),
}


def moved(x: Tensor, cells: int) -> Tensor:
    """Shift around the torus by another number of cells along each axis."""
    return x.roll((cells, 2 * cells), dims=(2, 3))


Network = TypeVar("Network", bound=nn.Module)


def randomised(network: Network) -> Network:
    """Make no layer zero or the identity, and the outputs of order 1."""
    for parameter in network.requires_grad_(False).parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    return network


def assert_commutes_when_seamless(
    network: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor, before: int, after: int
) -> None:
    """Moving the input by `before` cells moves the output by `after`, but not with zero padding."""
    ordinary = function(x)
    scale = ordinary.std()
    assert (function(moved(x, before)) - moved(ordinary, after)).abs().max() > 0.01 * scale
    with seamless(network):
        # float32 rounding; sums are in another order where the shifted rows meet other vector lanes.
        error = (function(moved(x, before)) - moved(function(x), after)).abs().max()
    assert error < 1e-5 * max(scale, 1)
    assert torch.equal(function(x), ordinary)


@pytest.mark.parametrize("name", UNETS)
def test_a_shifted_latent_gives_the_shifted_prediction(name: str):
    torch.manual_seed(0)
    network = randomised(UNet(UNETS[name]))
    context = None if UNETS[name].context_dim is None else torch.randn(1, 5, 8)
    x, t = torch.randn(1, 4, 16, 24), torch.tensor([500.0])
    assert_commutes_when_seamless(network, lambda x: network(x, t, context), x, 4, 4)


@pytest.mark.parametrize("config", [VAE, replace(VAE, attention_levels=(1,), codebook_size=16)])
def test_a_shifted_picture_gives_the_shifted_latent_and_back(config: VAEConfig):
    torch.manual_seed(0)
    vae = randomised(AutoencoderKL(config) if config.codebook_size is None else VQModel(config))
    assert_commutes_when_seamless(vae, vae.encode, torch.rand(1, 3, 32, 48) * 2 - 1, 4, 1)
    assert_commutes_when_seamless(vae, vae.decode, torch.randn(1, 4, 8, 12), 1, 4)


def test_an_error_inside_leaves_the_network_as_it_was():
    vae = AutoencoderKL(VAE)
    x = torch.rand(1, 3, 16, 16)
    before = vae.encode(x)
    with pytest.raises(KeyError), seamless(vae):
        raise KeyError
    assert torch.equal(vae.encode(x), before)
    assert all(conv.padding_mode == "zeros" for conv in vae.modules() if isinstance(conv, nn.Conv2d))


def test_nested_blocks_end_one_after_the_other():
    vae = AutoencoderKL(VAE).requires_grad_(False)
    x = torch.rand(1, 3, 16, 16)
    with seamless(vae):
        once = vae.encode(x)
        with seamless(vae):
            assert torch.equal(vae.encode(x), once)
        assert torch.equal(vae.encode(x), once)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_blocks_may_end_in_any_order(order: tuple[int, ...]):
    network = AutoencoderKL(VAE).requires_grad_(False)
    x = torch.rand(1, 3, 16, 16)
    ordinary = network.encode(x)
    blocks = [seamless(network), seamless(network.encoder), seamless(network)]
    for block in blocks:
        block.__enter__()
    torus = network.encode(x)
    assert not torch.equal(torus, ordinary)
    for place in order[:2]:
        blocks[place].__exit__(None, None, None)
    assert torch.equal(network.encode(x), torus)  # each of them covers the whole encoder
    blocks[order[2]].__exit__(None, None, None)
    assert torch.equal(network.encode(x), ordinary)
    assert all(conv.padding_mode == "zeros" for conv in network.modules() if isinstance(conv, nn.Conv2d))
    with seamless(network):
        assert torch.equal(network.encode(x), torus)
    assert torch.equal(network.encode(x), ordinary)
