"""No half file, ever, and no name that leads outside its folder."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ldm import files
from ldm.errors import LdmError
from ldm.files import atomic_write, inside, remove_unfinished


def test_a_file_appears_whole_with_the_permissions_of_a_plain_one(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a") as file:
        file.write(b"12")
        assert not (tmp_path / "a").exists()
    (tmp_path / "plain").touch()
    assert (tmp_path / "a").read_bytes() == b"12"
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "plain"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "a", overwrite=True) as file:  # noqa: PT012
        file.write(b"half")
        raise KeyboardInterrupt
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


def test_an_existing_file_is_never_replaced_unless_told(tmp_path: Path) -> None:
    with pytest.raises(LdmError, match="exists already"), atomic_write(tmp_path / "a") as file:  # noqa: PT012
        file.write(b"mine")
        (tmp_path / "a").write_bytes(b"came meanwhile")
    assert (tmp_path / "a").read_bytes() == b"came meanwhile"
    with pytest.raises(LdmError, match="exists already"), atomic_write(tmp_path / "a"):
        pass
    with atomic_write(tmp_path / "a", overwrite=True) as file:
        file.write(b"new")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"new"]


def test_a_drive_without_links_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    with atomic_write(tmp_path / "a") as file:
        file.write(b"1")
    with pytest.raises(LdmError, match="exists already"), atomic_write(tmp_path / "b"):
        (tmp_path / "b").touch()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_order_is_write_sync_rename_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    """The bytes are on the disk before the name is, and the name before the function returns."""
    calls: list[str] = []
    for name in ("fsync", "replace", "link"):
        original = getattr(os, name)

        def spy(*args: object, name: str = name, original=original) -> None:
            what = "folder" if name == "fsync" and os.path.isdir(f"/proc/self/fd/{args[0]}") else "file"
            calls.append(f"{name} {what}")
            original(*args)

        monkeypatch.setattr(os, name, spy)
    with atomic_write(tmp_path / "a", overwrite=overwrite) as file:
        file.write(b"1")
    assert calls == ["fsync file", "replace file" if overwrite else "link file", "fsync folder"]


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the write fails in the middle."""
    script = (
        "import resource, signal, sys; from ldm.files import atomic_write\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "with atomic_write(sys.argv[1]) as file:\n"
        "    for _ in range(100): file.write(bytes(10_000))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "a"], capture_output=True, text=True)
    assert "OSError" in done.stderr
    assert not list(tmp_path.iterdir())


def test_killed_writers_leave_only_what_the_next_start_removes(tmp_path: Path) -> None:
    """kill -9 in the middle of a stream of writes; a writer that still lives keeps its file."""
    script = (
        "import sys; from ldm.files import atomic_write\n"
        "print(flush=True)\n"
        "while True:\n"
        "    with atomic_write(sys.argv[1], overwrite=True) as file:\n"
        "        for _ in range(50): file.write(b'x' * 1000)\n"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", script, tmp_path / f"{i}"], stdout=subprocess.PIPE)
        for i in range(3)
    ]
    for i, writer in enumerate(writers):
        assert writer.stdout
        writer.stdout.readline()
        time.sleep(0.02 * (i + 1))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
    stale = tmp_path / f".stale{files.UNFINISHED}"
    stale.touch()
    with atomic_write(tmp_path / "alive") as file:
        assert stale in remove_unfinished(tmp_path)
        file.write(b"1")
    left = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
    assert left.pop("alive") == 1
    assert set(left.values()) <= {50_000}
    assert set(left) <= {"0", "1", "2"}


def test_a_writer_whose_new_file_was_cleaned_away_takes_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """remove_unfinished may come between creating and locking a file."""
    assert files.fcntl
    original, cleaned = files.fcntl.flock, []

    def clean_first(file: object, operation: int) -> None:
        if not cleaned:
            cleaned.extend(tmp_path.iterdir())
            cleaned[0].unlink()
        original(file, operation)  # pyright: ignore

    monkeypatch.setattr(files.fcntl, "flock", clean_first)
    with atomic_write(tmp_path / "a") as file:
        file.write(b"1")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"1"]


def test_names_stay_inside_their_folder(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "link").symlink_to(tmp_path)
    (root / "fine").symlink_to(root / "sub")
    (root / "loop").symlink_to(root / "loop")
    assert inside(root, "a.png") == root / "a.png"
    assert inside(root, "sub/a.png") == root / "sub/a.png"
    assert inside(root, "fine/a.png") == root / "sub/a.png"
    assert inside(root, "..a..") == root / "..a.."
    outside = [
        "",
        ".",
        "..",
        "../a",
        "sub/../../a",
        "/etc/passwd",
        "link/a",
        "link",
        "a\0b",
        "loop/a",
        "sub/..",
    ]
    for name in [*outside, "C:\\a", "\\\\server\\share", "..\\a", "sub\\..\\..\\a", "C:a", "\x1b[31m/../.."]:
        with pytest.raises(LdmError, match="outside its folder") as error:
            inside(root, name)
        assert str(error.value).isprintable()
