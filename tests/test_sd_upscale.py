"""SD upscale: tiles are image to image, and together they are the picture."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ldm
from ldm import cli
from ldm.controlnet import Control
from ldm.edit import Edit, Hires
from ldm.errors import LdmError, RequestError
from ldm.images import read_text, save
from ldm.infotext import parse
from ldm.inputs import Inputs
from ldm.sd_upscale import chosen, sd_upscale, tiles
from ldm.tiles import grid
from ldm.upscalers import enlarged, load_upscaler
from scripts.sd_upscale import main
from tests.tiny_families import tiny

LANCZOS = load_upscaler("Lanczos")
REQUEST = ldm.Request(
    prompt="a cat", steps=2, width=64, height=64, sampler="Euler a", seed=5, edit=Edit(strength=0.6)
)


def picture(width: int = 48, height: int = 32) -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC)


def test_a_picture_of_one_tile_is_image_to_image() -> None:
    models = tiny("sd1")
    drawn = sd_upscale(models, REQUEST, Inputs(picture=picture(32, 32)), LANCZOS)
    [plain] = ldm.img2img(models, REQUEST, enlarged(picture(32, 32), LANCZOS, 64, 64))
    assert drawn.tobytes() == plain.tobytes()


def test_each_tile_is_image_to_image_with_its_own_seed() -> None:
    models = tiny("sd1")
    image = enlarged(picture(), LANCZOS, 96, 64)
    drawn = sd_upscale(models, REQUEST, Inputs(picture=picture()), LANCZOS, overlap=24)
    assert drawn.size == (96, 64)
    for seed, left, alone in ((5, 0, (0, 0, 32, 64)), (6, 32, (64, 0, 96, 64))):  # where they do not overlap
        request = replace(REQUEST, seed=seed)
        [tile] = ldm.img2img(models, request, image.crop((left, 0, left + 64, 64)))
        inside = (alone[0] - left, 0, alone[2] - left, 64)
        assert drawn.crop(alone).tobytes() == tile.crop(inside).tobytes()


def test_hints_and_depth_are_cut_as_the_picture_is() -> None:
    gradient = Image.linear_gradient("L").rotate(90).resize((96, 64))
    control = Control(network=None, hint=gradient)  # type: ignore[arg-type]  (which is not run here)
    inputs = Inputs(picture=picture(), depth=gradient, controls=(control,))
    with pytest.raises(RequestError, match="takes no depth picture"):
        tiles(tiny("sd1"), REQUEST, inputs, LANCZOS)
    parts = tiles(tiny("sd2-depth"), REQUEST, inputs, LANCZOS, overlap=32)
    assert [one.seed for one, _ in parts.runs] == [5, 6]
    for (_, given), box in zip(parts.runs, parts.places.boxes, strict=True):
        wanted = gradient.convert("RGB").crop(box).tobytes()
        assert given.depth is not None
        assert given.depth.tobytes() == wanted
        assert [one.hint.tobytes() for one in given.controls] == [wanted]


def test_any_size_is_covered_by_tiles_of_good_sizes() -> None:
    parts = tiles(tiny("sd1"), REQUEST, Inputs(picture=picture(50, 16)), LANCZOS, scale=3.1, overlap=16)
    assert parts.enlarged.size == (152, 48)  # multiples of 8, as the web UI has it
    assert parts.places == grid(48, 152, 64, 16)
    assert all((run.width, run.height) == (64, 48) for run, _ in parts.runs)
    assert parts.joined(given.picture for _, given in parts.runs).tobytes() == parts.enlarged.tobytes()  # type: ignore[misc]


def test_tiles_have_the_same_names_if_they_are_drawn_the_same() -> None:
    models, inputs = tiny("sd1"), Inputs(picture=picture())

    def names(**changed: object) -> list[str]:
        return tiles(models, replace(REQUEST, **changed), inputs, LANCZOS, overlap=24).names(models)

    assert names() == names()
    assert len(set(names())) == 2
    for changed in ({"seed": 7}, {"prompt": "a dog"}, {"edit": Edit(strength=0.7)}):
        assert not set(names()) & set(names(**changed))


@pytest.mark.parametrize(
    ("request_", "settings"),
    [
        (replace(REQUEST, batch_size=2), {}),
        (replace(REQUEST, tiling=True), {}),
        (replace(REQUEST, edit=None, hires=Hires()), {}),
        (REQUEST, {"overlap": 64}),
        (REQUEST, {"scale": 0}),
        (replace(REQUEST, width=63), {}),
    ],
)
def test_settings_that_do_not_fit_are_refused(request_: ldm.Request, settings: dict) -> None:
    with pytest.raises(RequestError):
        tiles(tiny("sd1"), request_, Inputs(picture=picture(40, 40)), LANCZOS, **settings)
    with pytest.raises(RequestError, match="from a picture"):
        tiles(tiny("sd1"), REQUEST, Inputs(), LANCZOS)


def test_the_command_line_draws_all_tiles_and_says_how(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny("sd1").save(tmp_path / "tiny.safetensors")
    save(picture(), tmp_path / "small.png")
    words = [str(tmp_path / "small.png"), "a cat", "--ckpt", str(tmp_path / "tiny.safetensors")]
    words += ["--width", "64", "--height", "64", "--steps", "4", "--device", "cpu", "--seed", "5"]
    words += ["--overlap", "24", "--upscaler", "Lanczos", "--out", str(tmp_path / "large.png")]
    assert main(words) == cli.Exit.DONE
    told = capsys.readouterr()
    assert told.out == f"{tmp_path / 'large.png'}\n"
    with Image.open(tmp_path / "large.png") as large:
        assert large.size == (96, 64)
    text = read_text(tmp_path / "large.png")
    assert "SD upscale by: 2, SD upscale overlap: 24, SD upscale upscaler: Lanczos" in text
    assert "Denoising strength: 0.3" in text

    again = [str(tmp_path / "small.png"), "--from-picture", str(tmp_path / "large.png")]
    again += [
        "--ckpt",
        str(tmp_path / "tiny.safetensors"),
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "x.png"),
    ]
    assert main(again) == cli.Exit.DONE
    assert "sd_upscale:" not in capsys.readouterr().err  # no difference to tell
    with Image.open(tmp_path / "large.png") as large, Image.open(tmp_path / "x.png") as same:
        assert large.tobytes() == same.tobytes()
    assert read_text(tmp_path / "x.png") == text


def test_a_budget_is_for_a_tile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("sd1").save(tmp_path / "tiny.safetensors")
    save(picture(), tmp_path / "small.png")
    words = [str(tmp_path / "small.png"), "--ckpt", str(tmp_path / "tiny.safetensors"), "--device", "cpu"]
    words += ["--steps", "4", "--upscaler", "Lanczos", "--out", str(tmp_path / "large.png"), "--overwrite"]
    assert main([*words, "--budget", "400MB"]) == cli.Exit.DONE  # 96 x 64, less than a whole tile
    assert "memory: 0.3 of 0.4 GB: weights in float32 on cpu\n" in capsys.readouterr().err
    assert main([*words, "--scale", "16", "--budget", "400MB"]) == cli.Exit.USAGE  # tiles of 512
    assert "needs 0.50 GB of memory at least, there is 0.39" in capsys.readouterr().err


def test_a_picture_that_was_not_drawn_in_tiles_says_so() -> None:
    for fields in ("Seed: 1", "SD upscale upscaler: x, SD upscale overlap: 64", "SD upscale by: much"):
        with pytest.raises(LdmError, match="does not tell how it was drawn in tiles"):
            chosen(parse(f"a cat\nSteps: 20, Sampler: Euler, {fields}"))
