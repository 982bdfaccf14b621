"""Pictures: rounding, the settings they carry, and files that are whole and never replaced."""

import io
import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm.errors import LdmError
from ldm.images import grid, infotext, quote, save_numbered, save_png, to_pil, with_text
from ldm.request import Request
from tests.golden import golden
from tests.tiny_families import tiny

SETTLED = Request(
    prompt="a cat, sitting",
    seed=7,
    width=512,
    height=768,
    steps=20,
    cfg_scale=7.0,
    sampler="DPM++ 2M",
    schedule="karras",
)


def test_levels_are_rounded_and_clamped():
    values = torch.tensor([-2.0, -1.0, 0.0, 100.6 / 127.5 - 1, 1.0, 3.0]).expand(3, 1, 6)
    assert to_pil(values).getchannel("R").tobytes() == bytes([0, 0, 128, 101, 255, 255])


def test_axes_are_channel_row_column():
    pixels = -torch.ones(3, 2, 4, dtype=torch.float16)
    pixels[2, 1, 3] = 1
    image = to_pil(pixels)
    assert image.size == (4, 2)
    assert image.getpixel((3, 1)) == (0, 0, 255)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_picture_is_an_error_not_black(value: float):
    pixels = torch.zeros(3, 4, 4)
    pixels[1, 2, 3] = value
    with pytest.raises(LdmError, match="NaN"):
        to_pil(pixels)


@pytest.mark.parametrize("text", ["plain\nSteps: 1", "ünïcode", "日本 🍎", "", "half a pair \udce9"])
def test_the_text_survives_a_plain_save(text: str):
    file = io.BytesIO()
    to_pil(torch.zeros(3, 8, 8), text).save(file, "PNG")
    assert Image.open(file, formats=["PNG"]).info["parameters"] == text.replace("\udce9", "?")


def test_quoting_equals_the_web_ui():
    for case in json.loads(golden("infotext/quote.json").read_text())["cases"]:
        assert quote(case["value"]) == case["quoted"]


def test_infotext_has_the_fields_of_the_web_ui_in_its_order():
    assert infotext(SETTLED, tiny("sd1")) == (
        "a cat, sitting\nSteps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 7, "
        "Size: 512x768, RNG: CPU, Version: ldm 0.1.0"
    )


def test_infotext_names_what_differs_from_the_defaults():
    request = replace(
        SETTLED,
        prompt="",
        negative_prompt="blurry\ndark",
        cfg_scale=6.5,
        sampler="DDIM",
        schedule="ddim_uniform",
        clip_skip=2,
        eta=0.5,
        cfg_rescale=0.7,
        sigma_max=10.0,
        rho=5.0,
    )
    assert infotext(request, tiny("sd1")) == (
        "Negative prompt: blurry\ndark\nSteps: 20, Sampler: DDIM, Schedule type: DDIM, CFG scale: 6.5, "
        "Seed: 7, Size: 512x768, Clip skip: 2, RNG: CPU, CFG rescale: 0.7, Eta DDIM: 0.5, "
        "Schedule max sigma: 10, Schedule rho: 5, Version: ldm 0.1.0"
    )
    unchanged = replace(SETTLED, sampler="Euler a", eta=1.0, s_noise=1.0, clip_skip=1)
    assert "Eta" not in infotext(unchanged, tiny("sd1"))
    assert "Clip skip" not in infotext(unchanged, tiny("sd1"))


def test_infotext_names_the_file(tmp_path: Path):
    path = tmp_path / "model, v1.safetensors"
    path.write_bytes(b"abc")
    text = infotext(SETTLED, replace(tiny("sd1"), path=path))
    assert 'Model hash: ba7816bf8f, Model: "model, v1", RNG' in text  # FIPS 180-2, appendix B.1


def test_files_are_numbered_after_the_highest(tmp_path: Path):
    image = Image.new("RGB", (4, 4))
    assert save_numbered(image, tmp_path, "42").name == "00000-42.png"
    assert save_numbered(image, tmp_path, "43").name == "00001-43.png"
    (tmp_path / "00000-42.png").unlink()
    (tmp_path / "00012-notes.txt").touch()
    (tmp_path / "unrelated.png").touch()
    assert save_numbered(image, tmp_path, "44").name == "00013-44.png"
    (tmp_path / "99999-1.png").touch()
    assert save_numbered(image, tmp_path, "45").name == "100000-45.png"


def _write(folder: Path, colour: int) -> None:
    for _ in range(20):
        save_numbered(Image.new("RGB", (4, 4), (colour, 0, 0)), folder, "same")


def test_writers_in_one_folder_lose_nothing(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(tmp_path, colour)) for colour in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    colours = [Image.open(path).tobytes()[0] for path in tmp_path.iterdir()]
    assert sorted(colours) == [colour for colour in range(4) for _ in range(20)]


def test_a_file_is_replaced_only_when_told(tmp_path: Path):
    path = tmp_path / "x.png"
    save_png(with_text(Image.new("RGB", (4, 4)), "first"), path)
    with pytest.raises(LdmError, match=r"x\.png exists already"):
        save_png(with_text(Image.new("RGB", (4, 4)), "second"), path)
    assert Image.open(path).info["parameters"] == "first"
    save_png(with_text(Image.new("RGB", (4, 4)), "second"), path, overwrite=True)
    assert Image.open(path).info["parameters"] == "second"
    assert list(tmp_path.iterdir()) == [path]


def test_grid_puts_pictures_row_by_row():
    images = [with_text(Image.new("RGB", (2, 1), (i, 0, 0)), f"text {i}") for i in range(1, 6)]
    sheet = grid(images)
    assert sheet.size == (6, 2)
    assert [sheet.getpixel((x, y)) for y in (0, 1) for x in (0, 2, 4)] == [
        (i, 0, 0) for i in (1, 2, 3, 4, 5, 0)
    ]
    assert sheet.info["parameters"] == "text 1"
