"""Promise 20: training goes on to the bit after any kill, and from the state before where one is damaged."""

import multiprocessing
import os
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ldm import LdmError
from ldm.formats import read
from ldm.training.loop import LoopConfig, Run
from tests.reliability.test_faults import Disk

KILLS = int(os.environ.get("LDM_KILLS", 8))
CONFIG = LoopConfig(steps=5 * KILLS, lr=1e-2, warmup=2, ema_decay=0.9, save_every=5)


def make(folder: Path, config: LoopConfig = CONFIG) -> Run:
    torch.manual_seed(0)
    return Run(nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 3, 3)), config, folder)


def train(folder: Path, config: LoopConfig = CONFIG, pause: float = 0.0) -> Run:
    run = make(folder, config)
    run.resume()

    def loss(generator: torch.Generator) -> Tensor:
        time.sleep(pause)
        x = torch.randn(2, 3, 9, 9, generator=generator)
        return (run.model(x) - x[..., 2:-2, 2:-2].square()).square().mean()

    run.train(loss, samples_per_step=2)
    return run


def train_slowly(folder: str) -> None:
    torch.set_num_threads(1)
    train(Path(folder), pause=0.01)


def same(one: Path, other: Path) -> bool:
    a, b = read(one / "state.safetensors"), read(other / "state.safetensors")
    equal = all(torch.equal(w, b.tensors[name]) for name, w in a.tensors.items())
    return a.metadata == b.metadata and a.tensors.keys() == b.tensors.keys() and equal


def test_a_training_killed_at_random_moments_ends_as_one_that_was_not(tmp_path: Path):
    train(tmp_path / "whole")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ldm.training.loop"])
    rng = random.Random(0)
    for _ in range(KILLS):
        process = context.Process(target=train_slowly, args=(str(tmp_path / "killed"),), daemon=True)
        process.start()
        process.join(rng.uniform(0.1, 0.6))
        process.kill()
        process.join()
        for path in (tmp_path / "killed").glob("*.safetensors"):
            read(path)
    train(tmp_path / "killed")
    assert same(tmp_path / "whole", tmp_path / "killed")
    assert not list((tmp_path / "killed").glob(".*"))


def cut(data: bytes) -> bytes:
    return data[:-100]


def flipped(data: bytes) -> bytes:
    return data[:-50] + bytes([data[-50] ^ 1]) + data[-49:]


def another_step(data: bytes) -> bytes:
    return data.replace(b'"step":"20"', b'"step":"21"')


@pytest.mark.parametrize("damage", [cut, flipped, another_step, lambda data: b""])
def test_a_damaged_newest_state_falls_back_to_the_one_before(
    tmp_path: Path, damage, capsys: pytest.CaptureFixture[str]
):
    train(tmp_path / "damaged", replace(CONFIG, steps=20))
    newest = tmp_path / "damaged" / "state.safetensors"
    newest.write_bytes(damage(newest.read_bytes()))
    capsys.readouterr()
    run = make(tmp_path / "damaged")
    assert run.resume()
    assert run.step == 15
    said = capsys.readouterr().err
    assert said.startswith("state.safetensors")
    assert said.endswith("; going on from the state before\n")
    train(tmp_path / "damaged")
    assert read(newest).metadata["step"] == "40"


def test_the_sound_state_survives_the_save_after_a_damaged_one(tmp_path: Path):
    train(tmp_path, replace(CONFIG, steps=20))
    newest, previous = (tmp_path / f"state{name}.safetensors" for name in ("", ".previous"))
    newest.write_bytes(cut(newest.read_bytes()))
    before = previous.read_bytes()
    run = make(tmp_path)
    run.resume()
    run.step += 1
    run.save()
    assert previous.read_bytes() == before
    assert read(newest).metadata["step"] == "16"


def test_two_damaged_states_are_an_error_in_one_line(tmp_path: Path):
    train(tmp_path, replace(CONFIG, steps=20))
    for path in tmp_path.glob("state*"):
        path.write_bytes(cut(path.read_bytes()))
    with pytest.raises(LdmError, match="state"):
        make(tmp_path).resume()


def test_a_disk_that_fills_at_any_write_leaves_a_state_to_go_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    disk = Disk(monkeypatch)
    train(tmp_path / "whole")
    for n in range(1, 12):
        folder = tmp_path / str(n)
        train(folder, replace(CONFIG, steps=15))
        run = make(folder)
        run.resume()
        run.step += 1
        disk.fail(n)
        try:
            run.save()
        except OSError:
            failed = True
        else:
            failed = False
        disk.fail(0)
        assert not list(folder.glob(".*"))
        again = make(folder)
        assert again.resume()
        assert again.step in (15, 16)
        if not failed:
            break
    else:
        raise AssertionError("it always failed")
