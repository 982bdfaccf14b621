"""Promise 19: Ctrl-C once ends a run within a step, twice at once; a polite kill is Ctrl-C; no half file."""

import argparse
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import flags
import pytest
from PIL import Image
from torch import nn

from ldm import Request, cli
from ldm.images import save_numbered
from tests.reliability.runs import SMALL, start
from tests.tiny_families import tiny

JOBS = [cli.Job(Request(prompt="7", seed=i, width=16, height=16, steps=3)) for i in range(4)]


def ask(times: int, number: int = signal.SIGINT) -> None:
    for _ in range(times):
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("part", ["sampler", "decoder"])
def test_asked_within_the_networks(part: str, times: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Once: the step, or the picture that is being decoded, is finished. Twice: nothing is."""
    models, calls = tiny("class-f8"), []
    assert models.vae is not None
    network: nn.Module = models.unet if part == "sampler" else models.vae.decoder

    def hook(*_: object) -> None:
        calls.append(1)
        if len(calls) == (2 if part == "decoder" else 5):  # in the second picture
            ask(times)

    handle = network.register_forward_hook(hook)
    try:
        code = cli.draw(models, JOBS, lambda image, job: none(save_numbered(image, tmp_path, "x")))
    finally:
        handle.remove()
    assert code == 130
    finished = 2 if part == "decoder" and times == 1 else 1
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["00000-x.png", "00001-x.png"][:finished]
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith(
            f"stopped; {finished} of 4 pictures are done; "
            f"for the others add --seed {finished} --n-iter {4 - finished}"
        )
    )


def test_a_stopped_run_says_how_to_go_on():
    named = [replace(job, name=f"photo {i}") for i, job in enumerate(JOBS)]
    prompts = [replace(job, request=replace(job.request, prompt=str(i))) for i, job in enumerate(JOBS)]
    resumed = "a run with --resume goes on by itself"
    assert cli.how_to_go_on(JOBS, 1) == "for the others add --seed 1 --n-iter 3"
    turned = [cli.Job(Request(variation_seed=i, variation_strength=0.1)) for i in range(4)]
    assert cli.how_to_go_on(turned, 1) == "for the others add --variation-seed 1 --n-iter 3"
    assert cli.how_to_go_on(JOBS, 4) == "these are all"
    assert cli.how_to_go_on(JOBS[:1], 0) == "the same command begins again"
    assert cli.how_to_go_on(named, 2) == f"the next is photo 2 with seed 2; {resumed}"
    assert cli.how_to_go_on(prompts, 3) == f"the next is '3' with seed 3; {resumed}"


def none(_: object) -> None:
    """Of a value, nothing."""


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("call", ["fsync", "link"])
def test_asked_while_a_picture_is_saved(
    call: str, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Once: that picture is saved. Twice: the file is there whole, or not at all."""
    original: Callable[..., None] = getattr(os, call)

    def interrupted(*words: object) -> None:
        monkeypatch.setattr(os, call, original)
        original(*words)
        ask(times)

    monkeypatch.setattr(os, call, interrupted)
    assert (
        cli.draw(tiny("class-f8"), JOBS, lambda image, job: none(save_numbered(image, tmp_path, "x"))) == 130
    )
    there = ["00000-x.png"] if times == 1 or call == "link" else []
    assert [path.name for path in tmp_path.iterdir()] == there
    for name in there:
        Image.open(tmp_path / name).load()


def test_an_interrupt_that_comes_out_as_another_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Torch's context managers are not safe against interrupts: rarely, one becomes a RuntimeError."""
    stopping = threading.Event()
    monkeypatch.setattr(flags, "stopping", stopping)

    def run(a: argparse.Namespace) -> int:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            raise RuntimeError("trying to pop from empty mode stack")

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            flags.start(lambda: flags.main("draw", lambda argv: argparse.Namespace(debug=False), run, None))
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "draw: stopped\n"


def test_asked_at_random_moments_of_whole_runs(tmp_path: Path):
    checkpoint, out, log = tmp_path / "tiny.safetensors", tmp_path / "out", tmp_path / "log"
    tiny("class-f8").save(checkpoint)
    words = ["7", "--ckpt", str(checkpoint), *SMALL, "--n-iter", "1000", "--resume", "--out", str(out)]
    rng = random.Random(0)
    for i in range(12):
        log.unlink(missing_ok=True)
        run = start("txt2img", words, log)
        # One half of the runs is asked while it begins and loads, the other while it draws.
        while not log.exists() or (i % 2 and ".png" not in log.read_text()):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        for number in ((signal.SIGINT,), (signal.SIGTERM,), (signal.SIGINT, signal.SIGTERM))[i % 3]:
            assert run.pid is not None
            with suppress(ProcessLookupError):  # the first signal may have ended it already
                os.kill(run.pid, number)
        asked = time.monotonic()
        run.join(60)
        said = ["", *log.read_text().splitlines()]
        assert run.exitcode == 130, said
        assert time.monotonic() - asked < 10
        assert not [line for line in said if "Traceback" in line]
        ending = ("txt2img: stopped", "the same command goes on from there")
        assert said[-1].endswith(ending) or i % 3 == 2  # asked twice, it need not say anything
        assert not list(out.glob(".*"))
    drawn = list(out.glob("*.png"))
    assert len(drawn) >= 6
    for path in drawn:
        Image.open(path).load()
