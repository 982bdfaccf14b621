"""Extras: sizes, two upscalers, and what the picture says of itself."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops

from ldm.errors import LdmError, RequestError
from ldm.extras import Extras, Target, enlarged_file
from ldm.images import read_text, save, with_text
from ldm.upscalers import load_upscaler

LANCZOS, NEAREST = load_upscaler("Lanczos"), load_upscaler("Nearest")


def picture(width: int = 12, height: int = 8) -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        (Target(), (480, 320)),
        (Target(scale=1.505), (181, 120)),
        (Target(scale=0.001), (1, 1)),
        (Target(scale=4, max_side=300), (300, 200)),
        (Target(scale=2, max_side=300), (240, 160)),
        (Target(size=(300, 300)), (450, 300)),
        (Target(size=(360, 100)), (360, 240)),
        (Target(size=(60, 40), crop=True), (60, 40)),
    ],
)
def test_a_size_follows_from_the_shape(target: Target, wanted: tuple[int, int]) -> None:
    assert target.enlarged(120, 80) == wanted


def test_a_crop_takes_the_middle() -> None:
    target = Target(size=(8, 8), crop=True)
    large = Extras(target=target, upscaler=NEAREST)(picture(12, 8))
    assert large.size == (8, 8)
    assert not ImageChops.difference(large, picture(12, 8).crop((2, 0, 10, 8))).getbbox()
    assert Extras(target=Target(size=(8, 8)), upscaler=NEAREST)(picture(12, 8)).size == (12, 8)


@pytest.mark.parametrize(
    "settings",
    [
        {"scale": 0},
        {"scale": float("nan")},
        {"scale": 65},
        {"size": (0, 5)},
        {"size": (5, 70_000)},
        {"max_side": 0},
        {"crop": True},
        {"size": (5, 5), "max_side": 5},
    ],
)
def test_sizes_that_make_no_sense_are_refused(settings: dict) -> None:
    with pytest.raises(RequestError):
        Target(**settings)


def test_a_picture_longer_than_files_allow_is_refused_before_it_is_made() -> None:
    with pytest.raises(RequestError, match="66000x66 pixels are too many"):
        Target(scale=33).enlarged(2000, 2)


def test_the_second_picture_is_laid_over_the_first() -> None:
    both = Extras(target=Target(), upscaler=LANCZOS, second=NEAREST, visibility=0.25)(picture())
    first = Extras(target=Target(), upscaler=LANCZOS)(picture())
    second = Extras(target=Target(), upscaler=NEAREST)(picture())
    mean = 0.75 * np.asarray(first, float) + 0.25 * np.asarray(second, float)
    assert np.abs(np.asarray(both) - mean).max() <= 1  # Pillow cuts the fraction off
    unseen = Extras(target=Target(), upscaler=LANCZOS, second=NEAREST, visibility=0)(picture())
    assert unseen.tobytes() == first.tobytes()


def test_progress_runs_once_from_0_to_1() -> None:
    network = load_upscaler("R-ESRGAN AnimeVideo", tile=8, overlap=2)
    shares: list[float] = []
    Extras(target=Target(), upscaler=network, second=network)(picture(), shares.append)
    assert shares == sorted(shares)
    assert shares[0] <= 0.5 < 1 == shares[-1]


def test_transparency_stays() -> None:
    image = picture().convert("RGBA")
    alpha = Image.linear_gradient("L").resize(image.size)
    image.putalpha(alpha)
    for second in (None, NEAREST):
        large = Extras(target=Target(), upscaler=LANCZOS, second=second)(image)
        assert large.mode == "RGBA"
        wanted = alpha.resize(large.size, Image.Resampling.LANCZOS)
        assert not ImageChops.difference(large.getchannel("A"), wanted).getbbox()


@pytest.mark.parametrize(
    ("target", "second", "text"),
    [
        (Target(), None, "Postprocess upscale by: 4, Postprocess upscaler: Lanczos"),
        (
            Target(scale=1.5, max_side=640),
            NEAREST,
            "Postprocess upscale by: 1.5, Max side length: 640, Postprocess upscaler: Lanczos, "
            "Postprocess upscaler 2: Nearest, Postprocess upscaler 2 visibility: 0.5",
        ),
        (
            Target(size=(20, 10), crop=True),
            None,
            "Postprocess upscale to: 20x10, Postprocess crop to: 20x10, Postprocess upscaler: Lanczos",
        ),
    ],
)
def test_the_settings_are_written_as_the_web_ui_does(target: Target, second: object, text: str) -> None:
    assert Extras(target=target, upscaler=LANCZOS, second=second).text == text  # type: ignore[arg-type]


@pytest.mark.parametrize("ending", [".png", ".webp"])
def test_a_picture_keeps_the_settings_it_came_with(tmp_path: Path, ending: str) -> None:
    settings = "a café\nSteps: 20, Sampler: Euler, Seed: 1"
    save(with_text(picture(), settings), tmp_path / f"small{ending}")
    extras = Extras(target=Target(), upscaler=LANCZOS)
    save(enlarged_file(tmp_path / f"small{ending}", extras), tmp_path / f"large{ending}")
    assert read_text(tmp_path / f"large{ending}") == settings
    if ending == ".png":
        with Image.open(tmp_path / "large.png") as large:
            assert large.info["extras"] == large.info["postprocessing"] == extras.text


def test_a_picture_without_settings_gets_those_of_its_enlargement(tmp_path: Path) -> None:
    picture().save(tmp_path / "small.png")
    extras = Extras(target=Target(), upscaler=LANCZOS)
    save(enlarged_file(tmp_path / "small.png", extras), tmp_path / "large.png")
    with Image.open(tmp_path / "large.png") as large:
        assert {**large.info} == {"extras": extras.text, "postprocessing": extras.text}
    with pytest.raises(LdmError, match="holds no settings"):
        read_text(tmp_path / "large.png")
