"""Upscalers by name and from files; any picture and any size; tiles; networks that fail."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.errors import CheckpointError, LdmError, RequestError
from ldm.formats import write_safetensors
from ldm.library import Library
from ldm.upscalers import (
    DEFAULT,
    UPSCALERS,
    NetworkUpscaler,
    enlarged,
    interpolated,
    load_upscaler,
    upscaler_named,
)
from ldm.upscalers.compact import CompactConfig, CompactNet
from ldm.upscalers.esrgan import RRDBConfig, RRDBNet
from ldm.upscalers.upscaler import Upscaler


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Soft colours with some edges."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    waves = [np.sin(x / 5 + i) + np.cos(y / 7 - i) + ((x // 9 + y // 11) % 2) for i in range(len(mode))]
    levels = np.stack(waves, axis=-1) * 50 + 100
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8)).convert(mode)


def tiny(factor: int = 2, seed: int = 0) -> NetworkUpscaler:
    torch.manual_seed(seed)
    network = CompactNet(CompactConfig(features=8, convolutions=1, factor=factor))
    return NetworkUpscaler("tiny", network.eval().requires_grad_(False))


def tiny_esrgan() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return RRDBNet(RRDBConfig(features=8, blocks=1, growth=4)).state_dict()


@pytest.mark.parametrize("name", UPSCALERS)
def test_every_built_in_upscaler_enlarges_by_its_factor(name: str):
    upscaler = load_upscaler(name)
    assert upscaler.name == name
    result = upscaler(picture(12, 9))
    assert result.size == (12 * upscaler.factor, 9 * upscaler.factor)
    assert result.mode == "RGB"


def test_the_embedded_network_draws_edges_sharper_than_lanczos():
    """A disc made four times smaller and enlarged again. Measured: 2.7 and 5.1 pixels from red to white."""
    y, x = np.mgrid[:256, :256]
    disc = (x - 120) ** 2 + (y - 130) ** 2 < 90**2
    truth = np.where(disc[..., None], (220, 50, 40), (250, 245, 235)).astype(np.uint8)
    small = Image.fromarray(truth).resize((64, 64), Image.Resampling.BOX)

    def width_of_edge(name: str) -> float:
        green = np.array(load_upscaler(name)(small))[100:160, 180:240, 1]  # the disc's right edge
        return float(((green > 65) & (green < 230)).sum(axis=1).mean())

    assert width_of_edge(DEFAULT) < 0.7 * width_of_edge("Lanczos")


@pytest.mark.parametrize("key", ["params_ema", "params", None])
def test_a_file_of_torch_save_is_read_as_published(tmp_path: Path, key: str | None):
    weights = tiny_esrgan()
    torch.save({key: weights} if key else weights, tmp_path / "mine.pth")
    upscaler = load_upscaler(str(tmp_path / "mine.pth"))
    assert isinstance(upscaler, NetworkUpscaler)
    assert upscaler.name == "mine"
    assert all(torch.equal(w, weights[name]) for name, w in upscaler.network.state_dict().items())


def test_averaged_weights_come_before_the_last_ones(tmp_path: Path):
    averaged = tiny_esrgan()
    last = {name: w + 1 for name, w in averaged.items()}
    torch.save({"params": last, "params_ema": averaged}, tmp_path / "both.pth")
    upscaler = load_upscaler(tmp_path / "both.pth")
    assert isinstance(upscaler, NetworkUpscaler)
    assert all(torch.equal(w, averaged[name]) for name, w in upscaler.network.state_dict().items())


def test_files_are_found_by_their_names_and_those_of_the_web_ui(tmp_path: Path):
    write_safetensors(tmp_path / "RealESRGAN_x4plus.safetensors", tiny_esrgan())
    library = Library(upscalers=tmp_path)
    assert upscaler_named("RealESRGAN_x4plus", library).factor == 4
    assert upscaler_named("R-ESRGAN 4x+", library).name == "R-ESRGAN 4x+"
    with pytest.raises(LdmError, match="did you mean RealESRGAN_x4plus"):
        upscaler_named("RealESRGAN_x4", library)


def test_a_name_from_settings_never_leads_to_other_files(tmp_path: Path):
    folder = tmp_path / "upscalers"
    folder.mkdir()
    path = tmp_path / "secret.safetensors"
    write_safetensors(path, tiny_esrgan())
    for name in (str(path), "../secret", "../secret.safetensors"):
        with pytest.raises(LdmError):
            upscaler_named(name, Library(upscalers=folder))
    assert load_upscaler(str(path)).factor == 4  # a path that the user gives is one


def test_an_unknown_name_is_told_with_those_that_are_known():
    with pytest.raises(LdmError, match="Lanczos"):
        load_upscaler("Lancos")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("layers.0.residual_group.blocks.0.attn.relative_position_bias_table", "SwinIR"),
        ("stylegan_decoder.style_mlp.1.weight", "GFPGAN"),
        ("m_head.0.weight", "ScuNET"),
        ("block_1.c1_r.sk.weight", "SPAN"),
        ("whatever.weight", "no upscaler"),
    ],
)
def test_other_networks_are_refused_by_name(tmp_path: Path, name: str, what: str):
    write_safetensors(tmp_path / "x.safetensors", {name: torch.zeros(4, 4)})
    with pytest.raises(CheckpointError, match=what) as error:
        load_upscaler(tmp_path / "x.safetensors")
    assert str(error.value).startswith("x.safetensors: ")
    assert len(str(error.value)) <= 200


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "CMYK"])
@pytest.mark.parametrize("size", [(24, 16), (25, 40), (7, 5), (1, 1)])
def test_enlarged_gives_exactly_the_size(mode: str, size: tuple[int, int]):
    source = picture(12, 8, "RGB").convert(mode)
    for upscaler in (tiny(), load_upscaler("Nearest"), load_upscaler("None")):
        result = enlarged(source, upscaler, *size)
        assert result.size == size
        assert result.mode == ("RGBA" if mode in ("RGBA", "LA") else "RGB")


class Counting:
    """An upscaler that counts its runs."""

    name = "counting"

    def __init__(self, factor: int) -> None:
        self.factor = factor
        self.runs = 0

    def __call__(self, image: Image.Image, progress=None) -> Image.Image:
        self.runs += 1
        if progress is not None:
            progress(0.5)
            progress(1.0)
        return image.resize((image.width * self.factor, image.height * self.factor))


@pytest.mark.parametrize(
    ("factor", "size", "runs"),
    [
        (4, (10, 10), 0),
        (4, (5, 5), 0),
        (4, (11, 10), 1),
        (4, (40, 40), 1),
        (4, (40, 41), 2),
        (2, (80, 80), 3),
        (2, (200, 200), 3),  # more than three runs there are never
        (1, (20, 20), 1),
        (1, (10, 10), 1),  # a network that cleans
    ],
)
def test_an_upscaler_runs_while_a_side_is_too_small(factor: int, size: tuple[int, int], runs: int):
    upscaler: Upscaler = Counting(factor)
    shares: list[float] = []
    assert enlarged(picture(10, 10), upscaler, *size, progress=shares.append).size == size
    assert upscaler.runs == runs  # type: ignore[attr-defined]
    assert shares == sorted(shares)
    assert (shares[-1] if shares else 1) == 1


def test_nearest_goes_to_the_size_without_new_colours():
    source = picture(9, 7)
    result = enlarged(source, load_upscaler("Nearest"), 31, 23)
    assert set(np.array(result).reshape(-1, 3).view("u1,u1,u1").ravel().tolist()) <= set(
        np.array(source).reshape(-1, 3).view("u1,u1,u1").ravel().tolist()
    )


def test_transparency_is_resized_by_itself():
    source = picture(16, 16).convert("RGBA")
    source.putalpha(Image.linear_gradient("L").resize((16, 16)))
    plain = enlarged(source.convert("RGB"), tiny(), 40, 40)
    result = enlarged(source, tiny(), 40, 40)
    assert result.convert("RGB").tobytes() == plain.tobytes()
    expected = source.getchannel("A").resize((40, 40), Image.Resampling.LANCZOS)
    assert result.getchannel("A").tobytes() == expected.tobytes()
    source.putalpha(255)
    assert enlarged(source, tiny(), 40, 40).getchannel("A").getextrema() == (255, 255)


def test_sizes_without_a_pixel_are_refused():
    with pytest.raises(RequestError, match="1 x 1"):
        enlarged(picture(4, 4), tiny(), 0, 10)


def test_tiles_change_little_of_what_the_whole_picture_gives():
    """A network that sees 18 pixels far, in tiles of 64. Measured: 0.23 levels on average, at most 5.

    With the usual tiles of 192 it is 0.009 and at most 4, on a sheet of drawings of 512 x 400 pixels.
    """
    embedded = load_upscaler(DEFAULT, tile=64, overlap=32)
    assert isinstance(embedded, NetworkUpscaler)
    source = picture(100, 70)
    whole = np.array(replace(embedded, tile=0)(source), dtype=np.float64)
    difference = np.abs(np.array(embedded(source)) - whole)
    assert difference.mean() < 0.4
    assert difference.max() <= 8


def test_a_network_sees_no_more_than_a_tile():
    seen: list[tuple[int, ...]] = []

    class Watching(CompactNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(tuple(x.shape))
            return super().forward(x)

    network = Watching(CompactConfig(features=4, convolutions=0, factor=2)).requires_grad_(False)
    NetworkUpscaler("watching", network, tile=32, overlap=4)(picture(130, 20))
    assert set(seen) == {(1, 3, 20, 32)}
    assert len(seen) == 5


@pytest.mark.parametrize(("tile", "overlap"), [(-1, 0), (16, 16), (16, -1)])
def test_tiles_that_cannot_be_are_refused_at_once(tile: int, overlap: int):
    with pytest.raises(RequestError, match="overlap"):
        load_upscaler(DEFAULT, tile=tile, overlap=overlap)


def test_the_picture_given_stays_as_it_is():
    source = picture(20, 20)
    before = source.tobytes()
    enlarged(source, tiny(), 50, 50)
    assert source.tobytes() == before


def test_float16_that_overflows_is_repeated_in_float32(caplog: pytest.LogCaptureFixture):
    upscaler = tiny()
    upscaler.network.get_parameter("body.0.weight").fill_(5000)  # times 27 inputs of a white picture: 135,000
    half = replace(upscaler, network=copy.deepcopy(upscaler.network).half())
    full = replace(upscaler, network=copy.deepcopy(half.network).float())
    source = Image.new("RGB", (8, 8), "white")
    assert half(source).tobytes() == full(source).tobytes()
    assert "repeated in float32" in caplog.text


def test_a_network_that_gives_nan_is_named_and_no_picture_made():
    upscaler = tiny()
    upscaler.network.get_parameter("body.0.weight").fill_(3e38)
    with pytest.raises(LdmError, match="tiny gave NaN or infinity"):
        upscaler(picture(8, 8))


def test_between_two_networks_lie_their_weights_and_at_the_ends_they_themselves():
    first, second = tiny(seed=0), tiny(seed=1)
    source = picture(9, 9)
    assert interpolated(first, second, 1.0)(source).tobytes() == first(source).tobytes()
    assert interpolated(first, second, 0.0)(source).tobytes() == second(source).tobytes()
    before = first.network.state_dict()["body.0.weight"].clone()
    mixed = interpolated(first, second, 0.25).network.state_dict()["body.0.weight"]
    expected = 0.25 * before + 0.75 * second.network.state_dict()["body.0.weight"]
    torch.testing.assert_close(mixed, expected)
    assert torch.equal(first.network.state_dict()["body.0.weight"], before)


def test_networks_of_different_shapes_have_nothing_between_them():
    with pytest.raises(RequestError, match="differ in shape"):
        interpolated(tiny(2), tiny(4), 0.5)
    with pytest.raises(RequestError, match="0 to 1"):
        interpolated(tiny(), tiny(), 1.5)
