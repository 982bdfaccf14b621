"""Promises 23, 24 and 25: what fails fails alone, nothing leaks, and processes share a folder."""

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.soak import soak
from ldm import Models, Request, cli
from ldm.images import save, save_numbered
from ldm.inputs import Inputs
from ldm.sheets import cells
from ldm.sheets.xyz import chosen, plot
from scripts.img2img import main as img2img
from scripts.txt2img import main as txt2img
from scripts.upscale import main as upscale
from tests.reliability.runs import contents
from tests.tiny_families import tiny

ONE_STEP = ["--width", "16", "--height", "16", "--steps", "1", "--device", "cpu", "--out"]


def test_ten_bad_prompts_of_a_hundred_cost_ten_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    checkpoint = tmp_path / "tiny.safetensors"
    tiny("class-f8").save(checkpoint)
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "broken.safetensors").write_bytes(b"x" * 100)
    good = [f"--prompt {i} --seed {i}" for i in range(90)]
    bad = ["no number", "3 <lora:broken:1>", "3 <lora:absent:1>", "3 <lora:../broken:1>", "1001"] * 2
    mixed = list(good)
    for place, line in enumerate(bad):
        mixed.insert(10 * place, line)
    for name, lines in (("clean", good), ("mixed", mixed)):
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
        words = ["--from-file", str(tmp_path / f"{name}.txt"), "--ckpt", str(checkpoint), "--no-grid"]
        code = txt2img([*words, "--lora-dir", str(tmp_path / "loras"), *ONE_STEP, str(tmp_path / name)])
        assert code == (1 if name == "mixed" else 0)
    assert capsys.readouterr().err.endswith("90 of 100 pictures are done\n")
    assert contents(tmp_path / "mixed") == contents(tmp_path / "clean")
    assert len(contents(tmp_path / "clean")) == 90


@pytest.mark.parametrize("script", ["img2img", "upscale"])
def test_a_bad_picture_of_a_folder_costs_one(script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    checkpoint = tmp_path / "tiny.safetensors"
    if script == "img2img":
        tiny("sd1").save(checkpoint)
    for name in ("clean", "mixed"):
        (tmp_path / name).mkdir()
        for i in range(9):
            Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "mixed" / "4a.png").write_bytes((tmp_path / "mixed" / "4.png").read_bytes()[:-20])
    for name in ("clean", "mixed"):
        folder, out = str(tmp_path / name), str(tmp_path / f"{name}-out")
        if script == "img2img":
            code = img2img([folder, "a cat", "--ckpt", str(checkpoint), *ONE_STEP, out])
        else:
            code = upscale([folder, "--upscaler", "Lanczos", "--device", "cpu", "--out", out])
        assert code == (1 if name == "mixed" else 0)
    assert "9 of 10 pictures are done" in capsys.readouterr().err.splitlines()[-1]
    assert contents(tmp_path / "mixed-out") == contents(tmp_path / "clean-out")
    assert len(contents(tmp_path / "clean-out")) == 9


@contextmanager
def scarce(models: Models) -> Iterator[None]:
    """A hook on the network stands for the allocator: it fails where the picture is wide."""

    def allocate(network: object, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape[-1] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    handle = models.unet.register_forward_pre_hook(allocate)
    try:
        yield
    finally:
        handle.remove()


def test_what_is_too_large_for_the_memory_fails_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    models = tiny("class-f8")
    jobs = [
        cli.Job(Request(prompt="7", seed=i, width=32 + 32 * (i == 1), height=32, steps=1)) for i in range(3)
    ]
    with scarce(models):
        code = cli.draw(models, jobs, lambda image, job: save(image, tmp_path / f"{job.request.seed}.png"))
    assert code == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "2.png"]
    said = capsys.readouterr().err
    assert "'7': out of memory; try a smaller picture" in said
    assert said.endswith("2 of 3 pictures are done\n")


def test_a_cell_that_is_too_large_for_the_memory_fails_alone(tmp_path: Path):
    models = tiny("class-f8")
    sizes = plot(Request(prompt="7", steps=1), chosen("Size: 32x32, 64x32, 16x16"))
    with scarce(models):
        drawn = cells.draw(sizes, lambda path: (models, Inputs()), tmp_path)
    assert drawn is not None
    first, second, third = drawn
    assert isinstance(first, Path)
    assert str(second) == "out of memory; try a smaller picture"
    assert isinstance(third, Path)


def write(folder: Path, writer: int) -> None:
    for i in range(200):
        save_numbered(Image.new("RGB", (4, 4), (writer, i, 0)), folder, "same")


def test_eight_writers_lose_and_replace_nothing(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write, args=(tmp_path, writer)) for writer in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = [Image.open(path).getpixel((0, 0)) for path in tmp_path.iterdir()]
    assert sorted(found) == [(writer, i, 0) for writer in range(8) for i in range(200)]  # pyright: ignore


def test_nothing_leaks(tmp_path: Path):
    grown = soak(tmp_path, pictures=40, warm_up=20)
    assert grown.megabytes < 10
    assert grown.open_files == 0
    assert grown.left_behind == 0
