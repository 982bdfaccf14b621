"""Axes and plots over settings."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from ldm import LdmError, Request, RequestError
from ldm.checkpoint import DEFAULT_MODEL
from ldm.edit import Edit, Hires
from ldm.sheets.axes import ABSENT, AXES, axis
from ldm.sheets.cells import Cell, Layout
from ldm.sheets.xyz import NOTHING, chosen, find, plot
from ldm.styles import Style

BASE = Request(prompt="a red cat on a red mat", negative_prompt="a blue dog", seed=3)


def requests(layout: Layout) -> list[Request]:
    assert all(isinstance(cell, Cell) for cell in layout.cells)
    return [cell.request for cell in layout.cells if isinstance(cell, Cell)]


def only(text: str, base: Request = BASE) -> list[Request]:
    return requests(plot(base, chosen(text)))


def words(titles) -> list[str]:
    return [" / ".join(label.text for label in title) for title in titles]


# The web UI's list, in its order; those of both kinds of pictures once.
WEB_UI = """
Nothing, Seed, Var. seed, Var. strength, Steps, Hires steps, CFG Scale, Image CFG Scale, Prompt S/R,
Prompt order, Sampler, Hires sampler, Checkpoint name, Negative Guidance minimum sigma, Sigma Churn,
Sigma min, Sigma max, Sigma noise, Schedule type, Schedule min sigma, Schedule max sigma, Schedule
rho, Beta schedule alpha, Beta schedule beta, Eta, Clip skip, Denoising, Initial noise multiplier,
Extra noise, Hires upscaler, Cond. Image Mask Weight, VAE, Styles, UniPC Order, Face restore, Token
merging ratio, Token merging ratio high-res, Always discard next-to-last sigma, SGM noise
multiplier, Refiner checkpoint, Refiner switch at, RNG source, FP8 mode, Size
"""


def test_every_axis_of_the_web_ui_is_here_or_told_why_not():
    names = [name.strip() for name in WEB_UI.replace("\n", " ").split(",")]
    assert [name for name in names if name not in AXES and name not in ABSENT] == []
    assert [name for name in AXES if name in names] == [name for name in names if name in AXES]
    assert not set(AXES) & set(ABSENT)
    for name in ABSENT:
        with pytest.raises(RequestError, match=r"there is no axis '.*' here: "):
            axis(name)


def test_the_page_in_docs_lists_every_axis():
    page = (Path(__file__).parents[2] / "docs" / "grids.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1].replace("**", "") for line in page.splitlines() if line.startswith("| ")]
    told = {name.strip() for row in rows for name in re.split("[,;]", row)}
    assert [name for name in AXES if name not in told] == ["Nothing"]


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("Seed: 5, 7", [{"seed": 5}, {"seed": 7}]),
        ("seed=5-7", [{"seed": 5}, {"seed": 6}, {"seed": 7}]),
        ("Var. seed: 9", [{"variation_seed": 9}]),
        ("variation strength: 0-1(+0.5)", [{"variation_strength": x} for x in (0.0, 0.5, 1.0)]),
        ("STEPS : 4", [{"steps": 4}]),
        ("cfg_scale=1, 7.5", [{"cfg_scale": 1.0}, {"cfg_scale": 7.5}]),
        ("CFG rescale: 0.7", [{"cfg_rescale": 0.7}]),
        ("Image CFG Scale: 2", [{"image_cfg_scale": 2.0}]),
        ("Sampler: Euler a", [{"sampler": "Euler a"}]),
        ("Sampler: dpm++ 2m karras", [{"sampler": "DPM++ 2M", "schedule": "karras"}]),
        ("Sigma Churn: 5", [{"s_churn": 5.0}]),
        ("Sigma min: 0.1", [{"s_tmin": 0.1}]),
        ("Sigma max: 9", [{"s_tmax": 9.0}]),
        ("Sigma noise: 1.01", [{"s_noise": 1.01}]),
        ("Schedule type: Karras, Automatic", [{"schedule": "Karras"}, {"schedule": "Automatic"}]),
        ("Schedule min sigma: 0.1", [{"sigma_min": 0.1}]),
        ("Schedule max sigma: 9", [{"sigma_max": 9.0}]),
        ("Schedule rho: 5", [{"rho": 5.0}]),
        ("Eta: 0.5", [{"eta": 0.5}]),
        ("Clip skip: 1-2", [{"clip_skip": 1}, {"clip_skip": 2}]),
        ("UniPC order: 2", [{"order": 2}]),
        ("Refiner switch at: 0.6", [{"refiner_switch": 0.6}]),
        ("Size: 64x128, 128 x 64", [{"width": 64, "height": 128}, {"width": 128, "height": 64}]),
        ("Nothing", [{}]),
    ],
)
def test_axes_set_fields_of_the_request_and_nothing_else(text: str, changes: list[dict[str, object]]):
    made = only(text)
    assert len(made) == len(changes)
    for request, change in zip(made, changes, strict=True):
        for field in fields(Request):
            expected = change.get(field.name, getattr(BASE, field.name))
            assert getattr(request, field.name) == expected, field.name


@pytest.mark.parametrize(
    ("text", "part", "field", "value"),
    [
        ("Hires steps: 5", "hires", "steps", 5),
        ("Hires sampler: Euler a Karras", "hires", "sampler", "Euler a Karras"),
        ("Hires upscaler: Lanczos", "hires", "upscaler", "Lanczos"),
        ("Denoising: 0.4", "hires", "strength", 0.4),
        ("Denoising: 0.4", "edit", "strength", 0.4),
        ("Initial noise multiplier: 0.9", "edit", "noise_multiplier", 0.9),
        ("Extra noise: 0.1", "edit", "extra_noise", 0.1),
        ("Cond. Image Mask Weight: 0.5", "edit", "mask_weight", 0.5),
        ("Emphasis: No norm", "compat", "emphasis", "no norm"),
        ("RNG source: NV", "compat", "noise", "philox"),
        ("RNG source: gpu", "compat", "noise", "philox"),
        ("Compatibility: comfyui", "compat", "strength", "exact"),
    ],
)
def test_axes_of_parts_of_the_request(text: str, part: str, field: str, value: object):
    given = {"edit": Edit(padding=7), "hires": Hires(scale=1.5)}
    base = Request(**{part: given[part]}) if part in given else BASE
    (request,) = only(text, base)
    assert getattr(getattr(request, part), field) == value
    assert request.edit is None or request.edit.padding == 7
    assert request.hires is None or request.hires.scale == 1.5
    if part in given:
        with pytest.raises(RequestError, match=r"needs a (picture|second pass)"):
            only(text)


def test_search_and_replace_acts_on_both_prompts():
    made = only("Prompt S/R: red, green, , blue")
    assert [r.prompt for r in made] == [f"a {c} cat on a {c} mat" for c in ("red", "green", "", "blue")]
    assert [r.negative_prompt for r in only("Prompt S/R: dog, mouse")] == ["a blue dog", "a blue mouse"]
    assert only('prompt s/r: "red cat", "big, black cat"')[1].prompt == "a big, black cat on a red mat"


def test_search_and_replace_must_find_its_text():
    with pytest.raises(RequestError, match="neither the prompt nor the negative prompt holds 'green'"):
        only("Prompt S/R: green, red")
    with pytest.raises(RequestError, match="it is empty"):
        only("Prompt S/R: , red")


def test_prompt_order_puts_texts_in_each_others_places():
    base = Request(prompt="(cat), a dog and bird!")
    assert [r.prompt for r in only("Prompt order: dog, cat, bird", base)] == [
        "(dog), a cat and bird!",
        "(dog), a bird and cat!",
        "(cat), a dog and bird!",
        "(cat), a bird and dog!",
        "(bird), a dog and cat!",
        "(bird), a cat and dog!",
    ]
    with pytest.raises(RequestError, match="the prompt does not hold 'mouse'"):
        only("Prompt order: cat, mouse", base)
    with pytest.raises(RequestError, match="overlap"):
        only("Prompt order: cat, (cat)", base)


def test_minus_one_is_one_seed_for_a_whole_row():
    layout = plot(BASE, chosen("Steps: 1-3"), chosen("Seed: -1, -1, 5"))
    seeds = [request.seed for request in requests(layout)]
    assert seeds[0] == seeds[1] == seeds[2] != seeds[3] == seeds[4]
    assert seeds[6:] == [5, 5, 5]
    assert words(layout.lefts)[0] == f"Seed: {seeds[0]}"


def test_cells_are_row_by_row_and_sheet_by_sheet():
    layout = plot(BASE, chosen("Steps: 1-2"), chosen("Seed: 1-2"), chosen("CFG Scale: 3, 4"))
    assert [(r.cfg_scale, r.seed, r.steps) for r in requests(layout)] == [
        (cfg, seed, steps) for cfg in (3, 4) for seed in (1, 2) for steps in (1, 2)
    ]
    assert words(layout.tops) == ["Steps: 1", "Steps: 2"]
    assert words(layout.lefts) == ["Seed: 1", "Seed: 2"]
    assert words(layout.titles) == ["CFG Scale: 3", "CFG Scale: 4"]
    assert layout.order == tuple(range(8))


def test_the_values_of_x_act_first():
    layout = plot(BASE, chosen("Prompt S/R: red, blue"), chosen("Prompt S/R: cat, red cat"))
    assert [request.prompt for request in requests(layout)] == [
        "a red cat on a red mat",
        "a blue cat on a blue mat",
        "a red red cat on a red mat",
        "a blue red cat on a blue mat",
    ]


def test_slow_axes_are_outermost(tmp_path: Path):
    for name in "ab":
        (tmp_path / f"{name}.safetensors").touch()

    def drawn(x: str, y: str, z: str) -> list[tuple]:
        layout = plot(BASE, chosen(x), chosen(y), chosen(z), models=tmp_path)
        cells = [layout.cells[i] for i in layout.order]
        assert sorted(layout.order) == list(range(8))
        assert all(isinstance(cell, Cell) for cell in cells)
        return [
            (c.checkpoint and c.checkpoint.stem, c.vae and c.vae.stem, c.request.seed)
            for c in cells
            if isinstance(c, Cell)
        ]

    seeds, vae, model = "Seed: 1-2", "VAE: Automatic, a", "Checkpoint: a, b"
    expected = [(m, v, s) for m in "ab" for v in (None, "a") for s in (1, 2)]
    for axes in ((seeds, vae, model), (model, vae, seeds), (vae, model, seeds), (model, seeds, vae)):
        assert drawn(*axes) == expected


@pytest.mark.parametrize(
    ("text", "titles"),
    [
        ("CFG Scale: 7, 0.30000000000000004", ["CFG Scale: 7", "CFG Scale: 0.3"]),
        ("Prompt S/R: red, blue", ["red", "blue"]),
        ("Prompt order: cat, mat", ["cat, mat", "mat, cat"]),
        ("Sampler: Euler a", ["Euler a"]),
        ("Nothing", [""]),
        ("Checkpoint: embedded", ["embedded"]),
        ("Styles: None", ["Styles: None"]),
    ],
)
def test_titles(text: str, titles: list[str]):
    assert words(plot(BASE, chosen(text)).tops) == titles


def test_a_value_that_no_cell_can_have_is_told_and_a_combination_is_a_cell_with_the_reason():
    with pytest.raises(RequestError, match="steps must be 1 to 10000, got 0"):
        plot(BASE, chosen("Steps: 0, 5"), chosen("Seed: 1-3"))
    layout = plot(BASE, chosen("Schedule min sigma: 0.1, 5"), chosen("Schedule max sigma: 1, 10"))
    assert [str(cell) if isinstance(cell, LdmError) else "" for cell in layout.cells] == [
        *("", "need 0 < sigma_min < sigma_max, got 5 and 1", "", "")
    ]


def test_styles_are_applied_last():
    known = {"film": Style("film", "{prompt} on film"), "red": Style("red", "red")}
    layout = plot(BASE, chosen("Styles: None, film, 'red'"), known=known | {"'red'": known["red"]})
    assert [r.prompt.removeprefix(BASE.prompt) for r in requests(layout)] == ["", " on film", ", red"]
    both = plot(
        BASE, chosen('Styles: "film, red"'), chosen("Prompt S/R: red, blue"), known=known, names=["red"]
    )
    assert requests(both)[1].prompt == "a blue cat on a blue mat, red on film, red"
    with pytest.raises(RequestError, match="no style 'oil'"):
        plot(BASE, chosen("Styles: oil, film"), known=known)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("Sede: 1", "unknown axis 'Sede'; did you mean Seed"),
        ("xyzzy: 1", "unknown axis 'xyzzy'; such as Seed"),
        ("", "unknown axis ''"),
        ("Seed", "Seed: no values; write it as seed=1, 2, 3"),
        ("Steps: 1.5", "Steps: '1.5' is neither a whole number"),
        ("Sampler: Eular", "Sampler: unknown sampler 'Eular'; did you mean Euler"),
        ("Schedule type: caras", "Schedule type: unknown spacing 'caras'; did you mean 'karras'"),
        ("Size: 64", "Size: a size is written as 512x768, got '64'"),
        ("RNG source: dice", "RNG source: a source of noise is CPU, NV or GPU, got 'dice'"),
        ("Compat: paint", "Compatibility: unknown profile 'paint'"),
        ("Prompt order: a,b,c,d,e,f,g", "Prompt order: 7 texts have too many orders"),
        ("Face restore: GFPGAN", "there is no axis 'Face restore' here: there is no restoration of faces"),
    ],
)
def test_an_axis_that_cannot_be_read_is_one_sentence(text: str, complaint: str):
    with pytest.raises(RequestError) as error:
        chosen(text)
    assert complaint in str(error.value)
    assert len(str(error.value)) <= 200


def test_too_many_cells_are_refused():
    with pytest.raises(RequestError, match="the plot would have 10100 pictures; at most 10000"):
        plot(BASE, chosen("Seed: 1-101"), chosen("Steps: 1-100"))


def test_weights_are_found_by_path_name_or_part_of_it(tmp_path: Path):
    folder = tmp_path / "models"
    (folder / "people").mkdir(parents=True)
    for name in ("v1-5.safetensors", "v1-5-inpainting.ckpt", "people/ann.pt"):
        (folder / name).touch()
    assert find(Path("embedded"), None) == DEFAULT_MODEL
    assert find(folder / "v1-5.safetensors", None) == folder / "v1-5.safetensors"
    for name, file in (
        ("v1-5", "v1-5.safetensors"),
        ("v1-5.safetensors", "v1-5.safetensors"),
        ("inpaint", "v1-5-inpainting.ckpt"),
        ("INPAINTING", "v1-5-inpainting.ckpt"),
        ("people/ann", "people/ann.pt"),
        ("ann", "people/ann.pt"),
    ):
        assert find(Path(name), folder) == folder / file, name
    with pytest.raises(RequestError, match="2 files are called 'v1': v1-5, v1-5-inpainting"):
        find(Path("v1"), folder)
    with pytest.raises(RequestError, match="there is no file 'sdxl' in"):
        find(Path("sdxl"), folder)
    with pytest.raises(RequestError, match="give its path, or the folder with --models-dir"):
        find(Path("sdxl"), None)
    with pytest.raises(RequestError, match="there is no file"):
        find(Path("../models/x"), folder)


def test_nothing_is_an_axis_of_one_cell():
    assert requests(plot(BASE, NOTHING)) == [BASE]
