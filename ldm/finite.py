"""Never a black picture: a network that gives NaN or infinity is found out, tried again in float32, or named.

In float16 numbers end at 65504, and some networks go beyond. Each result is looked at where it leaves its
network for good (the end of a run, a decoded picture, an encoded prompt): at every step, a GPU would have to
wait for the answer.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from ldm import offload
from ldm.errors import NotFiniteError
from ldm.models import Models
from ldm.storage import computed_with

UNET, VAE, TEXT = "the UNet", "the autoencoder (VAE)", "the text encoder"

logger = logging.getLogger(__name__)


def finite(x: Tensor, part: str) -> Tensor:
    """x, as it is. Raises NotFiniteError with the name of the part that made it for NaN or infinity."""
    if torch.isfinite(x).all():
        return x
    raise NotFiniteError(
        f"{part} gave NaN or infinity, so there is no picture; "
        "try usual settings, or another file: its weights may be damaged"
    )


AutoencoderT = TypeVar("AutoencoderT", bound=nn.Module)


def with_autoencoder(vae: AutoencoderT, work: Callable[[AutoencoderT, Tensor], Tensor], x: Tensor) -> Tensor:
    """What an autoencoder makes of x, float32 and finite; in half precision it has a second try in float32.

    work: calls it, with x in its dtype. Raises NotFiniteError.
    """
    dtype = next(vae.parameters()).dtype
    result = work(vae, x.to(dtype)).float()
    if dtype != torch.float32 and not torch.isfinite(result).all():
        logger.warning(f"{VAE} gave NaN or infinity in half precision; it is repeated in float32")
        result = work(copy.deepcopy(vae).float(), x.float())
    return finite(result, VAE)


StepT = TypeVar("StepT")


def second_try(
    models: Models, run: Callable[[Models], Iterator[StepT]], more: Sequence[nn.Module] = ()
) -> Iterator[StepT]:
    """The steps of a run; if it ends in NaN or infinity, then those of the same run in float32.

    more: further networks of the run, beside those of the model. Raises NotFiniteError as `run` does, at once
    if all is float32 already.
    """
    modules = [part for part in (*_networks(models), *more) if isinstance(part, nn.Module)]
    try:
        yield from run(models)
        return
    except NotFiniteError as error:
        if all(p.dtype == torch.float32 for module in modules for p in computed_with(module)):
            raise
        why = str(error).partition(",")[0]
    # Behind the block: there, the error would keep the tensors of the first try alive.
    logger.warning(f"{why} in half precision; the run is repeated in float32")
    offload.leave(*modules)
    with _in_float32(modules):
        yield from run(_computing_in_float32(models))


def _networks(models: Models) -> Iterable[object]:
    refiner = () if models.refiner is None else _networks(models.refiner)
    return (models.denoiser.network, *models.text, *refiner)


def _computing_in_float32(models: Models) -> Models:
    refiner = models.refiner and _computing_in_float32(models.refiner)
    return replace(models, denoiser=replace(models.denoiser, dtype=torch.float32), refiner=refiner)


@contextmanager
def _in_float32(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block the weights are float32; then the very same tensors as before."""
    weights = [w for module in modules for w in (*module.parameters(), *module.buffers())]
    before = [(w, w.data) for w in weights if w.is_floating_point()]
    try:
        for w, data in before:
            w.data = data.float()
        yield
    finally:
        for w, data in before:
            w.data = data
