"""scripts/train_lora.py: what it leaves behind, and its answers to mistakes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm.formats import read
from scripts.train_lora import main
from tests.tiny_families import tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.safetensors"
    tiny("embedded").save(path)
    return path


@pytest.fixture
def train(checkpoint: Path, tmp_path: Path) -> Callable[..., int]:
    folder = tmp_path / "photos" / "2_cat"
    folder.mkdir(parents=True)
    for i, colour in enumerate(("red", "blue")):
        Image.new("RGB", (40 + 8 * i, 40), colour).save(folder / f"{colour}.png")

    def run(*words: str) -> int:
        out = tmp_path / "loras" / "cat.safetensors"
        common = ["--data", str(tmp_path / "photos"), "--out", str(out), "--ckpt", str(checkpoint)]
        return main([*common, "--device", "cpu", "--network_dim", "2", *words])

    return run


def test_the_command_line_trains_saves_and_samples(train, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert train("--epochs", "2", "--save-every", "1", "--sample-prompt", "a cat", "--sample-every", "2") == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'loras/cat.safetensors'}\n"
    assert "2 pictures, 4 with repeats; buckets: 2; batches: 4; 4 steps an epoch, 8 in all" in said.err
    assert "step 8/8" in said.err
    names = {path.relative_to(tmp_path / "loras").as_posix() for path in (tmp_path / "loras").rglob("*.*")}
    assert names == {
        "cat.safetensors",
        "cat-000001.safetensors",
        "cat/loss.csv",
        "cat/state.safetensors",
        "cat/latents.safetensors",
        "cat/samples/000002-0.png",
    }
    file = read(tmp_path / "loras/cat.safetensors")
    assert file.metadata["ss_epoch"] == "2"
    assert all(w.dtype is torch.float16 for w in file.tensors.values())
    written = (tmp_path / "loras/cat.safetensors").read_bytes()
    assert train("--epochs", "2") == 0  # nothing is left to do
    assert (tmp_path / "loras/cat.safetensors").read_bytes() == written


def test_a_file_that_is_not_of_this_run_is_not_replaced(train, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras/cat.safetensors").write_bytes(b"another one")
    assert train("--epochs", "1") == 2
    assert "exists already; choose another name" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "loras").iterdir()] == ["cat.safetensors"]


def test_mistakes_are_one_sentence_and_exit_code_2(train, tmp_path: Path, capsys: pytest.CaptureFixture):
    def answer(*words: str) -> str:
        assert train(*words) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert len(said.err.splitlines()) == 1
        return said.err

    assert "there is no folder" in answer("--data", str(tmp_path / "nowhere"))
    assert "epochs must be 1 or more" in answer("--epochs", "0")
    assert "multiple of 8" in answer("--no-buckets", "--resolution", "44")
    if not _has_bitsandbytes():
        assert "bitsandbytes" in answer("--optimizer", "adamw8bit")
    with pytest.raises(SystemExit) as end:
        train("--out", "cat.ckpt")
    assert end.value.code == 2
    assert "must end in .safetensors" in capsys.readouterr().err


def _has_bitsandbytes() -> bool:
    import importlib.util

    return importlib.util.find_spec("bitsandbytes") is not None
