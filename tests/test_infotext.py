"""The settings as text: the web UI's layout, written and read."""

import json
import random
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.compat import PROFILES, Compatibility
from ldm.denoise import Prediction
from ldm.edit import Edit, Hires
from ldm.infotext import Infotext, infotext, parse, quote
from ldm.interpret import request
from ldm.request import Request
from ldm.soft_inpainting import Soft
from tests.golden import golden
from tests.tiny_families import tiny

SETTLED = Request(
    prompt="a cat, sitting",
    seed=7,
    width=512,
    height=768,
    steps=20,
    cfg_scale=7.0,
    sampler="DPM++ 2M",
    schedule="karras",
)


def test_quoting_equals_the_web_ui():
    for case in json.loads(golden("infotext/quote.json").read_text())["cases"]:
        assert quote(case["value"]) == case["quoted"]


def test_infotext_has_the_fields_of_the_web_ui_in_its_order():
    assert infotext(SETTLED, tiny("sd1")) == (
        "a cat, sitting\nSteps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 7, "
        "Size: 512x768, RNG: CPU, Version: ldm 0.1.0"
    )


def test_infotext_names_what_differs_from_the_defaults():
    request = replace(
        SETTLED,
        prompt="",
        negative_prompt="blurry\ndark",
        cfg_scale=6.5,
        sampler="DDIM",
        schedule="ddim_uniform",
        clip_skip=2,
        eta=0.5,
        cfg_rescale=0.7,
        sigma_max=10.0,
        rho=5.0,
    )
    assert infotext(request, tiny("sd1")) == (
        "Negative prompt: blurry\ndark\nSteps: 20, Sampler: DDIM, Schedule type: DDIM, CFG scale: 6.5, "
        "Seed: 7, Size: 512x768, Clip skip: 2, RNG: CPU, Eta DDIM: 0.5, "
        "Schedule max sigma: 10, Schedule rho: 5, CFG rescale: 0.7, Version: ldm 0.1.0"
    )
    unchanged = replace(SETTLED, sampler="Euler a", eta=1.0, s_noise=1.0, clip_skip=1)
    assert "Eta" not in infotext(unchanged, tiny("sd1"))
    assert "Clip skip" not in infotext(unchanged, tiny("sd1"))


def test_infotext_names_the_file(tmp_path: Path):
    path = tmp_path / "model, v1.safetensors"
    path.write_bytes(b"abc")
    text = infotext(SETTLED, replace(tiny("sd1"), path=path))
    assert 'Model hash: ba7816bf8f, Model: "model, v1", RNG' in text  # FIPS 180-2, appendix B.1


def test_infotext_names_all_that_takes_part(tmp_path: Path):
    vae = tmp_path / "bright.vae.pt"
    vae.write_bytes(b"abc")
    model = tiny("sd1")
    models = replace(
        model,
        vae_path=vae,
        ema=True,
        denoiser=replace(model.denoiser, prediction=Prediction.V, dtype=torch.float16),
    )
    varied = replace(
        SETTLED,
        variation_seed=9,
        variation_strength=0.25,
        seed_resize_from=(384, 640),
        clip_skip=2,
        ensd=31337,
        compat=Compatibility(noise="philox", emphasis="no norm", truncate_8bit=True, ddim_levels="webui"),
    )
    hashes = {"Lora hashes": {"style": "0123456789ab", "face": "ba9876543210"}, "TI hashes": {}}
    assert infotext(varied, models, hashes) == (
        "a cat, sitting\nSteps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 7, "
        "Size: 512x768, VAE hash: ba7816bf8f, VAE: bright.vae.pt, Variation seed: 9, "
        "Variation seed strength: 0.25, Seed resize from: 384x640, Clip skip: 2, ENSD: 31337, RNG: NV, "
        'Lora hashes: "style: 0123456789ab, face: ba9876543210", Emphasis: No norm, Prediction: v, '
        'EMA: True, Precision: float16, Compatibility: "ddim_levels: webui, truncate_8bit: True", '
        "Version: ldm 0.1.0"
    )
    info = parse(infotext(varied, models, hashes))
    assert info.hashes("Lora hashes") == hashes["Lora hashes"]
    assert info.hashes("TI hashes") == {}
    assert request(info) == (varied, [])


def test_clip_skip_is_named_wherever_it_is_not_the_usual():
    """The families of two encoders skip a layer unless told otherwise, so a 1 is worth saying."""
    assert "Clip skip" not in infotext(replace(SETTLED, clip_skip=1), tiny("sd1"))
    assert "Clip skip: 1" in infotext(replace(SETTLED, clip_skip=1), tiny("sdxl"))
    assert "Clip skip" not in infotext(SETTLED, tiny("sdxl"))


def read(text: str) -> tuple[Request, list[str]]:
    return request(parse(text))


GOLDEN = json.loads(golden("infotext/infotext.json").read_text())["cases"]
# What the original adds to every text that does not have these fields, and fields that it renames.
ADDED = set(GOLDEN[10]["parsed"]) | {"Emphasis", "Downcast alphas_cumprod"}
RENAMED = {"VAE": "VAE/TE"}


@pytest.mark.parametrize("case", GOLDEN, ids=range(len(GOLDEN)))
def test_fields_equal_the_web_ui(case: dict[str, Any]):
    info, expected = parse(case["text"]), dict(case["parsed"])
    assert info.prompt == expected.pop("Prompt")
    assert info.negative_prompt == expected.pop("Negative prompt")
    if "First pass size" in info.fields:  # moved to the names that it has today
        assert (expected.pop("Size-1"), expected.pop("Size-2")) == (512, 512)
        expected |= {"Size-1": "1024", "Size-2": "1024"}
    for name, value in info.fields.items():
        size = re.fullmatch(r"(\d+)x(\d+)", value)
        if size:
            assert (expected.pop(f"{name}-1"), expected.pop(f"{name}-2")) == size.groups()
        elif name in RENAMED:
            assert expected.pop(RENAMED[name]) == [value]
        else:
            assert expected.pop(name) == value
    assert set(expected) <= ADDED


def test_any_line_reads_as_by_the_web_uis_pattern():
    """The documented pattern, which takes quadratic time, on short lines of what makes it difficult."""
    pattern = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    pieces = ["a", "Steps", "bb", ":", ": ", ",", ", ", '"', "-", "/", " ", "x y", "1", ".", "é", '\\"', "{"]
    draw = random.Random(0)
    for _ in range(5000):
        line = "".join(draw.choices(pieces, k=draw.randint(1, 30))).strip()
        found = pattern.findall(line)
        expected = {}
        for name, value in found if len(found) >= 3 else []:
            quoted = len(value) > 1 and value[0] == value[-1] == '"'
            if value := json.loads(value) if quoted else value.strip():
                expected[name] = value
        assert parse(line).fields == expected, line


N = 1_000_000
HEAVY = {
    "letters": "a" * N,
    "colons": ":" * N,
    "commas": "," * N,
    "lines": "a" + "\n" * N + "Steps: 1",
    "short lines": "x\n" * (N // 2),
    "spaces": "aa:" + " " * N + "x",
    "separators": "- /" * (N // 3),
    "empty fields": "aa:," * (N // 4),
    "open quotes": 'aa: "' * (N // 5),
    "open quotes and commas": 'aa: ",' * (N // 6),
    "escapes": 'aa: "' + '\\"' * (N // 2),
    "distinct fields": "".join(f"k{i}:v," for i in range(N // 10)),
    "field lines": "Steps: 1\n" * (N // 9),
    "negatives": "Negative prompt:\n" * (N // 17),
    "wide letters": "日本" * (N // 2),
}


@pytest.mark.parametrize("text", HEAVY.values(), ids=HEAVY)
def test_a_million_letters_are_read_at_once(text: str):
    """The promise is 0.1 s on a quiet machine; three times that still tells linear from quadratic."""
    start = time.process_time()
    request(parse(text))
    assert time.process_time() - start < 0.3


PROMPTS = [
    "",
    "a cat",
    " a cat ",
    "\na cat\n\n",
    "two\nlines",
    "trailing space \nin a line",
    "Negative prompt: not that one",
    "a\nNegative prompt: b\nNegative prompt: c",
    "Steps: 1, Sampler: Euler, CFG scale: 2, Seed: 3",
    "a\nSteps: 1\nSampler: Euler\nCFG scale: 2",
    'quotes " and \\ and, commas: all',
    "carriage\r\nreturn\ttab\0",
    "日本 🍎",
    "half a pair \udce9",
]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("negative_prompt", PROMPTS)
def test_every_prompt_reads_back(prompt: str, negative_prompt: str):
    wanted = replace(SETTLED, prompt=prompt, negative_prompt=negative_prompt)
    assert read(infotext(wanted, tiny("sd1"))) == (wanted, [])


def test_the_readable_prompt_is_written_once():
    assert "Exact" not in infotext(replace(SETTLED, prompt="a\n\nb", negative_prompt="c, d"), tiny("sd1"))


@pytest.mark.parametrize(
    "settings",
    [
        {"cfg_scale": 1 / 3, "cfg_rescale": 0.1 + 0.2, "seed": 2**64 - 1},
        {
            "sampler": "Euler",
            "schedule": "uniform",
            "s_churn": 1e-7,
            "s_tmin": 0.1,
            "s_tmax": 9.0,
            "s_noise": 1.1,
        },
        {"sampler": "UniPC", "schedule": "sgm_uniform", "order": 1},
        {"sampler": "DEIS", "order": 2, "sigma_min": 0.05, "sigma_max": 12.5, "rho": 5.5},
        {"sampler": "DDIM", "schedule": "turbo", "eta": 1.0},
        {"sampler": "Euler a", "eta": 0.0, "ensd": -5},
        {"sampler": "DPM++ 2M", "schedule": "align_your_steps_sdxl"},
        {"compat": PROFILES["compvis"]},
        {"compat": PROFILES["comfyui"], "variation_seed": 2, "variation_strength": 1.0},
        {"compat": Compatibility(late_first_edit=True)},
        {"tiling": True, "image_cfg_scale": 1.1, "refiner_switch": 0.5},
        {"edit": Edit(strength=0.75)},
        {
            "edit": Edit(
                strength=0.4,
                resize="latent",
                noise_multiplier=1.05,
                extra_noise=0.1,
                color_correction=True,
                mask_blur=0,
                mask_invert=True,
                masked_content="latent noise",
                only_masked=True,
                padding=5,
                mask_weight=0.5,
                soft=Soft(schedule_bias=2.0, mask_influence=0.5),
            )
        },
        {"edit": Edit(strength=1.0, soft=Soft())},
        {"hires": Hires()},
        {
            "hires": Hires(
                scale=1.5,
                width=1024,
                upscaler="R-ESRGAN 4x+: Anime6B",
                steps=7,
                strength=0.0,
                prompt='one, "two": three\nfour',
                negative_prompt="five",
                sampler="Euler a",
                schedule="karras",
                cfg_scale=3.5,
            )
        },
    ],
)
def test_every_setting_reads_back(settings: dict[str, Any]):
    wanted = replace(SETTLED, **settings)
    assert read(infotext(wanted, tiny("sd1"))) == (wanted, [])


def test_notes_of_a_person_are_read():
    """One field on each line, an old name of sampler and schedule, other capitals; the web UI takes it all
    for prompt."""
    text = """
        1girl, standing, (masterpiece:1.2)
        Negative prompt: lowres, bad hands

        Steps: 28
        Sampler: DPM++ 2S a Karras
        CFG Scale: 7

        Seed: 3512389764
        Size: 1024 x 1024
        Denoising strength: 0.68
    """
    made, notes = read(text)
    assert made == Request(
        prompt="1girl, standing, (masterpiece:1.2)",
        negative_prompt="lowres, bad hands",
        steps=28,
        sampler="DPM++ 2S a",
        schedule="karras",
        cfg_scale=7.0,
        seed=3512389764,
        width=1024,
        height=1024,
        edit=Edit(strength=0.68),
        compat=PROFILES["a1111"],
    )
    assert notes == []


@pytest.mark.parametrize(
    ("fields", "sampler", "schedule"),
    [
        ("Sampler: DPM++ 2M Karras", "DPM++ 2M", "karras"),
        ("Sampler: DPM++ 2M SDE Exponential", "DPM++ 2M SDE", "exponential"),
        ("Sampler: DPM++ 2M", "DPM++ 2M", "uniform"),  # before 1.9: no name of a schedule is no schedule
        ("Sampler: DPM2 a", "DPM2 a", "uniform"),
        ("Sampler: DPM++ 2M, Schedule type: Automatic", "DPM++ 2M", None),
        ("Sampler: DPM++ 2M Karras, Schedule type: Automatic", "DPM++ 2M", "karras"),
        ("Sampler: DPM++ 2M, Schedule type: SGM Uniform", "DPM++ 2M", "sgm_uniform"),
        ("Schedule type: Karras, Sampler: Euler", "Euler", "karras"),
        ("Sampler: Euler a", "Euler a", None),
        ("Sampler: DDIM", "DDIM", None),
        ("Sampler: PLMS", "PLMS", None),
        ("Sampler: UniPC", "UniPC", None),
        ("Sampler: k_euler_ancestral", "Euler a", None),
    ],
)
def test_samplers_of_all_versions(fields: str, sampler: str, schedule: str | None):
    made, notes = read(f"p\nSteps: 20, {fields}, CFG scale: 7, Seed: 1")
    assert (made.sampler, made.schedule, notes) == (sampler, schedule, [])


def test_noise_of_the_web_ui_is_the_cards_unless_it_says_cpu():
    text = "p\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 1"
    assert read(text)[0].compat == PROFILES["a1111"]
    assert read(f"{text}, RNG: NV")[0].compat == PROFILES["a1111"]
    assert read(f"{text}, RNG: CPU")[0].compat == replace(PROFILES["a1111"], noise="cpu")
    assert read(f"{text}, Emphasis: No norm")[0].compat.emphasis == "no norm"


def test_old_versions_of_the_web_ui_had_other_times_of_editing():
    text = "[a:b:1.0]\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 1, Version: v1."
    assert read(f"{text}5.2")[0].compat.old_edit_times
    assert not read(f"{text}6.0")[0].compat.old_edit_times


def test_what_cannot_be_used_is_said_field_by_field():
    made, notes = read(
        "p\nSteps: many, Sampler: Undefined, Schedule type: karas, CFG scale: nan, Seed: -1, Size: big, "
        "Eta: 0.5, Emphasis: loud, Hires upscale: 2, Hires steps: few, Face restoration: GFPGAN, "
        "Model: x, Version: v1.5.1, "
        'Compatibility: "wings: two"'
    )
    compat = replace(PROFILES["a1111"], old_edit_times=True)
    assert made == Request(prompt="p", hires=Hires(scale=2.0), compat=compat)
    assert notes == [
        "Steps: many is left out: that is no number",
        "Sampler: Undefined is left out: the sampler is unknown; the model's own takes its place",
        "Schedule type: karas is left out: unknown spacing 'karas'; did you mean 'karras'?",
        "CFG scale: nan is left out: cfg_scale must be a finite number, got nan",
        "Seed: -1 is left out: seed must be 0 to 18446744073709551615, got -1",
        "Size: big is left out: that is no number",
        "Emphasis: loud is left out: emphasis must be one of 'original', 'no norm', 'comfyui', 'ignore', "
        "'none', got 'loud'",
        "Face restoration: GFPGAN is left out: this is not done here",
        "Compatibility: wings: two is left out: one of these choices is unknown",
        "Hires steps: few is left out: it means nothing here",
        "eta is left out: the sampler does not take it",
        "Version: before 1.8, the noise schedule was rounded to half precision; details may differ",
    ]


def test_an_option_that_the_sampler_lacks_is_left_out():
    made, notes = read("p\nSteps: 20, Sampler: Euler, Eta: 0.5, CFG scale: 7, Seed: 1")
    assert made.eta is None
    assert notes == ["eta is left out: Euler does not take it"]


def test_nothing_in_a_text_is_an_error():
    draw = random.Random(0)
    names = [
        "Steps",
        "Sampler",
        "Seed",
        "Size",
        "Compatibility",
        "RNG",
        "Emphasis",
        "ENSD",
        "x",
        "Lora hashes",
    ]
    values = ["", "1", "-1", "9" * 5000, "1e999", "x", "1x", "None", '"', '"a: b, c"', "\0\x1b[31m", "\ud800"]
    for _ in range(2000):
        fields = ", ".join(f"{draw.choice(names)}: {draw.choice(values)}" for _ in range(6))
        info = parse(f"p\n{fields}")
        made, notes = request(info)
        assert isinstance(made, Request)
        assert all(note.isprintable() and len(note) <= 200 for note in notes)
        info.hashes("Lora hashes")


def test_a_text_of_ours_is_told_from_others():
    assert parse(infotext(SETTLED, tiny("sd1"))).ours
    assert not Infotext("", "", {"Version": "v1.10.1"}).ours
