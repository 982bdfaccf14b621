"""Where tools of the field differ in how they make a picture from the same settings, as one record.

Each field is a choice that changes pictures. Our defaults are what we think right; the profiles are what
other programs do unless they are told otherwise, so that their pictures can be made again.
docs/compatibility.md has the table and the reasons.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Literal, get_args, get_origin, get_type_hints

from ldm.errors import RequestError

NoiseSource = Literal["cpu", "philox"]
Emphasis = Literal["original", "no norm", "comfyui", "ignore", "none"]
DdimLevels = Literal["exact", "compvis", "webui"]
StrengthRule = Literal["webui", "diffusers", "exact"]


@dataclass(frozen=True, kw_only=True)
class Compatibility:
    """Every choice that differs between tools. Raises RequestError for a value that none of them has."""

    # Where noise comes from: PyTorch's CPU generator, or that of NVIDIA cards (`ldm.philox`).
    noise: NoiseSource = "cpu"
    # How weights in a prompt act on its encoding (`ldm.text.emphasis`).
    emphasis: Emphasis = "original"
    # Prompt editing: the first entry stays for one step more than it says.
    late_first_edit: bool = False
    # Prompt editing: `when` is a share below 1 and else a number of steps, whatever its decimal point.
    old_edit_times: bool = False
    # SDXL: an empty negative prompt is zeros, not the encoding of an empty text.
    zero_empty_negative: bool = True
    # Karras schedules run from sigma 10 to 0.1 instead of over the model's own range.
    old_karras_range: bool = False
    # Which training steps DDIM and PLMS visit, and where they end (`ldm.spacings.ddim_original`).
    ddim_levels: DdimLevels = "exact"
    # How many steps of a schedule image to image runs at a strength (`ldm.schedules.part_of_run`).
    strength: StrengthRule = "webui"
    # Cut the fraction of a colour level off instead of rounding to the nearest.
    truncate_8bit: bool = False

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            choices = get_args(kind) if get_origin(kind) is Literal else (True, False)
            if value not in choices:
                raise RequestError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")

    def differences(self) -> dict[str, str | bool]:
        """The choices that are not our default."""
        chosen = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in chosen.items() if value != getattr(DEFAULT, name)}


DEFAULT = Compatibility()
PROFILES: Mapping[str, Compatibility] = MappingProxyType(
    {
        "ldm": DEFAULT,
        "a1111": Compatibility(noise="philox", late_first_edit=True, ddim_levels="webui", truncate_8bit=True),
        "comfyui": Compatibility(
            emphasis="comfyui", zero_empty_negative=False, strength="exact", truncate_8bit=True
        ),
        "diffusers": Compatibility(emphasis="none", ddim_levels="compvis", strength="diffusers"),
        "compvis": Compatibility(
            noise="philox", emphasis="none", ddim_levels="compvis", strength="diffusers", truncate_8bit=True
        ),
    }
)


def profile(name: str) -> Compatibility:
    """A profile by its name. Raises RequestError for an unknown one."""
    if name not in PROFILES:
        raise RequestError(f"unknown profile {name!r}; choose from {', '.join(PROFILES)}")
    return PROFILES[name]
