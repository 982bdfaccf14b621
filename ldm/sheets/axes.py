"""The settings that a plot can vary.

An axis is a line of the table AXES: its name in the web UI, how its values are read, and what a value does to
a cell. To add one is to add a line.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ldm import samplers
from ldm.compat import profile
from ldm.errors import RequestError
from ldm.formats.mapped import printable
from ldm.sheets.cells import Cell
from ldm.sheets.values import floats, integers, permutations, texts
from ldm.spacings import plain

Read = Callable[[str], Sequence[Any]]
"""The values in a text. Raises LdmError if it holds something else."""

Apply = Callable[[Cell, Any, Sequence[Any]], Cell]
"""(cell, value, all values of the axis) -> the cell with that value. Raises LdmError if it cannot have it."""


@dataclass(frozen=True)
class Axis:
    """Something that a plot can vary."""

    name: str  # as in the web UI
    read: Read
    apply: Apply
    aliases: tuple[str, ...] = ()
    cost: float = 0.0  # of going to another value; the costly ones change the least often
    named: bool = True  # titles are "name: value"; False: the value alone


def _seeds(text: str) -> list[int]:
    """-1 is another seed each time; it is drawn here, once, so that a row or column shares it."""
    return [secrets.randbelow(2**32) if seed == -1 else seed for seed in integers(text)]


def _names(check: Callable[[str], object]) -> Read:
    """Texts that `check` does not refuse."""

    def read(text: str) -> list[str]:
        found = texts(text)
        for name in found:
            check(name)
        return found

    return read


def _sizes(text: str) -> list[str]:
    """ "512x768, 768 x 512"."""
    sizes = ["".join(size.lower().split()) for size in texts(text)]
    for size in sizes:
        width, _, height = size.partition("x")
        if not (width.isdecimal() and height.isdecimal() and len(size) < 20):
            raise RequestError(f"a size is written as 512x768, got {printable(size)!r}")
    return sizes


def _files(text: str) -> list[Path]:
    return [Path(name) for name in texts(text)]


def _set(name: str, path: str) -> Apply:
    """Set a field of the request, "steps", or of a part of it, "hires.steps"."""
    part, _, last = path.rpartition(".")

    def apply(cell: Cell, value: Any, values: Sequence[Any]) -> Cell:
        if not part:
            return replace(cell, request=replace(cell.request, **{last: value}))
        whole = getattr(cell.request, part)
        if whole is None:
            raise RequestError(f"{name} needs {_NEEDED[part]}")
        return replace(cell, request=replace(cell.request, **{part: replace(whole, **{last: value})}))

    return apply


_NEEDED = {"edit": "a picture to start from", "hires": "a second pass (hires)"}


def _strength(cell: Cell, value: float, values: Sequence[float]) -> Cell:
    """Of the second pass if there is one, as in the web UI."""
    return _set("Denoising", "hires.strength" if cell.request.hires else "edit.strength")(cell, value, values)


def _search_and_replace(cell: Cell, value: str, values: Sequence[str]) -> Cell:
    searched, request = values[0], cell.request
    if not searched:
        raise RequestError("the first value of Prompt S/R is the text to find; it is empty")
    if searched not in request.prompt and searched not in request.negative_prompt:
        raise RequestError(
            f"Prompt S/R: neither the prompt nor the negative prompt holds {printable(searched)!r}"
        )
    prompt = request.prompt.replace(searched, value)
    negative_prompt = request.negative_prompt.replace(searched, value)
    return replace(cell, request=replace(request, prompt=prompt, negative_prompt=negative_prompt))


def _reorder(cell: Cell, value: tuple[str, ...], values: Sequence[tuple[str, ...]]) -> Cell:
    """Put the texts in the order of `value` where they are in the prompt, each in the place of another."""
    prompt = cell.request.prompt
    for text in value:
        if not text or text not in prompt:
            raise RequestError(f"Prompt order: the prompt does not hold {printable(text)!r}")
    ordered, rest = "", prompt
    for searched, text in zip(sorted(value, key=prompt.find), value, strict=True):
        before, found, rest = rest.partition(searched)
        if not found:
            raise RequestError("Prompt order: the texts overlap in the prompt")
        ordered += before + text
    return replace(cell, request=replace(cell.request, prompt=ordered + rest))


def _sampler(cell: Cell, value: str, values: Sequence[str]) -> Cell:
    return replace(cell, request=replace(cell.request, **samplers.settings(value)))


def _size(cell: Cell, value: str, values: Sequence[str]) -> Cell:
    width, height = map(int, value.split("x"))
    return replace(cell, request=replace(cell.request, width=width, height=height))


def _checkpoint(cell: Cell, value: Path, values: Sequence[Path]) -> Cell:
    return replace(cell, checkpoint=value)


def _vae(cell: Cell, value: Path, values: Sequence[Path]) -> Cell:
    return replace(cell, vae=None if str(value).lower() in ("automatic", "none") else value)


def _styles(cell: Cell, value: str, values: Sequence[str]) -> Cell:
    names = [] if value.lower() == "none" else [name.strip() for name in value.split(",")]
    return replace(cell, styles=(*cell.styles, *filter(None, names)))


def _profile(cell: Cell, value: str, values: Sequence[str]) -> Cell:
    return replace(cell, request=replace(cell.request, compat=profile(value)))


_RANDOM_SOURCES = {"cpu": "cpu", "nv": "philox", "gpu": "philox"}


def _random_source(text: str) -> None:
    if text.lower() not in _RANDOM_SOURCES:
        raise RequestError(f"a source of noise is CPU, NV or GPU, got {printable(text)!r}")


def _noise(cell: Cell, value: str, values: Sequence[str]) -> Cell:
    return _set("RNG source", "compat.noise")(cell, _RANDOM_SOURCES[value.lower()], values)


def _emphasis(cell: Cell, value: str, values: Sequence[str]) -> Cell:
    return _set("Emphasis", "compat.emphasis")(cell, value.lower(), values)


def _field(name: str, path: str, read: Read, *aliases: str, cost: float = 0.0) -> Axis:
    return Axis(name, read, _set(name, path), aliases, cost)


_AXES = (
    Axis("Nothing", lambda text: [None], lambda cell, value, values: cell),
    _field("Seed", "seed", _seeds),
    _field("Var. seed", "variation_seed", _seeds, "Variation seed", "Subseed"),
    _field("Var. strength", "variation_strength", floats, "Variation strength", "Subseed strength"),
    _field("Steps", "steps", integers),
    _field("Hires steps", "hires.steps", integers),
    _field("CFG Scale", "cfg_scale", floats, "CFG"),
    _field("CFG rescale", "cfg_rescale", floats),
    _field("Image CFG Scale", "image_cfg_scale", floats),
    Axis("Prompt S/R", texts, _search_and_replace, named=False),
    Axis("Prompt order", permutations, _reorder, named=False),
    Axis("Sampler", _names(samplers.parse), _sampler, named=False),
    _field("Hires sampler", "hires.sampler", _names(samplers.parse)),
    Axis("Checkpoint name", _files, _checkpoint, ("Checkpoint", "Model"), 1.0, named=False),
    _field("Negative Guidance minimum sigma", "guidance_low", floats, "NGMS"),
    _field("Sigma Churn", "s_churn", floats, "s_churn"),
    _field("Sigma min", "s_tmin", floats, "Sigma tmin", "s_tmin"),
    _field("Sigma max", "s_tmax", floats, "Sigma tmax", "s_tmax"),
    _field("Sigma noise", "s_noise", floats, "s_noise"),
    _field("Schedule type", "schedule", _names(lambda name: samplers.parse("Euler", name)), "Schedule"),
    _field("Schedule min sigma", "sigma_min", floats),
    _field("Schedule max sigma", "sigma_max", floats),
    _field("Schedule rho", "rho", floats, "rho"),
    _field("Eta", "eta", floats),
    _field("Clip skip", "clip_skip", integers),
    Axis("Denoising", floats, _strength, ("Denoising strength", "Strength")),
    _field("Initial noise multiplier", "edit.noise_multiplier", floats),
    _field("Extra noise", "edit.extra_noise", floats),
    _field("Hires upscaler", "hires.upscaler", texts),
    _field("Cond. Image Mask Weight", "edit.mask_weight", floats),
    Axis("VAE", _files, _vae, cost=0.7),
    Axis("Styles", texts, _styles, ("Style",)),
    _field("UniPC Order", "order", integers, "Order", "Sampler order"),
    _field("Token merging ratio", "token_merging", floats),
    _field("Token merging ratio high-res", "hires.token_merging", floats),
    _field("Refiner switch at", "refiner_switch", floats, "Refiner switch"),
    Axis("RNG source", _names(_random_source), _noise, ("RNG",)),
    Axis("Emphasis", texts, _emphasis),
    Axis("Compatibility", _names(profile), _profile, ("Compat",)),
    Axis("Size", _sizes, _size),
)
AXES: Mapping[str, Axis] = MappingProxyType({axis.name: axis for axis in _AXES})

ABSENT: Mapping[str, str] = MappingProxyType(
    {
        "Beta schedule alpha": "the beta schedule has fixed parameters",
        "Beta schedule beta": "the beta schedule has fixed parameters",
        "Face restore": "there is no restoration of faces",
        "Always discard next-to-last sigma": "the sampler decides that",
        "SGM noise multiplier": "the sampler decides that",
        "Refiner checkpoint": "one refiner serves the whole plot",
        "FP8 mode": "weights are float32, float16 or bfloat16, for the whole plot (--dtype)",
    }
)
"""Axes of the web UI that are missing here, and why."""

_BY_PLAIN_NAME = {plain(name): axis for axis in _AXES for name in (axis.name, *axis.aliases)}


def axis(name: str) -> Axis:
    """An axis by its name in any spelling. Raises RequestError for an unknown one."""
    found = _BY_PLAIN_NAME.get(plain(name))
    if found is not None:
        return found
    for absent, why in ABSENT.items():
        if plain(absent) == plain(name):
            raise RequestError(f"there is no axis {absent!r} here: {why}")
    guesses = get_close_matches(plain(name)[:100], _BY_PLAIN_NAME, n=3, cutoff=0.5)
    names = list(dict.fromkeys(_BY_PLAIN_NAME[guess].name for guess in guesses))
    hint = f"did you mean {', '.join(names)}?" if names else f"such as {', '.join(list(AXES)[1:8])}"
    raise RequestError(f"unknown axis {printable(name, 40)!r}; {hint}")
