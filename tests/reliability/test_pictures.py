"""Promise 14: pictures are what their content is, and bounded by their headers.

That each format, depth and orientation is read right is in tests/test_read_picture.py.
"""

import io
import os
import re
import struct
import subprocess
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from PIL import Image

import ldm
from ldm import LdmError
from ldm.images import read_picture, read_text
from ldm.planning import plan
from tests.tiny_families import tiny


def encoded(kind: str, **options: bool) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(file, kind, **options)
    return file.getvalue()


def patched(data: bytes, at: int, raw: bytes) -> bytes:
    return data[:at] + raw + data[at + len(raw) :]


def bombs() -> dict[str, bytes]:
    """Small files whose headers claim pictures of over 64 million pixels."""
    png, jpeg, gif, avif = (encoded(kind) for kind in ("PNG", "JPEG", "GIF", "AVIF"))
    lossy, lossless = encoded("WEBP"), encoded("WEBP", lossless=True)
    big = struct.pack(">II", 60_000, 60_000)
    return {
        "png": patched(png, 16, big),
        "jpeg": patched(jpeg, jpeg.index(b"\xff\xc0") + 5, struct.pack(">HH", 60_000, 60_000)),
        "gif": patched(gif, 6, struct.pack("<HH", 60_000, 60_000)),
        "webp": patched(lossy, lossy.index(b"\x9d\x01\x2a") + 3, struct.pack("<HH", 16_383, 16_383)),
        "lossless webp": patched(lossless, lossless.index(b"VP8L") + 9, b"\xff\xff\xff\x0f"),
        "avif": patched(avif, avif.index(b"ispe") + 8, big),
        "just too large": patched(png, 16, struct.pack(">II", 8001, 8000)),
    }


@contextmanager
def cheaply() -> Iterator[None]:
    """Demand that what happens within costs less than a second and, where Linux tells that, 64 MB."""
    resettable = os.access("/proc/self/clear_refs", os.W_OK)
    if resettable:
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before, begin = peak_memory() if resettable else 0.0, time.process_time()
    yield
    assert time.process_time() - begin < 1
    assert not resettable or peak_memory() - before < 64


def peak_memory() -> float:
    """In MB, since the last reset."""
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1024


@pytest.mark.parametrize("name", bombs())
def test_bombs_are_refused_by_their_headers(name: str, tmp_path: Path):
    path = tmp_path / "picture.png"
    path.write_bytes(bombs()[name])
    for read in (read_picture, read_text):
        with cheaply(), pytest.raises(LdmError) as error:
            read(path)
        assert len(str(error.value)) <= 200
        assert str(error.value).isprintable()


@pytest.mark.parametrize("kind", ["TIFF", "BMP", "ICO", "EPS", "PDF", "PPM", "TGA", "JPEG2000", "ICNS"])
def test_other_formats_are_refused_whatever_their_names(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(subprocess, "Popen", None)  # Ghostscript would be called so
    (tmp_path / "picture.png").write_bytes(encoded(kind))
    with pytest.raises(LdmError, match="is no PNG, JPEG, WebP, AVIF or GIF picture"):
        read_picture(tmp_path / "picture.png")


def test_compressed_texts_that_unpack_without_end_are_refused_or_left(tmp_path: Path):
    png, path, packed = encoded("PNG"), tmp_path / "x.png", zlib.compress(bytes(100_000_000), 1)
    for kind, head in ((b"zTXt", b"parameters\0\0"), (b"iTXt", b"parameters\0\1\0\0\0"), (b"iCCP", b"a\0\0")):
        body = kind + head + packed
        chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
        path.write_bytes(png[:33] + chunk + png[33:])
        for read in (read_picture, read_text):
            with cheaply(), suppress(LdmError):
                read(path)


def test_a_picture_too_thin_to_draw_is_refused_before_the_first_step():
    inputs = ldm.Inputs(picture=Image.new("RGB", (3, 4000)))
    with pytest.raises(LdmError, match="width must be 8 to 16384, got 4"):
        plan(tiny("embedded"), ldm.Request(edit=ldm.Edit()), inputs)
