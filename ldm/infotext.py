"""The settings of a picture as one text, laid out as in the AUTOMATIC1111 web UI, which many tools read:

prompt
Negative prompt: what to avoid
Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 42, Size: 512x512, ...
"""

import json
from collections.abc import Iterator

import ldm
from ldm.models import Models
from ldm.request import Request
from ldm.samplers import SAMPLERS
from ldm.spacings import SPACINGS


def infotext(request: Request, models: Models) -> str:
    """The settings of one picture as text: the fields, their order and their quoting are the web UI's.

    request: as settled by `ldm.pipeline.plan`: nothing that decides the picture is None.
    """
    fields = ", ".join(
        name if name == text else f"{name}: {quote(text)}" for name, text in _fields(request, models)
    )
    negative = f"\nNegative prompt: {request.negative_prompt}" if request.negative_prompt else ""
    return f"{request.prompt}{negative}\n{fields}".strip()


def quote(text: str) -> str:
    """A value of a field, as a JSON string where it would otherwise run into the next field."""
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ",:\n") else text


def _fields(request: Request, models: Models) -> Iterator[tuple[str, str]]:
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
        yield "Model", models.name
    if request.clip_skip is not None and request.clip_skip > 1:
        yield "Clip skip", str(request.clip_skip)
    yield "RNG", "CPU"
    if request.cfg_rescale:
        yield "CFG rescale", _number(request.cfg_rescale)

    defaults = SAMPLERS[request.sampler].options
    names = {
        "eta": "Eta DDIM" if request.sampler == "DDIM" else "Eta",
        "s_churn": "Sigma churn",
        "s_tmin": "Sigma tmin",
        "s_tmax": "Sigma tmax",
        "s_noise": "Sigma noise",
        "order": "UniPC order" if request.sampler == "UniPC" else "Sampler order",
    }
    for option, value in request.sampler_options().items():
        if value != defaults.get(option):
            yield names[option], _number(value)
    overrides = {
        "Schedule max sigma": request.sigma_max,
        "Schedule min sigma": request.sigma_min,
        "Schedule rho": request.rho,
    }
    for name, value in overrides.items():
        if value is not None:
            yield name, _number(value)
    yield "Version", f"ldm {ldm.__version__}"


def _number(value: float) -> str:
    """7.0 -> "7", 6.5 -> "6.5": the shortest text that reads back as the same number."""
    return repr(value).removesuffix(".0")
