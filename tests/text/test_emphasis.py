"""Weights act on the encoded text as in the tools they come from."""

import pytest
import torch
from safetensors.torch import load_file

from ldm.compat import Emphasis
from ldm.text.emphasis import weighted
from tests.golden import golden


@pytest.mark.parametrize("mode", ["original", "no norm", "ignore", "none"])
def test_equals_the_web_ui(mode: Emphasis):
    """Exactly: the operations are the same. Its mean is over both prompts of a batch: here as one chunk."""
    data = load_file(golden("prompts/emphasis.safetensors"))
    z, weights = data["z"].flatten(0, 1).unsqueeze(0), data["multipliers"].reshape(1, -1)
    expected = data[f"out_{mode.replace(' ', '_')}"].flatten(0, 1).unsqueeze(0)
    assert torch.equal(weighted(mode, z, weights), expected)


@pytest.fixture
def z() -> torch.Tensor:
    return torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0)) + 1


def test_original_keeps_the_mean_of_each_chunk_and_no_chunk_acts_on_another(z: torch.Tensor):
    weights = torch.linspace(0.5, 2, 21).reshape(3, 7)
    out = weighted("original", z, weights)
    # Means of 35 numbers around 1 in float32.
    torch.testing.assert_close(out.mean((1, 2)), z.mean((1, 2)), atol=1e-5, rtol=1e-5)
    for i in range(3):
        alone = weighted("original", z[i : i + 1], weights[i : i + 1])
        torch.testing.assert_close(alone, out[i : i + 1], atol=1e-6, rtol=1e-6)


def test_comfyui_goes_from_the_empty_prompt_through_the_prompt(z: torch.Tensor):
    empty = torch.randn(1, 7, 5, generator=torch.Generator().manual_seed(1))
    for weight in (0.0, 0.5, 2.0):
        weights = torch.full((3, 7), weight)
        expected = torch.lerp(empty.expand_as(z), z, weight)
        torch.testing.assert_close(weighted("comfyui", z, weights, empty), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("mode", ["original", "no norm", "comfyui", "ignore", "none"])
def test_weights_of_one_change_no_bit(mode: Emphasis, z: torch.Tensor):
    assert torch.equal(weighted(mode, z, torch.ones(3, 7)), z)


@pytest.mark.parametrize("mode", ["original", "no norm", "comfyui"])
def test_half_precision_stays_and_the_input_is_not_changed(mode: Emphasis, z: torch.Tensor):
    half, weights = z.bfloat16(), torch.linspace(0.5, 2, 21).reshape(3, 7)
    before = half.clone()
    out = weighted(mode, half, weights, half[:1])
    assert out.dtype == torch.bfloat16
    assert torch.equal(half, before)
    # bfloat16 has 8 bits: three roundings of numbers up to about 6.
    torch.testing.assert_close(out.float(), weighted(mode, z, weights, z[:1]), atol=0.1, rtol=0.02)


def test_a_mean_of_zero_is_not_divided_by():
    z = torch.tensor([[[1.0, -1.0], [2.0, -2.0]]])  # (1, 2, 2)
    assert torch.equal(
        weighted("original", z, torch.tensor([[1.0, 2.0]])), z * torch.tensor([[[1.0], [2.0]]])
    )
