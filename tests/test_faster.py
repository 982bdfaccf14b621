"""Less work, counted; and where nothing is left out, nothing changes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import ldm
from ldm import infotext, interpret, offload
from ldm.errors import RequestError
from ldm.faster import Evaluations, Reusing
from ldm.formats import write_safetensors
from ldm.inputs import NO_INPUTS
from ldm.library import Library
from ldm.lora_names import kohya_key, parts, trained
from ldm.planning import plan
from ldm.unet import UNet
from tests.test_controlnet import controlnet
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
    sigmas = plan(tiny("sd1"), GUIDED).sigmas[:-1]
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
    evaluations = Evaluations()
    network = Reusing(unet, 3, evaluations)
    for call in range(7):
        evaluations.count = call
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
    network = Reusing(unet, 2, Evaluations())
    whole = network(x, t, context, None, control)
    assert torch.equal(network(x, t, context, None, control), whole)  # the same input: the same features
    control[0] += 1
    assert not torch.equal(network(x, t, context, None, control), whole)


def made_in(request: ldm.Request, inputs: ldm.Inputs = NO_INPUTS, **of: Any) -> list[int]:
    """In which evaluations of a run the deep features are made."""
    models = replace(copied(), **of)
    count, made = -1, []

    def evaluated(*_: object) -> None:
        nonlocal count
        count += 1

    models.unet.input_blocks[0].register_forward_pre_hook(evaluated)
    models.unet.middle_block.register_forward_pre_hook(lambda *_: made.append(count))
    assert np.asarray(ldm.txt2img(models, request, inputs)[0]).std() > 0
    assert count + 1 == plan(models, request, inputs).steps_made or "refiner" in of
    return made


EVERY_THIRD = replace(GUIDED, reuse=3)


def test_features_are_made_in_every_so_many_evaluations():
    assert made_in(EVERY_THIRD) == [0, 3, 6, 9]
    assert made_in(GUIDED) == [*range(10)]
    second_order = replace(EVERY_THIRD, sampler="DPM++ SDE", steps=2)
    assert ldm.explain(tiny("sd1"), second_order).evaluations == 3


def test_features_are_never_from_long_ago():
    sigmas = plan(tiny("sd1"), GUIDED).sigmas[:-1]
    interval = replace(EVERY_THIRD, guidance_low=sigmas[-3], guidance_high=sigmas[2])
    assert made_in(interval) == [0, 2, 5, 7]  # without guidance, with, and without again
    assert made_in(replace(EVERY_THIRD, prompt="a [cat:dog:0.5]")) == [0, 3, 5, 8]
    assert made_in(replace(EVERY_THIRD, prompt="a [cat|dog]", reuse=2)) == [*range(10)]
    assert made_in(replace(EVERY_THIRD, prompt="a [cat|dog]")) == [0, 1, 4, 5, 8, 9]


def test_a_second_pass_makes_its_own_features():
    assert made_in(replace(EVERY_THIRD, hires=ldm.Hires(scale=1.5, steps=4))) == [0, 3, 6, 9, 10, 13]


def test_a_hint_that_begins_or_ends_counts_at_once():
    network = controlnet(tiny("sd1").unet.config)
    control = ldm.Control(network, Image.new("RGB", (64, 64), "white"), start=0.2, end=0.5)
    assert made_in(EVERY_THIRD, ldm.Inputs(controls=(control,))) == [0, 2, 5, 8]


def test_a_refiner_works_in_full():
    assert made_in(replace(EVERY_THIRD, refiner_switch=0.5), refiner=tiny("sd1"))[:2] == [0, 3]


@pytest.mark.parametrize("edit", [ldm.Edit(strength=0.5), ldm.Edit(strength=0.5, mask_blur=0)])
def test_given_pictures_are_drawn_with_reuse(edit: ldm.Edit):
    picture, mask = Image.new("RGB", (64, 64), "red"), Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    inputs = ldm.Inputs(picture=picture, mask=mask if edit.mask_blur == 0 else None)
    assert made_in(replace(EVERY_THIRD, edit=edit), inputs) == [0, 3]


@pytest.mark.parametrize("blocks", [False, True])
def test_reuse_on_a_device_that_holds_a_part_of_the_model(blocks: bool):
    wanted = ldm.txt2img(tiny("sd1"), EVERY_THIRD)[0]
    models = copied()
    home = {weight.data_ptr() for weight in models.unet.parameters()}
    at_home = []
    for layer in models.unet.modules():
        if layer._parameters:
            layer.register_forward_pre_hook(
                lambda layer, _: at_home.extend(home & {w.data_ptr() for w in layer.parameters()})
            )
    models = offload.offloaded(models, "cpu", blocks=blocks)
    assert ldm.txt2img(models, EVERY_THIRD)[0].tobytes() == wanted.tobytes()
    assert at_home == []


def test_reuse_is_refused_where_it_cannot_be():
    with pytest.raises(RequestError, match="DPM adaptive would take") as adaptive:
        plan(tiny("sd1"), replace(EVERY_THIRD, sampler="DPM adaptive"))
    with pytest.raises(RequestError, match="DPM adaptive would take"):
        plan(tiny("sd1"), replace(EVERY_THIRD, hires=ldm.Hires(sampler="DPM adaptive")))
    compiled = copied()
    compiled.unet.compile(backend="eager")
    with pytest.raises(RequestError, match="choose either reuse or --fast") as fixed:
        plan(compiled, EVERY_THIRD)
    plan(compiled, GUIDED)
    assert all(len(str(error.value)) <= 200 for error in (adaptive, fixed))


@pytest.mark.parametrize("option", [{"reuse": 2}, {"token_merging": 0.5, "token_merging_downsample": 2}])
def test_a_run_with_less_work_draws_nearly_the_same(option: dict[str, Any]):
    models, request = ldm.load(), ldm.Request(prompt="a red apple", seed=7, steps=10)
    wanted = np.asarray(ldm.txt2img(models, request)[0], dtype=float)
    found = np.asarray(ldm.txt2img(models, replace(request, **option))[0], dtype=float)
    error = np.sqrt(((wanted - found) ** 2).mean())
    assert 0 < error < 30  # of 255: pictures of two seeds differ by about 90


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


def test_an_explanation_tells_what_is_left_out():
    request = replace(
        GUIDED, guidance_skip=0.2, reuse=3, token_merging=0.5, hires=ldm.Hires(token_merging=0.25)
    )
    told = [line for line in str(ldm.explain(tiny("sd1"), request)).splitlines() if "less work" in line]
    assert told[:3] == [
        "less work: guidance in 7 of 10 steps",
        "less work: the UNet's deep features in 1 of 3 evaluations",
        "less work: self-attention with 50% of the tokens merged, on maps of the latent's size",
    ]
    assert told[-1].startswith("second pass, less work: self-attention with 25% of the tokens")
    assert "less work" not in str(ldm.explain(tiny("sd1"), GUIDED))


def test_four_steps_of_lcm_run_the_network_four_times_on_one_row(tmp_path: Path):
    random, models = torch.Generator().manual_seed(1), copied()
    tensors: dict[str, Tensor] = {}
    for place in trained(models, convolutions=True):  # as in the published LCM-LoRA: all of the UNet
        if place.part == "unet":
            shape = parts(models)["unet"].get_parameter(f"{place.name}.weight").shape
            key = kohya_key(models, place)
            tensors[f"{key}.lora_up.weight"] = torch.randn(
                shape[0], 2, *[1] * (len(shape) - 2), generator=random
            )
            tensors[f"{key}.lora_down.weight"] = torch.randn(2, *shape[1:], generator=random) / 100
            tensors[f"{key}.alpha"] = torch.tensor(2.0)
    write_safetensors(tmp_path / "lcm-lora.safetensors", tensors, {})
    models, seen = replace(models, library=Library(loras=tmp_path)), Rows()
    models.unet.register_forward_pre_hook(seen)
    request = replace(GUIDED, prompt="a cat <lora:lcm-lora:1>", sampler="LCM", steps=4, cfg_scale=1.0)
    plain, few = (ldm.txt2img(models, replace(request, prompt=one))[0] for one in ("a cat", request.prompt))
    assert seen == [1] * 8
    assert plain.tobytes() != few.tobytes()
    schedule, sigmas = models.denoiser.schedule, plan(models, request).sigmas
    assert [round(schedule.t(sigma)) for sigma in sigmas[:-1]] == [999, 749, 499, 249]
