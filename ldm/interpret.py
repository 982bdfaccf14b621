"""What a text of settings asks for: a request, and a line for each field that cannot be fulfilled."""

import re
from dataclasses import replace
from typing import Any

from ldm import edit_text
from ldm.compat import DEFAULT, PROFILES, Compatibility
from ldm.denoise import Prediction
from ldm.errors import LdmError, RequestError, SamplerError
from ldm.formats.mapped import printable
from ldm.infotext import ABOUT_FILES, ABOUT_MODELS, NGMS_ALL, REMARKS, SETTINGS, Infotext
from ldm.request import Request
from ldm.samplers import SAMPLERS
from ldm.samplers import parse as parse_sampler
from ldm.spacings import spacing_name


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

    def note(name: str, value: str) -> None:
        notes.append(printable(f"{name}: {value[:60]} is left out: it means nothing here", 200))

    try:
        made = replace(made, **edit_text.read(info.fields, note))  # pyright: ignore[reportArgumentType]
    except LdmError as error:
        notes.append(printable(f"{edit_text.STRENGTH} and what belongs to it are left out: {error}", 200))
    made = _with_usable_options(made, notes)
    if _older(info, (1, 8, 0)):
        notes.append(
            "Version: before 1.8, the noise schedule was rounded to half precision; details may differ"
        )
    return made, notes


def _setting(name: str, value: str, made: Request, info: Infotext) -> dict[str, Any]:
    """What one field sets. Raises ValueError, or RequestError with the reason, if it cannot be used."""
    if len(value) > 1000 and name not in (*ABOUT_FILES, *REMARKS):
        raise RequestError("it is too long")
    match name:
        case "NGMS" if info.fields.get(NGMS_ALL) != "True":
            raise RequestError("this is done here in all steps, not in every other one")
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
        case "Tiling":
            return {"tiling": value == "True"}
        case "Emphasis":
            return {"compat": replace(made.compat, emphasis=value.lower())}
        case "Version" if _older(info, (1, 6, 0)):
            return {"compat": replace(made.compat, old_edit_times=True)}
        case "Compatibility":
            return {"compat": _compatibility(value, made.compat)}
        case _ if name in (*ABOUT_FILES, *ABOUT_MODELS, *REMARKS, *edit_text.NAMES, NGMS_ALL):
            return {}
        case _ if info.ours and name.startswith("ControlNet "):
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


def _older(info: Infotext, than: tuple[int, int, int]) -> bool:
    """Whether a version of the web UI from before `than` wrote the text."""
    version = re.search(r"v(\d+)\.(\d+)\.(\d+)", info.fields.get("Version", ""))
    return version is not None and tuple(int(part[:9]) for part in version.groups()) < than


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
