"""Parts that come to a device when they run.

The device is the CPU here, too: what comes to it is a copy at another address all the same.
"""

import gc
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from weakref import ref

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import ldm
from ldm import lora, offload
from ldm.controlnet import Control, ControlNet
from ldm.controlnet_file import load_controlnet
from ldm.formats import write_safetensors
from ldm.lora_names import kohya_key, parts, trained
from ldm.models import Models
from ldm.t2i_adapter import Adapter
from tests.test_controlnet import controlnet as random_controlnet
from tests.tiny_families import tiny

REQUEST = ldm.Request(prompt="a cat", steps=2, width=64, height=64, sampler="Euler")


def copied(name: str = "sd1") -> Models:
    """A model that a test may change."""
    models = tiny(name)
    network = deepcopy(models.unet)
    return replace(
        models,
        denoiser=replace(models.denoiser, network=network),
        vae=deepcopy(models.vae),
        text=tuple(map(deepcopy, models.text)),
    )


def addresses(*modules: nn.Module) -> set[int]:
    return {w.data_ptr() for module in modules for w in module.parameters()}


def modules(models: Models) -> list[nn.Module]:
    return [part for part in models.parts if isinstance(part, nn.Module)]


def watch(models: Models, seen: Callable[[nn.Module], None]) -> None:
    """Call `seen` with each layer that has weights, when it runs."""
    for part in modules(models):
        for layer in part.modules():
            if layer._parameters:
                layer.register_forward_pre_hook(lambda layer, _: seen(layer))


@pytest.mark.parametrize("name", ["sd1", "sdxl", "unconditional"])
@pytest.mark.parametrize("blocks", [False, True])
def test_only_the_running_part_is_on_the_device(name: str, blocks: bool):
    request = REQUEST if name != "unconditional" else replace(REQUEST, prompt="")
    wanted = ldm.txt2img(tiny(name), request)[0]
    models = copied(name)
    home = addresses(*modules(models))
    models = offload.offloaded(models, "cpu", blocks=blocks)
    units = [*models.text, *offload.units(models.unet, blocks=blocks), *((models.vae,) if models.vae else ())]
    moved: list[nn.Module] = []

    def seen(layer: nn.Module) -> None:
        (unit,) = (unit for unit in units if addresses(unit) - home)
        assert not addresses(unit) & home
        assert layer in set(unit.modules())
        moved.append(unit)

    watch(models, seen)
    assert ldm.txt2img(models, request)[0].tobytes() == wanted.tobytes()
    assert set(units) == set(moved)
    offload.leave(models.unet)
    assert addresses(*modules(models)) == home


@pytest.mark.parametrize("blocks", [False, True])
def test_a_controlnet_comes_and_goes_like_the_parts_of_the_model(tmp_path: Path, blocks: bool):
    path = tmp_path / "control.safetensors"
    write_safetensors(path, random_controlnet(tiny("sd1").unet.config).state_dict(), {})
    hint = Image.linear_gradient("L")

    def drawn(models: Models, control: ControlNet | Adapter) -> bytes:
        inputs = ldm.Inputs(controls=(Control(control, hint),))
        return ldm.txt2img(models, REQUEST, inputs)[0].tobytes()

    wanted = drawn(tiny("sd1"), load_controlnet(path, tiny("sd1")))
    assert wanted != ldm.txt2img(tiny("sd1"), REQUEST)[0].tobytes()
    models = offload.offloaded(copied(), "cpu", blocks=blocks)
    control = load_controlnet(path, models)
    home = addresses(control)
    away: list[bool] = []
    for layer in control.modules():
        if layer._parameters:
            layer.register_forward_pre_hook(lambda layer, _: away.append(not addresses(layer) & home))
    assert drawn(models, control) == wanted
    assert away
    assert all(away)
    offload.leave(control)
    assert addresses(control) == home


def test_the_unet_comes_once_for_all_steps():
    models = offload.offloaded(copied(), "cpu")
    places, last = set(), models.unet.out[2]
    watch(models, lambda layer: places.update(addresses(layer)) if layer is last else None)
    ldm.txt2img(models, replace(REQUEST, steps=4))
    assert len(places) == 2  # of a weight and a bias


@pytest.mark.parametrize("blocks", [False, True])
def test_lora_files_act_and_go_without_a_trace(tmp_path: Path, blocks: bool):
    tensors: dict[str, Tensor] = {}
    random = torch.Generator().manual_seed(1)
    for place in trained(tiny("sd1"), convolutions=False):
        weight = parts(tiny("sd1"))[place.part].get_parameter(f"{place.name}.weight")
        key = kohya_key(tiny("sd1"), place)
        tensors[f"{key}.lora_up.weight"] = torch.randn(len(weight), 2, generator=random)
        tensors[f"{key}.lora_down.weight"] = torch.randn(2, weight.shape[1], generator=random)
    path = tmp_path / "style.safetensors"
    write_safetensors(path, tensors, {})
    plain = ldm.txt2img(tiny("sd1"), REQUEST)[0]
    with lora.applied(tiny("sd1"), [(path, 0.1)]):
        styled = ldm.txt2img(tiny("sd1"), REQUEST)[0]
    assert styled.tobytes() != plain.tobytes()

    models = offload.offloaded(copied(), "cpu", blocks=blocks)
    for _ in range(2):  # the second time, parts of the first run are still on the device
        with lora.applied(models, [(path, 0.1)]):
            assert ldm.txt2img(models, REQUEST)[0].tobytes() == styled.tobytes()
        assert ldm.txt2img(models, REQUEST)[0].tobytes() == plain.tobytes()
    for part, network in parts(models).items():
        for name, weight in network.state_dict().items():
            assert torch.equal(weight, parts(tiny("sd1"))[part].state_dict()[name])


def test_a_run_in_half_precision_is_repeated_in_float32(caplog: pytest.LogCaptureFixture):
    def half() -> Models:
        models = copied()
        for network in (models.unet, *models.text):
            network.half()
        models.unet.get_parameter("out.2.bias").fill_(65500)  # what is added to it is beyond float16
        models.unet.get_parameter("out.2.weight").mul_(1000)
        return replace(models, denoiser=replace(models.denoiser, dtype=torch.float16))

    wanted = ldm.txt2img(half(), REQUEST)[0]
    models = offload.offloaded(half(), "cpu")
    caplog.clear()
    assert ldm.txt2img(models, REQUEST)[0].tobytes() == wanted.tobytes()
    assert "repeated in float32" in caplog.text
    assert {w.dtype for w in models.unet.parameters()} == {torch.float16}


def test_a_part_that_does_not_fit_leaves_the_room_empty():
    models = copied()
    unet = models.unet
    home = addresses(unet)
    room = offload.Room(torch.device("cuda:99"))  # there is none: the first copy fails
    with pytest.raises((RuntimeError, AssertionError)):
        room.enter(unet)
    assert room.guest is None
    assert addresses(unet) == home


@pytest.mark.parametrize("blocks", [False, True])
def test_models_that_nobody_uses_any_more_go_with_all_their_weights(blocks: bool):
    models = offload.offloaded(copied(), "cpu", blocks=blocks)
    ldm.txt2img(models, REQUEST)  # the autoencoder comes last and stays in the room
    kept = [ref(thing) for part in modules(models) for thing in (part, *part.parameters())]
    del models
    gc.collect()
    assert not [one for one in kept if one() is not None]


@pytest.mark.parametrize("blocks", [False, True])
def test_what_is_offloaded_already_is_refused_and_stays_as_it_was(blocks: bool):
    models, other = copied(), copied()
    home = addresses(*modules(models))
    others = addresses(*modules(other))
    wanted = ldm.txt2img(models, REQUEST)[0].tobytes()
    models = offload.offloaded(models, "cpu")
    for again in (models, replace(other, vae=models.vae), replace(other, refiner=models)):
        with pytest.raises(ldm.RequestError, match="offloaded already"):
            offload.offloaded(again, "cpu", blocks=blocks)
    assert not any(map(offload.is_offloaded, modules(other)))
    assert ldm.txt2img(models, REQUEST)[0].tobytes() == wanted
    assert ldm.txt2img(other, REQUEST)[0].tobytes() == wanted
    assert addresses(*modules(other)) == others
    offload.leave(models.unet)
    assert addresses(*modules(models)) == home


def test_a_refiner_may_share_parts_with_its_model():
    models = copied()
    wanted = ldm.txt2img(models, REQUEST)[0].tobytes()
    home = addresses(*modules(models))
    models = offload.offloaded(replace(models, refiner=models), "cpu")
    assert ldm.txt2img(replace(models, refiner=None), REQUEST)[0].tobytes() == wanted
    offload.leave(models.unet)
    assert addresses(*modules(models)) == home
