"""Texts are read whole, or refused in one line that names the file."""

from pathlib import Path

import pytest

from ldm.errors import RequestError
from ldm.text_file import MAX_TEXT, read_utf8


def test_a_text_is_read_with_or_without_a_byte_order_mark(tmp_path: Path):
    for content in ("caf\u00e9\r\nb", "\ufeffcaf\u00e9\r\nb"):
        (tmp_path / "a.txt").write_bytes(content.encode())
        assert read_utf8(tmp_path / "a.txt") == "caf\u00e9\r\nb"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\xff\xfe\x00", "it is no text in UTF-8"),
        (None, "No such file"),
        (b"a" * (MAX_TEXT + 1), "larger than"),
    ],
    ids=["bytes", "missing", "long"],
)
def test_what_is_no_text_is_refused(tmp_path: Path, content: bytes | None, why: str):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(RequestError, match=f"a.txt.*{why}"):
        read_utf8(tmp_path / "a.txt")


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="there is no file without an end")
def test_a_file_without_an_end_is_refused():
    with pytest.raises(RequestError, match="larger than"):
        read_utf8("/dev/zero")
