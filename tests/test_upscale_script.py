"""The command line that enlarges pictures: folders, mistakes, and what it leaves behind."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from ldm import cli
from scripts.upscale import main
from tests.tiny_families import tiny

SCRIPT = Path(__file__).parents[1] / "scripts" / "upscale.py"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures and a file that is none, in tmp_path/in."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i, name in enumerate(("a.png", "b.jpg", "d.webp")):
        Image.new("RGB", (10 + i, 8), (200, 30, 60 * i)).save(folder / name)
    (folder / "c.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("neither")
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def run(folder: Path, *words: str) -> int:
    """Run the script on a path; quickly, with a filter, into the folder `out` beside it."""
    common = ["--upscaler", "Lanczos", "--device", "cpu", "--out", str(folder.parent / "out")]
    return main([str(folder), *common, *words])


def test_a_picture_is_enlarged_by_the_embedded_network_and_its_path_printed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder / "a.png"), "--out", str(tmp_path / "out"), "--device", "cpu"]) == cli.Exit.DONE
    large = tmp_path / "out" / "a.png"
    assert capsys.readouterr().out == f"{large}\n"
    assert size(large) == (40, 32)
    with Image.open(large) as image:
        assert image.info["extras"] == "Postprocess upscale by: 4, Postprocess upscaler: R-ESRGAN AnimeVideo"


def test_one_bad_picture_of_a_folder_does_not_stop_the_others(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, "--scale", "2") == cli.Exit.FAILED
    assert names(tmp_path / "out") == ["a.png", "b.png", "d.png"]
    assert size(tmp_path / "out" / "d.png") == (24, 16)
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 3
    assert "c.png is no PNG" in told.err
    assert "3 of 4 pictures are done, 1 failed" in told.err


def test_pictures_that_are_there_are_passed_over_or_replaced(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "c.png").unlink()
    assert run(folder) == cli.Exit.DONE
    (tmp_path / "out" / "b.png").unlink()
    stays = (tmp_path / "out" / "a.png").stat().st_mtime_ns
    capsys.readouterr()
    assert run(folder, "--scale", "3") == cli.Exit.DONE
    told = capsys.readouterr()
    assert told.out == f"{tmp_path / 'out' / 'b.png'}\n"
    assert "2 pictures are there already" in told.err
    assert (tmp_path / "out" / "a.png").stat().st_mtime_ns == stays
    assert run(folder, "--scale", "3", "--overwrite") == cli.Exit.DONE
    assert size(tmp_path / "out" / "a.png") == (30, 24)


def test_pictures_of_one_name_keep_their_endings(folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(folder / "a.webp")
    assert main([str(folder / "a.png"), str(folder / "a.webp"), "--out", str(tmp_path / "out")]) == 0
    assert names(tmp_path / "out") == ["a.png.png", "a.webp.png"]


def test_sizes_crops_and_a_second_upscaler(folder: Path, tmp_path: Path) -> None:
    words = ["--size", "30x30", "--crop", "--upscaler2", "Nearest", "--visibility", "0.3", "--overwrite"]
    out = tmp_path / "x.jpg"
    assert run(folder / "a.png", *words, "--out", str(out)) == cli.Exit.DONE
    assert size(out) == (30, 30)
    assert run(folder / "a.png", "--max-side", "20", "--overwrite", "--out", str(out)) == cli.Exit.DONE
    assert size(out) == (20, 16)


def test_latent_diffusion_is_found_by_its_file_and_takes_its_flags(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny("ldsr").save(tmp_path / "last.safetensors")
    words = [str(folder / "a.png"), "--ldsr", str(tmp_path / "last.safetensors"), "--device", "cpu"]
    assert main([*words, "--steps", "1", "--out", str(tmp_path / "out")]) == cli.Exit.DONE
    assert size(tmp_path / "out" / "a.png") == (40, 32)
    assert main([*words, "--prompt", "a cat", "--out", str(tmp_path / "other")]) == cli.Exit.USAGE
    assert "LDSR cannot use --prompt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--scale", "0"], "the scale must be above 0"),
        (["--scale", "two"], "invalid float value: 'two'"),
        (["--size", "30"], "a size is written as 512x768, got '30'"),
        (["--size", "30x30", "--scale", "2"], "--size stands in place of --scale"),
        (["--crop"], "--crop needs --size"),
        (["--visibility", "0.5"], "--visibility needs --upscaler2"),
        (["--upscaler2", "Nearest", "--visibility", "2"], "visibility must be 0 to 1"),
        (["--max-side", "0"], "a side in pixels must be 1 to 65535"),
        (["--steps", "5"], "Lanczos cannot use --steps"),
        (["--ldsr", "none.ckpt"], "give one of both"),
        (["--upscaler", "none"], "there is no upscaler 'none'"),
        (["--upscalers-dir", "nowhere"], "there is no folder nowhere"),
        (["--device", "abacus"], "unknown device 'abacus'"),
        (["--out", "x.gif"], "saved as .png"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str],
    complaint: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = run(folder / "a.png", *words)
    except SystemExit as error:  # argparse
        code = error.code
    assert code == cli.Exit.USAGE
    told = capsys.readouterr()
    assert told.out == ""
    assert complaint in told.err
    assert len(told.err.splitlines()) == 1
    assert not [*tmp_path.glob("out/*")]


def test_a_picture_or_folder_that_is_not_there_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "none.png") == cli.Exit.USAGE
    assert "there is no file" in capsys.readouterr().err
    assert run(tmp_path) == cli.Exit.USAGE
    assert "there are no pictures in" in capsys.readouterr().err


def test_no_picture_replaces_itself(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "a.png").read_bytes()
    assert run(folder / "a.png", "--out", str(folder), "--overwrite") == cli.Exit.USAGE
    assert "is one of the pictures itself" in capsys.readouterr().err
    assert (folder / "a.png").read_bytes() == before


def test_help_needs_no_torch() -> None:
    code = (
        f"import runpy, sys; sys.argv = ['upscale', '--help']; sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
    )
    code += f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--upscaler NAME" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="no signals between processes")
def test_ctrl_c_keeps_the_finished_pictures_and_the_same_command_goes_on(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "c.png").unlink()
    Image.effect_noise((600, 600), 50).convert("RGB").save(folder / "e.png")  # takes the network a while
    words = [sys.executable, str(SCRIPT), str(folder), "--out", str(tmp_path / "out"), "--device", "cpu"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for _ in range(3):  # the first three paths
            process.stdout.readline()
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        told = process.stderr.read()
        assert process.wait() == cli.Exit.STOPPED
    assert "stopped; 3 of 4 pictures are done" in told
    assert names(tmp_path / "out") == ["a.png", "b.png", "d.png"]
