"""The settings as text: the web UI's layout, written and read."""

import json
from dataclasses import replace
from pathlib import Path

from ldm.infotext import infotext, quote
from ldm.request import Request
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
        "Seed: 7, Size: 512x768, Clip skip: 2, RNG: CPU, CFG rescale: 0.7, Eta DDIM: 0.5, "
        "Schedule max sigma: 10, Schedule rho: 5, Version: ldm 0.1.0"
    )
    unchanged = replace(SETTLED, sampler="Euler a", eta=1.0, s_noise=1.0, clip_skip=1)
    assert "Eta" not in infotext(unchanged, tiny("sd1"))
    assert "Clip skip" not in infotext(unchanged, tiny("sd1"))


def test_infotext_names_the_file(tmp_path: Path):
    path = tmp_path / "model, v1.safetensors"
    path.write_bytes(b"abc")
    text = infotext(SETTLED, replace(tiny("sd1"), path=path))
    assert 'Model hash: ba7816bf8f, Model: "model, v1", RNG' in text  # FIPS 180-2, appendix B.1
