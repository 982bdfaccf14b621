"""Pictures: rounding, the settings they carry, and files that are whole and never replaced."""

import io
import multiprocessing
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm.errors import LdmError
from ldm.images import grid, save_numbered, save_png, to_pil, with_text


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
