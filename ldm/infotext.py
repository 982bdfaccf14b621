"""The settings of a picture as one text, laid out as in the AUTOMATIC1111 web UI, which many tools read:

    prompt
    Negative prompt: what to avoid
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 42, Size: 512x512, ...

`infotext` writes it. `parse` takes it apart without judging, `request` makes settings of it and says what it
could not use. The text may come from anywhere: reading it takes time in proportion to its length, and nothing
in it is an error.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import ldm
from ldm.compat import DEFAULT, PROFILES, Compatibility
from ldm.denoise import Prediction
from ldm.errors import LdmError, RequestError, SamplerError
from ldm.families import ClipPart
from ldm.formats.mapped import printable
from ldm.models import Models
from ldm.request import Request
from ldm.samplers import SAMPLERS
from ldm.samplers import parse as parse_sampler
from ldm.spacings import SPACINGS, spacing_name

SETTINGS: Mapping[str, tuple[str, type[int] | type[float]]] = MappingProxyType(
    {
        "Steps": ("steps", int),
        "CFG scale": ("cfg_scale", float),
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
    }
)
"""Fields that are numbers: (the field of `Request`, its type)."""

OTHER_SETTINGS = ("Sampler", "Schedule type", "Size", "Seed resize from", "RNG", "Emphasis", "Compatibility")
EXACT = {"prompt": "Exact prompt", "negative_prompt": "Exact negative prompt"}

ABOUT_FILES = (
    *("Model hash", "Model", "VAE hash", "VAE"),
    *("Lora hashes", "TI hashes", "Hypernet hashes", "Hashes"),
)
ABOUT_MODELS = ("Prediction", "EMA", "Precision")
REMARKS = (
    *("Version", "User", "Batch size", "Batch pos", "Created Date"),
    *("Civitai resources", "Civitai metadata", "Template", "Negative Template"),
)
"""Fields that decide nothing, or nothing that a `Request` could: `ldm.replay` sees to the files."""

ELSEWHERE = (
    *("Denoising strength", "Hires upscale", "Hires resize", "Hires steps", "Hires upscaler"),
    *("Face restoration", "Tiling", "Conditional mask weight", "Mask blur", "Token merging ratio"),
    *("Refiner", "Refiner switch at", "Pad conds", "Discard penultimate sigma"),
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
    *,
    place: int = 0,
) -> str:
    """The settings of one picture as text: the fields, their order and their quoting are the web UI's.

    request: as settled by `ldm.pipeline.plan`: nothing that decides the picture is None.
    hashes: of further files that took part, {"Lora hashes": {name: hash}, "TI hashes": ...}.
    place: of the picture in its batch. It is written, as the last bits of a network's output depend on the
        size of the batch: only the whole batch makes exactly the same picture again.

    A prompt that the layout cannot hold, such as one with a line "Negative prompt:" in it, is written a
    second time as a field in quotes, so that every request reads back as it was.
    """
    fields = [*_fields(request.single(place), models, hashes)]
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
    request: Request, models: Models, hashes: Mapping[str, Mapping[str, str]]
) -> Iterator[tuple[str, str]]:
    """(name, quoted value) in the order of the web UI; what only we have comes after, the version last."""
    assert request.sampler is not None
    assert request.schedule is not None
    assert request.cfg_scale is not None
    yield "Steps", str(request.steps)
    yield "Sampler", request.sampler
    yield "Schedule type", SPACINGS[request.schedule].label
    yield "CFG scale", _number(request.cfg_scale)
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
        yield "Variation seed strength", _number(request.variation_strength)
    if request.seed_resize_from:
        yield "Seed resize from", "{}x{}".format(*request.seed_resize_from)
    usual_skips = {part.skip for part in models.family.parts if isinstance(part, ClipPart)}
    if request.clip_skip is not None and (request.clip_skip > 1 or usual_skips != {1}):
        yield "Clip skip", str(request.clip_skip)
    if request.ensd:
        yield "ENSD", str(request.ensd)
    yield "RNG", "NV" if request.compat.noise == "philox" else "CPU"
    for name, files in hashes.items():
        if files:
            yield name, quote(", ".join(f"{file}: {short}" for file, short in files.items()))
    yield from _options(request)

    if request.compat.emphasis != DEFAULT.emphasis:
        yield "Emphasis", request.compat.emphasis.capitalize()
    if request.cfg_rescale:
        yield "CFG rescale", _number(request.cfg_rescale)
    if models.denoiser.prediction is not models.family.prediction:
        yield "Prediction", models.denoiser.prediction.value
    if models.ema:
        yield "EMA", "True"
    if models.denoiser.dtype.itemsize < 4:
        yield "Precision", str(models.denoiser.dtype).removeprefix("torch.")
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
            yield name, _number(given[setting])


def _number(value: float) -> str:
    """7.0 -> "7", 6.5 -> "6.5": the shortest text that reads back as the same number."""
    return repr(value).removesuffix(".0")


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


def request(info: Infotext) -> tuple[Request, list[str]]:
    """The settings as a request for one picture, and one line for each field that cannot be reproduced.

    What the text leaves out is what its writer would have done: our defaults in a text of ours, else those of
    the web UI (`ldm.compat`), whose noise came from the graphics card unless it says something else.
    """
    notes: list[str] = []
    made = Request(
        prompt=info.prompt,
        negative_prompt=info.negative_prompt,
        compat=DEFAULT if info.ours else PROFILES["a1111"],
    )
    for name, value in info.fields.items():
        try:
            if settings := _setting(name, value, made, info):
                made = replace(made, **settings)
        except (LdmError, ValueError) as error:
            reason = str(error) if isinstance(error, LdmError) else "that is no number"
            notes.append(printable(f"{name}: {value[:60]} is left out: {reason}", 200))
    made = _with_usable_options(made, notes)
    return made, notes + _changes_of_versions(info)


def _setting(name: str, value: str, made: Request, info: Infotext) -> dict[str, Any]:
    """What one field sets. Raises ValueError, or RequestError with the reason, if it cannot be used."""
    if len(value) > 1000 and name not in (*ABOUT_FILES, *REMARKS):
        raise RequestError("it is too long")
    match name:
        case _ if name in SETTINGS:
            setting, kind = SETTINGS[name]
            return {setting: kind(value)}
        case "Sampler":
            return _sampler(value, info)
        case "Schedule type":
            return {} if value.lower() == "automatic" else {"schedule": spacing_name(value)}
        case "Size" | "Seed resize from":
            width, _, height = value.lower().replace("×", "x").partition("x")
            size = int(width), int(height)
            return {"seed_resize_from": size} if name != "Size" else {"width": size[0], "height": size[1]}
        case "RNG":
            noise = "cpu" if value.upper() == "CPU" else "philox"
            return {"compat": replace(made.compat, noise=noise)}
        case "Emphasis":
            return {"compat": replace(made.compat, emphasis=value.lower())}
        case "Compatibility":
            return {"compat": _compatibility(value, made.compat)}
        case _ if name in ABOUT_FILES or name in ABOUT_MODELS or name in REMARKS:
            return {}
        case _:
            raise RequestError("this is not done here")


def _sampler(name: str, info: Infotext) -> dict[str, Any]:
    """The sampler, and the schedule where its name decides it.

    Until version 1.8 the web UI had a name for each pair, and "DPM++ 2M" without a second name was the
    uniform schedule. Since then the schedule is a field of its own.
    """
    try:
        sampler, spacing = parse_sampler(name)
    except SamplerError:
        raise RequestError("the sampler is unknown; the model's own takes its place") from None
    schedule = info.fields.get("Schedule type")
    if info.ours or (schedule and schedule.lower() != "automatic"):
        return {"sampler": sampler.name}
    try:
        parse_sampler(f"{name} Uniform")
    except SamplerError:  # there is the name of a schedule already
        return {"sampler": sampler.name, "schedule": spacing}
    old_pair = sampler.name.startswith("DPM") and sampler.spacing in ("karras", "exponential")
    return {"sampler": sampler.name, "schedule": "uniform" if old_pair and not schedule else None}


def _compatibility(text: str, base: Compatibility) -> Compatibility:
    choices: dict[str, Any] = {}
    for entry in text.split(", "):
        name, _, value = entry.partition(": ")
        choices[name] = {"True": True, "False": False}.get(value, value)
    try:
        return replace(base, **choices)
    except TypeError:  # a name that does not exist: from a later version
        raise RequestError("one of these choices is unknown") from None


def _with_usable_options(made: Request, notes: list[str]) -> Request:
    """Without the options that its sampler does not have; the web UI writes some of them all the same."""
    known = SAMPLERS[made.sampler].options if made.sampler else {}
    for option in made.sampler_options():
        if option not in known:
            notes.append(f"{option} is left out: {made.sampler or 'the sampler'} does not take it")
            made = replace(made, **{option: None})
    return made


def _changes_of_versions(info: Infotext) -> list[str]:
    """What old versions of the web UI did otherwise, where it matters to this text."""
    version = re.search(r"v(\d+)\.(\d+)\.(\d+)", info.fields.get("Version", ""))
    if version is None:
        return []
    number = tuple(int(part[:9]) for part in version.groups())
    notes = []
    if number < (1, 6, 0) and "[" in info.prompt:
        notes.append("Version: before 1.6, whole numbers in [from:to:1] meant steps and 1.0 did, too")
    if number < (1, 8, 0):
        notes.append(
            "Version: before 1.8, the noise schedule was rounded to half precision; details may differ"
        )
    return notes


def batch(info: Infotext, single: Request) -> tuple[Request, int]:
    """The request for the whole batch that a picture of ours is from, and its place there."""
    try:
        size, place = (int(info.fields[name][:9]) for name in ("Batch size", "Batch pos"))
        first = single.single(-place)
        return replace(first, batch_size=size), min(place, size - 1)
    except (KeyError, ValueError):  # not from a batch
        return single, 0


def prediction(info: Infotext) -> Prediction | None:
    """What the network was said to predict; None: what is usual for its family."""
    return Prediction(info.fields["Prediction"]) if info.fields.get("Prediction") in ("eps", "v") else None
