"""Sheets with titles."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm import LdmError, RequestError
from ldm.images import save, with_text
from ldm.sheets.contact import contact_sheet
from ldm.sheets.titles import SMALLEST, Label, Title, check_size, notice, sheet, shrunk

WORDS = "a photograph of an astronaut riding a horse on the moon, highly detailed, 8k"
FILE_NAME = "v1-5-pruned-emaonly-fp16_with_a_name_that_never_ends.safetensors"


def title(*texts: str) -> Title:
    return tuple(map(Label, texts))


def plain(width: int, height: int, colour: tuple[int, int, int] = (200, 30, 30)) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def ink(image: Image.Image, background: tuple[int, int, int] = (255, 255, 255)) -> np.ndarray:
    """Where (height, width) something is drawn."""
    return (np.asarray(image) != background).any(axis=2)


def test_pictures_stand_row_by_row_without_titles():
    colours = [(i * 40, 0, 0) for i in range(5)]
    page = sheet([plain(8, 6, colour) for colour in colours], 3, margin=2)
    assert page.size == (3 * 8 + 2 * 2, 2 * 6 + 2)
    found = [page.getpixel((i % 3 * 10 + 4, i // 3 * 8 + 3)) for i in range(6)]
    assert found == [*colours, (255, 255, 255)]


def test_pictures_of_other_sizes_stand_in_the_middle_of_their_places():
    page = sheet([plain(20, 20), plain(10, 20), plain(20, 10)], 3)
    assert page.size == (60, 20)
    assert np.flatnonzero(ink(page.crop((20, 0, 40, 20))).any(axis=0)).tolist() == list(range(5, 15))
    assert np.flatnonzero(ink(page.crop((40, 0, 60, 20))).any(axis=1)).tolist() == list(range(5, 15))


@pytest.mark.parametrize("side", [64, 128, 512])
@pytest.mark.parametrize("text", ["Seed: 1", WORDS, FILE_NAME, WORDS * 20, "é" * 500, "\n\0 x", "日本"])
def test_titles_stay_inside_their_places(side: int, text: str):
    white = [plain(side, side, (255, 255, 255))] * 4
    titles = [title(text), title("x", text)]
    page = sheet(white, 2, tops=titles, lefts=titles)
    left, top = page.width - 2 * side, page.height - 2 * side
    drawn = ink(page)
    assert not drawn[top:, left:].any()  # nothing on the pictures
    assert left <= 0.75 * side
    assert top <= 2 * side
    for column in range(2):
        box = drawn[:top, left + column * side : left + (column + 1) * side]
        assert box.any()
        assert not box[:, [0, -1]].any()  # not cut at the sides,
        assert not box[[0, -1]].any()  # nor above or below
    for row in range(2):
        box = drawn[top + row * side : top + (row + 1) * side, :left]
        assert box.any()
        assert not box[:, [0, -1]].any()
        assert not box[[0, -1]].any()


def test_a_title_becomes_smaller_before_its_words_are_broken():
    def height_of_letters(text: str) -> int:
        page = sheet([plain(128, 128)], 1, tops=[title(text)])
        rows = np.flatnonzero(ink(page.crop((0, 0, 128, page.height - 128))).any(axis=1))
        return int(rows[-1] - rows[0])

    assert height_of_letters("sampler") == height_of_letters("sampler sam") > height_of_letters("s" * 20) > 4


def test_a_label_that_is_not_active_is_grey_and_struck_through():
    def drawn(active: bool) -> Image.Image:
        page = sheet([plain(128, 128)], 1, tops=[(Label("rain rain", active=active),)])
        return page.crop((0, 0, 128, page.height - 128))

    def struck(image: Image.Image) -> bool:
        columns = np.flatnonzero(ink(image).any(axis=0))
        return bool(ink(image)[:, columns[0] : columns[-1] + 1].all(axis=1).any())  # a line without a gap

    assert np.asarray(drawn(True)).min() < 60
    assert np.asarray(drawn(False)).min() == 153
    assert struck(drawn(False))
    assert not struck(drawn(True))


def test_sheets_are_pictures_for_sheets():
    inner = sheet([plain(32, 32)] * 4, 2, tops=[title("a"), title("b")])
    outer = sheet([inner, inner], 2, tops=[title("Seed: 1"), title("Seed: 2")])
    assert outer.width == 2 * inner.width
    assert outer.height > inner.height


def test_a_sheet_without_titles_has_no_place_for_them():
    assert sheet([plain(16, 16)], 1, tops=[()], lefts=[()]).size == (16, 16)


def test_a_sheet_that_is_too_large_is_told_before_it_is_made():
    with pytest.raises(RequestError, match=r"80000x80000 pixels, which is more than 64 million; .*--cell"):
        check_size(80_000, 80_000)
    with pytest.raises(RequestError):
        sheet([plain(1000, 1000)] * 100, 10)


def test_shrinking_keeps_the_shape_and_small_pictures():
    assert shrunk(plain(400, 200), 100).size == (100, 50)
    assert shrunk(plain(3, 900), 100).size == (1, 100)
    small = plain(50, 50)
    assert shrunk(small, 100) is small
    assert shrunk(small, None) is small


def test_a_notice_fits_into_its_picture():
    for side in (32, 64, 512):
        image = notice("the sampler 'LMS' has no option 'eta'; it has order", side, side)
        drawn = ink(image, (230, 230, 230))
        assert image.size == (side, side)
        assert drawn.any()
    assert not drawn[[0, -1]].any()
    assert SMALLEST >= 8


def test_a_contact_sheet_tells_names_and_seeds(tmp_path: Path):
    save(
        with_text(plain(64, 64), "a cat\nSteps: 3, Sampler: Euler, CFG scale: 7, Seed: 5"), tmp_path / "a.png"
    )
    save(plain(600, 300), tmp_path / "b.webp")
    (tmp_path / "c.png").write_bytes(b"no picture")
    paths = sorted(tmp_path.iterdir())
    page, failed = contact_sheet(paths, 2, side=100, margin=0)
    assert list(failed) == [tmp_path / "c.png"]
    assert all(isinstance(error, LdmError) for error in failed.values())
    assert page.width == 200
    caption = page.height // 2 - 100
    assert ink(page.crop((0, 100, 100, 100 + caption))).any()
    again, _ = contact_sheet(paths, 2, side=100, margin=0)
    assert page.tobytes() == again.tobytes()
    assert contact_sheet(paths[:1], 6)[0].width == 64  # no empty columns
