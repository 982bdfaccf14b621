"""Whatever weights a sound file holds, each reader takes or refuses them in one line (promises 6 to 13)."""

import random
import time
from pathlib import Path

import pytest
import torch

from ldm import LdmError
from ldm.upscalers.ncnn import read_ncnn
from tests.hostile.fuzz import mutated
from tests.hostile.readers import altered, readers, save
from tests.tiny_families import tiny
from tests.upscalers.test_ncnn import save_ncnn
from tests.upscalers.test_ncnn import tiny as tiny_upscaler

SECONDS = 2.0  # of processor time for one file
KINDS = list(readers())


def refusal(read, path: Path) -> str:
    """What the LdmError says, nothing if there is none; any other error passes through."""
    try:
        read(path)
    except LdmError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", KINDS)
def test_good_files_are_read(kind: str, tmp_path: Path):
    weights, read = readers()[kind]
    read(save(tmp_path / "good.safetensors", weights))


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_weights_are_refused_in_one_line(kind: str, tmp_path: Path):
    weights, read = readers()[kind]
    rng = random.Random(kind)
    sd1 = {name: w.clone() for name, w in tiny("sd1").unet.state_dict().items()}
    for i in range(10):  # `python -m tests.hostile.fuzz` tries more
        path = save(tmp_path / "x.safetensors", altered(rng, weights))
        begin = time.process_time()
        said = refusal(read, path)
        assert time.process_time() - begin < SECONDS, i
        assert said.isprintable(), i
        assert len(said) <= 200, i
    after = tiny("sd1").unet.state_dict()
    assert all(torch.equal(w, after[name]) for name, w in sd1.items())  # of what a file shall change, nothing


@pytest.mark.parametrize("kind", ["compact", "esrgan"])
def test_damaged_ncnn_files_are_refused_in_one_line(kind: str, tmp_path: Path):
    save_ncnn(tmp_path / "good", tiny_upscaler(kind))
    texts, data = ((tmp_path / f"good.{ending}").read_bytes() for ending in ("param", "bin"))
    rng = random.Random(kind)
    tokens = [b"0=-1", b"6=-1", b"1=0", b"6=99999999999999999999", b"\n", b" ", b"-", b"9" * 5000, b"0=7"]
    for i in range(150):
        (tmp_path / "x.param").write_bytes(mutated(rng, texts, tokens))
        (tmp_path / "x.bin").write_bytes(mutated(rng, data) if i % 3 == 0 else data)
        said = refusal(read_ncnn, tmp_path / "x.param")
        assert said.isprintable(), i
        assert len(said) <= 200, i
