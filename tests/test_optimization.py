"""`ldm.optimize` changes how results are computed, and nothing else."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm import native, tiled_vae
from ldm.models import Models
from ldm.optimization import _TRANSFORMED, FastConv2d, optimize, product_pays, winograd
from ldm.seamless import seamless
from ldm.unet import UNet
from tests.golden import module_case
from tests.test_unet import CASES
from tests.tiny_families import tiny

compiled = pytest.mark.skipif(native.kernels() is None, reason="there is no compiler")

# Winograd's float32 rounding grows with the channels and layers; the target of docs/performance.md.
TOLERANCE = 2e-5  # of the largest number


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert (got - expected).abs().max() <= TOLERANCE * expected.abs().max()


def prediction(models: Models, x: Tensor) -> Tensor:
    config = models.unet.config
    torch.manual_seed(1)
    context = torch.randn(len(x), 7, config.context_dim or 1)
    y = torch.randn(len(x), config.vector_dim) if config.vector_dim else None
    with torch.no_grad():
        return models.unet(x, torch.full((len(x),), 300.0), context, y)


@pytest.fixture(params=["sd1", "sd2", "sdxl"])
def models(request: pytest.FixtureRequest) -> Iterator[Models]:
    torch.manual_seed(0)
    models = tiny(request.param)
    yield models
    optimize(models, False)


@compiled
@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 6), (3, 21), (1, 1), (33, 34)])
@pytest.mark.parametrize("bias", [True, False])
def test_winograd_is_a_convolution_for_every_shape(height: int, width: int, bias: bool):
    torch.manual_seed(0)
    conv = nn.Conv2d(96, 48, 3, padding=1, bias=bias).requires_grad_(False)
    x = torch.randn(3, 96, height, width)
    library = native.kernels()
    assert library is not None
    exact = F.conv2d(
        x.double(), conv.weight.double(), None if conv.bias is None else conv.bias.double(), padding=1
    )
    result = winograd(library, x.contiguous(memory_format=torch.channels_last), conv.weight, conv.bias)
    assert_same(result.double(), exact)


@pytest.mark.parametrize(
    ("channels", "side", "winograd_used"), [(64, 16, True), (64, 4, False), (1024, 2, False)]
)
def test_a_layer_chooses_its_way_by_its_size(channels: int, side: int, winograd_used: bool):
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, channels, 3, padding=1).requires_grad_(False)
    x = torch.randn(2, channels, side, side)
    plain = conv(x)
    optimize(conv)
    assert type(conv) is FastConv2d
    assert_same(conv(x), plain)
    assert (conv.weight in _TRANSFORMED) is (winograd_used and native.kernels() is not None)
    assert product_pays(x, conv.weight) is (channels == 1024)


def test_networks_predict_the_same(models: Models):
    x, z = torch.randn(2, 4, 24, 24), torch.randn(1, 4, 12, 12)
    assert models.vae is not None
    plain, plain_pixels = prediction(models, x), models.vae.decode(z)
    optimize(models)
    assert_same(prediction(models, x), plain)
    assert_same(models.vae.decode(z), plain_pixels)
    assert_same(tiled_vae.decode(models.vae, z, strip=2**14), plain_pixels)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_original(name: str):
    weights, values = module_case(name)
    unet = UNet(CASES[name]).requires_grad_(False)
    unet.load_state_dict(weights)
    optimize(unet)
    out = unet(values["in/x"], values["in/timesteps"], values.get("in/context"), values.get("in/y"))
    assert_same(out, values["out/out"])


def test_weights_and_names_stay_and_the_way_back_is_exact(models: Models):
    x = torch.randn(2, 4, 24, 24)
    before = dict(models.unet.named_parameters())
    plain, kinds = prediction(models, x), [type(m) for m in models.unet.modules()]
    optimize(models)
    optimize(models)  # twice is as good as once
    prediction(models, x)
    assert {name: id(p) for name, p in models.unet.named_parameters()} == {
        n: id(p) for n, p in before.items()
    }
    optimize(models, False)
    assert torch.equal(prediction(models, x), plain)
    assert [type(m) for m in models.unet.modules()] == kinds
    assert not any(weight in _TRANSFORMED for weight in before.values())


def test_a_changed_weight_is_noticed(models: Models):
    """As `ldm.lora` changes it: in place, and back."""
    x = torch.randn(2, 4, 24, 24)
    weights = [m.weight for m in models.unet.modules() if isinstance(m, nn.Conv2d)]
    pristine = [w.clone() for w in weights]

    def predictions() -> list[Tensor]:
        found = []
        for factor in (1.0, 1.5, 1.0):
            with torch.no_grad():
                for weight, own in zip(weights, pristine, strict=True):
                    weight.copy_(own * factor)
            found.append(prediction(models, x))
        return found

    plain = predictions()
    optimize(models)
    for fast, expected in zip(predictions(), plain, strict=True):
        assert_same(fast, expected)


def test_textures_stay_seamless(models: Models):
    x = torch.randn(2, 4, 24, 24)
    with seamless(models.unet):
        plain = prediction(models, x)
    optimize(models)
    with seamless(models.unet):
        assert_same(prediction(models, x), plain)


@compiled
def test_memory_made_in_inference_mode_serves_outside_of_it_too():
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 64, 3, padding=1).requires_grad_(False)
    optimize(conv)
    # The memory at hand is kept for each thread, so it must be a new one.
    with ThreadPoolExecutor(1) as thread:
        x = torch.randn(1, 64, 48, 48)
        with torch.inference_mode():
            expected = conv(x)
        assert torch.equal(thread.submit(torch.inference_mode()(conv), x).result(), expected)
        assert torch.equal(thread.submit(torch.no_grad()(conv), x).result(), expected)


def test_gradients_flow_as_ever():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(16, 16, 3, padding=1), torch.randn(2, 16, 24, 24)
    conv(x).square().sum().backward()
    expected, conv.weight.grad = conv.weight.grad, None
    optimize(conv)
    conv(x).square().sum().backward()
    assert expected is not None
    assert conv.weight.grad is not None
    assert torch.equal(conv.weight.grad, expected)


@pytest.mark.parametrize("variable", [("LDM_KERNELS", "0"), ("CXX", "no-such-compiler"), ("CXX", "false")])
def test_without_a_compiler_torch_does_the_work(
    variable: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: object
):
    monkeypatch.setenv(*variable)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.kernels.cache_clear()
    try:
        assert native.kernels() is None
        torch.manual_seed(0)
        conv, x = nn.Conv2d(64, 32, 3, padding=1).requires_grad_(False), torch.randn(2, 64, 24, 24)
        plain = conv(x)
        optimize(conv)
        torch.testing.assert_close(conv(x), plain)
    finally:
        native.kernels.cache_clear()
