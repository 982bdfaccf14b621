"""The safetensors format by the letter, both ways, against the official library."""

import json
import random
from pathlib import Path

import pytest
import safetensors.torch as official
import torch
from torch import Tensor

from ldm import formats
from ldm.errors import CheckpointError, LdmError
from ldm.formats.safetensors_file import DTYPES
from tests.hostile.build import FLOATS, safetensors

READ, WRITTEN = 300, 100  # random files in each direction


def random_file(seed: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of any type and shape (sizes 0 and 1 and scalars included) under names of any letters."""
    rng = random.Random(seed)
    g = torch.Generator().manual_seed(seed)

    def text() -> str:
        return "".join(rng.choice('ab.0\\"\n\x7fé名🙂 {}') for _ in range(rng.randrange(9)))

    tensors = {}
    for _ in range(rng.randrange(1, 6)):
        shape = [rng.randrange(4) for _ in range(rng.randrange(4))]
        dtype = rng.choice(list(DTYPES.values()))
        raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=g)
        raw = raw % 2 if dtype == torch.bool else raw
        tensors[text()] = raw.view(dtype).reshape(shape) if dtype.itemsize > 1 else raw.view(dtype)[..., 0]
    return tensors, {text(): text() for _ in range(rng.randrange(2))}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    def bits(t: Tensor) -> tuple:
        return t.dtype, t.shape, t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return {key: bits(t) for key, t in a.items()} == {key: bits(t) for key, t in b.items()}


def test_what_the_official_library_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for seed in range(READ):
        tensors, metadata = random_file(seed)
        official.save_file(tensors, path, metadata)
        read = formats.read(path)
        assert same(dict(read.tensors), tensors)
        assert read.metadata == metadata


def test_what_we_write_is_the_official_file(tmp_path: Path) -> None:
    """Byte for byte: same order, same alignment, same header."""
    ours, theirs = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for seed in range(WRITTEN):
        tensors, metadata = random_file(seed)
        formats.write_safetensors(ours, tensors, metadata, overwrite=True)
        official.save_file(tensors, theirs, metadata or None)
        assert ours.read_bytes() == theirs.read_bytes()


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    base = torch.arange(6.0, requires_grad=True)
    complex_base = torch.randn(2, dtype=torch.complex64)
    views = {"t": base.view(2, 3).t(), "part": base[2:4], "conj": complex_base.conj(), "one": base.sum()}
    views["stride 0"] = base[2:3].expand(1, 1)  # which counts as contiguous
    formats.write_safetensors(path, views)
    read = formats.read(path).tensors
    assert all(torch.equal(read[key], view) for key, view in views.items())


def test_tensors_may_be_changed_and_the_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    formats.write_safetensors(path, {"a": torch.ones(2)})
    formats.read(path).tensors["a"].mul_(2)
    assert formats.read(path).tensors["a"].tolist() == [1, 1]


def test_a_file_may_be_written_over_the_one_that_is_read(tmp_path: Path) -> None:
    """The old bytes live on under the map: a training state may be loaded, changed and saved again."""
    path = tmp_path / "a.safetensors"
    formats.write_safetensors(path, {"a": torch.ones(2), "b": torch.zeros(1)})
    read = formats.read(path).tensors
    formats.write_safetensors(path, {key: t + 1 for key, t in read.items()}, overwrite=True)
    assert read["a"].tolist() == [1, 1]
    assert formats.read(path).tensors["a"].tolist() == [2, 2]


def test_an_existing_file_is_kept_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    formats.write_safetensors(path, {"a": torch.ones(2)})
    with pytest.raises(LdmError, match="exists already"):
        formats.write_safetensors(path, {"a": torch.zeros(2)})
    assert formats.read(path).tensors["a"].tolist() == [1, 1]


def test_what_cannot_be_written_is_refused_before_a_file_exists(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'a' is torch\.complex128"):
        formats.write_safetensors(tmp_path / "a", {"a": torch.ones(1, dtype=torch.complex128)})
    with pytest.raises(CheckpointError, match="metadata"):
        formats.write_safetensors(tmp_path / "a", {"a": torch.ones(1)}, {"step": 3})  # pyright: ignore
    assert not list(tmp_path.iterdir())


LEGAL = {
    "spaces": b'{ "a" :\t{ "data_offsets" : [ 0 , 16 ] ,\n"shape":[4],\r"dtype":"F32"} } \n\t ',
    "escapes": b'{"\\u0061":{"\\u0064type":"F32","shape":[4],"data_offsets":[0,16]}}',
    "more_fields": b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16],"x":[1.5,{"y":null}]}}',
    "ones": b'{"a":{"dtype":"F32","shape":[1,4,1,1,1],"data_offsets":[0,16]}}',
    "odd_length": b'{"aaaa":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}} ',
    "metadata_last": b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"__metadata__":{"a":"b"}}',
    "metadata_large": b'{"__metadata__":{"a":"' + b'{\\"x\\"' * 200_000 + b'"},'
    b'"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
    "backslashes": b'{"__metadata__":{"\\\\":"\\\\\\""},'
    b'"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
    "empty_tensors": b'{"z":{"dtype":"F32","shape":[0,7],"data_offsets":[0,0]},'
    b'"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"y":{"dtype":"U8","shape":[0],"data_offsets":[16,16]}}',
}


@pytest.mark.parametrize("header", LEGAL.values(), ids=LEGAL)
def test_awkward_legal_headers_are_read_as_the_official_library_does(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors(header, FLOATS))
    read = formats.read(path)
    assert same(dict(read.tensors), official.load_file(path))
    assert read.metadata == json.loads(header).get("__metadata__", {})
    assert all(t.data_ptr() % t.dtype.itemsize == 0 for t in read.tensors.values())
