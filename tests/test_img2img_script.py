"""scripts/img2img.py and the flags it shares: what is drawn from given pictures, and answers to mistakes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from ldm.controlnet import ControlNet, ControlNetConfig
from ldm.formats import write_safetensors
from scripts.img2img import main
from tests.tiny_families import tiny

WEB_UI_RULE = "strength 0.5 makes 3 of 4 steps"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny checkpoints, a ControlNet, and pictures of three kinds."""
    folder = tmp_path_factory.mktemp("given")
    for name in ("sd1", "sd2", "pix2pix", "sd2-depth"):
        tiny(name).save(folder / f"{name}.safetensors")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ControlNetConfig(unet=tiny("sd1").unet.config)
        network = ControlNet(config)
    weights = {f"control_model.{name}": w for name, w in network.state_dict().items()}
    write_safetensors(folder / "edges.safetensors", weights, {})
    pictures = folder / "pictures"
    pictures.mkdir()
    levels = np.random.default_rng(0).integers(0, 256, (50, 70, 4), dtype=np.uint8)
    Image.fromarray(levels[..., :3]).save(pictures / "colours.png")
    Image.fromarray(levels).save(pictures / "glass.png")
    Image.fromarray(levels[..., 0]).save(pictures / "grey.jpg")
    return folder


@pytest.fixture
def draw(folder: Path, tmp_path: Path):
    def run(picture: str, *words: str, model: str = "sd1") -> int:
        common = ["--ckpt", str(folder / f"{model}.safetensors"), "--steps", "4", "--device", "cpu"]
        sizes = ["--width", "64", "--height", "64"]
        out = ["--out", str(tmp_path / "out")]
        return main([str(folder / "pictures" / picture), "a cat", *common, *sizes, *out, *words])

    return run


def saved(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "out").iterdir())


def text(path: Path) -> str:
    return Image.open(path).info["parameters"]


def test_a_folder_is_drawn_picture_by_picture_and_a_broken_one_does_not_stop_it(
    draw, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    broken = folder / "pictures" / "broken.png"
    broken.write_bytes(b"no picture")
    try:
        assert draw("", "--strength", "0.5") == 1
    finally:
        broken.unlink()
    names = [path.name for path in saved(tmp_path)]
    assert names == ["00000-42-colours.png", "00001-42-glass.png", "00002-42-grey.png"]
    said = capsys.readouterr().err
    assert "broken" in said
    assert "3 of 4 pictures are done" in said
    assert all("Denoising strength: 0.5, Init image hash: " in text(path) for path in saved(tmp_path))


def test_the_number_of_steps_is_said(draw, capsys: pytest.CaptureFixture[str]):
    assert draw("colours.png", "--strength", "0.5") == 0
    assert "strength 0.5 makes 3 of 4 steps" in capsys.readouterr().err
    assert draw("colours.png", "--strength", "0.5", "--exact-steps") == 0
    assert "strength 0.5 makes 4 of 4 steps" in capsys.readouterr().err


def test_a_picture_is_drawn_again_from_its_settings(draw, tmp_path: Path):
    assert draw("glass.png", "--strength", "0.6", "--resize", "fill", "--batch-size", "2") == 0
    first, second = saved(tmp_path)
    assert draw("glass.png", "--from-picture", str(second)) == 0
    again = saved(tmp_path)[-1]
    assert Image.open(again).tobytes() == Image.open(second).tobytes() != Image.open(first).tobytes()
    assert text(again) == text(second)


def test_a_picture_is_drawn_again_with_changes(folder: Path, tmp_path: Path):
    picture, model = str(folder / "pictures/glass.png"), str(folder / "sd1.safetensors")
    first = ["--width", "64", "--height", "64", "--steps", "4", "--extra-noise", "0.1"]

    def run(*words: str) -> Path:
        assert (
            main([picture, *words, "--ckpt", model, "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
        )
        return saved(tmp_path)[-1]

    old = run("red car", *first, "--strength", "0.5")
    wanted = run("blue car", *first, "--strength", "0.8", "--seed", "7")
    again = run("blue car", "--from-picture", str(old), "--strength", "0.8", "--seed", "7")
    assert Image.open(again).tobytes() == Image.open(wanted).tobytes()
    assert text(again) == text(wanted)
    assert text(run("--from-picture", str(old))) == text(old)


def test_a_hint_leads_and_is_written_down(draw, folder: Path, tmp_path: Path):
    control = ["--control", str(folder / "edges.safetensors"), str(folder / "pictures/colours.png")]
    assert draw("grey.jpg") == 0
    assert draw("grey.jpg", *control, "--control-hint", "canny", "--control-weight", "2") == 0
    assert draw("grey.jpg", *control, "--control-weight", "0") == 0
    plain, led, unled = (Image.open(path) for path in saved(tmp_path))
    assert plain.tobytes() == unled.tobytes() != led.tobytes()
    assert (
        'ControlNet 0: "Module: canny, Model: edges, Weight: 2, Guidance Start: 0' in led.info["parameters"]
    )


def test_models_with_further_inputs_draw(draw, folder: Path, tmp_path: Path):
    assert draw("colours.png", "--image-cfg-scale", "1.2", model="pix2pix") == 0
    depth = str(folder / "pictures/grey.jpg")
    assert draw("colours.png", "--depth", depth, "--strength", "0.5", model="sd2-depth") == 0
    edited, deep = map(text, saved(tmp_path))
    assert "Image CFG scale: 1.2" in edited
    assert "Depth hash: " in deep


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--strength", "0"], "strength must be above 0 and at most 1, got 0"),
        (["--resize", "bend"], "invalid choice: 'bend'"),
        (["--noise-multiplier", "-1"], "noise_multiplier must be 0 to 10, got -1"),
        (["--control", "missing", "missing"], "there is no file missing"),
        (
            ["--control-weight", "1", "--control-weight", "2"],
            "--control-weight stands 2 times for 0 controls",
        ),
        (["--depth", "{pictures}/grey.jpg"], "takes no depth picture"),
        (["--refiner", "missing"], "there is no file missing"),
        (["--budget", "4GB", "--from-picture", "x.png"], "--budget goes without --dtype, --storage"),
        (["--exact-steps", "--from-picture", "x.png"], "--exact-steps does not go with --from-picture"),
        (["--budget", "300MB"], "GB of memory at least, there is 0.29"),
    ],
)
def test_mistakes_are_one_line(
    draw, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], complaint: str
):
    words = [word.format(pictures=folder / "pictures") for word in words]
    try:
        code = draw("grey.jpg", *words)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert complaint in capsys.readouterr().err.splitlines()[-1]


def test_a_budget_is_for_the_largest_picture(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Where no size is named, they are drawn in about their own; what is no picture is left out."""
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "0.png").write_bytes(b"no picture")
    Image.new("RGB", (512, 512)).save(mixed / "1.png")
    words = ["--ckpt", str(folder / "sd1.safetensors"), "--steps", "2", "--strength", "0.5"]
    command = [str(mixed), "--device", "cpu", "--out", str(tmp_path / "out"), *words, "--budget", "600MB"]
    assert main(command) == 1
    assert "memory: 0.5 of 0.6 GB: weights in float32 on cpu\n" in capsys.readouterr().err
    Image.new("RGB", (1024, 1024)).save(mixed / "2.png")
    assert main(command) == 2
    assert "needs 0.72 GB of memory at least, there is 0.59" in capsys.readouterr().err


def test_a_depth_model_without_a_depth_picture_says_what_it_needs(draw, capsys: pytest.CaptureFixture[str]):
    assert draw("colours.png", model="sd2-depth") == 2
    assert "needs a depth picture" in capsys.readouterr().err


def test_a_picture_that_was_drawn_from_another_one_asks_for_it(draw, tmp_path: Path):
    assert draw("colours.png") == 0
    with pytest.raises(ldm.LdmError, match="drawn from another one; give that, too"):
        ldm.replay(saved(tmp_path)[0], tiny("sd1"))
