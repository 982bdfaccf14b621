"""Promise 11 at the command lines: a hostile file behind any flag is exit code 2 and one line."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

from scripts.img2img import main as img2img
from scripts.inpaint import main as inpaint
from scripts.interrogate import main as interrogate
from scripts.sd_upscale import main as sd_upscale
from scripts.train_lora import main as train_lora
from scripts.txt2img import main as txt2img
from scripts.upscale import main as upscale
from tests.hostile.build import safetensors, state_dict, tensor, zipped
from tests.hostile.pickles import calls
from tests.reliability.test_pictures import bombs
from tests.tiny_families import tiny

Main = Callable[[Sequence[str]], int]
DRAW = ["--ckpt", "GOOD", "--width", "16", "--height", "16", "--steps", "1"]

WEIGHTS: dict[str, tuple[Main, list[str]]] = {
    "a checkpoint": (txt2img, ["a cat", "--ckpt", "BAD"]),
    "an autoencoder": (txt2img, ["a cat", *DRAW, "--vae", "BAD"]),
    "a refiner": (txt2img, ["a cat", *DRAW, "--refiner", "BAD"]),
    "a LoRA": (txt2img, ["a cat <lora:bad:1>", *DRAW, "--lora-dir", "FOLDER"]),
    "a hypernetwork": (txt2img, ["a cat <hypernet:bad:1>", *DRAW, "--hypernetwork-dir", "FOLDER"]),
    "a ControlNet": (txt2img, ["a cat", *DRAW, "--control", "BAD", "PICTURE"]),
    "a model for pictures": (img2img, ["PICTURE", "a cat", "--ckpt", "BAD"]),
    "an upscaler": (upscale, ["PICTURE", "--upscaler", "BAD"]),
    "LDSR": (upscale, ["PICTURE", "--ldsr", "BAD"]),
    "an upscaler of tiles": (sd_upscale, ["PICTURE", "a cat", *DRAW[:2], "--upscaler", "BAD"]),
    "a model to train on": (train_lora, ["--data", "DATA", "--out", "OUT/x.safetensors", "--ckpt", "BAD"]),
}
PICTURES: dict[str, tuple[Main, list[str]]] = {
    "a picture's settings": (txt2img, ["--from-picture", "BAD", *DRAW[:2]]),
    "a picture to draw from": (img2img, ["BAD", "a cat", *DRAW]),
    "a picture to repaint": (inpaint, ["BAD", "a cat", "--box", "0,0,8,8", *DRAW]),
    "a mask": (inpaint, ["PICTURE", "a cat", "--mask", "BAD", *DRAW]),
    "a depth picture": (img2img, ["PICTURE", "a cat", *DRAW, "--depth", "BAD"]),
    "a hint": (txt2img, ["a cat", "--control", "canny", "BAD"]),
    "a picture to enlarge": (upscale, ["BAD", "--upscaler", "Lanczos"]),
    "a picture for tiles": (sd_upscale, ["BAD", "a cat", *DRAW[:2]]),
}
TEXTS: dict[str, tuple[Main, list[str]]] = {
    "prompts": (txt2img, ["--from-file", "BAD", *DRAW]),
    "styles": (txt2img, ["a cat", *DRAW, "--styles-file", "BAD", "--style", "x"]),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "good.safetensors"
    tiny("sd1").save(path)
    return path


@pytest.fixture
def refused(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Demand that a command line with a bad file in it ends in exit code 2 and one line."""
    Image.new("RGB", (16, 16)).save(tmp_path / "picture.png")
    for name in ("folder", "data", "out"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "data" / "a.png")

    def run(main: Main, words: list[str], ending: str, content: bytes) -> None:
        bad = tmp_path / "folder" / f"bad{ending}"
        bad.write_bytes(content)
        names = {"BAD": bad, "GOOD": good, "FOLDER": bad.parent, "PICTURE": tmp_path / "picture.png"}
        names |= {"DATA": tmp_path / "data", "OUT/x.safetensors": tmp_path / "out" / "x.safetensors"}
        argv = [str(names.get(word, word)) for word in words]
        if main is not train_lora:
            argv += ["--device", "cpu", "--out", str(tmp_path / "out")]
        capsys.readouterr()
        assert main(argv) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert "Traceback" not in said.err
        last = said.err.splitlines()[-1]
        assert last.isprintable()
        assert len(last) <= 200 + len("sd_upscale: ")
        assert [path.name for path in (tmp_path / "out").iterdir()] == []

    return run


@pytest.mark.parametrize("what", WEIGHTS)
def test_hostile_weights(what: str, refused: Callable[..., None], tmp_path: Path):
    marker = tmp_path / "EXECUTED"
    contents = {
        ".pt": zipped(calls(marker)["reduce"]),
        ".ckpt": zipped(state_dict(tensor()))[:-10],
        ".safetensors": safetensors({"x": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 16]}}),
    }
    for ending, content in contents.items():
        refused(*WEIGHTS[what], ending, content)
        (tmp_path / "folder" / f"bad{ending}").unlink()
    assert not marker.exists()


@pytest.mark.parametrize("what", PICTURES)
def test_hostile_pictures(what: str, refused: Callable[..., None]):
    for content in (bombs()["png"], b"%!PS-Adobe-3.0 EPSF-3.0\n", bombs()["jpeg"][:100]):
        refused(*PICTURES[what], ".png", content)


@pytest.mark.parametrize("what", TEXTS)
def test_hostile_texts(what: str, refused: Callable[..., None]):
    for content in (b"\xff\xfe\x00\xd8", b"\n" * 100_000):  # no UTF-8; nothing
        refused(*TEXTS[what], ".txt", content)


def test_a_hostile_clip(refused: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    bad = tmp_path / "clip.pt"
    bad.write_bytes(zipped(calls(tmp_path / "EXECUTED")["reduce"]))
    assert interrogate([str(tmp_path / "picture.png"), "--clip", str(bad)]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "EXECUTED").exists()
