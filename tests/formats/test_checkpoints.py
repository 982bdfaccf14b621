"""Checkpoints written by torch.save: every awkward legal file loads, to the bit; damage is seen."""

import io
import os
import struct
import zipfile
import zlib
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ldm import formats
from ldm.errors import CheckpointError
from ldm.formats import Opaque
from tests.golden import golden
from tests.hostile.build import PROTO2, PROTO4, legacy, name, state_dict, tensor, text, value, zipped


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """Type, shape and bytes: equal for equal tensors, NaN and -0 included."""
    whole = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return tensor.dtype, tuple(tensor.shape), whole.view(torch.uint8).numpy().tobytes()


def awkward() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    base = torch.randn(24, generator=g)
    dtypes = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8)
    dtypes += (
        torch.uint8,
        torch.bool,
        torch.complex64,
        torch.complex128,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    )
    dtypes += (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
    found = {str(dtype): (base[:6] * 9).abs().to(dtype).reshape(2, 3) for dtype in dtypes}
    return found | {
        "scalar": torch.tensor(7.0),
        "empty": torch.zeros(0, 3),
        "transposed": base.view(4, 6).t(),
        "slice": base[3:9],
        "strided": base.view(4, 6)[1::2, ::3],
        "expanded": torch.ones(1).expand(5),
        "parameter": nn.Parameter(torch.ones(2)),
        "conjugate": torch.randn(3, dtype=torch.complex64, generator=g).conj(),
        "negative": torch.randn(3, dtype=torch.complex64, generator=g).conj().imag,
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "shared": base,
        "shared_again": base,
        "channels_last": torch.randn(1, 2, 3, 3, generator=g).to(memory_format=torch.channels_last),
        "Ω.название": torch.ones(1),
        "": torch.ones(1),
    }


def saved(data: object, path: Path, protocol: int = 2, zipped: bool = True) -> Path:
    torch.save(data, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    return path


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_every_kind_of_tensor_is_read_to_the_bit(tmp_path: Path, protocol: int, as_zip: bool) -> None:
    tensors = awkward()
    read = formats.read(
        saved({"state_dict": OrderedDict(tensors)}, tmp_path / "model.ckpt", protocol, as_zip)
    )
    assert list(read.tensors) == list(tensors)
    for key, expected in tensors.items():
        assert bits(read.tensors[key]) == bits(expected), key
        assert not read.tensors[key].requires_grad


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_beside_the_weights_is_kept(tmp_path: Path, protocol: int, as_zip: bool) -> None:
    plain: dict[Any, Any] = {
        "none": None,
        "numbers": (0, 255, 256, 65536, -1, 2**40, -(2**70), 1.5, float("inf"), True, False),
        "complex": 1 + 2j,
        "text": "a\nΩ🙂\udcff",
        "bytes": b"\x00\xff" * 200,
        "nothing": b"",
        "list": [1, [2, []]],
        "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "dtype": torch.bfloat16,
        1: {None: 0, True: 1, b"key": 2},
    }
    data = plain | {"w": torch.ones(1)}
    found = formats.read_tree(saved(data, tmp_path / "a.pt", protocol, as_zip))
    found.pop("w")
    assert found == plain


def test_objects_become_plain_data(tmp_path: Path) -> None:
    data = {
        "set": {1},
        "frozenset": frozenset({2}),
        "size": torch.Size([1, 2]),
        "device": torch.device("cuda:1"),
        "cpu": torch.device("cpu"),
        "bytearray": bytearray(b"ab"),
        "counter": Counter(a=2),
        "defaultdict": defaultdict(list, a=1),
        "numpy": [np.float64(0.5), np.float32(0.25), np.int64(-3), np.bool_(True), np.float16(2)],
        "complex numpy": np.complex64(1),
    }
    expected = {
        "set": [1],
        "size": (1, 2),
        "device": "cuda:1",
        "cpu": "cpu",
        "bytearray": b"ab",
        "counter": {"a": 2},
        "defaultdict": {"a": 1},
        "numpy": [0.5, 0.25, -3, True, 2.0],
    }
    for protocol in (2, 4):
        found = formats.read_tree(saved(data, tmp_path / "a.pt", protocol))
        assert {key: found[key] for key in expected} == expected
        assert list(found["frozenset"]) == [2]
        assert isinstance(found["complex numpy"], Opaque)


def test_calls_without_arguments_are_empty_or_opaque(tmp_path: Path) -> None:
    size, scalar = name("torch", "Size") + b")R", name("numpy.core.multiarray", "scalar") + b")R"
    path = tmp_path / "a.ckpt"
    path.write_bytes(zipped(PROTO2 + b"}(" + text("size") + size + text("number") + scalar + b"u."))
    found = formats.read_tree(path)
    assert found["size"] == []
    assert isinstance(found["number"], Opaque)


def test_shared_storages_stay_shared_and_the_file_is_not_written(tmp_path: Path) -> None:
    base = torch.arange(4.0)
    path = saved({"a": base, "b": base[1:]}, tmp_path / "a.pt")
    before = path.read_bytes()
    read = formats.read(path).tensors
    read["a"][1] = 7
    assert read["b"][0] == 7
    assert path.read_bytes() == before
    assert formats.read(path).tensors["a"][1] == 1


def test_stored_tensors_are_not_copied(tmp_path: Path) -> None:
    """The pages of a mapped file appear in /proc/self/maps under its name."""
    path = saved({"a": torch.ones(1000)}, tmp_path / "mapped.pt")
    read = formats.read(path).tensors["a"]
    ranges = [
        [int(n, 16) for n in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith("mapped.pt")
    ]
    assert any(start <= read.data_ptr() < end for start, end in ranges)


@pytest.mark.parametrize("version", ["1.4.2", "2.6.6"])
def test_lightning_checkpoints_load_without_lightning(version: str) -> None:
    path = golden(f"manifests/lightning-{version}-tiny.ckpt")
    trusted = torch.load(path, weights_only=False) if version == "2.6.6" else None
    read = formats.read(path)
    names = ["alphas_cumprod", "model.betas", "model.a.weight", "model.a.bias"]
    assert list(read.tensors) == names
    assert read.metadata["pytorch-lightning_version"] == version
    assert read.metadata["global_step"] == "4"
    if trusted:
        assert {key: bits(t) for key, t in read.tensors.items()} == {
            key: bits(t) for key, t in trusted["state_dict"].items()
        }


def test_textual_inversions_are_read_as_trees() -> None:
    a1111 = formats.read_tree(golden("textual_inversion/a1111_sd15_3vectors.pt"))
    assert a1111["string_to_param"]["*"].shape == (3, 768)
    assert a1111["name"] == "demo"
    diffusers = formats.read_tree(golden("textual_inversion/diffusers_learned_embeds.bin"))
    assert [(key, t.shape) for key, t in diffusers.items()] == [("<demo>", (768,))]


def test_objects_of_absent_classes_are_opaque(tmp_path: Path) -> None:
    """As OmegaConf and Lightning pickle them: NEWOBJ or REDUCE, items, then BUILD with a state."""
    config = name("omegaconf.dictconfig", "DictConfig") + b")\x81}" + text("_content") + b"}sb"
    items = (
        name("pytorch_lightning.utilities.parsing", "AttributeDict")
        + b")\x81("
        + text("lr")
        + b"G"
        + bytes(8)
    )
    listed = name("omegaconf.listconfig", "ListConfig") + b")R(K\x01K\x02e"
    anything = name("typing", "Any") + name("__builtin__", "dict") + b"\x86"
    pickled = PROTO2 + b"}(" + text("config") + config + text("hparams") + items + b"u"
    pickled += text("list") + listed + text("types") + anything + text("w") + tensor() + b"u."
    path = tmp_path / "a.ckpt"
    path.write_bytes(zipped(pickled))
    tree = formats.read_tree(path)
    assert tree["config"].name == "omegaconf.dictconfig.DictConfig"
    assert tree["config"].state == {"_content": {}}
    assert tree["hparams"].name.endswith("AttributeDict")
    assert tree["w"].tolist() == [1, 2, 3, 4]


def test_state_dicts_and_tensors_with_attributes_are_read(tmp_path: Path) -> None:
    """A module's state_dict carries version numbers; a tensor may carry anything that was set on it."""
    module = nn.Linear(2, 1)
    tagged, parameter = torch.ones(2), nn.Parameter(torch.ones(1))
    tagged.note = "kept by pickle"  # pyright: ignore[reportAttributeAccessIssue]
    parameter.note = [1]  # pyright: ignore[reportAttributeAccessIssue]
    read = formats.read(
        saved(module.state_dict() | {"tagged": tagged, "parameter": parameter}, tmp_path / "a.pt")
    )
    assert bits(read.tensors["weight"]) == bits(module.weight)
    assert bits(read.tensors["tagged"]) == bits(tagged)
    assert bits(read.tensors["parameter"]) == bits(parameter)
    assert list(formats.read(saved(module.state_dict(), tmp_path / "b.pt")).tensors) == ["weight", "bias"]


def test_dicts_and_bytes_of_old_protocols_are_read(tmp_path: Path) -> None:
    raw = (
        name("__builtin__", "bytes")
        + b")R"
        + name("__builtin__", "bytearray")
        + text("\xff")
        + text("latin-1")
    )
    path = tmp_path / "a.pt"
    path.write_bytes(zipped(PROTO2 + b"(" + text("w") + tensor() + text("raw") + raw + b"\x86R\x86d."))
    tree = formats.read_tree(path)
    assert tree["w"].tolist() == [1, 2, 3, 4]
    assert tree["raw"] == (b"", b"\xff")


def test_a_parameter_dict_is_a_dict(tmp_path: Path) -> None:
    """A1111's old embeddings keep their vectors in one."""
    state = b"}" + text("_parameters") + b"}" + text("*") + tensor() + b"ss"
    path = tmp_path / "a.pt"
    path.write_bytes(
        zipped(PROTO2 + name("torch.nn.modules.container", "ParameterDict") + b")\x81" + state + b"b.")
    )
    assert formats.read_tree(path)["*"].tolist() == [1, 2, 3, 4]


def test_python_2_texts_and_ordered_dicts_are_read(tmp_path: Path) -> None:
    pairs = b"](](U\x01a" + tensor() + b"e](U\x01\xff" + b"K\x01ee"
    path = tmp_path / "a.pt"
    path.write_bytes(zipped(PROTO2 + name("collections", "OrderedDict") + pairs + b"\x85R."))
    tree = formats.read_tree(path)
    assert tree["a"].tolist() == [1, 2, 3, 4]
    assert tree[b"\xff"] == 1


def test_keys_that_are_neither_text_nor_small_numbers_are_dropped(tmp_path: Path) -> None:
    """Hashing an arbitrary key could be made slow, and no weight has one. Lightning 1.4 used classes."""
    callback = name("pytorch_lightning.callbacks", "ModelCheckpoint")
    path = tmp_path / "a.pt"
    path.write_bytes(
        zipped(PROTO2 + b"}(" + callback + b"N)K\x01" + value(2**40) + b"N" + text("w") + tensor() + b"u.")
    )
    assert list(formats.read_tree(path)) == ["w"]


def test_the_state_dict_is_preferred_and_nested_names_are_joined(tmp_path: Path) -> None:
    one = torch.ones(1)
    nested = {"params": {"conv": {0: one}}, "params_ema": {"conv.0": one}, "list": [one], "step": 3}
    read = formats.read(saved(nested, tmp_path / "a.pth"))
    assert list(read.tensors) == ["params.conv.0", "params_ema.conv.0"]
    read = formats.read(saved({"other": one, "state_dict": {"w": one}, "epoch": 2}, tmp_path / "b.ckpt"))
    assert list(read.tensors) == ["w"]
    assert read.metadata == {"epoch": "2"}


def rezipped(path: Path, method: int, force_zip64: bool = False) -> bytes:
    """The same archive, packed again by Python's zipfile as people's tools do."""
    target = io.BytesIO()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w", method) as archive:
        for member in source.namelist():
            with archive.open(member, "w", force_zip64=force_zip64) as file:
                file.write(source.read(member))
        archive.writestr("archive/notes/README.txt", "unknown members are not looked into")
        archive.writestr("archive/empty/", b"")
        archive.comment = b"a comment"
    return target.getvalue()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("force_zip64", [False, True])
def test_repacked_archives_load(tmp_path: Path, method: int, force_zip64: bool) -> None:
    tensors = awkward()
    source = saved(tensors, tmp_path / "a.pt")
    path = tmp_path / "repacked.pt"
    path.write_bytes(rezipped(source, method, force_zip64))
    read = formats.read(path).tensors
    assert {key: bits(t) for key, t in read.items()} == {key: bits(t) for key, t in tensors.items()}


def test_the_content_decides_not_the_name(tmp_path: Path) -> None:
    formats.write_safetensors(tmp_path / "a.ckpt", {"w": torch.ones(2)})
    assert formats.read(tmp_path / "a.ckpt").tensors["w"].tolist() == [1, 1]
    saved({"w": torch.ones(2)}, tmp_path / "b")
    assert formats.read(tmp_path / "b").tensors["w"].tolist() == [1, 1]


def small_files(folder: Path) -> tuple[Path, Path, Path]:
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, dtype=torch.float16)}
    formats.write_safetensors(folder / "small.safetensors", tensors, {"k": "v"}, overwrite=True)
    packed = saved({"state_dict": tensors}, folder / "small.ckpt")
    return packed, saved(tensors, folder / "old.pt", zipped=False), folder / "small.safetensors"


def test_every_truncation_of_three_files_is_refused(tmp_path: Path) -> None:
    for path in small_files(tmp_path):
        formats.read(path)
        for size in reversed(range(path.stat().st_size)):
            os.truncate(path, size)
            with pytest.raises(CheckpointError):
                formats.read(path)


def test_a_flipped_bit_in_any_byte_under_a_checksum_is_refused(tmp_path: Path) -> None:
    path = small_files(tmp_path)[0]
    content = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
    for member in members:
        header = member.header_offset
        start = (
            header
            + 30
            + sum(int.from_bytes(content[header + i : header + i + 2], "little") for i in (26, 28))
        )
        assert zlib.crc32(content[start : start + member.file_size]) == member.CRC
        for at in range(start, start + member.file_size):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
            with pytest.raises(CheckpointError):
                formats.read(path)


def test_an_archive_beyond_the_32_bit_fields_is_read(tmp_path: Path) -> None:
    """Sizes and offsets in zip64 records, as torch writes them for large files, here in a small one."""
    content = bytearray(zipped(state_dict(tensor())))
    end = len(content) - 22
    count, size, start = content[end + 8], int.from_bytes(content[end + 12 : end + 16], "little"), 0
    start = int.from_bytes(content[end + 16 : end + 20], "little")
    end64 = b"PK\6\6" + (44).to_bytes(8, "little") + b"\x2d\0\x2d\0" + bytes(8)
    end64 += b"".join(n.to_bytes(8, "little") for n in (count, count, size, start))
    locator = b"PK\6\7" + bytes(4) + end.to_bytes(8, "little") + b"\1\0\0\0"
    saturated = b"PK\5\6" + bytes(4) + b"\xff" * 12 + bytes(2)
    path = tmp_path / "a.ckpt"
    path.write_bytes(content[:end] + end64 + locator + saturated)
    assert formats.read(path).tensors["t0"].tolist() == [1, 2, 3, 4]
    for broken in (end64.replace(b"PK\6\6", b"PK\6\5"), end64[:24] + b"\x09" + end64[25:]):
        path.write_bytes(content[:end] + broken + locator + saturated)
        with pytest.raises(CheckpointError):
            formats.read(path)
    path.write_bytes(
        content[:end] + end64 + locator.replace(end.to_bytes(8, "little"), b"\xff" * 8) + saturated
    )
    with pytest.raises(CheckpointError):
        formats.read(path)


def test_a_member_beyond_the_32_bit_fields_is_read(tmp_path: Path) -> None:
    """Sizes and place of data/0 in the zip64 extra field of its entry, after a field that means nothing."""
    content = bytearray(zipped(state_dict(tensor())))
    end, second = len(content) - 22, content.rindex(b"PK\1\2")
    packed, size, header = struct.unpack_from("<2L14xL", content, second + 20)
    content[second + 20 : second + 28] = b"\xff" * 8
    content[second + 42 : second + 46] = b"\xff" * 4
    extra = b"\xfe\xca\2\0ab" + struct.pack("<2H3Q", 1, 24, size, packed, header)
    content[second + 30 : second + 32] = struct.pack("<H", len(extra))
    content[end + 12 : end + 16] = struct.pack(
        "<L", len(extra) + struct.unpack_from("<L", content, end + 12)[0]
    )
    content[end:end] = extra
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    assert formats.read(path).tensors["t0"].tolist() == [1, 2, 3, 4]


def test_misaligned_storages_are_copied_to_aligned_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for shift in range(4):
        path.write_bytes(zipped(state_dict(tensor()), folder="a" * (1 + shift) + "/"))
        read = formats.read(path).tensors["t0"]
        assert read.tolist() == [1, 2, 3, 4]
        assert read.data_ptr() % 4 == 0
    path.write_bytes(legacy(state_dict(tensor())))
    assert formats.read(path).tensors["t0"].data_ptr() % 4 == 0


def test_protocol_4_names_and_memo_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    pickled = (
        PROTO4
        + b"\x95"
        + bytes(8)
        + b"}\x94q\x30"
        + text("w")
        + tensor()
        + b"s(K\x01K\x021N0\x8f(K\x01\x900h\x30."
    )
    path.write_bytes(zipped(pickled))
    assert list(formats.read_tree(path)) == ["w"]
