"""No half file, ever, and no name that leads outside its folder."""

import errno
import os
import resource
import signal
import time
from collections.abc import Callable
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


def in_a_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process, which is cheaper than a new interpreter. Returns its process id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the write fails in the middle."""

    def fill() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(OSError, match="File too large"), atomic_write(tmp_path / "a") as file:
            file.write(bytes(1_000_000))

    assert os.waitstatus_to_exitcode(os.waitpid(in_a_child(fill), 0)[1]) == 0
    assert not list(tmp_path.iterdir())


def test_killed_writers_leave_only_what_the_next_start_removes(tmp_path: Path) -> None:
    """kill -9 in the middle of a stream of writes; a writer that still lives keeps its file."""

    def write_for_ever() -> None:
        while True:
            with atomic_write(tmp_path / "stream", overwrite=True) as file:
                for _ in range(50):
                    file.write(bytes(1000))

    for moment in range(10):
        child = in_a_child(write_for_ever)
        time.sleep(0.003 * (moment + 1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    stale = tmp_path / f".stale{files.UNFINISHED}"
    stale.touch()
    with atomic_write(tmp_path / "alive") as file:
        assert stale in remove_unfinished(tmp_path)
        file.write(b"1")
    left = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
    assert left.pop("alive") == 1
    assert left in ({}, {"stream": 50_000})


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
