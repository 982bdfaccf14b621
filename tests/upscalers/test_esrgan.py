"""The ESRGAN networks: every published layout of names, the shapes that say what they are, the numbers."""

import gzip
import json

import pytest
import torch
from safetensors.torch import load_file

from ldm.errors import CheckpointError
from ldm.upscalers import load_network, load_upscaler
from ldm.upscalers.compact import CompactConfig, CompactNet, compact_config
from ldm.upscalers.esrgan import RRDBConfig, RRDBNet, renamed, rrdb_config
from tests.golden import golden, module_case

X4PLUS = RRDBConfig()
TINY = RRDBConfig(features=8, blocks=1, growth=4)


def weights_of(config: RRDBConfig) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return RRDBNet(config).state_dict()


def shapes(weights: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in weights.items()}


@pytest.mark.parametrize("name", ["rrdbnet_x4", "rrdbnet_x2", "esrgan_old_layout_x4"])
def test_the_numbers_are_those_of_the_original_code(name: str):
    weights, case = module_case(name)
    network = load_network(weights)
    # Measured: 1.8e-6 of outputs up to 1.3. Sums of float32 in another order.
    torch.testing.assert_close(network(case["in/x"]), case["out/out"], rtol=0, atol=1e-5)


def test_the_embedded_network_draws_what_the_ncnn_runtime_draws():
    case = load_file(golden("upscalers/animevideov3_ncnn.safetensors"))
    upscaler = load_upscaler("R-ESRGAN AnimeVideo")
    levels = case["in/levels"].permute(2, 0, 1).unsqueeze(0)
    result = upscaler.network(levels.float() / 255)[0]  # type: ignore[attr-defined]
    # Measured: 9e-7 of outputs up to 1.2. Sums of float32 in another order.
    torch.testing.assert_close(result, case["out/pixels"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("RealESRGAN_x4plus", X4PLUS),
        ("RealESRGAN_x4plus_anime_6B", RRDBConfig(blocks=6)),
        ("RealESRGAN_x2plus", RRDBConfig(unshuffle=2)),
        ("esrgan-old-layout-x4-23b", X4PLUS),
    ],
)
def test_names_and_shapes_are_those_of_the_published_file(name: str, config: RRDBConfig):
    with gzip.open(golden(f"manifests/{name}.json.gz")) as file:
        tensors = json.load(file)["tensors"]
    published = renamed({key: torch.empty(entry["shape"], device="meta") for key, entry in tensors.items()})
    assert len(published) == len(tensors)
    assert rrdb_config(shapes(published)) == config
    with torch.device("meta"):
        assert shapes(RRDBNet(config).state_dict()) == shapes(published)


def old_name(name: str) -> str:
    """A name of today in the code of 2018 to 2020."""
    for new, old in {"body.": "RRDB_trunk.", "conv_body.": "trunk_conv.", "conv_hr.": "HRconv."}.items():
        if name.startswith(new):
            name = old + name.removeprefix(new)
    return name.replace("conv_up", "upconv").replace(".rdb", ".RDB")


def test_the_names_of_2019_mean_the_same_network():
    weights = weights_of(TINY)
    renamed_back = renamed({old_name(name): weight for name, weight in weights.items()})
    assert list(renamed_back) == list(weights)


@pytest.mark.parametrize(("doublings", "last"), [(0, 4), (1, 7), (2, 10), (3, 13)])
def test_numbered_layouts_of_every_length_are_understood(doublings: int, last: int):
    """Without doublings the last convolutions are model.2 and model.4; each doubling moves them by three."""
    weights = weights_of(RRDBConfig(features=8, blocks=1, growth=4, doublings=doublings))
    places = {"conv_first": "model.0", "conv_body": "model.1.sub.1"}
    places |= {"conv_hr": f"model.{last - 2}", "conv_last": f"model.{last}"}
    places |= {f"conv_up{i}": f"model.{3 * i}" for i in range(1, doublings + 1)}

    def numbered(name: str) -> str:
        module, _, kind = name.rpartition(".")
        if module.startswith("body."):
            _, block, part, conv = module.split(".")
            return f"model.1.sub.{block}.{part.upper()}.{conv}.0.{kind}"
        return f"{places[module]}.{kind}"

    network = load_network({numbered(name): weight for name, weight in weights.items()})
    assert network.factor == 2**doublings
    assert all(torch.equal(weight, weights[name]) for name, weight in network.state_dict().items())


@pytest.mark.parametrize("unshuffle", [1, 2, 4])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 7), (1, 3)])
def test_networks_of_factor_4_2_and_1_take_any_size(unshuffle: int, height: int, width: int):
    config = RRDBConfig(features=8, blocks=1, growth=4, unshuffle=unshuffle)
    network = load_network(weights_of(config))
    assert network.config == config
    assert network.factor == 4 // unshuffle
    result = network(torch.rand(1, 3, height, width))
    assert result.shape == (1, 3, height * network.factor, width * network.factor)


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_a_compact_network_is_known_by_its_shapes(factor: int):
    config = CompactConfig(features=8, convolutions=3, factor=factor)
    weights = CompactNet(config).state_dict()
    shuffled = dict(sorted(weights.items()))  # files order names as texts: body.10 before body.2
    network = load_network(shuffled)
    assert network.config == config
    assert network(torch.rand(1, 3, 5, 7)).shape == (1, 3, 5 * factor, 7 * factor)


@pytest.mark.parametrize(("name", "convolutions"), [("animevideov3", 16), ("general-x4v3", 32)])
def test_the_published_compact_networks_have_the_shapes_of_ours(name: str, convolutions: int):
    """Two entries for each convolution, one for each PReLU: as the published files."""
    config = CompactConfig(convolutions=convolutions)
    with torch.device("meta"):
        weights = shapes(CompactNet(config).state_dict())
    assert len(weights) == 3 * (convolutions + 1) + 2
    assert weights[f"body.{2 * convolutions + 2}.weight"] == (48, 64, 3, 3)
    assert weights["body.1.weight"] == (64,)
    assert compact_config(weights) == config


def test_zero_weights_of_a_compact_network_give_larger_pixels():
    network = CompactNet(CompactConfig(features=8, convolutions=1, factor=2))
    for weight in network.parameters():
        torch.nn.init.zeros_(weight)
    x = torch.rand(1, 3, 4, 5)
    assert torch.equal(network(x), x.repeat_interleave(2, -1).repeat_interleave(2, -2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("conv_hr.bias"), "missing"),
        (lambda w: w.update({"extra.weight": torch.zeros(1)}), "unknown"),
        (lambda w: w.update({"conv_hr.weight": torch.zeros(8, 8, 1, 1)}), "wrong shape"),
        (lambda w: w.update({"conv_first.weight": torch.zeros(8, 1, 3, 3)}), "only RGB"),
        (lambda w: w.update({"conv_last.weight": torch.zeros(1, 8, 3, 3)}), "only RGB"),
        (lambda w: w.update({"conv_first.weight": torch.zeros(())}), "incomplete"),
        (lambda w: w.update({f"conv_up{i}.weight": torch.zeros(8, 8, 3, 3) for i in range(99)}), "doubles"),
        (lambda w: w.pop("conv_last.weight"), "incomplete"),
        (lambda w: w.update({"conv_hr.bias": torch.full((8,), torch.nan)}), "NaN"),
    ],
)
def test_weights_that_make_no_whole_network_are_refused(change, message: str):
    weights = dict(weights_of(TINY))
    change(weights)
    with pytest.raises(CheckpointError, match=message):
        load_network(weights)


@pytest.mark.parametrize("drop", ["body.1.weight", "body.4.weight", "body.0.bias"])
def test_a_compact_network_that_lacks_weights_is_refused(drop: str):
    weights = CompactNet(CompactConfig(features=8, convolutions=1)).state_dict()
    del weights[drop]
    with pytest.raises(CheckpointError):
        load_network(weights)
