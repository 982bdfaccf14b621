"""The command line: its answers to mistakes, and what it leaves behind."""

import errno
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ldm
from ldm import cli
from scripts import again, img2img, inpaint, txt2img
from scripts.txt2img import main, parse, requests
from tests.tiny_families import tiny

SCRIPT = Path(__file__).parents[1] / "scripts" / "txt2img.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.safetensors"
    tiny("sd1").save(path)
    return path


@pytest.fixture
def draw(checkpoint: Path, tmp_path: Path):
    """Run the script on the tiny checkpoint at 64 x 64, 2 steps, into tmp_path/out."""

    def run(*words: str) -> int:
        common = ["--ckpt", str(checkpoint), "--width", "64", "--height", "64", "--steps", "2"]
        return main([*common, "--device", "cpu", "--out", str(tmp_path / "out"), *words])

    return run


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def pixels(path: Path) -> bytes:
    return Image.open(path).tobytes()


def text(path: Path) -> str:
    return Image.open(path).info["parameters"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--steps", "0"], "steps must be 1 to 10000, got 0"),
        (["--steps", "ten"], "invalid int value: 'ten'"),
        (["--width", "100"], "width must be a multiple of 8, got 100; try 96"),
        (["--height", "4"], "height must be a multiple of 8, got 4; try 8"),
        (["--cfg-scale", "nan"], "cfg_scale must be a finite number"),
        (["--seed", "-5"], "seed must be"),
        (["--seed", str(2**64 - 1), "--n-iter", "2"], "seed must be"),
        (["--batch-size", "0"], "batch_size must be"),
        (["--n-iter", "0"], "--n-iter must be at least 1"),
        (["--sampler", "DPM++ 2N"], "did you mean DPM++ 2M"),
        (["--sampler", "LMS", "--eta", "1"], "has no option 'eta'"),
        (["--sampler", "UniPC", "--order", "4"], "the order of UniPC must be one of 1, 2, 3, got 4"),
        (["--sigma-min", "5", "--sigma-max", "3"], "need 0 < sigma_min < sigma_max, got 5 and 3"),
        (["--rho", "0"], "rho must be above 0"),
        (["--sampler", "Euler", "--rho", "5"], "the spacing 'uniform' has no rho"),
        (["--schedule", "vp", "--sigma-max", "10"], "the spacing 'vp' has fixed ends"),
        (["--n-rows", "0"], "--n-rows must be at least 1"),
        (["--schedule", "caras"], "did you mean 'karras'"),
        (["--eta", "-1"], "eta must be"),
        (["--device", "abacus"], "unknown device 'abacus'"),
        (["--vae", "none.pt"], "there is no file none.pt"),
        (["--from-file", "none.txt"], "give one prompt"),
        (["--prompt", "another"], "give one prompt"),
        (["--out", "x.gif"], "saved as .png"),
        (["--out", "x.png", "--n-iter", "2"], "one file for 2 pictures"),
        (["--out", "/dev/null/x"], "cannot make the folder"),
        (["--budget", "lots"], "memory is written as 4GB, 900MB or free, got 'lots'"),
        (["--budget", "4GB", "--storage", "float16"], "--budget goes without --dtype, --storage"),
        (["--budget", "free", "--resume"], "free memory changes; with --resume say how much: --budget 4GB"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_read(
    words: list[str],
    complaint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    unread = tmp_path / "not a checkpoint.safetensors"
    unread.touch()
    try:
        code = main(["a cat", "--ckpt", str(unread), *words])
    except SystemExit as end:  # argparse's way
        code = end.code
    said = capsys.readouterr()
    assert code == 2
    assert said.out == ""
    assert complaint in said.err
    assert len(said.err.splitlines()) == 1


def test_a_budget_is_planned_before_loading(draw, capsys: pytest.CaptureFixture[str]):
    assert draw("a cat", "--budget", "2GB") == 0
    assert re.search(r"^memory: 0\.\d of 2\.0 GB: weights in float32 on cpu$", capsys.readouterr().err, re.M)
    assert draw("a cat", "--budget", "100MB") == 2
    assert "GB of memory at least, there is 0.1" in capsys.readouterr().err


def test_a_missing_or_damaged_checkpoint_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"<html>not found</html>")
    for path in (damaged, tmp_path / "missing.safetensors"):
        assert main(["a cat", "--ckpt", str(path), "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert path.name in said
        assert len(said.splitlines()) == 1


def test_debug_shows_where(tmp_path: Path):
    with pytest.raises(ldm.LdmError):
        main(["a cat", "--ckpt", str(tmp_path / "missing"), "--debug"])


def test_help_and_typing_mistakes_need_no_torch():
    program = (
        "import sys, runpy; sys.argv = ['txt2img', '--help']\n"
        f"sys.path[0] = {str(SCRIPT.parent)!r}\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "--sampler" in said
    assert said.endswith("False\n")


def test_pictures_are_numbered_seeded_and_carry_their_settings(
    draw, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert draw("a cat", "--batch-size", "2", "--n-iter", "2", "--negative", "dog") == 0
    out = tmp_path / "out"
    saved = ["00000-42.png", "00001-43.png", "00002-44.png", "00003-45.png", "00004-grid.png"]
    assert names(out) == saved
    said = capsys.readouterr()
    assert said.out.splitlines() == [str(out / name) for name in saved]
    assert said.err.startswith("tiny: Stable Diffusion 1.x")
    assert "4/4" in said.err  # the progress bar
    assert re.fullmatch(
        r"a cat\nNegative prompt: dog\nSteps: 2, Sampler: DPM\+\+ 2M, Schedule type: Karras, CFG scale: 7, "
        r"Seed: 44, Size: 64x64, Model hash: [0-9a-f]{10}, Model: tiny, RNG: CPU, "
        r"Batch size: 2, Batch pos: 0, Version: ldm .*",
        text(out / saved[2]),
    )
    assert Image.open(out / saved[4]).size == (128, 128)
    assert len({pixels(out / name) for name in saved[:4]}) == 4


def test_the_same_command_draws_the_same_picture_whatever_the_batch(draw, tmp_path: Path):
    assert draw("a cat", "--batch-size", "2", "--no-grid") == 0
    assert draw("a cat", "--n-iter", "2", "--no-grid") == 0
    assert draw("a cat", "--seed", "43") == 0
    first, second, again, also, single = sorted((tmp_path / "out").iterdir())
    assert pixels(also) == pixels(single)
    # A convolution of two pictures may sum in another order than that of one: a level may round differently.
    for one, other in ((first, again), (second, also)):
        assert max(abs(a - b) for a, b in zip(pixels(one), pixels(other), strict=True)) <= 1


def test_variations_count_on_over_batches():
    words = ["a cat", "--variation-strength", "0.2", "--variation-seed", "7"]
    for split in (["--batch-size", "4"], ["--n-iter", "4"], ["--batch-size", "2", "--n-iter", "2"]):
        singles = [one.single(i) for one in requests(parse([*words, *split])) for i in range(one.batch_size)]
        assert [(one.seed, one.variation_seed) for one in singles] == [(42, 7), (42, 8), (42, 9), (42, 10)]
    fixed = requests(parse([*words, "--n-iter", "2", "--fixed-code"]))
    assert fixed[0] == fixed[1]


def test_rows_of_the_sheet_are_as_long_as_asked_for(draw, tmp_path: Path):
    assert draw("a cat", "--n_samples", "3", "--n_rows", "3", "--skip_save") == 0
    [sheet] = (tmp_path / "out").iterdir()
    assert Image.open(sheet).size == (192, 64)


def test_the_flag_of_the_first_model_looks_where_the_original_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert main(["a cat", "--laion400m"]) == 2
    assert capsys.readouterr().err == "txt2img: there is no file models/ldm/text2img-large/model.ckpt\n"


def test_one_picture_goes_to_the_named_file(draw, tmp_path: Path):
    path = tmp_path / "sub" / "cat.png"
    assert draw("a cat", "--out", str(path)) == 0
    assert draw("a cat", "--out", str(path)) == 2
    assert draw("a cat", "--out", str(path), "--overwrite") == 0
    assert names(path.parent) == ["cat.png"]


def test_random_seeds_differ_and_are_recorded(draw, tmp_path: Path):
    assert draw("a cat", "--seed", "-1") == 0
    assert draw("a cat", "--seed", "-1") == 0
    first, second = sorted((tmp_path / "out").iterdir())
    assert f"Seed: {first.stem.split('-')[1]}," in text(first)
    assert pixels(first) != pixels(second)


def test_prompts_come_from_a_file(draw, tmp_path: Path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\ufeffa cat\n\n  a dög \n", encoding="utf-8")
    assert draw("--from-file", str(prompts), "--no-grid", "--fixed-code") == 0
    cat, dog = sorted((tmp_path / "out").iterdir())
    assert [text(path).splitlines()[0] for path in (cat, dog)] == ["a cat", "a dög"]
    assert cat.name.endswith("-42.png")
    assert dog.name.endswith("-42.png")


@pytest.mark.parametrize(
    ("words", "recorded"),
    [
        (["--ddim_steps", "3"], "Steps: 3, Sampler: DDIM"),
        (["--ddim_steps", "3", "--ddim_eta", "0.5"], "Eta DDIM: 0.5"),
        (["--ddim_steps", "3", "--plms", "--ddim_eta", "0.0"], "Steps: 3, Sampler: PLMS"),
        (["--dpm_solver", "--scale", "5"], "Sampler: DPM++ 2M, Schedule type: SGM Uniform, CFG scale: 5,"),
        (["--H", "32", "--W", "128"], "Size: 128x32"),
        (["--n_samples", "1", "--n_iter", "1", "--n_rows", "2", "--skip_grid"], "Seed: 42"),
        (["--schedule", "Automatic", "--sampler", "Euler Karras"], "Schedule type: Uniform"),
        (["--laion400m"], "Seed: 42"),
        (["--precision", "full", "--C", "4", "--f", "8", "--config", "v1-inference.yaml"], "Seed: 42"),
    ],
)
def test_command_lines_of_the_original_script_work(
    checkpoint: Path, tmp_path: Path, words: list[str], recorded: str
):
    common = ["--prompt", "a cat", "--ckpt", str(checkpoint), "--outdir", str(tmp_path / "out")]
    size = [] if "--H" in words else ["--H", "64", "--W", "64"]
    steps = [] if "--ddim_steps" in words else ["--steps", "2"]
    assert main([*common, *size, *steps, *words]) == 0
    [saved] = (tmp_path / "out").iterdir()
    assert recorded in text(saved)


def test_one_bad_prompt_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A class-conditional model wants numbers for prompts."""
    path = tmp_path / "classes.safetensors"
    tiny("class-f8").save(path)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("3\na cat\n5\n")
    words = ["--ckpt", str(path), "--width", "64", "--height", "64", "--steps", "2", "--no-grid"]
    assert main(["--from-file", str(prompts), *words, "--out", str(tmp_path / "out")]) == 1
    assert names(tmp_path / "out") == ["00000-42.png", "00001-44.png"]
    assert capsys.readouterr().err.endswith("2 of 3 pictures are done\n")
    assert main(["a cat", *words, "--out", str(tmp_path / "out")]) == 2


def test_files_that_a_prompt_names_and_styles(
    draw, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert draw("a cat <lora:x:1>") == cli.Exit.USAGE
    assert "no folder with LoRA files is given" in capsys.readouterr().err
    assert draw("a cat <lora:x:1>", "--lora-dir", str(tmp_path / "none")) == cli.Exit.USAGE
    assert "there is no folder" in capsys.readouterr().err
    assert draw("a cat <lora:x:1>", "--lora-dir", str(tmp_path)) == cli.Exit.USAGE
    assert "there is no LoRA 'x'" in capsys.readouterr().err
    (tmp_path / "styles.csv").write_text('name,prompt,negative_prompt\nfilm,"{prompt}, film grain",digital\n')
    monkeypatch.chdir(tmp_path)
    assert draw("a cat", "--style", "film", "--compat", "a1111", "--variation-strength", "0.2") == 0
    written = text(tmp_path / "out" / "00000-42.png")
    assert written.startswith("a cat, film grain\nNegative prompt: digital\n")
    assert "Variation seed strength: 0.2" in written
    assert draw("a cat", "--compat", "paint") == cli.Exit.USAGE
    assert draw("a cat", "--seed-resize-from", "big") == cli.Exit.USAGE


def test_explaining_draws_nothing(draw, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert draw("a (red:1.3) [cat:dog:0.5]", "--explain") == 0
    told = capsys.readouterr().out
    assert "  step 1\n    3 of 75 tokens: a (red: 1.3) cat\n  step 2\n" in told
    assert not (tmp_path / "out").exists()


def test_a_picture_is_drawn_again(draw, tmp_path: Path, checkpoint: Path):
    assert draw("a (red:1.2) cat", "--batch-size", "2", "--sampler", "Euler a", "--no-grid") == 0
    second = tmp_path / "out" / "00001-43.png"
    again = tmp_path / "again.png"
    words = ["--from-picture", str(second), "--models-dir", str(checkpoint.parent), "--out", str(again)]
    assert main(words) == 0
    assert pixels(again) == pixels(second)
    assert text(again) == text(second)


def test_a_full_disk_is_exit_code_3(
    draw, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path
):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert draw("a cat") == cli.Exit.DISK
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert names(tmp_path / "out") == []


def test_ctrl_c_keeps_what_is_finished(checkpoint: Path, tmp_path: Path):
    words = ["a cat", "--ckpt", str(checkpoint), "--width", "64", "--height", "64", "--steps", "40"]
    run = subprocess.Popen(
        [sys.executable, str(SCRIPT), *words, "--n-iter", "1000", "--out", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])},
    )
    assert run.stdout is not None
    first = run.stdout.readline()
    run.send_signal(signal.SIGINT)
    rest, errors = run.communicate(timeout=60)
    saved = (first + rest).split()
    assert run.returncode == 130
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == (
        f"stopped; {len(saved)} of 1000 pictures are done; "
        f"for the others add --seed {42 + len(saved)} --n-iter {1000 - len(saved)}"
    )
    assert sorted(saved) == sorted(str(path) for path in (tmp_path / "out").iterdir())
    for path in saved:
        Image.open(path).load()


def test_fast_draws_the_same_picture_but_for_rounding(draw, tmp_path: Path):
    assert draw("a cat") == draw("a cat", "--fast") == 0
    plain, fast = (np.asarray(Image.open(path)).astype(int) for path in sorted((tmp_path / "out").iterdir()))
    assert np.abs(plain - fast).max() <= 1


def test_a_picture_is_drawn_again_with_changes(
    draw, tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
):
    assert draw("a cat", "--batch-size", "2", "--sampler", "Euler a", "--eta", "0.5", "--no-grid") == 0
    second = str(tmp_path / "out" / "00001-43.png")

    def again(*words: str) -> Path:
        path = tmp_path / "again.png"
        common = ["--models-dir", str(checkpoint.parent), "--device", "cpu", "--out", str(path)]
        assert main(["--from-picture", second, *common, "--overwrite", *words]) == 0
        return path

    # Only what is named changes, to what the whole command would have drawn.
    assert draw("a cat", "--batch-size", "2", "--sampler", "Euler a", "--eta", "0.5", "--steps", "3") == 0
    other = tmp_path / "out" / "00003-43.png"
    changed = again("--steps", "3")
    assert pixels(changed) == pixels(other)
    assert text(changed) == text(other)
    assert "was made with" not in capsys.readouterr().err  # what was asked for needs no warning

    # A flag counts where its value is the usual one, too; the seed is that of this picture.
    changed = again("a dog", "--seed", "42", "--negative=", "--tiling")
    settings = text(changed)
    assert settings.startswith("a dog\nSteps: 2, Sampler: Euler a,")
    assert "Seed: 42," in settings
    assert "Eta: 0.5" in settings
    assert "Tiling: True" in settings

    # A new sampler comes with its own schedule and options.
    settings = text(again("--sampler", "DPM++ 2M Karras", "--cfg_scale", "3"))
    assert "Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 3," in settings
    assert "Eta" not in settings


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--sampler", "nonsense"], "unknown sampler 'nonsense'"),
        (["--steps", "0"], "steps must be 1 to 10000"),
        (["--eta", "1"], "has no option 'eta'"),
        (["--batch-size", "1"], "--batch-size does not go with --from-picture"),
        (["--hires", "2"], "--hires does not go with --from-picture"),
        (["--style", "film"], "--style does not go with --from-picture"),
        (["--storage", "float16"], "for --storage give --ckpt"),
        (["--fast"], "for --fast give --ckpt"),
        (["--from-file", "x.txt"], "--from-file does not go with --from-picture"),
    ],
)
def test_an_impossible_change_is_one_line(
    draw,
    tmp_path: Path,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    complaint: str,
):
    assert draw("a cat", "--sampler", "Euler", "--out", str(tmp_path / "x.png")) == 0
    capsys.readouterr()
    try:
        common = ["--models-dir", str(checkpoint.parent), "--device", "cpu", "--out", str(tmp_path / "y.png")]
        code = main(["--from-picture", str(tmp_path / "x.png"), *common, *words])
    except SystemExit as end:  # argparse's way
        code = end.code
    said = capsys.readouterr().err
    assert code == 2
    assert complaint in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "y.png").exists()


def test_no_flag_is_ignored_when_a_picture_is_drawn_again():
    """Each one is a field to change, is refused, or says where and how to run."""
    running = {
        *("given", "from_picture", "picture", "out", "overwrite", "debug", "device", "ckpt", "laion400m"),
        *("models_dir", "lora_dir", "embeddings_dir", "hypernetwork_dir", "upscalers_dir", "explain"),
        *("control", "control_hint", "control_weight", "control_start", "control_end", "control_mode"),
        *("depth", "mask", "box", "outpaint", "outpaint_fill", "overlap", "no_grid", "skip_save"),
        *("resume", "budget"),  # refused elsewhere
        *("config", "C", "f"),  # always ignored, and said so
    }
    named = {field.name for record in (ldm.Request, ldm.Edit) for field in fields(record)}
    for script in (txt2img, img2img, inpaint):
        for flag in vars(script.parse(["x"])):
            field = again.FIELDS.get(flag, flag)
            assert field in named or flag in {*again.REFUSED, *again.LOADING, *running}, flag


def test_the_model_of_a_picture_that_is_drawn_again_is_held_as_asked(draw, tmp_path: Path):
    assert draw("a cat", "--out", str(tmp_path / "x.png")) == 0
    held = ["--storage", "float16", "--from-picture", str(tmp_path / "x.png"), "--out"]
    assert draw("a cat", *held, str(tmp_path / "y.png")) == 0
    assert pixels(tmp_path / "y.png") != pixels(tmp_path / "x.png")
