"""Promises 16 and 17: no half file, ever; a full disk costs one picture and the run goes on afterwards."""

import builtins
import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ldm.files import UNFINISHED
from ldm.formats import read, write_safetensors
from scripts.txt2img import main as txt2img
from tests.reliability.runs import SMALL, contents
from tests.tiny_families import tiny


class Disk:
    """A disk that fails from its n-th operation on: making a file, writing, syncing, renaming. It counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done, self.fails_at, self.error = 0, 0, errno.ENOSPC
        disk, plain_open = self, builtins.open

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                disk.tick()
                return super().write(data)

        def open_on_disk(path: Any, mode: str = "r", *words: Any, **more: Any) -> Any:
            if "x" not in mode:
                return plain_open(path, mode, *words, **more)
            disk.tick()
            return io.BufferedWriter(Raw(path, "xb"))

        monkeypatch.setattr(builtins, "open", open_on_disk)
        for name in ("fsync", "link", "replace"):
            monkeypatch.setattr(os, name, self.counted(getattr(os, name)))

    def counted(self, function: Callable[..., None]) -> Callable[..., None]:
        def call(*words: Any, **more: Any) -> None:
            self.tick()
            function(*words, **more)

        return call

    def tick(self) -> None:
        self.done += 1
        if 0 < self.fails_at <= self.done:
            raise OSError(self.error, os.strerror(self.error))

    def fail(self, at: int, error: int = errno.ENOSPC) -> None:
        self.done, self.fails_at, self.error = 0, at, error


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def last_line(said: str) -> str:
    """A progress bar that lived for less than 0.1 s ends without a new line."""
    return said.splitlines()[-1].rpartition("step/s]")[2]


def test_a_disk_that_fills_at_any_write_costs_one_picture_at_most(
    tmp_path: Path, disk: Disk, capsys: pytest.CaptureFixture[str]
):
    checkpoint = tmp_path / "tiny.safetensors"
    tiny("class-f8").save(checkpoint)
    words = ["7", "--ckpt", str(checkpoint), *SMALL, "--n-iter", "2", "--resume", "--out"]
    disk.fail(0)
    assert txt2img([*words, str(tmp_path / "whole")]) == 0
    whole, operations = contents(tmp_path / "whole"), disk.done
    assert operations == 15  # three files, each: make, write, sync, link, sync the folder

    for n in range(1, operations + 1):
        out = tmp_path / str(n)
        disk.fail(n, errno.ENOSPC if n % 2 else errno.EIO)
        assert txt2img([*words, str(out)]) == 3
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert last_line(said).startswith("txt2img: [Errno ")
        left = contents(out)
        assert set(left.items()) <= set(whole.items())
        assert len(left) == n // 5  # all that was finished
        assert len(list(out.iterdir())) == len(left)
        disk.fail(0)
        assert txt2img([*words, str(out)]) == 0
        assert contents(out) == whole


def test_a_disk_that_fills_while_weights_are_written_leaves_the_old_ones(tmp_path: Path, disk: Disk):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": torch.zeros(3), "b": torch.zeros(4)})
    disk.fail(0)
    write_safetensors(tmp_path / "b.safetensors", {"a": torch.ones(3), "b": torch.ones(4)})
    operations = disk.done
    for n in range(1, operations + 1):
        disk.fail(n)
        with pytest.raises(OSError, match="No space left"):
            write_safetensors(path, {"a": torch.ones(3), "b": torch.ones(4)}, overwrite=True)
        renamed = disk.done == operations  # only the folder was not synced
        disk.fail(0)
        assert {w.max().item() for w in read(path).tensors.values()} == {float(renamed)}
        assert not list(tmp_path.glob(".*"))


def test_a_full_disk_tells_how_far_the_run_came(
    tmp_path: Path, disk: Disk, capsys: pytest.CaptureFixture[str]
):
    checkpoint = tmp_path / "tiny.safetensors"
    tiny("class-f8").save(checkpoint)
    disk.fail(6)  # of the second picture
    assert (
        txt2img(["7", "--ckpt", str(checkpoint), *SMALL, "--n-iter", "9", "--out", str(tmp_path / "o")]) == 3
    )
    assert last_line(capsys.readouterr().err) == (
        "txt2img: [Errno 28] No space left on device; 1 of 9 pictures are done; "
        "for the others add --seed 43 --n-iter 8"
    )


def test_what_killed_writers_left_is_removed_at_the_next_start(tmp_path: Path):
    checkpoint, out = tmp_path / "tiny.safetensors", tmp_path / "out"
    tiny("class-f8").save(checkpoint)
    out.mkdir()
    (out / f".0123456789abcdef{UNFINISHED}").write_bytes(b"half a picture")
    assert txt2img(["7", "--ckpt", str(checkpoint), *SMALL, "--out", str(out)]) == 0
    assert [path.name for path in out.iterdir()] == ["00000-42.png"]
    Image.open(out / "00000-42.png").load()
