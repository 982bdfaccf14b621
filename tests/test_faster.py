"""Less work, counted; and where nothing is left out, nothing changes."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ldm
from ldm import infotext, interpret
from ldm.faster import Reusing
from ldm.unet import UNet
from tests.test_offload import REQUEST, copied
from tests.tiny_families import tiny, unet_config

STEPS = 10
GUIDED = replace(REQUEST, steps=STEPS, cfg_scale=5.0)


class Rows(list[int]):
    """The size of the batch in each call of a UNet."""

    def __call__(self, unet: Any, inputs: tuple[Tensor, ...]) -> None:
        self.append(len(inputs[0]))


def rows(request: ldm.Request) -> list[int]:
    models, seen = copied(), Rows()
    models.unet.register_forward_pre_hook(seen)
    ldm.txt2img(models, request)
    return seen


def test_outside_the_interval_half_the_work_is_done():
    sigmas = ldm.plan(tiny("sd1"), GUIDED).sigmas[:-1]
    low, high = sigmas[-3], sigmas[2]
    expected = [1 + (low < sigma <= high) for sigma in sigmas]
    assert expected == [1, 1, 2, 2, 2, 2, 2, 1, 1, 1]
    assert rows(replace(GUIDED, guidance_low=low, guidance_high=high)) == expected


def test_early_steps_are_skipped_as_in_the_web_ui():
    assert rows(replace(GUIDED, guidance_skip=0.2)) == [1] * 3 + [2] * 7  # steps 0, 1, 2 of 10
    assert rows(GUIDED) == [2] * 10


def test_without_guidance_the_picture_is_that_of_scale_one():
    everywhere = ldm.txt2img(tiny("sd1"), replace(GUIDED, guidance_low=1000))[0]
    unguided = ldm.txt2img(tiny("sd1"), replace(GUIDED, cfg_scale=1.0))[0]
    assert everywhere.tobytes() == unguided.tobytes()


@pytest.mark.parametrize("name", ["sd1", "sdxl", "unconditional", "sd1-inpaint"])
@torch.no_grad()
def test_every_first_call_is_the_whole_unet(name: str):
    torch.manual_seed(0)
    config = replace(unet_config(tiny(name).family), channel_mult=(1, 2, 2), depth=(1, 1, 0))
    unet = UNet(config).eval()
    random = torch.Generator().manual_seed(0)
    context = torch.randn(2, 5, config.context_dim, generator=random) if config.context_dim else None
    y = torch.randn(2, config.vector_dim, generator=random) if config.vector_dim else None
    network = Reusing(unet, 3)
    for call in range(7):
        x = torch.randn(2, config.in_channels, 9, 13, generator=random)  # odd: halving rounds up
        t = torch.tensor([500.0 - call, 3.0])
        same = torch.equal(network(x, t, context, y), unet(x, t, context, y))
        assert same == (call % 3 == 0)


@torch.no_grad()
def test_controls_add_to_the_first_block_in_each_call():
    unet = UNet(unet_config(tiny("sd1").family)).eval()
    x, t, context = torch.randn(1, 4, 8, 8), torch.zeros(1), torch.randn(1, 5, 64)
    control = [
        torch.zeros_like(one) for one in unet.down(x, unet.embedding(x, t, context, None), context, {})
    ]
    network = Reusing(unet, 2)
    whole = network(x, t, context, None, control)
    assert torch.equal(network(x, t, context, None, control), whole)  # the same input: the same features
    control[0] += 1
    assert not torch.equal(network(x, t, context, None, control), whole)


def test_a_run_with_reuse_draws_nearly_the_same():
    models, request = ldm.load(), ldm.Request(prompt="a red apple", seed=7, steps=20)
    wanted = np.asarray(ldm.txt2img(models, request)[0], dtype=float)
    found = np.asarray(ldm.txt2img(models, replace(request, reuse=2))[0], dtype=float)
    error = np.sqrt(((wanted - found) ** 2).mean())
    assert 0 < error < 20  # of 255


def test_the_settings_come_back_from_the_picture():
    request = replace(GUIDED, guidance_low=0.3, guidance_high=5.5, guidance_skip=0.1, reuse=3)
    picture = ldm.txt2img(tiny("sd1"), request)[0]
    again, notes = interpret.request(infotext.parse(picture.info["parameters"]))
    assert notes == []
    for name in ("guidance_low", "guidance_high", "guidance_skip", "reuse"):
        assert getattr(again, name) == getattr(request, name)


def test_the_web_ui_leaves_out_every_other_step_unless_it_says_so():
    text = "a cat\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 1, NGMS: 0.5, Version: v1.10.1"
    request, notes = interpret.request(infotext.parse(text))
    assert request.guidance_low == 0
    assert any(note.startswith("NGMS") for note in notes)
    request, _ = interpret.request(
        infotext.parse(text.replace("NGMS: 0.5", "NGMS: 0.5, NGMS all steps: True"))
    )
    assert request.guidance_low == 0.5
