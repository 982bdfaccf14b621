"""Each hostile archive, pickle and header is refused by the check that is meant for it."""

from pathlib import Path

from tests.hostile.samples import REFUSALS, hostile_files, refusals


def test_each_is_refused_for_its_own_reason(tmp_path: Path) -> None:
    """So that the loss of one check is seen even if a later one refuses the file, too."""
    for name, content in hostile_files(tmp_path / "EXECUTED").items():
        if name.startswith(("zip_", "header_")) and len(content) < 100_000:
            (tmp_path / name).write_bytes(content)
    expected = dict(line.split("\t", 1) for line in REFUSALS.read_text("utf-8").splitlines())
    assert refusals(tmp_path) == expected
