"""The settings of a picture as one text, laid out as in the AUTOMATIC1111 web UI, which many tools read:

    prompt
    Negative prompt: what to avoid
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 42, Size: 512x512, ...

`infotext` writes it. `parse` takes it apart without judging; `ldm.interpret` makes a request of it. The text
may come from anywhere: reading it takes time in proportion to its length, and nothing in it is an error.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType

import ldm
from ldm import edit_text, stepdown
from ldm.compat import DEFAULT
from ldm.edit_text import number
from ldm.families import ClipPart, Concat
from ldm.models import Models
from ldm.request import Request
from ldm.samplers import SAMPLERS
from ldm.spacings import SPACINGS
from ldm.storage import held_in

PLAIN = Request()  # with every default

SETTINGS: Mapping[str, tuple[str, type[int] | type[float]]] = MappingProxyType(
    {
        "Steps": ("steps", int),
        "CFG scale": ("cfg_scale", float),
        "Image CFG scale": ("image_cfg_scale", float),
        "Seed": ("seed", int),
        "Variation seed": ("variation_seed", int),
        "Variation seed strength": ("variation_strength", float),
        "Clip skip": ("clip_skip", int),
        "ENSD": ("ensd", int),
        "CFG rescale": ("cfg_rescale", float),
        "Eta DDIM": ("eta", float),
        "Eta": ("eta", float),
        "Sigma churn": ("s_churn", float),
        "Sigma tmin": ("s_tmin", float),
        "Sigma tmax": ("s_tmax", float),
        "Sigma noise": ("s_noise", float),
        "UniPC order": ("order", int),
        "Sampler order": ("order", int),
        "Schedule max sigma": ("sigma_max", float),
        "Schedule min sigma": ("sigma_min", float),
        "Schedule rho": ("rho", float),
        "Refiner switch at": ("refiner_switch", float),
        "NGMS": ("guidance_low", float),
        "Guidance max sigma": ("guidance_high", float),
        "Skip Early CFG": ("guidance_skip", float),
        "Feature reuse": ("reuse", int),
        "Token merging ratio": ("token_merging", float),
        "Token merging downsample": ("token_merging_downsample", int),
    }
)
"""Fields that are numbers: (the field of `Request`, its type)."""

OTHER_SETTINGS = (
    "NGMS all steps",
    *("Sampler", "Schedule type", "Size", "Seed resize from", "Tiling", "RNG", "Emphasis", "Compatibility"),
    *edit_text.NAMES,
)
NGMS_ALL = "NGMS all steps"  # without it, the web UI leaves out guidance in every other step only
EXACT = {"prompt": "Exact prompt", "negative_prompt": "Exact negative prompt"}

ABOUT_FILES = (
    *("Model hash", "Model", "VAE hash", "VAE"),
    *("Lora hashes", "TI hashes", "Hypernet hashes", "Hashes"),
    *("Refiner", "Init image hash", "Mask hash", "Depth hash"),
)
ABOUT_MODELS = ("Prediction", "EMA", "Precision", "Storage", "Memory")
REMARKS = (
    *("Version", "User", "Batch size", "Batch pos", "Created Date"),
    *("Civitai resources", "Civitai metadata", "Template", "Negative Template"),
)
"""Fields that decide nothing, or nothing that a `Request` could: `ldm.reproduce` sees to the files."""

ELSEWHERE = (
    "Face restoration",
    "First pass size",
    "Pad conds",
    "Discard penultimate sigma",
)
"""Fields of the web UI that are not done here, as far as they are needed to recognise its text."""

_KNOWN = {
    name.lower(): name
    for name in (
        *SETTINGS,
        *OTHER_SETTINGS,
        *EXACT.values(),
        *ABOUT_FILES,
        *ABOUT_MODELS,
        *REMARKS,
        *ELSEWHERE,
    )
}


def infotext(
    request: Request,
    models: Models,
    hashes: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
    inputs: Mapping[str, str] = MappingProxyType({}),
    *,
    place: int = 0,
) -> str:
    """The settings of one picture as text: the fields, their order and their quoting are the web UI's.

    request: as settled by `ldm.pipeline.plan`: nothing that decides the picture is None.
    hashes: of further files that took part, {"Lora hashes": {name: hash}, "TI hashes": ...}.
    inputs: fields on the given pictures, see `ldm.inputs.Inputs.fields`.
    place: of the picture in its batch. It is written, as the last bits of a network's output depend on the
        size of the batch: only the whole batch makes exactly the same picture again.

    A prompt that the layout cannot hold, such as one with a line "Negative prompt:" in it, is written a
    second time as a field in quotes, so that every request reads back as it was.
    """
    fields = [*_fields(request.single(place), models, hashes, inputs)]
    if request.batch_size > 1:
        fields[-1:-1] = [("Batch size", str(request.batch_size)), ("Batch pos", str(place))]
    plain = parse(_layout(request.prompt, request.negative_prompt, fields))
    for setting, name in EXACT.items():
        wanted = getattr(request, setting)
        if getattr(plain, setting) != wanted:
            fields.insert(-1, (name, json.dumps(wanted)))
    return _layout(request.prompt, request.negative_prompt, fields)


def _layout(prompt: str, negative_prompt: str, fields: Sequence[tuple[str, str]]) -> str:
    negative = f"\nNegative prompt: {negative_prompt}" if negative_prompt else ""
    listed = ", ".join(name if name == text else f"{name}: {text}" for name, text in fields)
    return f"{prompt}{negative}\n{listed}".strip()


def quote(text: str) -> str:
    """A value of a field, as a JSON string where it would otherwise not read back."""
    plain = text == text.strip() and not text.startswith('"') and not any(c in text for c in ",:\n")
    return text if plain else json.dumps(text, ensure_ascii=False)


def _fields(
    request: Request,
    models: Models,
    hashes: Mapping[str, Mapping[str, str]],
    inputs: Mapping[str, str],
) -> Iterator[tuple[str, str]]:
    """(name, quoted value) in the order of the web UI; what only we have comes after, the version last."""
    assert request.sampler is not None
    assert request.schedule is not None
    assert request.cfg_scale is not None
    yield "Steps", str(request.steps)
    yield "Sampler", request.sampler
    yield "Schedule type", SPACINGS[request.schedule].label
    yield "CFG scale", number(request.cfg_scale)
    if models.family.concat is Concat.PICTURE or request.image_cfg_scale != PLAIN.image_cfg_scale:
        yield "Image CFG scale", number(request.image_cfg_scale)
    yield "Seed", str(request.seed)
    yield "Size", f"{request.width}x{request.height}"
    if models.hash is not None:
        yield "Model hash", models.hash
        yield "Model", quote(models.name)
    if models.vae_hash is not None and models.vae_path is not None:
        yield "VAE hash", models.vae_hash
        yield "VAE", quote(models.vae_path.name)
    if request.variation_strength:
        yield "Variation seed", str(request.variation_seed)
        yield "Variation seed strength", number(request.variation_strength)
    if request.seed_resize_from:
        yield "Seed resize from", "{}x{}".format(*request.seed_resize_from)
    further = [*edit_text.written(request.edit, request.hires)]  # the strength is the first of them
    yield from further[:1]
    usual_skips = {part.skip for part in models.family.parts if isinstance(part, ClipPart)}
    if request.clip_skip is not None and (request.clip_skip > 1 or usual_skips != {1}):
        yield "Clip skip", str(request.clip_skip)
    if request.ensd:
        yield "ENSD", str(request.ensd)
    yield from _changed(request, "Token merging ratio", "Token merging downsample")
    for name, text in inputs.items():
        yield name, quote(text)
    yield "RNG", "NV" if request.compat.noise == "philox" else "CPU"
    if request.tiling:
        yield "Tiling", "True"
    yield from ((name, quote(text)) for name, text in further[1:])
    if models.refiner is not None:
        yield "Refiner", quote(f"{models.refiner.name} [{models.refiner.hash}]")
    if models.refiner is not None or request.refiner_switch != PLAIN.refiner_switch:
        yield "Refiner switch at", number(request.refiner_switch)
    for name, files in hashes.items():
        if files:
            yield name, quote(", ".join(f"{file}: {short}" for file, short in files.items()))
    yield from _options(request)
    for least in _changed(request, "NGMS"):
        yield from (least, (NGMS_ALL, "True"))
    yield from _changed(request, "Guidance max sigma", "Skip Early CFG", "Feature reuse")
    if request.compat.emphasis != DEFAULT.emphasis:
        yield "Emphasis", request.compat.emphasis.capitalize()
    if request.cfg_rescale:
        yield "CFG rescale", number(request.cfg_rescale)
    if models.denoiser.prediction is not models.family.prediction:
        yield "Prediction", models.denoiser.prediction.value
    if models.ema:
        yield "EMA", "True"
    if models.denoiser.dtype.itemsize < 4:
        yield "Precision", str(models.denoiser.dtype).removeprefix("torch.")
    if (held := held_in(models.denoiser.network)) is not None:
        yield "Storage", str(held).removeprefix("torch.")
    if ways := stepdown.notes(*models.all_parts):
        yield "Memory", quote("; ".join(ways))
    choices = {k: v for k, v in request.compat.differences().items() if k not in ("noise", "emphasis")}
    if choices:
        yield "Compatibility", quote(", ".join(f"{name}: {choice}" for name, choice in choices.items()))
    yield "Version", f"ldm {ldm.__version__}"


def _options(request: Request) -> Iterator[tuple[str, str]]:
    """What was chosen of the sampler and of the schedule, where it is not the default."""
    assert request.sampler is not None
    given = request.sampler_options() | {
        name: value
        for name in ("sigma_max", "sigma_min", "rho")
        if (value := getattr(request, name)) is not None
    }
    defaults = SAMPLERS[request.sampler].options
    elsewhere = {"Eta" if request.sampler == "DDIM" else "Eta DDIM"}
    elsewhere.add("Sampler order" if request.sampler == "UniPC" else "UniPC order")
    for name, (setting, _) in SETTINGS.items():
        if setting in given and given[setting] != defaults.get(setting) and name not in elsewhere:
            yield name, number(given[setting])


def _changed(request: Request, *names: str) -> Iterator[tuple[str, str]]:
    """Those of these fields that are not the default."""
    for name in names:
        setting, _ = SETTINGS[name]
        if (value := getattr(request, setting)) != getattr(PLAIN, setting):
            yield name, number(value)


@dataclass(frozen=True)
class Infotext:
    """A text of settings, taken apart."""

    prompt: str
    negative_prompt: str
    fields: Mapping[str, str]  # "Steps" -> "20", without quotes, in the order of the text

    @property
    def ours(self) -> bool:
        """Whether this library wrote it."""
        return self.fields.get("Version", "").startswith("ldm ")

    def hashes(self, name: str) -> dict[str, str]:
        """A field that lists files, such as "Lora hashes": their names and hashes."""
        pairs = (entry.rpartition(": ") for entry in self.fields.get(name, "").split(", "))
        return {file.strip(): short.strip() for file, colon, short in pairs if colon}


_MAX_FIELDS = 2000  # no text of settings has that many; what comes after them is left unread
_NAME = re.compile(r"(?:^|[^\w \-/])[ \-/]*(\w[\w \-/]+)$")
_NEGATIVE = re.compile(r"\nNegative [pP]rompt:[^\S\n]*")
_JSON = json.JSONDecoder(strict=False)


def parse(text: str) -> Infotext:
    """Take a text of settings apart as the web UI does: any of its versions, and tools that write like it.

    The fields are in the last line, if it holds at least three. Beyond the web UI, this reads the form that
    people paste into notes, with the fields on several lines. All else is prompt; lines lose the white space
    around them. Takes time in proportion to the length, and raises nothing.
    """
    lines = text.strip().split("\n")
    start = len(lines) - 1
    found = _named_values(lines[-1])
    if len(found) < 3:
        start, found = _trailing_fields(lines)
    named = [(_KNOWN.get(name.lower(), name), value) for name, value in found]
    fields = {name: value for name, value in named if value or name in EXACT.values()}

    prompt, *negative = _NEGATIVE.split("\n" + "\n".join(map(str.strip, lines[:start])), maxsplit=1)
    negative_prompt = _NEGATIVE.sub("\n", "".join(negative))
    return Infotext(
        fields.pop(EXACT["prompt"], prompt.lstrip("\n")),
        fields.pop(EXACT["negative_prompt"], negative_prompt.lstrip("\n")),
        MappingProxyType(fields),
    )


def _named_values(line: str) -> list[tuple[str, str]]:
    """All "name: value" of a line. A name has at least two letters, and at most a hundred."""
    found, position = [], 0
    for _ in range(_MAX_FIELDS):
        if (colon := line.find(":", position)) < 0:
            break
        name = _NAME.search(line[max(position, colon - 100) : colon])
        position = colon + 1
        if name:
            value, position = _value(line, position)
            found.append((name[1], value))
    return found


def _value(line: str, start: int) -> tuple[str, int]:
    """The value that starts here, and where it ends: a JSON string, or all up to the next comma."""
    quotation = line.find('"', start, start + 2)
    if quotation >= 0 and not line[start:quotation].strip():
        with suppress(ValueError):
            value, end = _JSON.raw_decode(line, quotation)
            if line[end : end + 1] in ("", ","):
                return value, end
    end = line.find(",", start)
    end = len(line) if end < 0 else end
    return line[start:end].strip(), end


def _trailing_fields(lines: Sequence[str]) -> tuple[int, list[tuple[str, str]]]:
    """Fields on several lines: where they start and what they are; none if there are fewer than three."""
    start, stop = len(lines), max(len(lines) - _MAX_FIELDS, 0)
    while start > stop and (not lines[start - 1].strip() or _starts_with_field(lines[start - 1])):
        start -= 1
    found = _named_values(",".join(lines[start:]))
    return (start, found) if len(found) >= 3 else (len(lines), [])


def _starts_with_field(line: str) -> bool:
    return line.partition(":")[0].strip().lower() in _KNOWN
