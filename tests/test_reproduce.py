"""Pictures are made again: the same pixels from what a picture tells, and the files found by hash."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import ldm
from ldm.compat import PROFILES, Compatibility
from ldm.denoise import Prediction
from ldm.errors import LdmError
from ldm.files import sha256
from ldm.formats import write_safetensors
from ldm.images import save
from ldm.infotext import parse
from ldm.library import Library
from ldm.reproduce import diff, prepare, replay
from ldm.request import Request
from ldm.samplers import SAMPLERS
from tests.lora.test_lora import lora_tensors
from tests.tiny_families import tiny

SMALL = Request(prompt="a red apple", negative_prompt="blur", seed=5, width=16, height=16, steps=3)


def again(image: Image.Image, models: ldm.Models) -> Image.Image:
    """The picture made from nothing but its own text."""
    found = prepare(image, models)
    assert found.notes == ()
    return found.draw()


def assert_same(a: Image.Image, b: Image.Image) -> None:
    assert a.tobytes() == b.tobytes()
    assert a.info["parameters"] == b.info["parameters"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_pictures_of_every_sampler_replay_to_the_same_pixels(sampler: str):
    # The adaptive one looks at the network some hundred times.
    models = tiny("unconditional" if sampler == "DPM adaptive" else "sd1")
    first, second = ldm.txt2img(models, replace(SMALL, sampler=sampler, batch_size=2))
    assert first.tobytes() != second.tobytes()
    assert_same(again(second, models), second)


@pytest.mark.parametrize(
    "settings",
    [
        {"sampler": "Euler a", "compat": Compatibility(noise="philox")},
        {"sampler": "DPM++ SDE", "compat": Compatibility(noise="philox")},
        {"sampler": "Euler a", "variation_seed": 9, "variation_strength": 0.3, "ensd": 31337},
        {"sampler": "DPM++ 2M SDE", "variation_seed": 9, "variation_strength": 0.3},
        {"seed_resize_from": (48, 24), "width": 40, "height": 24},
        {"sampler": "Euler", "s_churn": 2.0, "s_tmin": 0.1, "s_tmax": 10.0, "s_noise": 1.01, "rho": 5.0}
        | {"schedule": "karras", "sigma_min": 0.05, "sigma_max": 11.1},
        {"sampler": "DDIM", "eta": 0.7, "cfg_rescale": 0.7, "cfg_scale": 1 / 3 + 6},
        {"sampler": "UniPC", "order": 2, "schedule": "automatic"},
        {"clip_skip": 2, "cfg_scale": 1.0},
        {"sampler": "DDIM", "compat": PROFILES["a1111"], "prompt": "[a:b:1] and a [d|e]"},
        {"sampler": "PLMS", "compat": PROFILES["compvis"], "steps": 7},
        {"compat": PROFILES["comfyui"]},
        {"compat": PROFILES["diffusers"], "prompt": " kept as it is \nNegative prompt: too"},
        {"compat": Compatibility(old_karras_range=True, emphasis="no norm")},
    ],
    ids=str,
)
def test_pictures_of_every_setting_replay_to_the_same_pixels(settings: dict[str, Any]):
    second = ldm.txt2img(tiny("sd1"), replace(SMALL, batch_size=2, **settings))[1]
    assert_same(again(second, tiny("sd1")), second)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"clip_skip": 1},
        {"negative_prompt": ""},
        {"schedule": "align_your_steps"},
        {"negative_prompt": "", "compat": Compatibility(zero_empty_negative=False)},
    ],
    ids=str,
)
def test_pictures_of_sdxl_replay_to_the_same_pixels(settings: dict[str, Any]):
    [image] = ldm.txt2img(tiny("sdxl"), replace(SMALL, **settings))
    assert_same(again(image, tiny("sdxl")), image)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints and a VAE in a folder and below it, the one that is wanted under the least likely name."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "below").mkdir()
    tiny("unconditional").save(folder / "below" / "zebra.safetensors", metadata={"which": "wanted"})
    tiny("unconditional").save(folder / "model.safetensors", metadata={"which": "another"})
    vae = tiny("unconditional").state_dict()
    brighter = {name: w * 1.1 for name, w in vae.items() if name.startswith("first_stage_model.")}
    write_safetensors(folder / "bright.safetensors", brighter, {})
    return folder


def picture(folder: Path, path: Path, **settings: Any) -> Image.Image:
    [image] = ldm.txt2img(ldm.load(folder / "below" / "zebra.safetensors", **settings), SMALL)
    save(image, path)
    return image


@pytest.mark.parametrize("ending", [".png", ".webp"])
def test_a_file_replays_with_its_checkpoint_found_by_hash(folder: Path, tmp_path: Path, ending: str):
    image = picture(folder, tmp_path / f"x{ending}")
    renamed = image.info["parameters"].replace("Model: zebra", "Model: model")
    for source in (tmp_path / f"x{ending}", parse(renamed)):
        assert_same(replay(source, folders=[folder]), image)


@pytest.mark.parametrize("chosen", ["vae", "prediction", "dtype"])
def test_parts_chosen_by_hand_replay(folder: Path, tmp_path: Path, chosen: str):
    settings = {
        "vae": {"vae": folder / "bright.safetensors"},
        "prediction": {"prediction": Prediction.V},
        "dtype": {"dtype": torch.bfloat16},
    }[chosen]
    image = picture(folder, tmp_path / "x.png", **settings)
    expected = {
        "vae": "VAE: bright.safetensors",
        "prediction": "Prediction: v",
        "dtype": "Precision: bfloat16",
    }
    assert expected[chosen] in image.info["parameters"]
    assert_same(replay(tmp_path / "x.png", folders=[folder]), image)


@pytest.mark.parametrize("kind", ["LoRA", "embedding"])
def test_files_of_the_prompt_are_found_by_hash(kind: str, tmp_path: Path):
    """Renamed and moved; under the old name lies another file."""
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new / "below"):
        folder.mkdir(parents=True)
    if kind == "LoRA":
        tensors, others = (lora_tensors(tiny("sd1"), seed) for seed in (0, 1))
        prompt, name = "a red apple <lora:style:0.8:0.5>", "other"
    else:
        tensors, others = {"emb_params": torch.ones(2, 64)}, {"emb_params": -torch.ones(2, 64)}
        prompt, name = "a red apple in style", "style"  # a word of the prompt: it cannot have another name
    write_safetensors(old / "style.safetensors", tensors, {})
    write_safetensors(new / "style.safetensors", others, {})
    write_safetensors(new / "below" / f"{name}.safetensors", tensors, {})
    models = replace(tiny("sd1"), library=Library(loras=old, embeddings=old if kind != "LoRA" else None))
    [image] = ldm.txt2img(models, replace(SMALL, prompt=prompt))
    found = prepare(image, tiny("sd1"), [new])
    assert found.notes == ()
    assert_same(found.draw(), image)
    [plain] = ldm.txt2img(tiny("sd1"), replace(SMALL, prompt="a red apple in style"))
    assert plain.tobytes() != image.tobytes()


def test_a_picture_alone_is_not_said_to_be_of_a_batch():
    [image] = ldm.txt2img(tiny("sd1"), SMALL)
    assert "Batch" not in image.info["parameters"]
    two = ldm.txt2img(tiny("sd1"), replace(SMALL, batch_size=2))
    assert prepare(two[1], tiny("sd1")).request == prepare(two[0], tiny("sd1")).request


@pytest.mark.parametrize(
    "fields", ["Batch size: 5000, Batch pos: 1", "Batch size: 2, Batch pos: 9", "Batch size: x"]
)
def test_a_batch_that_cannot_be_is_no_error(fields: str):
    text = f"a\nSteps: 2, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 32x32, {fields}, Version: ldm 0.1.0"
    found = prepare(text, tiny("sd1"))
    assert (found.request.batch_size, found.request.seed, found.place) == (1, 1, 0)


def test_an_old_model_hash_is_understood(folder: Path, tmp_path: Path):
    path = tmp_path / "big.safetensors"
    path.write_bytes((folder / "model.safetensors").read_bytes())
    digest = sha256(path, start=0x100000, size=0x10000)[:8]
    text = f"x\nSteps: 2, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 32x32, Model hash: {digest}"
    assert prepare(text, folders=[tmp_path]).models.path == path


def test_another_model_is_told(folder: Path, tmp_path: Path):
    image = picture(folder, tmp_path / "x.png")
    other = ldm.load(folder / "model.safetensors", prediction="v")
    notes = prepare(image, other).notes
    was, now = image.info["parameters"].partition("Model hash: ")[2][:10], other.hash
    assert f"Model hash: the picture was made with {was}, this is {now}" in notes
    assert "Model: the picture was made with zebra, this is model" in notes
    assert "Prediction: the picture was made with nothing, this is v" in notes


def test_what_is_missing_is_one_clear_sentence(folder: Path, tmp_path: Path):
    fields = "Steps: 2, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 32x32"
    with pytest.raises(LdmError, match="does not tell its checkpoint"):
        replay(f"x\n{fields}")
    with pytest.raises(LdmError, match=r"the checkpoint 'gone' \(0123456789\) is not in the given folders"):
        replay(f"x\n{fields}, Model hash: 0123456789, Model: gone", folders=[folder])
    with pytest.raises(LdmError, match=r"the checkpoint 'gone' \(without hash\) is needed; give the folder"):
        replay(f"x\n{fields}, Model: gone")
    with pytest.raises(LdmError, match="no folder"):
        replay(f"x\n{fields}", folders=[tmp_path / "gone"])
    with pytest.raises(LdmError, match="no settings"):
        replay("only\nwords")


def test_fields_that_cannot_be_done_are_warnings(caplog: pytest.LogCaptureFixture):
    text = (
        "a cat <lora:gone:0.8>\nSteps: 2, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 32x32, Clip skip: 2, "
        'Face restoration: GFPGAN, Lora hashes: "gone: 0123456789ab", TI hashes: "easy: 0123456789ab", '
        "VAE hash: 0123456789, Version: v1.10.1"
    )
    with caplog.at_level(logging.WARNING):
        image = replay(text, tiny("sd1"))
    assert [record.getMessage() for record in caplog.records] == [
        "Face restoration: GFPGAN is left out: this is not done here",
        "lora: 'gone' was not found; the picture is made without it",
        "TI hashes: the embedding 'easy' was not found; its name is a plain word",
        "VAE hash: the picture was made with 0123456789, this is nothing",
    ]
    assert parse(image.info["parameters"]).prompt == "a cat "


def test_the_web_uis_clip_skip_is_for_the_first_family():
    text = "a\nSteps: 2, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 32x32, Clip skip: 2"
    assert prepare(text, tiny("sd1")).request.clip_skip == 2
    assert prepare(text, tiny("sdxl")).request.clip_skip is None


def test_differences_of_pictures_texts_and_requests(tmp_path: Path):
    [a] = ldm.txt2img(tiny("sd1"), SMALL)
    [b] = ldm.txt2img(tiny("sd1"), replace(SMALL, seed=6, cfg_scale=3.5, clip_skip=2))
    save(b, tmp_path / "b.png")
    expected = [("CFG scale", "7", "3.5"), ("Seed", "5", "6"), ("Clip skip", None, "2")]
    assert diff(a, tmp_path / "b.png") == expected
    assert diff(a.info["parameters"], parse(b.info["parameters"])) == expected
    assert diff(a, a) == []
    assert diff(SMALL, replace(SMALL, compat=PROFILES["a1111"], seed=1)) == [
        ("seed", 5, 1),
        ("compat.noise", "cpu", "philox"),
        *[("compat.late_first_edit", False, True), ("compat.ddim_levels", "exact", "webui")],
        ("compat.truncate_8bit", False, True),
    ]
    assert diff(a, replace(SMALL, sampler="DPM++ 2M", schedule="karras", cfg_scale=7.0)) == []
