"""Files that once raised another error than ours, found by the fuzzer: weights that no format forbids."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm import LdmError
from ldm.upscalers.ncnn import read_ncnn
from tests.hostile.readers import readers, save


def change(kind: str) -> dict[str, Tensor]:
    weights = dict(readers()[kind].weights)
    match kind:
        case "controlnet":
            weights["input_hint_block.4.weight"] = torch.zeros(())
        case "adapter":
            del weights["body.0.block1.weight"]
        case "lora":
            alpha = next(name for name in weights if name.endswith("alpha"))
            weights[alpha] = torch.tensor(1 + 2j)
        case "compact":
            weights["body.0.weight"] = weights["body.0.weight"].to(torch.int64)
    return weights


@pytest.mark.parametrize("kind", ["controlnet", "adapter", "lora", "compact"])
def test_what_was_found_is_refused_in_one_line(kind: str, tmp_path: Path):
    with pytest.raises(LdmError) as error:
        readers()[kind].read(save(tmp_path / "x.safetensors", change(kind)))
    assert str(error.value).isprintable()
    assert len(str(error.value)) <= 200


@pytest.mark.parametrize("setting", ["6=577", "6=" + "9" * 30, "6=-1", "0=-1", "0=0", "1=0", "6=x"])
def test_numbers_of_ncnn_that_make_no_network(setting: str, tmp_path: Path):
    layer = f"Convolution c 1 1 a b 0=4 1=3 6=576 {setting}"
    (tmp_path / "x.param").write_text(f"7767517\n2 9\nInput in 0 1 data\n{layer}\n")
    (tmp_path / "x.bin").write_bytes(bytes(4 * (1 + 577 + 4)))
    with pytest.raises(LdmError, match=r"x\.param"):
        read_ncnn(tmp_path / "x.param")
