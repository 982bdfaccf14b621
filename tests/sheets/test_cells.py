"""Drawing the cells of a plot: what is loaded, what is kept, what goes wrong, and what stops."""

import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import ldm
from ldm import LdmError, Request, RequestError
from ldm.edit import Edit
from ldm.images import read_text, with_text
from ldm.inputs import NO_INPUTS, Inputs
from ldm.sheets.cells import Cell, Layout, assembled, draw, with_vae
from ldm.sheets.titles import Label
from ldm.sheets.xyz import NOTHING, chosen, plot
from ldm.vae import AutoencoderKL, VAEConfig
from tests.tiny_families import tiny

BASE = Request(prompt="a cat", width=32, height=32, steps=2, seed=1)


class Loader:
    """Gives the same tiny model for every checkpoint, and notes which were asked for."""

    def __init__(self, inputs: Inputs = NO_INPUTS) -> None:
        self.asked: list[Path | None] = []
        self.inputs = inputs

    def __call__(self, checkpoint: Path | None) -> tuple[ldm.Models, Inputs]:
        self.asked.append(checkpoint)
        if checkpoint and checkpoint.name == "missing":
            raise LdmError("there is no file missing")
        return replace(tiny("sd1"), path=checkpoint), self.inputs


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def runs() -> Iterator[list[int]]:
    """The number of calls of the network since the start, as its one element."""
    count = [0]

    def called(*args: object) -> None:
        count[0] += 1

    hook = tiny("sd1").unet.register_forward_hook(called)
    yield count
    hook.remove()


def test_each_cell_is_a_picture_with_its_own_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    layout = plot(BASE, chosen("Seed: 1-2"), chosen("Steps: 1-2"))
    outcomes = draw(layout, Loader(), tmp_path)
    assert outcomes is not None
    paths = [path for path in outcomes if isinstance(path, Path)]
    assert [path.name[:6] for path in paths] == ["00000-", "00001-", "00002-", "00003-"]
    assert sorted(capsys.readouterr().out.split()) == [str(path) for path in paths]
    for path, cell in zip(paths, layout.cells, strict=True):
        assert isinstance(cell, Cell)
        assert f"Steps: {cell.request.steps}, " in read_text(path)
        assert f"Seed: {cell.request.seed}, " in read_text(path)
        image = ldm.txt2img(tiny("sd1"), cell.request)[0]
        assert Image.open(path).tobytes() == image.tobytes()


def test_what_is_there_is_not_drawn_again(tmp_path: Path, runs: list[int]):
    first = draw(plot(BASE, chosen("Seed: 1-3")), Loader(), tmp_path)
    before, kept = runs[0], contents(tmp_path)
    assert draw(plot(BASE, chosen("Seed: 1-3")), Loader(), tmp_path) == first
    assert runs[0] == before
    assert contents(tmp_path) == kept
    # More values draw what is new, wherever the others stand now.
    more = draw(plot(BASE, chosen("Seed: 4, 3, 1")), Loader(), tmp_path)
    assert first is not None
    assert more is not None
    assert more[1:] == [first[2], first[0]]
    assert len(contents(tmp_path)) == 4
    # Another setting is another picture.
    draw(plot(replace(BASE, cfg_scale=3), chosen("Seed: 1")), Loader(), tmp_path)
    assert len(contents(tmp_path)) == 5


def test_a_cell_is_one_picture():
    with pytest.raises(RequestError, match="drawn alone, not 2 at once"):
        plot(replace(BASE, batch_size=2), chosen("Seed: 1"))


def test_equal_cells_are_drawn_once(tmp_path: Path):
    outcomes = draw(plot(BASE, chosen("Var. seed: 1-3")), Loader(), tmp_path)  # with a strength of 0
    assert outcomes is not None
    assert len(set(outcomes)) == len(contents(tmp_path)) == 1


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], runs: list[int]
):
    layout = plot(BASE, chosen("Seed: 1-3"), chosen("Sampler: Euler a, DPM++ 2M"))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    expected = draw(layout, Loader(), whole)
    assert expected is not None
    every = runs[0]

    def interrupt(*args: object) -> None:
        if runs[0] in stops:
            signal.raise_signal(signal.SIGINT)

    stops = {every + 5, every + 9}  # within the second and the third picture
    hook = tiny("sd1").unet.register_forward_hook(interrupt)
    try:
        assert draw(layout, Loader(), parts) is None
        assert "stopped; 2 of 6 pictures are done; the same command goes on" in capsys.readouterr().err
        assert draw(layout, Loader(), parts) is None
    finally:
        hook.remove()
    outcomes = draw(layout, Loader(), parts)
    assert outcomes is not None
    assert contents(parts) == contents(whole)
    assert assembled(layout, outcomes).tobytes() == assembled(layout, expected).tobytes()


def test_another_process_may_be_quicker(tmp_path: Path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    drawn = draw(plot(BASE, NOTHING), Loader(), theirs)
    assert drawn is not None
    [path] = drawn
    assert isinstance(path, Path)
    hook = tiny("sd1").unet.register_forward_hook(lambda *args: shutil.copy(path, ours) and None)
    try:
        assert draw(plot(BASE, NOTHING), Loader(), ours) == [ours / path.name]
    finally:
        hook.remove()
    assert contents(ours) == contents(theirs)


def test_the_leftovers_of_a_killed_process_are_removed(tmp_path: Path):
    (tmp_path / ".0123.ldm-unfinished").write_bytes(b"half a picture")
    draw(plot(BASE, NOTHING), Loader(), tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".png"]


def test_a_checkpoint_is_loaded_once_however_the_axes_lie(tmp_path: Path):
    for name in ("a.safetensors", "b.safetensors"):
        tiny("sd1").save(tmp_path / name)
    models, seeds = chosen("Checkpoint: a, b"), chosen("Seed: 1-2")
    for x, y in ((models, seeds), (seeds, models)):
        loader = Loader()
        draw(plot(BASE, x, y, models=tmp_path), loader, tmp_path)
        assert [path and path.stem for path in loader.asked] == ["a", "b"]


def test_an_autoencoder_of_another_file_takes_part(tmp_path: Path):
    vae = AutoencoderKL(VAEConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1))  # other random weights
    replace(tiny("sd1"), vae=vae).save(tmp_path / "other.safetensors")
    loader = Loader()
    outcomes = draw(plot(BASE, chosen("VAE: None, other"), models=tmp_path), loader, tmp_path)
    assert outcomes is not None
    first, second = (path for path in outcomes if isinstance(path, Path))
    assert loader.asked == [None]
    assert "VAE: other.safetensors" in read_text(second)
    assert Image.open(first).tobytes() != Image.open(second).tobytes()


def test_an_autoencoder_that_does_not_fit_is_told(tmp_path: Path):
    vae = AutoencoderKL(VAEConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=3, embed_dim=3))
    replace(tiny("sd1"), vae=vae).save(tmp_path / "three.safetensors")
    with pytest.raises(LdmError, match="an autoencoder of 3 channels, the UNet works on 4"):
        with_vae(tiny("sd1"), tmp_path / "three.safetensors")


def test_one_bad_cell_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    layout = plot(BASE, chosen("Sampler: Euler, Euler a"), chosen("Eta: 0.5, 1"))
    outcomes = draw(layout, Loader(), tmp_path)
    assert outcomes is not None
    assert [isinstance(outcome, Path) for outcome in outcomes] == [False, True, False, True]
    said = capsys.readouterr().err
    assert "picture 1: the sampler 'Euler' has no option 'eta'" in said
    page = assembled(layout, outcomes)
    assert page.getpixel((page.width - 64 + 1, page.height - 64 + 1)) == (230, 230, 230)  # a notice
    assert page.info["parameters"] == read_text(next(o for o in outcomes if isinstance(o, Path)))


def test_a_checkpoint_that_cannot_be_loaded_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    good, bad = Cell(BASE), Cell(BASE, checkpoint=Path("missing"))
    layout = Layout((bad, good, bad, RequestError("no such thing")), (0, 2, 1, 3), ((),) * 4)
    outcomes = draw(layout, Loader(), tmp_path)
    assert outcomes is not None
    assert [isinstance(outcome, Path) for outcome in outcomes] == [False, True, False, False]
    said = capsys.readouterr().err
    assert said.count("picture 1, 3: there is no file missing") == 1
    assert "picture 4: no such thing" in said


def test_all_cells_are_given_the_pictures(tmp_path: Path):
    picture = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    base = replace(BASE, edit=Edit(), steps=4)
    layout = plot(base, chosen("Denoising: 0.25, 1"))
    outcomes = draw(layout, Loader(Inputs(picture=picture)), tmp_path)
    assert outcomes is not None
    assert all("Init image hash" in read_text(path) for path in outcomes if isinstance(path, Path))
    turned = Inputs(picture=picture.rotate(180))
    again = draw(layout, Loader(turned), tmp_path)
    assert again is not None
    assert not set(again) & set(outcomes)  # another picture is another cell


def test_large_pictures_are_smaller_on_the_sheet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ldm.sheets.cells.MAX_PIXELS", 1_000_000)
    with_text(Image.effect_noise((500, 400), 50), "a cat\nSteps: 2, Seed: 1, Size: 500x400").save(
        tmp_path / "large.png"
    )
    titles = tuple((Label(str(i)),) for i in range(3))
    layout = Layout((Cell(BASE),) * 9, tuple(range(9)), titles, titles)
    page = assembled(layout, [tmp_path / "large.png"] * 9, margin=2)
    assert 200_000 < page.width * page.height <= 1_000_000  # not 1.8 million
    assert assembled(layout, [tmp_path / "large.png"] * 9, side=50).width < 5 * 50
