"""Noise: the golden streams, and that an image's noise is its own."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from ldm.compat import Compatibility, NoiseSource
from ldm.noise import (
    BrownianNoise,
    BrownianPath,
    GaussianNoise,
    Stream,
    philox_stream,
    slerp,
    starting_noise,
    torch_stream,
)
from ldm.philox import Philox
from ldm.request import Request
from tests.golden import golden

TENSORS = load_file(golden("rng/rng.safetensors"))
RNG = json.loads(golden("rng/rng.json").read_text())
BROWNIAN = json.loads(golden("samplers/brownian.json").read_text())["cases"]


def sha256(x: torch.Tensor) -> str:
    return hashlib.sha256(x.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("record", RNG["cpu"])
def test_latents_equal_the_webui(record: dict):
    x = GaussianNoise(record["shape"], [record["seed"]]).draw()
    assert sha256(x) == record["sha256_f32_le"]


@pytest.mark.parametrize("record", RNG["sequence_of_calls_same_generator"])
def test_later_draws_equal_the_webui(record: dict):
    noise = GaussianNoise(record["shape"], [record["seed"]])
    assert [sha256(noise(1.0, 0.5)) for _ in record["calls"]] == [c["sha256_f32_le"] for c in record["calls"]]


def test_images_of_a_batch_equal_the_webui():
    record = RNG["batch"]
    x = GaussianNoise(record["shape"], record["seeds"]).draw()
    assert [sha256(image) for image in x] == record["sha256_each"]


@pytest.mark.parametrize("record", RNG["philox_nv"])
def test_philox_equals_the_webui(record: dict):
    """1e-6: single-precision logarithm and sine differ between libraries in the last bit."""
    stream = philox_stream(record["seed"])
    for call in record["calls"]:
        values = stream(record["shape"]).flatten()
        expected = torch.tensor(call["first16"])
        torch.testing.assert_close(values[: len(expected)], expected, atol=1e-6, rtol=0)
        if "last4" in call:
            torch.testing.assert_close(values[-4:], torch.tensor(call["last4"]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("record", RNG["subseed"])
def test_variations_equal_the_webui(record: dict):
    """1e-6: a cosine of single precision may differ in its last bit from one processor to the next."""
    request = Request(
        seed=record["seed"], variation_seed=record["subseed"], variation_strength=record["strength"]
    )
    x, _ = starting_noise(request, record["shape"], factor=8)
    torch.testing.assert_close(x.flatten()[:16], torch.tensor(record["first16"]), atol=1e-6, rtol=0)
    if "std" in record:
        assert x.mean().item() == pytest.approx(record["mean"], abs=1e-6)
        assert x.std().item() == pytest.approx(record["std"], abs=1e-6)


@pytest.mark.parametrize("strength", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_slerp_equals_the_webui(strength: float):
    turned = slerp(TENSORS["slerp_low"], TENSORS["slerp_high"], strength)
    torch.testing.assert_close(turned, TENSORS[f"slerp_{strength}"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("height", [1, 2, 3])
def test_variations_of_flat_pictures_have_no_nan(height: int):
    """With few numbers in a column, two columns are often parallel: an angle of 0 or one lost in rounding."""
    for seed in range(50):
        a, b = torch_stream(seed)((4, height, 64)), torch_stream(seed + 1000)((4, height, 64))
        for strength in (0.0, 0.3, 1.0):
            assert slerp(a, b, strength).isfinite().all()


@pytest.mark.parametrize("record", RNG["seed_resize"])
def test_resized_seeds_equal_the_webui(record: dict):
    width, height = record["seed_resize_from_w"], record["seed_resize_from_h"]
    x, _ = starting_noise(
        Request(seed=record["seed"], seed_resize_from=(width, height)), record["shape"], factor=8
    )
    _, h, w = record["shape"]
    assert sha256(x[0]) == record["sha256_f32_le"]
    assert torch.equal(x[0], TENSORS[f"seed_resize/{h}x{w}_from_{height}x{width}"])


def test_later_noise_from_another_seed_equals_the_webui():
    record = RNG["ensd"]
    x, noise = starting_noise(Request(seed=record["seed"], ensd=record["ENSD"]), (4, 16, 16), factor=8)
    assert sha256(x) == record["first_noise_sha256"]
    for expected in record["next_noises"]:
        assert sha256(noise.draw()) == expected["sha256_f32_le"]


@pytest.mark.parametrize("ensd", [-8, -(2**64) + 1, 2**64 - 1])
def test_every_ensd_gives_a_seed(ensd: int):
    _, noise = starting_noise(Request(seed=7, ensd=ensd), (1, 2, 2), factor=8)
    assert torch.equal(noise.draw()[0], torch_stream((7 + ensd) % 2**64)((1, 2, 2)))


@pytest.mark.parametrize("source", ["cpu", "philox"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ensd": 31337},
        {"variation_seed": 5, "variation_strength": 0.4},
        {"seed_resize_from": (48, 96)},
        {"seed_resize_from": (96, 40), "variation_strength": 1.0, "ensd": -9},
    ],
)
def test_a_batch_starts_like_its_pictures_alone(source: NoiseSource, settings: dict):
    request = Request(seed=7, batch_size=3, compat=Compatibility(noise=source), **settings)
    x, noise = starting_noise(request, (4, 8, 9), factor=8)
    later = noise.draw()
    for i in range(3):
        alone, own = starting_noise(request.single(i), (4, 8, 9), factor=8)
        assert torch.equal(x[i], alone[0])
        assert torch.equal(later[i], own.draw()[0])
    assert not torch.equal(x[0], x[1])


def test_variations_keep_the_seed():
    request = Request(seed=7, batch_size=2, variation_seed=3)
    assert request.single(1) == Request(seed=8, variation_seed=3)
    request = replace(request, variation_strength=0.1)
    assert request.single(1) == Request(seed=7, variation_seed=4, variation_strength=0.1)
    assert request.later(2) == replace(request, variation_seed=5)


def test_a_start_from_philox_is_that_of_a_card():
    x, _ = starting_noise(Request(compat=Compatibility(noise="philox")), (1, 2, 2), factor=8)
    expected = torch.tensor([-0.92466259, -0.42534415, -2.6438457, 0.14518388])
    torch.testing.assert_close(x.flatten(), expected, atol=1e-6, rtol=0)


def test_philox_is_normal_and_takes_large_seeds():
    x = torch.cat([Philox(seed).randn((4, 64, 64)).flatten() for seed in (0, 2**32 - 1, 2**63)])
    assert x.dtype == torch.float32
    assert abs(x.mean().item()) < 4 / math.sqrt(len(x))
    assert x.std().item() == pytest.approx(1, abs=4 / math.sqrt(2 * len(x)))
    assert x.isfinite().all()


@pytest.mark.parametrize("case", BROWNIAN)
def test_brownian_noise_equals_k_diffusion(case: str):
    """2e-6: the parts of an interval are added in another order than torchsde does."""
    record, expected = BROWNIAN[case], load_file(golden("samplers/brownian.safetensors"))
    # A single seed means a single tree over the whole batch there: one image of two times the channels here.
    alone = isinstance(record["seed"], int)
    seeds, shape = ([record["seed"]], record["x_shape"]) if alone else (record["seed"], record["x_shape"][1:])
    noise = BrownianNoise(shape, seeds, record["sigma_min"], record["sigma_max"])
    for i, (sigma, sigma_next) in enumerate(record["calls_sigma_from_to"]):
        x = noise(sigma, sigma_next)
        torch.testing.assert_close(x[0] if alone else x, expected[f"{case}/{i}"], atol=2e-6, rtol=0)


def test_brownian_increments_add_up():
    path = BrownianPath((4, 8, 8), 5, 0.03, 14.6)
    levels = [0.03, 0.1, 0.123456, 1.0, 7.3, 14.6]
    parts = sum(path.increment(a, b) for a, b in pairwise(levels))
    torch.testing.assert_close(parts, path.increment(0.03, 14.6), atol=1e-5, rtol=0)


def test_brownian_increments_are_independent_with_the_variance_of_their_length():
    path = BrownianPath((4, 64, 64), 11, 0.0, 8.0)
    first, second = path.increment(0.5, 1.5).flatten(), path.increment(1.5, 6.0).flatten()
    error = 4 / math.sqrt(len(first))
    assert first.var().item() == pytest.approx(1.0, abs=error * math.sqrt(2))
    assert second.var().item() == pytest.approx(4.5, abs=4.5 * error * math.sqrt(2))
    assert (first * second).mean().item() == pytest.approx(0, abs=error * math.sqrt(4.5))


def test_the_order_of_requests_does_not_change_a_brownian_path():
    calls = [(14.6, 9.0), (9.0, 2.0), (2.0, 0.03)]
    forwards, backwards = (BrownianNoise((4, 8, 8), [1], 0.03, 14.6) for _ in range(2))
    drawn = [forwards(*call) for call in calls]
    assert all(torch.equal(a, backwards(*call)) for a, call in reversed(list(zip(drawn, calls, strict=True))))


@pytest.mark.parametrize("kind", ["gaussian", "brownian"])
@pytest.mark.parametrize("stream", [torch_stream, philox_stream])
def test_an_image_has_the_same_noise_in_every_batch(kind: str, stream: Callable[[int], Stream]):
    def noise(seeds: list[int]) -> GaussianNoise | BrownianNoise:
        if kind == "brownian":
            return BrownianNoise((4, 8, 8), seeds, 0.03, 14.6, stream=stream)
        return GaussianNoise((4, 8, 8), seeds, stream=stream)

    batch, single = noise([3, 8, 2]), noise([8])
    for call in ((14.6, 3.0), (3.0, 1.0)):
        assert torch.equal(batch(*call)[1], single(*call)[0])


def test_brownian_requests_beyond_the_path_are_clamped():
    path = BrownianPath((1,), 0, 0.1, 10.0)
    assert torch.equal(path.increment(0.05, 20.0), path.increment(0.1, 10.0))
    assert torch.equal(path.increment(11.0, 12.0), torch.zeros(1))
