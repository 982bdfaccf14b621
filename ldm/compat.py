"""Where tools of the field differ in how they make a picture from the same settings, as one record.

Each field is a choice that changes pictures. Our defaults are what we think right; the profiles are what
other programs do, so that their pictures can be made again. docs/compatibility.md tells the reasons.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

NoiseSource = Literal["cpu", "philox"]
"""cpu: PyTorch's CPU generator. philox: NVIDIA's, see `ldm.philox`."""

Emphasis = Literal["original", "no norm", "comfyui", "ignore", "none"]
"""How weights in a prompt act on its encoding, see `ldm.text.emphasis`."""


@dataclass(frozen=True, kw_only=True)
class Compatibility:
    """Every choice that differs between tools."""

    noise: NoiseSource = "cpu"
    emphasis: Emphasis = "original"
    zero_empty_negative: bool = True  # SDXL: an empty negative prompt is zeros, not the encoded ""
    old_karras_range: bool = False  # Karras schedules run from sigma 10 to 0.1 instead of the model's range
    truncate_8bit: bool = False  # cut the fraction of a colour level off instead of rounding


DEFAULT = Compatibility()
PROFILES: Mapping[str, Compatibility] = MappingProxyType({"ldm": DEFAULT})
