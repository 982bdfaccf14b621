"""The autoencoders equal the originals: golden outputs, and diffusers live."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.vae import AutoencoderKL, VAEConfig, VQModel
from tests.golden import module_case

TINY = VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1)
KL_CASES = {
    "vae_kl": TINY,
    "vae_kl_attn_embed3_z6": replace(TINY, z_channels=6, embed_dim=3, attention_levels=(1,)),
}
VQ = replace(TINY, z_channels=3, embed_dim=3, codebook_size=64)


def assert_equal_to_original(actual: Tensor, expected: Tensor) -> None:
    # Outputs are of order 1 and the originals' own float32 rounding is up to 5e-6.
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)


def randomised(module: nn.Module) -> None:
    """Make no parameter 0 or 1: as initialised, an error in a bias or norm would not show."""
    for parameter in module.requires_grad_(False).parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)


@pytest.mark.parametrize("name", KL_CASES)
def test_kl_equals_the_original(name: str):
    weights, values = module_case(name)
    config = KL_CASES[name]
    vae = AutoencoderKL(config).requires_grad_(False)
    vae.load_state_dict(weights)
    mean, logvar = vae.moments(values["in/image"])
    assert_equal_to_original(mean, values["out/mean"])
    assert_equal_to_original(logvar, values["out/logvar"])
    sample = vae.encode(values["in/image"], values["in/sample_noise"])
    assert_equal_to_original(sample / config.scale, values["out/sample"])
    assert_equal_to_original(vae.encode(values["in/image"]) / config.scale, values["out/mean"])
    pixels = vae.decode(values["in/latent"] * config.scale)
    assert_equal_to_original(pixels, values["out/decoded_from_latent"])


def test_vq_equals_the_original():
    weights, values = module_case("vae_vq")
    vae = VQModel(VQ).requires_grad_(False)
    vae.load_state_dict(weights)
    latent = vae.encode(values["in/image"]) / VQ.scale
    assert_equal_to_original(latent, values["out/encoded_prequant"])
    assert torch.equal(vae.quantize.indices(latent), values["out/indices"])
    assert_equal_to_original(vae.quantize(latent), values["out/quantized"])
    given = values["in/latent"]
    assert torch.equal(vae.quantize.indices(given), values["out/latent_indices"])
    assert_equal_to_original(vae.quantize(given), values["out/latent_quantized"])
    assert_equal_to_original(vae.decode(given * VQ.scale), values["out/decoded_quantizing"])
    plain = vae.decode(given * VQ.scale, quantize=False)
    assert_equal_to_original(plain, values["out/decoded_force_not_quantize"])


@pytest.mark.parametrize("size", [(2, 16, 16), (1, 20, 12)], ids=["square", "oblong, one picture"])
def test_kl_equals_diffusers(size: tuple[int, int, int]):
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as Peer

    torch.manual_seed(0)
    vae = AutoencoderKL(replace(TINY, ch_mult=(1, 2, 2), num_res_blocks=2))
    randomised(vae)
    peer_class: Any = Peer  # its annotations are narrower than what it takes
    peer = peer_class(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
    ).requires_grad_(False)
    original = {f"first_stage_model.{name}": tensor for name, tensor in vae.state_dict().items()}
    peer.load_state_dict(convert_ldm_vae_checkpoint(original, peer.config))
    batch, height, width = size
    image, latent = (
        torch.rand(batch, 3, height, width) * 2 - 1,
        torch.randn(batch, 4, height // 4, width // 4),
    )
    mean, logvar = vae.moments(image)
    expected = peer.encode(image).latent_dist
    # Outputs are of order 1; both sum in float32 in a different order.
    torch.testing.assert_close(mean, expected.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logvar, expected.logvar, atol=1e-5, rtol=1e-5)
    pixels = vae.decode(latent * vae.config.scale)
    torch.testing.assert_close(pixels, peer.decode(latent)[0], atol=1e-5, rtol=1e-5)


def test_extreme_variances_are_clamped():
    vae = AutoencoderKL(TINY).requires_grad_(False)
    vae.quant_conv.load_state_dict(
        {"weight": torch.zeros(8, 8, 1, 1), "bias": torch.tensor([0.0] * 4 + [1e4, -1e4, 0.0, 0.0])}
    )
    _, logvar = vae.moments(torch.zeros(1, 3, 8, 8))
    assert logvar[0, 0].unique().tolist() == [20.0]
    assert logvar[0, 1].unique().tolist() == [-30.0]


def test_a_codebook_vector_is_its_own_nearest():
    vae = VQModel(VQ).requires_grad_(False)
    vae.quantize.embedding.weight.normal_()
    codes = vae.quantize.embedding.weight.T.view(1, 3, 8, 8)  # each of the 64 at one pixel
    assert vae.quantize.indices(codes).flatten().tolist() == list(range(64))
    assert torch.equal(vae.quantize(codes), codes)


@pytest.mark.parametrize("config", [TINY, VQ], ids=["KL", "VQ"])
def test_decoder_compiles_to_one_graph(config: VAEConfig):
    vae = (VQModel if config.codebook_size else AutoencoderKL)(config).requires_grad_(False)
    latent = torch.randn(1, config.embed_dim, 4, 6)
    compiled = torch.compile(vae.decode, backend="eager", fullgraph=True)  # an error if the graph breaks
    torch.testing.assert_close(compiled(latent), vae.decode(latent), atol=1e-6, rtol=0)


def test_vq_without_a_codebook_is_refused():
    with pytest.raises(ValueError, match="codebook_size"):
        VQModel(TINY)
