"""Networks in the format of ncnn, written here by the letter of its description."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ldm.errors import CheckpointError
from ldm.upscalers import load_network, load_upscaler
from ldm.upscalers.compact import CompactConfig, CompactNet
from ldm.upscalers.esrgan import RRDBConfig, RRDBNet
from ldm.upscalers.ncnn import read_ncnn
from scripts import get_upscaler

FLOAT16 = 0x01306B47


def save_ncnn(path: Path, network: nn.Module, tag: int = FLOAT16, extra: str = "") -> None:
    """The layers with weights, and some without, as the converters of ncnn write them."""
    layers, data = ["Input in 0 1 data"], b""
    for name, part in network.named_modules():
        if isinstance(part, nn.Conv2d):
            out, size = part.out_channels, part.weight.numel()
            layers.append(f"Convolution {name} 1 1 a b 0={out} 1=3 4=1 5=1 6={size} 9=2 -23310=1,2.0e-01")
            layers.append("Split s 1 2 b c d")
            kind = np.float16 if tag == FLOAT16 else np.float32
            values = part.weight.numpy().astype(kind).tobytes()
            assert part.bias is not None
            data += tag.to_bytes(4, "little") + values + bytes(-len(values) % 4) + part.bias.numpy().tobytes()
        elif isinstance(part, nn.PReLU):
            layers.append(f"PReLU {name} 1 1 a b 0={part.weight.numel()}")
            data += part.weight.numpy().tobytes()
    layers += [extra] if extra else []
    path.with_suffix(".param").write_text("\n".join(["7767517", f"{len(layers)} 99", *layers]) + "\n")
    path.with_suffix(".bin").write_bytes(data)


def tiny(kind: str) -> RRDBNet | CompactNet:
    torch.manual_seed(0)
    if kind == "compact":
        # 7 channels: 189 numbers of 16 bit need padding to a multiple of four bytes.
        network = CompactNet(CompactConfig(features=7, convolutions=1, factor=1))
    else:
        network = RRDBNet(RRDBConfig(features=8, blocks=2, growth=4))
    return network.requires_grad_(False)


def same(read: dict[str, Tensor], network: nn.Module) -> bool:
    expected = network.state_dict()
    return list(read) == list(expected) and all(
        torch.equal(weight.float(), expected[name].to(weight.dtype).float()) for name, weight in read.items()
    )


@pytest.mark.parametrize("kind", ["compact", "esrgan"])
@pytest.mark.parametrize("tag", [FLOAT16, 0])
def test_every_weight_comes_back_under_its_name(tmp_path: Path, kind: str, tag: int):
    network = tiny(kind)
    save_ncnn(tmp_path / "net", network, tag)
    weights = read_ncnn(tmp_path / "net.param")
    assert same(weights, network)
    assert load_network(weights).config == network.config


@pytest.mark.parametrize(("cut", "message"), [(-4, "no ncnn network"), (4, "4 bytes .* left over")])
def test_bytes_too_few_or_too_many_are_refused(tmp_path: Path, cut: int, message: str):
    save_ncnn(tmp_path / "net", tiny("compact"))
    data = (tmp_path / "net.bin").read_bytes()
    (tmp_path / "net.bin").write_bytes(data[:cut] if cut < 0 else data + bytes(cut))
    with pytest.raises(CheckpointError, match=message):
        read_ncnn(tmp_path / "net.param")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("Interp r 1 1 a out 0=3 1=5.0e-01", "shrinks its result"),
        ("Deconvolution d 1 1 a b 0=3", "Deconvolution"),
        ("Convolution c 1 1 a b 0=3 1=3 6=99999999999", "no ncnn network"),
        ("Convolution c 1 1 a b 0=-3 1=3 6=-27", "no ncnn network"),
        ("Convolution c", "no ncnn network"),
    ],
)
def test_texts_of_other_networks_are_refused(tmp_path: Path, extra: str, message: str):
    save_ncnn(tmp_path / "net", tiny("compact"), extra=extra)
    with pytest.raises(CheckpointError, match=message):
        read_ncnn(tmp_path / "net.param")


def test_quantised_weights_are_refused(tmp_path: Path):
    save_ncnn(tmp_path / "net", tiny("compact"), tag=0x000D4B38)
    with pytest.raises(CheckpointError, match="quantised"):
        read_ncnn(tmp_path / "net.param")


@pytest.mark.parametrize("text", ["", "7767517", "hello\nworld\n", "7767517\n5 5\nInput in 0 1 data\n"])
def test_a_text_that_is_no_network_is_refused(tmp_path: Path, text: str):
    (tmp_path / "net.param").write_text(text)
    (tmp_path / "net.bin").write_bytes(b"")
    with pytest.raises(CheckpointError):
        read_ncnn(tmp_path / "net.param")


def test_a_missing_file_is_named(tmp_path: Path):
    (tmp_path / "net.param").write_text("7767517")
    with pytest.raises(CheckpointError, match=r"net\.bin"):
        read_ncnn(tmp_path / "net.param")


def test_the_script_converts_a_file_and_never_replaces_one_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    save_ncnn(tmp_path / "mine", tiny("esrgan"))
    command = [str(tmp_path / "mine.param"), "--out", str(tmp_path / "upscalers")]
    assert get_upscaler.main(command) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == tmp_path / "upscalers" / "mine.safetensors"
    assert load_upscaler(path).factor == 4
    assert get_upscaler.main(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert get_upscaler.main([*command, "--overwrite"]) == 0


def test_the_names_of_the_script_are_those_that_can_be_fetched():
    from ldm.upscalers.published import PUBLISHED

    assert tuple(PUBLISHED) == get_upscaler.NAMES


def test_the_script_refuses_an_unknown_name_in_one_line(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        get_upscaler.main(["x5plus"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
