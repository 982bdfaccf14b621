"""The command line that repaints: what it may touch, what it makes larger, and its answers to mistakes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm import cli
from ldm.masks import blurred
from scripts.inpaint import main
from tests.tiny_families import tiny

FAMILIES = ("embedded", "sd1", "sd1-inpaint", "sd2", "sd2-inpaint", "sdxl")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    paths = {name: folder / f"{name}.safetensors" for name in FAMILIES}
    for name, path in paths.items():
        tiny(name).save(path)
    return paths


@pytest.fixture
def photo(tmp_path: Path) -> Image.Image:
    """64 x 48 random pixels, in tmp_path/photo.png."""
    levels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    image = Image.fromarray(levels)
    image.save(tmp_path / "photo.png")
    return image


@pytest.fixture
def repaint(checkpoints: dict[str, Path], tmp_path: Path, photo: Image.Image):
    """Run the script on the photo, 2 steps, and return the picture it made.

    The embedded model's family works on pictures of 64 pixels as they are; others would enlarge them.
    """

    def run(
        *words: str, family: str = "embedded", picture: str = "photo.png", name: str = "x.png"
    ) -> Image.Image:
        common = ["--ckpt", str(checkpoints[family]), "--steps", "2", "--device", "cpu"]
        out = tmp_path / name
        assert main([str(tmp_path / picture), "a cat", *common, "--out", str(out), *words]) == cli.Exit.DONE
        return Image.open(out)

    return run


def changed(result: Image.Image, original: Image.Image) -> np.ndarray:
    """Where the pictures differ, (H, W) bool."""
    assert result.size == original.size
    return (np.asarray(result) != np.asarray(original)).any(axis=-1)


def drawn_mask(blur: int = 0) -> np.ndarray:
    mask = Image.new("L", (64, 48))
    mask.paste(255, (10, 20, 42, 44))
    return np.asarray(blurred(mask, blur)) > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("area", [(), ("--only-masked", "--padding", "8")])
def test_only_the_box_and_its_blur_are_repainted(
    repaint, photo: Image.Image, family: str, area: tuple[str, ...]
):
    size = ("--width", "64", "--height", "48")
    result = repaint("--box", "10,20,42,44", *size, *area, family=family)
    assert not changed(result, photo)[~drawn_mask(4)].any()
    assert changed(result, photo)[drawn_mask()].mean() > 0.9


@pytest.mark.parametrize("content", ["original", "fill", "latent-noise", "latent nothing"])
def test_every_content_keeps_what_is_not_masked(repaint, photo: Image.Image, tmp_path: Path, content: str):
    Image.fromarray(drawn_mask().astype(np.uint8) * 255).save(tmp_path / "mask.png")
    result = repaint("--mask", str(tmp_path / "mask.png"), "--content", content, "--blur", "0")
    assert (changed(result, photo) <= drawn_mask()).all()
    result = repaint("--mask", str(tmp_path / "mask.png"), "--invert", "--blur", "0", name="inverted.png")
    assert (changed(result, photo) <= ~drawn_mask()).all()


def test_a_hole_is_filled_and_the_rest_kept(repaint, photo: Image.Image, tmp_path: Path):
    holed = photo.convert("RGBA")
    holed.paste((0, 0, 0, 0), (10, 20, 42, 44))
    holed.save(tmp_path / "holed.png")
    result = repaint("--blur", "0", picture="holed.png")
    assert result.mode == "RGB"
    assert (changed(result, photo) <= drawn_mask()).all()


def test_soft_inpainting_keeps_what_is_not_masked(repaint, photo: Image.Image):
    soft = ("--soft-settings", "preservation=1,contrast-boost=2")
    result = repaint("--box", "10,20,42,44", *soft, "--blur", "3")
    assert not changed(result, photo)[~drawn_mask(3)].any()
    text = result.info["parameters"]
    assert "Soft inpainting enabled: True, Soft inpainting preservation strength: 1" in text


def test_the_canvas_grows_and_the_picture_stays(repaint, photo: Image.Image):
    result = repaint("--outpaint", "left=16,bottom=8", "--overlap", "0", "--blur", "0")
    assert result.size == (80, 56)
    assert not changed(result.crop((16, 0, 80, 48)), photo).any()
    assert "Denoising strength: 1," in result.info["parameters"]
    result = repaint("--outpaint", "8", "--outpaint-fill", "noise", "--strength", "0.9", name="noise.png")
    assert result.size == (80, 64)
    assert not changed(result.crop((30, 30, 50, 36)), photo.crop((22, 22, 42, 28))).any()


@pytest.mark.parametrize("size", [(61, 45), (300, 90)])
def test_a_picture_of_any_size_keeps_it(repaint, tmp_path: Path, size: tuple[int, int]):
    """Also where the model works at another one; and it is made again from its settings."""
    odd = Image.effect_noise(size, 60).convert("RGB")
    odd.save(tmp_path / "odd.png")
    result = repaint("--box", "10,20,42,44", "--blur", "0", picture="odd.png")
    assert changed(result, odd)[20:44, 10:42].any()
    assert not changed(result, odd)[:, 42:].any()
    again = repaint(
        "--from-picture", str(tmp_path / "x.png"), "--box", "10,20,42,44", picture="odd.png", name="y.png"
    )
    assert again.tobytes() == result.tobytes()
    assert again.info == result.info


def test_a_picture_is_drawn_again_with_changes(repaint, tmp_path: Path):
    box = ["--box", "10,20,42,44"]
    repaint(*box, "--padding", "16", "--strength", "0.6")
    again = ["--from-picture", str(tmp_path / "x.png")]
    new = ["--blur", "0", "--content", "latent-noise", "--soft-settings", "preservation=1"]
    wanted = repaint(*box, "--padding", "16", "--strength", "0.6", *new, name="wanted.png")
    changed_one = repaint(*box, *again, *new, name="y.png")
    assert changed_one.tobytes() == wanted.tobytes()
    assert changed_one.info == wanted.info
    # The picture keeps its 64x48 until a size is named.
    assert repaint(*box, *again, "--height", "64", name="z.png").size == (64, 64)


def test_a_size_brings_the_picture_to_it_first(repaint):
    assert repaint("--box", "10,20,42,44", "--width", "64", "--height", "64", "--resize", "crop").size == (
        64,
        64,
    )


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "the picture has no transparent part to repaint"),
        (["--mask", "none.png"], "there is no file none.png"),
        (["--mask", "photo.png", "--box", "1,2,3,4"], "give one of --mask, --box and --outpaint"),
        (["--box", "1,2,3"], "a box is four whole numbers"),
        (["--box", "70,2,80,9"], "covers nothing of the 64x48 picture"),
        (["--box", "0,0,9,9", "--blur", "-1"], "mask_blur must be 0 to 1000"),
        (["--box", "0,0,9,9", "--strength", "0"], "strength must be above 0"),
        (["--box", "0,0,9,9", "--content", "blue"], "masked_content must be one of fill, original"),
        (["--box", "0,0,9,9", "--soft-settings", "bias=3"], "'bias=3' is not understood"),
        (["--box", "0,0,9,9", "--soft-settings", "preservation=9"], "preservation strength"),
        (["--outpaint", "left"], "'left' is not understood"),
        (["--outpaint", "left=-8"], "at the left must be 0 to"),
        (["--outpaint", "0"], "there is nothing to draw"),
        (["--outpaint", "8", "--invert"], "--invert would leave the new part"),
        (["--overlap", "8"], "belong to --outpaint"),
        (["--from-picture", "x.png", "--compat", "a1111"], "--compat does not go with --from-picture"),
        (["--box", "0,0,9,9", "--out", "x.gif"], "saved as .png"),
    ],
)
def test_a_mistake_is_one_line_before_a_model_is_read(
    words: list[str],
    complaint: str,
    photo: Image.Image,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    unread = tmp_path / "not a checkpoint.safetensors"
    unread.touch()
    try:
        code = main(["photo.png", "a cat", "--ckpt", str(unread), *words])
    except SystemExit as end:  # argparse's way
        code = end.code
    said = capsys.readouterr()
    assert code == 2
    assert said.out == ""
    assert complaint in said.err
    assert len(said.err.splitlines()) == 1


def test_a_mask_that_does_not_fit_is_told(
    checkpoints: dict[str, Path], photo: Image.Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    common = [str(tmp_path / "photo.png"), "a cat", "--ckpt", str(checkpoints["embedded"]), "--device", "cpu"]
    for mask, complaint in (
        (Image.new("L", (64, 48)), "the mask is empty"),
        (Image.new("L", (48, 64), 255), "their shapes must match"),
    ):
        mask.save(tmp_path / "mask.png")
        assert main([*common, "--mask", str(tmp_path / "mask.png"), "--out", str(tmp_path / "o.png")]) == 2
        assert complaint in capsys.readouterr().err
    assert not (tmp_path / "o.png").exists()


def test_a_budget_is_for_the_size_that_is_drawn(
    repaint, checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Of a part that is drawn by itself, not of the whole picture."""
    Image.new("RGB", (1024, 1024)).save(tmp_path / "large.png")
    words = ["--box", "10,20,42,44", "--budget", "600MB"]
    part = ["--only-masked", "--width", "64", "--height", "64"]
    repaint(*words, *part, family="sd1", picture="large.png")
    assert "memory: 0.3 of 0.6 GB: weights in float32 on cpu\n" in capsys.readouterr().err
    command = [str(tmp_path / "large.png"), "--ckpt", str(checkpoints["sd1"]), "--device", "cpu"]
    assert main([*command, *words, "--out", str(tmp_path / "y.png")]) == 2
    assert "needs 0.72 GB of memory at least, there is 0.59" in capsys.readouterr().err
