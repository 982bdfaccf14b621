"""The layout of torch.save since version 1.6, field by field: what is read, and where each limit lies."""

from __future__ import annotations

import os
import random
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import pytest

from ldm.formats import mapped, zip_reader
from tests.formats.container import Container
from tests.hostile.build import FLOATS, both, entries, patched, state_dict, storage, tensor, zipped

GOOD = state_dict(tensor())
PLAIN = zipped(GOOD)
FIRST, SECOND = entries(PLAIN)
END = len(PLAIN) - 22


@pytest.fixture
def archive(tmp_path: Path) -> Container:
    return Container(tmp_path, zip_reader)


def test_a_plain_archive_and_one_with_a_comment_are_read(archive: Container) -> None:
    for content in (
        PLAIN,
        patched(PLAIN, END + 20, b"\x03\0") + b"abc",
        patched(PLAIN, END + 20, b"\xff\xff") + bytes(65535),
        # The sign of an end inside the comment, too short or too far from the end to be one.
        patched(PLAIN, END + 20, b"\x08\0") + b"PK\5\6" + bytes(4),
        patched(PLAIN, END + 20, b"\x18\0") + b"PK\5\6" + bytes(20),
        zipped(GOOD, {"data/0": FLOATS, "byteorder": b"little", "version": b"3", ".format_version": b"1"}),
        zipped(GOOD, folder=""),
        zipped(GOOD, folder="a/b/c/"),
        zipped(GOOD, folder="ü/"),
        zipped(GOOD, method=zipfile.ZIP_DEFLATED),
        zipped(GOOD, {"data/0": FLOATS, "x/data.pkl.txt": b"", "empty": b""}),
    ):
        assert archive.read(content)["t0"].tolist() == [1, 2, 3, 4]


def test_storages_need_no_bytes_if_they_are_empty(archive: Container) -> None:
    none = state_dict(tensor(storage(numel=0), shape=(0, 2), stride=(1, 1)))
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        assert archive.read(zipped(none, {"data/0": b""}, method))["t0"].shape == (0, 2)
        assert archive.read(zipped(none, {"data/0": b"", "byteorder": b"little"}, method))["t0"].shape == (
            0,
            2,
        )


@pytest.mark.parametrize("flag", [1 << 1, 1 << 2, 1 << 3, 1 << 11])
def test_flags_of_effort_and_names_are_usual(archive: Container, flag: int) -> None:
    raw = struct.pack("<H", flag)
    assert archive.read(both(both(PLAIN, FIRST, 8, raw), SECOND, 8, raw))["t0"].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("flag", [1 << bit for bit in range(16) if bit not in (1, 2, 3, 11)])
def test_other_flags_are_refused_of_what_is_read(archive: Container, flag: int) -> None:
    raw = struct.pack("<H", flag)
    for entry in (FIRST, SECOND):
        assert "encrypted or packed" in archive.refusal(both(PLAIN, entry, 8, raw))
    more = zipped(GOOD, {"data/0": FLOATS, "notes": b"a"})
    assert archive.read(both(more, entries(more)[2], 8, raw))["t0"].tolist() == [1, 2, 3, 4]


def test_sizes_may_follow_the_data_only_if_a_flag_says_so(archive: Container) -> None:
    flagged = both(PLAIN, SECOND, 8, struct.pack("<H", 8))
    header = struct.unpack_from("<L", PLAIN, SECOND + 42)[0]
    assert archive.read(patched(flagged, header + 14, bytes(12)))["t0"].tolist() == [1, 2, 3, 4]
    assert "contradicts" in archive.refusal(patched(PLAIN, header + 14, bytes(12)))
    for at in (14, 18, 22):  # CRC, packed size, size: all or none are missing
        assert "contradicts" in archive.refusal(patched(flagged, header + at, bytes(4)))
        one = bytearray(patched(flagged, header + 14, bytes(12)))
        one[header + at] = 1
        assert "contradicts" in archive.refusal(bytes(one))


def test_the_local_header_says_the_same_as_the_directory(archive: Container) -> None:
    for entry in (FIRST, SECOND):
        header = struct.unpack_from("<L", PLAIN, entry + 42)[0]
        for at in (0, 6, 8, 14, 18, 22, 30):  # signature, flags, method, CRC, packed size, size, name
            changed = patched(PLAIN, header + at, bytes([PLAIN[header + at] ^ 0x10]))
            assert "contradicts" in archive.refusal(changed), at
        for at in (4, 10, 12):  # version needed, time, date
            changed = patched(PLAIN, header + at, b"\x55\x55")
            assert archive.read(changed)["t0"].tolist() == [1, 2, 3, 4]


def test_the_number_of_members_is_limited_and_exact(archive: Container) -> None:
    assert "damaged" in archive.refusal(patched(PLAIN, END + 8, b"\1\0\1\0"))
    assert "damaged" in archive.refusal(patched(PLAIN, END + 8, b"\3\0\3\0"))
    assert "damaged" in archive.refusal(patched(PLAIN, END + 8, b"\2\0\3\0"))
    for at in (4, 6):  # numbers of disks
        assert "damaged" in archive.refusal(patched(PLAIN, END + at, b"\1\0"))
    assert "damaged" in archive.refusal(patched(PLAIN, END + 12, struct.pack("<L", END - FIRST + 1)))
    assert "no checkpoint" in archive.refusal(b"PK\5\6" + bytes(18))
    assert "no proper end" in archive.refusal(b"PK\5\6" + bytes(17))


def with_empty(names: list[bytes]) -> bytes:
    """An archive of a checkpoint and empty members, written by hand as zipfile is slow."""
    records, listed = bytearray(PLAIN[:FIRST]), bytearray(PLAIN[FIRST:END])
    for raw in names:
        tail = struct.pack("<2H", len(raw), 0)
        listed += b"PK\1\2" + bytes(24) + tail + bytes(10) + struct.pack("<L", len(records)) + raw
        records += b"PK\3\4" + bytes(22) + tail + raw
    count = len(names) + 2
    numbers = struct.pack("<2H2L", count, count, len(listed), len(records))
    return bytes(records + listed) + b"PK\5\6" + bytes(4) + numbers + bytes(2)


def test_an_archive_has_at_most_50_000_members_of_500_characters(archive: Container) -> None:
    names = [str(i).encode() for i in range(49_999)]
    assert archive.read(with_empty(names[:-1]))["t0"].tolist() == [1, 2, 3, 4]
    assert "damaged" in archive.refusal(with_empty(names))
    assert archive.read(with_empty([b"n" * 500]))["t0"].tolist() == [1, 2, 3, 4]
    assert "damaged" in archive.refusal(with_empty([b"n" * 501]))
    assert "damaged" in archive.refusal(with_empty([b""]))


def test_members_fill_the_archive_from_its_begin_and_do_not_overlap(archive: Container) -> None:
    moved = bytearray(b"\0" + PLAIN)
    for entry in (FIRST + 1, SECOND + 1):
        moved[entry + 42 : entry + 46] = struct.pack("<L", struct.unpack_from("<L", moved, entry + 42)[0] + 1)
    moved[END + 17 : END + 21] = struct.pack("<L", FIRST + 1)
    assert "do not begin it" in archive.refusal(bytes(moved))
    one_more = struct.pack("<L", len(GOOD) + 1)
    start = 30 + len("a/data.pkl")
    crc = struct.pack("<L", zlib.crc32(PLAIN[start : start + len(GOOD) + 1]))
    longer = both(both(both(PLAIN, FIRST, 20, one_more), FIRST, 24, one_more), FIRST, 16, crc)
    assert "overlap" in archive.refusal(longer)
    into_the_directory = struct.pack("<L", 17)
    longer = both(both(PLAIN, SECOND, 20, into_the_directory), SECOND, 24, into_the_directory)
    assert "zip archive is damaged" in archive.refusal(longer)


def test_names_are_unique_in_any_case(archive: Container) -> None:
    assert "one name" in archive.refusal(zipped(GOOD, {"data/0": FLOATS, "Version": b"1", "vERSION": b"1"}))
    assert "one name" in archive.refusal(zipped(GOOD, {"data/0": FLOATS, "STRASSE": b"", "straße": b""}))


def test_one_pickle_is_needed(archive: Container) -> None:
    assert "no checkpoint" in archive.refusal(zipped(GOOD).replace(b"data.pkl", b"data.pkx"))
    assert "no checkpoint" in archive.refusal(zipped(GOOD).replace(b"a/data.pkl", b"a_data.pkl"))
    assert "several data.pkl" in archive.refusal(zipped(GOOD, {"data/0": FLOATS, "b/data.pkl": GOOD}))


@pytest.mark.parametrize("order", [b"big", b"littleX", b"Little", b""])
def test_only_little_endian_numbers_are_read(archive: Container, order: bytes) -> None:
    assert "big-endian" in archive.refusal(zipped(GOOD, {"data/0": FLOATS, "byteorder": order}))


def test_small_members_stay_below_their_limits(archive: Container) -> None:
    assert "big-endian" in archive.refusal(zipped(GOOD, {"data/0": FLOATS, "byteorder": bytes(10)}))
    assert "11 bytes, far too many" in archive.refusal(
        zipped(GOOD, {"data/0": FLOATS, "byteorder": bytes(11)})
    )
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        padded = GOOD + bytes(16_000_000 - len(GOOD))
        assert archive.read(zipped(padded, method=method))["t0"].tolist() == [1, 2, 3, 4]
        assert "far too many" in archive.refusal(zipped(padded + b"\0", method=method))


def test_storages_are_digits_of_the_right_size(archive: Container) -> None:
    for key in ("x", "0x", "", "٠", "0\n", "../0"):
        pickled = state_dict(tensor(storage(key)))
        assert "is missing" in archive.refusal(zipped(pickled, {f"data/{key}": FLOATS}))
    assert archive.read(zipped(state_dict(tensor(storage("017"))), {"data/017": FLOATS}))
    for raw in (FLOATS[:15], FLOATS + b"\0"):
        assert "bytes instead of 16" in archive.refusal(zipped(GOOD, {"data/0": raw}))
    unusual = both(PLAIN, SECOND, 10, b"\x0c\0")
    assert "unusual way" in archive.refusal(unusual)


def test_damage_of_any_stored_member_is_seen(archive: Container) -> None:
    whole = zipped(GOOD, {"data/0": FLOATS, "notes": b"remember", "byteorder": b"little"})
    for raw in (FLOATS, b"remember", b"little", GOOD):
        at = whole.index(raw)
        assert "is damaged" in archive.refusal(patched(whole, at, bytes([whole[at] ^ 1])))


def test_what_is_deflated_is_as_long_as_it_says(archive: Container) -> None:
    packed = zipped(GOOD, method=zipfile.ZIP_DEFLATED)
    for entry, raw in zip(entries(packed), (GOOD, FLOATS), strict=True):
        size = struct.pack("<L", len(raw) - 1)
        shorter = both(both(packed, entry, 24, size), entry, 16, struct.pack("<L", zlib.crc32(raw[:-1])))
        assert ("is damaged" if raw == GOOD else "15 bytes instead") in archive.refusal(shorter)
        wrong = both(packed, entry, 16, b"\1\2\3\4")
        assert "is damaged" in archive.refusal(wrong)


@pytest.mark.parametrize("cores", [None, 1, 3])
def test_damage_is_seen_by_however_many_threads(
    archive: Container, monkeypatch: pytest.MonkeyPatch, cores: int | None
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(zip_reader, "WORTH_A_THREAD", 1000)
    whole = zipped(GOOD, {"data/0": FLOATS, **{f"x{i}": bytes([i]) * 1000 for i in range(5)}})
    assert archive.read(whole)["t0"].tolist() == [1, 2, 3, 4]
    for i in range(5):
        at = whole.index(bytes([i]) * 1000)
        assert f"x{i} inside it is damaged" in archive.refusal(patched(whole, at, b"x"))


def test_a_deflated_stream_is_whole_and_fills_its_member(archive: Container) -> None:
    def stored(stream: bytes, holds: bytes) -> bytes:
        """The plain archive with `stream` as the packed bytes of data/0, which is said to hold `holds`."""
        content = zipped(GOOD, {"data/0": stream})
        entry = entries(content)[1]
        content = both(both(content, entry, 10, b"\x08\0"), entry, 24, struct.pack("<L", 16))
        return both(content, entry, 16, struct.pack("<L", zlib.crc32(holds)))

    deflater = zlib.compressobj(wbits=-15)
    endless = deflater.compress(FLOATS) + deflater.flush(zlib.Z_SYNC_FLUSH)
    end = deflater.flush()
    assert archive.read(stored(endless + end, FLOATS))["t0"].tolist() == [1, 2, 3, 4]
    deflater = zlib.compressobj(wbits=-15)
    short = deflater.compress(FLOATS[:15]) + deflater.flush()
    for bad in (
        stored(endless, FLOATS),
        stored(endless + end + b"more", FLOATS),
        stored(short, FLOATS[:15]),
        stored(endless + end, FLOATS[:15]),
        stored(b"\xff" * 20, b""),
    ):
        assert "data/0 inside it is damaged" in archive.refusal(bad)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_pieces_of_any_size_make_the_same_whole(
    archive: Container, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(mapped, "CHUNK", size)
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        assert archive.read(zipped(GOOD, method=method))["t0"].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("noise", "declared", "piece"), [(0, 500_000, 1000), (900_000, 900_010, 1 << 18)], ids=["zeros", "noise"]
)
def test_not_much_more_memory_is_taken_than_a_member_says(
    archive: Container, monkeypatch: pytest.MonkeyPatch, noise: int, declared: int, piece: int
) -> None:
    """Not even if its 30 MB come in the second or in the last of the pieces that are read."""
    monkeypatch.setattr(mapped, "CHUNK", piece)
    hidden = random.Random(0).randbytes(noise) + bytes(30_000_000)
    packed = zipped(hidden, method=zipfile.ZIP_DEFLATED)
    packed = both(packed, entries(packed)[0], 24, struct.pack("<L", declared))
    tracemalloc.start()
    try:
        assert "is damaged" in archive.refusal(packed)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (
        most - piece < 2 * declared + 200_000
    )  # the pieces and what is made of them, with some room to grow


def test_weights_unpack_to_32_MB_more_than_16_times_the_file(archive: Container) -> None:
    def sized(numbers: int, file_size: int) -> bytes:
        pickled = state_dict(tensor(storage(numel=numbers, kind="ByteStorage"), shape=(1,)))
        packed = zipped(pickled, {"data/0": bytes(numbers)}, zipfile.ZIP_DEFLATED)
        comment = bytes(file_size - len(packed))
        return packed[:-2] + struct.pack("<H", len(comment)) + comment

    assert archive.read(sized(32_000_000 + 16 * 40_000, 40_000))["t0"].tolist() == [0]
    assert "far more than weights" in archive.refusal(sized(32_000_001 + 16 * 40_000, 40_000))


def wide(*, end: bytes | None = None, **fields: int) -> bytes:
    """The plain archive with a zip64 end record and locator, changed in some fields."""
    size = END - FIRST
    f = {"length": 44, "disk": 0, "start_disk": 0, "here": 2, "count": 2, "size": size, "start": FIRST}
    f |= {"locator": END, "narrow_here": 0xFFFF, "narrow_count": 0xFFFF}
    f |= {"narrow_size": 0xFFFFFFFF, "narrow_start": 0xFFFFFFFF} | fields
    names = ("length", "disk", "start_disk", "here", "count", "size", "start")
    length, *rest = (f[name] for name in names)
    record = b"PK\6\6" + struct.pack("<Q2H2L4Q", length, 45, 45, *rest)
    locator = b"PK\6\7" + struct.pack("<LQL", 0, f["locator"], 1)
    narrow = [f[f"narrow_{name}"] for name in ("here", "count", "size", "start")]
    return PLAIN[:END] + (end or record) + locator + b"PK\5\6" + bytes(4) + struct.pack("<2H2LH", *narrow, 0)


def test_a_zip64_end_is_read_and_agrees_with_the_narrow_one(archive: Container) -> None:
    size = END - FIRST
    for good in (
        wide(),
        wide(narrow_here=2),
        wide(narrow_count=2),
        wide(narrow_size=size),
        wide(narrow_start=FIRST),
        wide(narrow_here=2, narrow_count=2, narrow_size=size, narrow_start=FIRST),
    ):
        assert archive.read(good)["t0"].tolist() == [1, 2, 3, 4]
    for bad in (
        wide(length=43),
        wide(length=45),
        wide(disk=1),
        wide(start_disk=1),
        wide(here=3),
        wide(count=3),
        wide(here=1, count=1),
        wide(size=size - 1),
        wide(start=FIRST + 1),
        wide(locator=END + 1),
        wide(locator=END - 1),
        wide(locator=1 << 63),
        wide(narrow_here=1),
        wide(narrow_count=1),
        wide(narrow_size=size + 1),
        wide(narrow_start=FIRST + 1),
        wide(narrow_here=0xFFFE),
        wide(narrow_count=0xFFFE),
        wide(narrow_size=0xFFFFFFFE),
        wide(narrow_start=0xFFFFFFFE),
        wide(end=bytes(56)),
    ):
        assert "zip archive is damaged" in archive.refusal(bad)


def test_a_zip64_end_may_not_be_missing(archive: Container) -> None:
    locator = b"PK\6\7" + struct.pack("<LQL", 0, 0, 1)
    assert "zip archive is damaged" in archive.refusal(
        locator + b"PK\5\6" + bytes(12) + struct.pack("<LH", len(locator), 0)
    )


def test_a_locator_lies_before_the_end(archive: Container) -> None:
    """Not in the comment, where an index below 0 would find it."""
    assert "no checkpoint" in archive.refusal(b"PK\5\6" + bytes(16) + b"\x14\0PK\6\7" + bytes(16))


def extended(extra: bytes, *, size: bytes = b"", packed: bytes = b"", header: bytes = b"") -> bytes:
    """The plain archive with an extra field in the entry of data/0, and perhaps other numbers there."""
    content = patched(PLAIN, SECOND + 24, size)
    content = patched(patched(content, SECOND + 20, packed), SECOND + 42, header)
    content = patched(content, SECOND + 30, struct.pack("<H", len(extra)))
    content = patched(content, END + 12, struct.pack("<L", END - FIRST + len(extra)))
    return content[:END] + extra + content[END:]


def test_wide_numbers_of_a_member_are_read(archive: Container) -> None:
    full, where = b"\xff" * 4, struct.unpack_from("<L", PLAIN, SECOND + 42)[0]
    one, two, three = (struct.pack(f"<2H{n}Q", 1, 8 * n, *[16, 16, where][:n]) for n in (1, 2, 3))
    only_header = struct.pack("<2HQ", 1, 8, where)
    other, short = b"\xfe\xca\2\0ab", b"\xfe\xca\0\0"
    for good in (
        extended(b""),
        extended(other),
        extended(b"\1\0"),  # too short for a field; not looked at
        extended(one, size=full),
        extended(one, packed=full),
        extended(two, size=full, packed=full),
        extended(three, size=full, packed=full, header=full),
        extended(three, size=full, packed=full),  # more than is needed
        extended(only_header, header=full),
        extended(other + one, size=full),
        extended(short + one, size=full),
        extended(one + other, size=full),
    ):
        assert archive.read(good)["t0"].tolist() == [1, 2, 3, 4]
    for bad in (
        extended(b"", size=full),
        extended(other, size=full),
        extended(one, size=full, packed=full),
        extended(one[:-1], size=full),
        extended(b"\1\0\x10\0" + bytes(8), size=full),  # its length is that of two numbers, it has one
        extended(b"\2" + one[1:], size=full),
        extended(struct.pack("<2HL", 1, 4, 16), size=full),
        extended(b"\1\0\x08", size=full),
        extended(short, size=full),
        extended(other + short, size=full),
        extended(other + one[:-1], size=full),
        extended(b"\1\0\7\0" + bytes(7), size=full),
    ):
        assert "zip archive is damaged" in archive.refusal(bad)


def test_entries_lie_inside_the_directory(archive: Container) -> None:
    for at, raw in (
        (28, b"\0\0"),
        (28, b"\xf5\1"),
        (28, b"\x09\0"),
        (30, b"\1\0"),
        (32, b"\1\0"),
        (0, b"PK\1\3"),
    ):
        assert "zip archive" in archive.refusal(patched(PLAIN, SECOND + at, raw))
    comment = patched(patched(PLAIN, SECOND + 32, b"\2\0"), END + 12, struct.pack("<L", END - FIRST + 2))
    assert archive.read(comment[:END] + b"ab" + comment[END:])["t0"].tolist() == [1, 2, 3, 4]
    for header in (len(PLAIN) - 29, len(PLAIN), 0xFFFFFFFE):
        assert "zip archive is damaged" in archive.refusal(
            patched(PLAIN, SECOND + 42, struct.pack("<L", header))
        )
    assert "contradicts" in archive.refusal(patched(PLAIN, SECOND + 42, struct.pack("<L", len(PLAIN) - 30)))
    raw = struct.pack("<L", 1 << 30)
    assert "zip archive is damaged" in archive.refusal(both(both(PLAIN, SECOND, 20, raw), SECOND, 24, raw))
    assert "zip archive is damaged" in archive.refusal(both(PLAIN, SECOND, 24, struct.pack("<L", 15)))
    assert "zip archive is damaged" in archive.refusal(PLAIN.replace(b"a/data/0", b"\xff/data/0"))
