"""Noise: the golden streams, and that an image's noise is its own."""

import hashlib
import json
import math
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from ldm.noise import BrownianNoise, BrownianPath, GaussianNoise, philox_stream, torch_stream
from ldm.philox import Philox
from tests.golden import golden

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


@pytest.mark.parametrize("kind", ["torch", "philox", "brownian"])
def test_an_image_has_the_same_noise_in_every_batch(kind: str):
    def noise(seeds: list[int]) -> GaussianNoise | BrownianNoise:
        if kind == "brownian":
            return BrownianNoise((4, 8, 8), seeds, 0.03, 14.6)
        return GaussianNoise((4, 8, 8), seeds, stream=philox_stream if kind == "philox" else torch_stream)

    batch, single = noise([3, 8, 2]), noise([8])
    for call in ((14.6, 3.0), (3.0, 1.0)):
        assert torch.equal(batch(*call)[1], single(*call)[0])


def test_brownian_requests_beyond_the_path_are_clamped():
    path = BrownianPath((1,), 0, 0.1, 10.0)
    assert torch.equal(path.increment(0.05, 20.0), path.increment(0.1, 10.0))
    assert torch.equal(path.increment(11.0, 12.0), torch.zeros(1))
