"""The fields of `Edit` and `Hires` in a text of settings, under the web UI's names: written, and read.

Written is what differs from the defaults; read is whatever is there.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ldm.edit import Edit, Hires
from ldm.soft_inpainting import Soft

STRENGTH = "Denoising strength"  # of image to image, or of the second pass
SOFT = "Soft inpainting enabled"


def number(value: float) -> str:
    """7.0 -> "7", 6.5 -> "6.5": the shortest text that reads back as the same number."""
    return repr(value).removesuffix(".0")


@dataclass(frozen=True)
class Field:
    """A field of a record as text. `read` raises ValueError or KeyError for a text that means nothing."""

    name: str
    attribute: str
    write: Callable[[Any], str]
    read: Callable[[str], Any]


def _words(name: str, attribute: str, words: Mapping[Any, str]) -> Field:
    """A choice: how each value is written. Capitals do not matter when it is read."""
    meanings = {text.lower(): value for value, text in words.items()}
    return Field(name, attribute, words.__getitem__, lambda text: meanings[text.lower()])


def _float(name: str, attribute: str) -> Field:
    return Field(name, attribute, number, float)


_RESIZE = {
    "resize": "Just resize",
    "crop": "Crop and resize",
    "fill": "Resize and fill",
    "latent": "Just resize (latent upscale)",
}
_CONTENT = {content: content for content in ("fill", "original", "latent noise", "latent nothing")}

EDIT = (
    _float("Conditional mask weight", "mask_weight"),
    _words("Resize mode", "resize", _RESIZE),
    _float("Noise multiplier", "noise_multiplier"),
    _float("Extra noise", "extra_noise"),
    _words("Color correction", "color_correction", {True: "True", False: "False"}),
    Field("Mask blur", "mask_blur", str, int),
    _words("Mask mode", "mask_invert", {True: "Inpaint not masked", False: "Inpaint masked"}),
    _words("Inpaint area", "only_masked", {True: "Only masked", False: "Whole picture"}),
    _words("Keep size", "keep_size", {True: "True", False: "False"}),
    Field("Masked area padding", "padding", str, int),
    _words("Masked content", "masked_content", _CONTENT),
)
_SOFT = tuple(
    _float(f"Soft inpainting {name}", attribute)
    for name, attribute in (
        ("schedule bias", "schedule_bias"),
        ("preservation strength", "preservation"),
        ("transition contrast boost", "contrast_boost"),
        ("mask influence", "mask_influence"),
        ("difference threshold", "difference_threshold"),
        ("difference contrast", "difference_contrast"),
    )
)
HIRES = (
    Field("Hires prompt", "prompt", str, str),
    Field("Hires negative prompt", "negative_prompt", str, str),
    Field("Hires CFG Scale", "cfg_scale", number, float),
    _float("Hires upscale", "scale"),
    Field("Hires steps", "steps", str, int),
    Field("Hires upscaler", "upscaler", str, str),
    Field("Hires sampler", "sampler", str, str),
    Field("Hires schedule type", "schedule", str, str),
    _float("Token merging ratio hr", "token_merging"),
)
RESIZE = "Hires resize"

NAMES = (STRENGTH, SOFT, RESIZE, *(field.name for field in (*EDIT, *_SOFT, *HIRES)))


def written(edit: Edit | None, hires: Hires | None) -> Iterator[tuple[str, str]]:
    """(name, text) for what differs from the defaults; the texts are not quoted."""
    if edit is not None and edit.strength is not None:
        yield STRENGTH, number(edit.strength)
        yield from _differences(EDIT, edit, Edit())
        if edit.soft is not None:
            yield SOFT, "True"
            yield from _differences(_SOFT, edit.soft, Soft())
    if hires is not None:
        yield STRENGTH, number(hires.strength)
        yield from _differences(HIRES, hires, None)  # None there: as in the first pass
        if hires.width or hires.height:
            yield RESIZE, f"{hires.width or 0}x{hires.height or 0}"


def _differences(table: tuple[Field, ...], record: Any, default: Any) -> Iterator[tuple[str, str]]:
    for field in table:
        value = getattr(record, field.attribute)
        if value != getattr(default, field.attribute, None):
            yield field.name, field.write(value)


def read(found: Mapping[str, str], note: Callable[[str, str], object]) -> dict[str, Edit | Hires]:
    """What the fields of a text ask for: {"edit": Edit}, {"hires": Hires} or nothing.

    note: called with the name and the text of each field that means nothing; it is left out.
    """
    hires = _values(HIRES, found, note)
    if RESIZE in found:
        width, _, height = found[RESIZE].partition("x")
        if width.isdecimal() and height.isdecimal():
            hires |= {"width": int(width) or None, "height": int(height) or None}
        else:
            note(RESIZE, found[RESIZE])
    strength = _values((_float(STRENGTH, "strength"),), found, note)
    if hires:
        return {"hires": Hires(**strength, **hires)}
    edit = _values(EDIT, found, note)
    if found.get(SOFT) == "True":
        edit["soft"] = Soft(**_values(_SOFT, found, note))
    return {"edit": Edit(**strength, **edit)} if strength else {}


def _values(
    table: tuple[Field, ...], found: Mapping[str, str], note: Callable[[str, str], object]
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for field in table:
        if field.name in found:
            try:
                values[field.attribute] = field.read(found[field.name])
            except (ValueError, KeyError):
                note(field.name, found[field.name])
    return values
