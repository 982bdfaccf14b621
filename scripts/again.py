"""--from-picture: draw a picture again, but for what the flags beside it change."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import flags

if TYPE_CHECKING:
    from ldm import Edit, Request

FIELDS = {  # where a flag has another name than its field of `Request` or `Edit`
    "positional": "prompt",
    "negative": "negative_prompt",
    "blur": "mask_blur",
    "invert": "mask_invert",
    "content": "masked_content",
    "soft_settings": "soft",
}
_LEVELS = ("sigma_min", "sigma_max", "rho")
BROUGHT = {  # fields that a new value of another one brings along, as those of the picture may not fit it
    "sampler": ("schedule", "eta", "s_churn", "s_tmin", "s_tmax", "s_noise", "order", *_LEVELS),
    "schedule": _LEVELS,
    "width": ("keep_size",),
    "height": ("keep_size",),
}
REFUSED = (
    *("from_file", "batch_size", "n_iter", "n_rows", "fixed_code"),  # there is one picture
    *("compat", "exact_steps", "style", "styles_file"),
    *("plms", "dpm_solver", "ddim_steps", "ddim_eta"),  # --sampler, --steps and --eta say it clearly
    *("hires", "hires_size", "hires_upscaler", "hires_steps", "hires_strength", "hires_prompt"),
    *("hires_negative", "hires_sampler", "hires_schedule", "hires_cfg_scale", "hires_token_merging"),
)
LOADING = (
    *("vae", "dtype", "precision", "storage", "lowvram", "fast", "prediction", "ema", "vocabulary"),
    *("refiner",),
)


def given(p: flags.Parser, argv: Sequence[str] | None) -> set[str]:
    """The names of the flags on a command line with --from-picture, which `p` has taken already.

    Ends the program in one line if one of them cannot be combined with it.
    """
    silent = copy.deepcopy(p)
    for action in silent._actions:
        action.default = argparse.SUPPRESS
    names = set(vars(silent.parse_args(argv)))
    for name in REFUSED:
        if name in names:
            p.error(
                f"{_flag(name)} does not go with --from-picture, which draws one picture with its settings"
            )
    return names


def check_loading(p: flags.Parser, names: set[str]) -> None:
    """End the program in one line if a flag asks for a model other than the one that the picture names."""
    for name in LOADING:
        if name in names:
            p.error(f"--from-picture loads the model that the picture names; for {_flag(name)} give --ckpt")


def changing(names: set[str], asked: Request) -> Callable[[Request], Request]:
    """What makes of the request in a picture the one that the flags beside --from-picture ask for.

    names: as `given` returns them.
    asked: what all flags make, of which the fields are taken whose flags were given.
    """
    from dataclasses import fields, replace

    from ldm import Edit

    named = {FIELDS.get(name, name) for name in names}
    named |= {other for name in named for other in BROUGHT.get(name, ())}

    def taken(record: Request | Edit) -> dict[str, Any]:
        return {field.name: getattr(record, field.name) for field in fields(record) if field.name in named}

    def change(request: Request) -> Request:
        changes = taken(asked)
        if asked.edit is not None:
            changes["edit"] = replace(request.edit or Edit(), **taken(asked.edit))
        return replace(request, **changes)

    return change


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
