"""Promise 18: a run of many pictures, ended as often as you like, leaves the files of one that was not.

LDM_KILLS=200 python -m pytest tests/reliability -k killed: the same with so many kills, and of a training.
"""

import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import ldm
from ldm import cli
from ldm.formats import write_safetensors
from scripts.img2img import main as img2img
from scripts.txt2img import main as txt2img
from tests.lora.test_lora import lora_tensors
from tests.reliability.runs import SMALL, contents, start
from tests.tiny_families import tiny

KILLS = int(os.environ.get("LDM_KILLS", 20))
PICTURES = KILLS * 3 // 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.safetensors"
    tiny("class-f8").save(path)
    return path


def test_a_run_killed_many_times_leaves_the_files_of_one_that_was_not(checkpoint: Path, tmp_path: Path):
    words = ["7", "--ckpt", str(checkpoint), *SMALL, "--n-iter", str(PICTURES), "--resume", "--out"]
    for folder in ("first", "whole"):  # the first process of all starts slowly
        begin = time.monotonic()
        whole = start("txt2img", [*words, str(tmp_path / folder)], tmp_path / f"{folder}.log")
        whole.join(2 * PICTURES)
        assert whole.exitcode == 0
    took = (time.monotonic() - begin) * 30 / PICTURES

    rng, out, log = random.Random(0), tmp_path / "out", tmp_path / "killed.log"
    for _ in range(KILLS):
        run = start("txt2img", [*words, str(out)], log)
        run.join(rng.uniform(0.0, 0.4) * took)
        run.kill()
        run.join()
        for path in out.glob("*.png"):
            Image.open(path).load()
    last = start("txt2img", [*words, str(out)], log)
    last.join(2 * PICTURES)
    assert last.exitcode == 0
    assert contents(out) == contents(tmp_path / "whole")
    assert len(contents(out)) == PICTURES + 1  # with the record of the run
    assert not list(out.glob(".*"))  # what killed writers left was removed
    drawn = [line for line in log.read_text().splitlines() if line.endswith(".png")]
    assert len(drawn) == len(set(drawn))  # nothing was done twice


def test_a_run_with_another_argument_is_refused_in_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["7", "--ckpt", str(checkpoint), *SMALL, "--resume", "--out", str(tmp_path / "out"), "--n-iter"]
    assert txt2img([*words, "2"]) == 0
    before = contents(tmp_path / "out")
    other = tmp_path / "other.safetensors"
    tiny("class-f8").save(other, metadata={"a": "b"})
    for changed, named in (
        ([*words, "3"], "another number of pictures"),
        ([*words, "2", "--seed", "1"], "another prompt or setting"),
        (["8", *words[1:], "2"], "another prompt or setting"),
        ([*words, "2", "--ckpt", str(other)], "another model or device"),
    ):
        capsys.readouterr()
        assert txt2img(changed) == 2
        assert named in capsys.readouterr().err.splitlines()[-1]
    assert contents(tmp_path / "out") == before
    capsys.readouterr()
    assert txt2img([*words, "2"]) == 0  # the same once more does nothing
    assert "2 of 2 pictures are there already" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before
    (tmp_path / "out" / "run.json").write_text("[" * 100_000)
    assert txt2img([*words, "2"]) == 2
    assert "is damaged" in capsys.readouterr().err


def test_a_run_with_other_files_or_a_faster_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    models, lora, out = tiny("sd1"), tmp_path / "style.safetensors", tmp_path / "out"
    models.save(tmp_path / "tiny.safetensors")
    write_safetensors(lora, lora_tensors(models, seed=0), {}, overwrite=True)
    small = ["--ckpt", str(tmp_path / "tiny.safetensors"), *SMALL, "--n-iter", "2", "--resume"]
    words = ["a cat <lora:style:1>", *small, "--lora-dir", str(tmp_path), "--out", str(out)]
    embeddings = tmp_path / "embeddings"
    embeddings.mkdir()
    assert txt2img([*words, "--embeddings-dir", str(embeddings)]) == 0
    before = contents(out)

    def refused(*more: str) -> str:
        capsys.readouterr()
        assert txt2img([*words, *more]) == 2
        assert contents(out) == before
        return capsys.readouterr().err.splitlines()[-1]

    assert "holds a run with another --fast or --budget" in refused("--fast")
    write_safetensors(lora, lora_tensors(models, seed=1), {}, overwrite=True)
    assert "holds a run with another LoRA, embedding or other file" in refused()
    write_safetensors(lora, lora_tensors(models, seed=0), {}, overwrite=True)
    (out / "00001-43.png").unlink()
    assert txt2img(words) == 0
    assert contents(out) == before
    write_safetensors(
        embeddings / "cat.safetensors", {"emb_params": torch.ones(1, models.unet.config.context_dim or 0)}, {}
    )
    assert "another LoRA, embedding" in refused("--embeddings-dir", str(embeddings))
    lora.unlink()
    assert "there is no LoRA 'style'" in refused()


def test_the_upscaler_of_a_second_pass_belongs_to_the_run(tmp_path: Path):
    models = replace(tiny("sd1"), library=ldm.Library(upscalers=tmp_path))
    for upscaler, other in (("mine", True), ("Lanczos", False)):
        jobs = [cli.Job(ldm.Request(prompt="a cat", hires=ldm.Hires(scale=2, upscaler=upscaler)))]
        found = []
        for content in (b"one", b"two"):
            (tmp_path / "mine.pth").write_bytes(content)
            found.append(cli.facts(models, jobs, ldm.Inputs()))
        assert (found[0] != found[1]) == other


def test_a_missing_file_is_told_before_the_run_begins(tmp_path: Path):
    """So that the folder can be used once it is there; of several prompts, the others are drawn."""
    tiny("sd1").save(tmp_path / "tiny.safetensors")
    out = tmp_path / "out"
    words = ["--ckpt", str(tmp_path / "tiny.safetensors"), *SMALL, "--resume", "--out", str(out)]
    assert txt2img(["a cat <lora:style:1>", *words, "--lora-dir", str(tmp_path)]) == 2
    assert contents(out) == {}
    (tmp_path / "prompts.txt").write_text("a cat <lora:style:1>\na dog\n")
    assert txt2img(["--from-file", str(tmp_path / "prompts.txt"), *words, "--lora-dir", str(tmp_path)]) == 1
    assert sorted(contents(out)) == ["00001-43.png", "run.json"]


def test_a_run_begins_behind_the_pictures_that_are_there_and_fills_gaps_of_batches(
    checkpoint: Path, tmp_path: Path
):
    out = tmp_path / "out"
    words = ["7", "--ckpt", str(checkpoint), *SMALL, "--out", str(out), "--batch-size", "2", "--n-iter", "2"]
    assert txt2img([*words, "--no-grid"]) == 0
    assert txt2img([*words, "--resume"]) == 0
    whole = contents(out)
    assert sorted(whole)[4:] == ["00004-42.png", "00005-43.png", "00006-44.png", "00007-45.png", "run.json"]
    (out / "00005-43.png").unlink()
    assert txt2img([*words, "--resume"]) == 0
    assert contents(out) == whole


def test_a_second_process_at_the_same_run_is_refused(checkpoint: Path, tmp_path: Path):
    words = ["7", "--ckpt", str(checkpoint), *SMALL, "--n-iter", "1000", "--resume"]
    first = start("txt2img", [*words, "--out", str(tmp_path / "out")], tmp_path / "first.log")
    for _ in range(600):
        if list(tmp_path.glob("out/*.png")):
            break
        time.sleep(0.05)
    assert txt2img([*words, "--out", str(tmp_path / "out")]) == 2
    first.kill()
    first.join()


def test_a_folder_of_pictures_goes_on(tmp_path: Path):
    model = tmp_path / "tiny.safetensors"
    tiny("sd1").save(model)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16), (90 * i, 0, 0)).save(pictures / f"{i}.png")
    words = [str(pictures), "a cat", "--ckpt", str(model), *SMALL, "--resume", "--out", str(tmp_path / "out")]
    assert img2img(words) == 0
    whole = contents(tmp_path / "out")
    assert sorted(whole) == ["00000-42-0.png", "00001-42-1.png", "00002-42-2.png", "run.json"]
    (tmp_path / "out" / "00001-42-1.png").unlink()
    assert img2img(words) == 0
    assert contents(tmp_path / "out") == whole
    (pictures / "1.png").unlink()
    assert img2img(words) == 2


def test_one_picture_and_a_named_file_are_no_run(checkpoint: Path, tmp_path: Path):
    words = ["7", "--ckpt", str(checkpoint), *SMALL, "--resume"]
    assert txt2img([*words, "--out", str(tmp_path / "a.png")]) == 2
    with pytest.raises(SystemExit):
        txt2img([*words, "--skip-save"])


def test_a_picture_in_tiles_goes_on_with_the_next_tile(tmp_path: Path):
    """Ctrl-C, then kill -9, then to the end: no drawn tile is lost, and the picture is the same."""
    tiny("sd1").save(tmp_path / "tiny.safetensors")
    Image.linear_gradient("L").resize((24, 24)).save(tmp_path / "small.png")
    words = [str(tmp_path / "small.png"), "a cat", "--ckpt", str(tmp_path / "tiny.safetensors"), *SMALL]
    words += ["--overlap", "8", "--upscaler", "Lanczos", "--out"]  # 25 tiles
    whole, out, log = tmp_path / "whole.png", tmp_path / "out.png", tmp_path / "log"
    kept = tmp_path / "out-tiles"
    for number in (signal.SIGINT, signal.SIGKILL):
        before = set(kept.glob("*.png"))
        run = start("sd_upscale", [*words, str(out)], log)
        while run.is_alive() and len(set(kept.glob("*.png"))) < len(before) + 2:
            time.sleep(0.005)
        assert run.pid is not None
        os.kill(run.pid, number)
        run.join(60)
        assert run.exitcode == (130 if number == signal.SIGINT else -9)
        assert before < set(kept.glob("*.png"))
        assert not out.exists()
    said, drawn = log.read_text(), len(list(kept.glob("*.png")))
    assert "of 25 pictures are done; the same command goes on from there" in said
    assert f"the tiles that are drawn wait in {kept}\n" in said
    for path in (out, whole):
        last = start("sd_upscale", [*words, str(path)], log)
        last.join(60)
        assert last.exitcode == 0
    assert f"{drawn} of 25 pictures are there already" in log.read_text()
    assert out.read_bytes() == whole.read_bytes()
    assert not kept.exists()
