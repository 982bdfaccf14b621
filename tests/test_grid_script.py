"""The command line of sheets."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ldm import cli
from ldm.denoise import Prediction
from scripts.grid import main
from tests.tiny_families import tiny

SCRIPT = Path(__file__).parents[1] / "scripts" / "grid.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.safetensors"
    tiny("sd1").save(path)
    return path


@pytest.fixture
def words(checkpoint: Path) -> list[str]:
    """A tiny model, 32 x 32, 2 steps."""
    small = ["--width", "32", "--height", "32", "--steps", "2", "--device", "cpu"]
    return ["a cat", "--ckpt", str(checkpoint), *small]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["a cat"], "give axes (--x, --y, --z), or --matrix, or --sheet with pictures"),
        (["a cat", "--x", "seed=1", "--matrix"], "give axes"),
        (["--x", "seed=1"], "give one prompt"),
        (["a cat", "--prompt", "b", "--matrix"], "give one prompt"),
        (["a cat", "--x", "seed=1", "--batch-size", "2"], "use the axis seed in place of --batch-size"),
        (["a cat", "--x", "seed=1", "--margin", "-1"], "--margin must be 0 to 500, got -1"),
        (["a cat", "--x", "seed=1", "--cell", "3"], "--cell must be 16 to 4096, got 3"),
        (["a cat", "--x", "sede=1"], "unknown axis 'sede'; did you mean Seed"),
        (["a cat", "--x", "steps=0"], "steps must be 1 to 10000, got 0"),
        (["a cat", "--x", "prompt s/r=dog, mouse"], "neither the prompt nor the negative prompt holds 'dog'"),
        (["a cat", "--x", "checkpoint=none"], "there is no file 'none'"),
        (["a cat", "--x", "seed=1", "--ckpt", "none.ckpt"], "there is no file none.ckpt"),
        (["a cat", "--x", "seed=1", "--picture", "none.png"], "there is no file none.png"),
        (["a cat", "--x", "seed=1", "--strength", "0.5"], "--mask and --strength need a picture"),
        (["a cat", "--x", "denoising=0.5"], "Denoising needs a picture to start from"),
        (["a cat", "--x", "hires steps=5"], "Hires steps needs a second pass"),
        (["a cat" + "|b" * 14, "--matrix"], "a prompt matrix has at most 13 parts"),
        (["a cat", "--matrix", "--style", "film"], "cannot read styles.csv: No such file"),
        (["a cat", "--matrix", "--out", "x.gif"], "saved as .png"),
        (["--sheet", "none"], "there is no file none"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_drawn(
    words: list[str],
    complaint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(words)
    except SystemExit as end:  # argparse's way
        code = end.code
    said = capsys.readouterr()
    assert code == 2
    assert said.out == ""
    assert complaint in said.err
    assert len(said.err.splitlines()) == 1


def test_help_and_typing_mistakes_need_no_torch():
    program = (
        f"import sys, runpy; sys.path.insert(0, {str(SCRIPT.parent)!r}); sys.argv = ['grid', '--help']\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "--matrix" in said
    assert said.endswith("False\n")


def test_a_plot_is_a_sheet_and_its_pictures(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    axes = ["--x", "seed=1-2", "--y", "sampler=Euler, DPM++ 2M", "--z", "cfg scale=1, 7"]
    assert main([*words, *axes, "--out", str(out)]) == 0
    *pictures, sheet = capsys.readouterr().out.split()
    assert len(pictures) == len(list((out / "cells").iterdir())) == 8
    page = Image.open(sheet)
    assert page.width > 4 * 32
    assert page.info["parameters"].startswith("a cat\nSteps: 2, Sampler: Euler, ")
    before = contents(out)
    assert main([*words, *axes, "--out", str(out)]) == 0
    assert capsys.readouterr().out.split() == [sheet]  # nothing is drawn again
    assert contents(out) == before


def test_a_sheet_may_have_a_file_of_its_own(words: list[str], tmp_path: Path):
    out = tmp_path / "plot.png"
    assert main([*words, "--x", "seed=1-2", "--out", str(out), "--cell", "16"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plot-cells", "plot.png"]
    assert Image.open(out).width == 2 * 16 + 4
    assert main([*words, "--x", "seed=1-2", "--out", str(out)]) == 2  # exists already
    assert main([*words, "--x", "seed=1-2", "--out", str(out), "--overwrite"]) == 0
    assert Image.open(out).width == 2 * 32 + 4


def test_a_matrix(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words[0] = "a cat|black|asleep"
    assert main([*words, "--matrix", "--different-seeds", "--out", str(tmp_path)]) == 0
    *pictures, _ = capsys.readouterr().out.split()
    texts = [Image.open(path).info["parameters"] for path in pictures]
    prompts = ["a cat", "a cat, black", "a cat, asleep", "a cat, black, asleep"]
    assert [text.partition("\n")[0] for text in texts] == prompts
    assert [text.partition("Seed: ")[2][:2] for text in texts] == ["42", "43", "44", "45"]


def test_styles_are_not_parts_of_the_matrix(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    styles = tmp_path / "styles.csv"
    styles.write_text("name,prompt,negative_prompt\nfilm,{prompt} on film,\n")
    words[0] = "a cat|black"
    style = ["--style", "film", "--styles-file", str(styles)]
    assert main([*words, "--matrix", *style, "--out", str(tmp_path / "out")]) == 0
    pictures = capsys.readouterr().out.split()[:2]
    prompts = [Image.open(path).info["parameters"].partition("\n")[0] for path in pictures]
    assert prompts == ["a cat on film", "a cat, black on film"]


def test_bad_cells_leave_the_others_and_an_exit_code(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([*words, "--x", "size=32x32, 36x36", "--out", str(tmp_path / "a")]) == cli.Exit.FAILED
    said = capsys.readouterr()
    assert "picture 2: width must be a multiple of 8, got 36; try 32" in said.err
    assert said.err.endswith("1 of 2 pictures are done\n")
    assert len(said.out.split()) == 2
    assert main([*words, "--x", "size=36x36", "--out", str(tmp_path / "b")]) == cli.Exit.USAGE
    assert not list((tmp_path / "b").glob("*.png"))


def test_a_picture_is_where_all_cells_start(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    Image.linear_gradient("L").convert("RGB").resize((32, 32)).save(tmp_path / "given.png")
    axes = ["--x", "denoising=0.5, 1", "--picture", str(tmp_path / "given.png")]
    assert main([*words, *axes, "--out", str(tmp_path / "out")]) == 0
    pictures = capsys.readouterr().out.split()[:2]
    texts = [Image.open(path).info["parameters"] for path in pictures]
    assert ["Denoising strength: 0.5" in texts[0], "Denoising strength: 1" in texts[1]] == [True, True]


def test_a_second_pass_can_be_plotted(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    axes = ["--hires", "2", "--x", "hires steps=1, 2", "--y", "hires upscaler=Latent, Lanczos"]
    assert main([*words, *axes, "--out", str(tmp_path)]) == 0
    pictures = capsys.readouterr().out.split()[:4]
    assert {Image.open(path).size for path in pictures} == {(64, 64)}


def test_contact_sheets(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(3):
        Image.new("RGB", (300, 200), (80 * i, 0, 0)).save(pictures / f"{i}.png")
    (pictures / "notes.txt").touch()
    out = tmp_path / "contact.png"
    assert main(["--sheet", str(pictures), "--columns", "2", "--out", str(out)]) == 0
    assert capsys.readouterr().out.split() == [str(out)]
    assert Image.open(out).width == 2 * 256 + 4
    (pictures / "3.png").write_bytes(b"damaged")
    code = main(["--sheet", str(pictures), "--out", str(tmp_path / "sheets")])
    assert code == cli.Exit.FAILED
    assert "3.png" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["--sheet", str(tmp_path / "empty"), "--out", str(out)]) == 2


def test_a_budget_is_for_the_largest_picture(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A picture that cannot be drawn is not in the way of the others."""
    common = [*words, "--out", str(tmp_path), "--budget", "600MB"]
    assert main([*common, "--x", "size=32x32, 36x36"]) == cli.Exit.FAILED
    assert "memory: 0.3 of 0.6 GB: weights in float32 on cpu\n" in capsys.readouterr().err
    assert main([*common, "--x", "size=32x32, 1024x1024"]) == cli.Exit.USAGE
    assert "picture 1, 2: this needs 0.72 GB of memory at least, there is 0.59" in capsys.readouterr().err


def test_all_axes_are_listed(capsys: pytest.CaptureFixture[str]):
    assert main(["--axes"]) == 0
    assert "CFG Scale" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_the_same_command_serves_every_family(family: str, words: list[str], tmp_path: Path):
    tiny(family, Prediction.EPS).save(tmp_path / "tiny.safetensors")
    words[words.index("--ckpt") + 1] = str(tmp_path / "tiny.safetensors")
    axes = ["--x", "cfg scale=1, 7", "--y", "clip skip=1, 2"]
    assert main([*words, *axes, "--out", str(tmp_path)]) == 0
    assert len(list((tmp_path / "cells").iterdir())) == 4


def test_the_embedded_model_draws_plots(tmp_path: Path):
    axes = ["--x", "seed=1-2", "--y", "prompt s/r=red, green"]
    assert main(["a red apple", "--steps", "2", "--device", "cpu", *axes, "--out", str(tmp_path)]) == 0
    assert len(list((tmp_path / "cells").iterdir())) == 4


def test_a_killed_run_goes_on_to_the_same_bytes(words: list[str], tmp_path: Path):
    axes = ["--x", "seed=1-5", "--y", "steps=2-3"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*words, *axes, "--out", str(whole)]) == 0
    command = [sys.executable, str(SCRIPT), *words, *axes, "--out", str(parts)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()  # one picture is there
        process.send_signal(signal.SIGKILL)
    assert list((parts / "cells").glob("*.png"))
    assert main([*words, *axes, "--out", str(parts)]) == 0
    assert contents(parts) == contents(whole)
