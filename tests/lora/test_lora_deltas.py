"""Each way to store a change gives the weights of its original implementation."""

import gzip
import re
from collections import defaultdict
from dataclasses import fields
from random import Random

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from ldm.errors import CheckpointError
from ldm.formats import write_safetensors
from ldm.lora import read
from ldm.lora_deltas import KINDS, Delta, Scaling, parse
from tests.golden import golden


def cases() -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in load(gzip.decompress(golden("lora/merge.safetensors.gz").read_bytes())).items():
        way, kind, name = key.split("/", 2)
        found[f"{way}/{kind}"][name] = tensor
    return found


CASES = dict(sorted(cases().items()))


def delta_of(case: dict[str, Tensor], folder) -> Delta:
    path = folder / "lora.safetensors"
    write_safetensors(path, {key.removeprefix("lora/"): t for key, t in case.items() if key[:5] == "lora/"})
    (changes,) = read(path).modules.values()
    assert set(changes) == {"weight"}
    return changes["weight"]


def results(case: dict[str, Tensor], delta: Delta):
    """(multiplier, the original's weights, ours), every third row of them: those in the golden data."""
    for name, wanted in case.items():
        if match := re.fullmatch(r"merged_(?:(lycoris|a1111)_)?(.*)", name):
            yield float(match[2]), wanted, delta.merged(case["weight"], float(match[2]))[::3]


@pytest.mark.parametrize("name", CASES)
def test_merged_weights_are_those_of_the_original(name: str, tmp_path):
    case = CASES[name]
    delta = delta_of(case, tmp_path)
    delta.check(case["weight"].shape)
    compared = 0
    for multiplier, wanted, ours in results(case, delta):
        if "dora" in name and multiplier not in (1.0, 0.8):
            continue  # a convention: see the next test
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-6)
        compared += 1
    assert compared


def test_dora_blends_the_weight_and_the_trained_one(tmp_path):
    # The web UI's convention, which the golden data show where it agrees with the training: along the inputs.
    case = CASES["dora_in/linear"]
    delta = delta_of(case, tmp_path)
    whole = delta.merged(case["weight"], 1.0)
    half = delta.merged(case["weight"], 0.5)
    torch.testing.assert_close(half, (case["weight"] + whole) / 2, rtol=0, atol=1e-6)


W = torch.linspace(-1, 1, 12).reshape(3, 4)


def change(tensors: dict[str, Tensor], kind: str = "weight", base: Tensor = W) -> Tensor:
    delta = parse(tensors)[0][kind]
    delta.check(base.shape)
    return delta.to("cpu").change(base)


def test_without_alpha_the_scale_is_one():
    tensors = {"up": torch.ones(3, 2), "down": torch.ones(2, 4)}
    assert torch.equal(change(tensors), torch.full((3, 4), 2.0))
    assert torch.equal(change(tensors | {"alpha": torch.tensor(1.0)}), torch.full((3, 4), 1.0))


def test_a_linear_lora_fits_a_convolution_of_one_pixel_and_the_reverse():
    linear = {"up": torch.ones(3, 2), "down": torch.ones(2, 4)}
    conv = {name: t[:, :, None, None] for name, t in linear.items()}
    assert change(linear, base=W[:, :, None, None]).shape == (3, 4, 1, 1)
    assert torch.equal(change(conv), change(linear))


def test_full_changes_of_weight_and_bias():
    tensors = {"diff": W + 1, "diff_b": torch.arange(3.0)}
    assert torch.equal(change(tensors), W + 1)
    assert torch.equal(change(tensors, "bias", torch.zeros(3)), torch.arange(3.0))


def test_ia3_scales_outputs_or_inputs():
    outputs = {"weight": torch.tensor([0.0, 1.0, 2.0]), "on_input": torch.tensor(0)}
    assert torch.equal(change(outputs), W * torch.tensor([[0.0], [1.0], [2.0]]))
    inputs = {"weight": torch.tensor([0.0, 1.0, 2.0, 3.0]), "on_input": torch.tensor(1)}
    assert torch.equal(change(inputs), W * torch.tensor([0.0, 1.0, 2.0, 3.0]))


def test_oft_keeps_angles_between_inputs():
    blocks = torch.randn(2, 2, 2, generator=torch.Generator().manual_seed(0))
    base = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    turned = base + change({"oft_blocks": blocks}, base=base)
    assert not torch.allclose(turned, base, atol=0.1)
    torch.testing.assert_close(turned.T @ turned, base.T @ base)


UP, DOWN = torch.ones(3, 2), torch.ones(2, 4)
HOSTILE = {
    "transposed": {"up": torch.ones(4, 2), "down": torch.ones(2, 3)},
    "other size": {"up": UP, "down": torch.ones(2, 5)},
    "same size, other shape": {"up": torch.ones(6, 2), "down": torch.ones(2, 2)},
    "one row for all": {"up": torch.ones(1, 2), "down": DOWN},
    "ranks differ": {"up": torch.ones(3, 3), "down": DOWN},
    "rank 0": {"up": torch.ones(3, 0), "down": torch.ones(0, 4)},
    "no down": {"up": UP},
    "no up": {"down": DOWN, "alpha": torch.tensor(1.0)},
    "NaN": {"up": UP * torch.nan, "down": DOWN},
    "infinity": {"up": UP, "down": DOWN.half() * 1e5},
    "integers": {"up": UP.int(), "down": DOWN},
    "alpha NaN": {"up": UP, "down": DOWN, "alpha": torch.tensor(torch.nan)},
    "alpha of two": {"up": UP, "down": DOWN, "alpha": torch.ones(2)},
    "kernel in a linear layer": {"up": UP[:, :, None, None], "down": torch.ones(2, 4, 3, 3)},
    "mid of another rank": {"up": UP, "down": DOWN, "mid": torch.ones(3, 3, 1, 1)},
    "numbers as matrices": {"up": torch.tensor(1.0), "down": torch.tensor(1.0)},
    "one magnitude for all": {"up": UP, "down": DOWN, "dora_scale": torch.ones(1, 1)},
    "magnitudes of another layer": {"up": UP, "down": DOWN, "dora_scale": torch.ones(5, 1)},
    "LoHa of two shapes": {
        "hada_w1_a": UP,
        "hada_w1_b": DOWN,
        "hada_w2_a": UP,
        "hada_w2_b": torch.ones(2, 1),
    },
    "LoKr with one factor": {"lokr_w1": torch.ones(3, 4)},
    "LoKr of another size": {"lokr_w1": torch.ones(3, 2), "lokr_w2": torch.ones(2, 2)},
    "IA3 of another size": {"weight": torch.ones(1), "on_input": torch.tensor(0)},
    "OFT of another size": {"oft_blocks": torch.ones(2, 2, 2)},
    "OFT flat": {"oft_blocks": torch.ones(3)},
    "full of another shape": {"diff": torch.ones(4, 3)},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_cannot_be_meant_is_refused_and_nothing_is_broadcast(name: str):
    with pytest.raises(CheckpointError):
        change(HOSTILE[name])


# Shapes of parts, most of which fit somewhere.
POOL = [
    *[(2, 2)] * 10,
    (4, 2),
    (2, 4),
    (2, 2, 2),
    (2, 1),
    (1, 2),
    (2, 18),
    (2, 2, 1, 1),
    (2, 2, 3, 3),
    (4,),
    (),
    (0, 2),
]
OPTIONAL = ("mid", "hada_t1", "hada_t2", "lokr_t2", "rescale")


@pytest.mark.parametrize("kind", KINDS)
def test_what_passes_the_check_can_be_merged_and_the_rest_is_refused(kind: type[Delta]):
    random = Random(0)
    passed = 0
    for _ in range(1000):
        base = torch.ones(random.choice([(4,), (4, 2), (2, 2), (4, 4), (4, 2, 1, 1), (2, 2, 3, 3)]))
        tensors = {"on_input": torch.tensor(float(random.randrange(2)))} if kind is Scaling else {}
        for name in sorted({field.name for field in fields(kind)} - {"alpha", "on_input"}):
            if random.random() < (0.3 if name in OPTIONAL else 0.9):
                tensors[name] = torch.ones(random.choice(POOL))
        if random.random() < 0.1:
            tensors["dora_scale"] = torch.ones(random.choice([(4,), (4, 1), (1, 2), (1, 1)]))
        try:
            delta = parse(tensors)[0].get("weight")
            if delta is not None:
                delta.check(tuple(base.shape))
        except CheckpointError:
            continue
        if delta is not None:
            assert delta.change(base).shape == base.shape
            passed += 1
    assert passed > 3


def test_tensors_of_no_known_kind_are_told():
    changes, left = parse({"up": UP, "down": DOWN, "hada_w1": W, "diff_b": torch.ones(3)})
    assert set(changes) == {"weight", "bias"}
    assert left == ["hada_w1"]
    assert parse({"weight": W}) == ({}, ["weight"])
