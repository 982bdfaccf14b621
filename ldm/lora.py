"""LoRA files and their relatives: read, compare with a model, merge into its weights and take out again.

    with ldm.lora.applied(models, [("style.safetensors", 0.8), ("person.safetensors", 1.0, 0.5)]):
        image = ldm.txt2img(models, request)[0]

The changes are merged into the same tensors, which are restored bit for bit from kept copies: no cost per
step, nothing to compile anew, and only the touched layers are exchanged.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ldm.errors import CheckpointError, RequestError
from ldm.families import FAMILIES
from ldm.formats.mapped import printable
from ldm.lora_deltas import Decomposed, Delta, Full, Hadamard, LowRank
from ldm.lora_file import LoraFile, file_error, read, short_hash
from ldm.lora_names import Place, locate, names, parts
from ldm.models import Models
from ldm.offload import leave

__all__ = ["Coverage", "LoraFile", "Use", "applied", "coverage", "read", "short_hash"]


@dataclass(frozen=True)
class Coverage:
    """How well a file fits a model."""

    matched: tuple[str, ...]  # modules of the file that the model has
    unmatched: tuple[str, ...]  # modules that it lacks, and tensors of no known kind: without effect

    def __str__(self) -> str:
        total = len(self.matched) + len(self.unmatched)
        first = f"; without effect: {printable(', '.join(self.unmatched[:3]))}" if self.unmatched else ""
        return f"{len(self.matched)} of {total} modules matched{first}"


Use = tuple[str | os.PathLike[str] | LoraFile, float] | tuple[str | os.PathLike[str] | LoraFile, float, float]
"""A file, the multiplier for the UNet, and that for the text encoders if it is another."""


def coverage(models: Models, lora: LoraFile) -> Coverage:
    """Which modules of the file the model has.

    Raises CheckpointError, with the reason, if the file was made for another family.
    """
    matched, missing = _match(models, lora, names(models))
    return Coverage(tuple(dict.fromkeys(match.key for match in matched)), (*missing, *lora.unmatched))


@contextmanager
def applied(models: Models, loras: Iterable[Use]) -> Iterator[None]:
    """Within the block, the model's weights are W + sum of multiplier * change, computed in float32.

    Each change is one of the pristine weights W, and half precision rounds once, so that the order of files
    does not matter, to the bit. When the last block that changes a weight ends, also by an exception, the
    weight is W again, to the bit. Blocks may be nested and may end in any order, as abandoned runs do.

    Raises CheckpointError if a file is damaged, was made for another family or does not fit, and RequestError
    for a multiplier that is not finite; then no weight has changed.
    """
    done: list[tuple[nn.Parameter, list[Change]]] = []
    try:
        for weight, changes in _plan(models, loras):
            if weight not in _MERGED:  # first, as the memory for it may be missing
                _MERGED[weight] = Merged(weight.detach().clone(), [])
            done.append((weight, changes))
            _add(weight, changes)
        yield
    finally:
        leave(models.denoiser.network, *models.text)
        for weight, changes in done:
            _remove(weight, changes)


class Change(NamedTuple):
    """What one use of a file does to one weight."""

    file: str
    multiplier: float
    delta: Delta


class Merged(NamedTuple):
    """A weight's own value, and all that is merged into it at the moment."""

    pristine: Tensor
    changes: list[Change]


# Kept beside the models and not in the blocks, since two blocks may overlap and each may end first.
_MERGED: MutableMapping[nn.Parameter, Merged] = WeakIdKeyDictionary()


def _plan(models: Models, loras: Iterable[Use]) -> list[tuple[nn.Parameter, list[Change]]]:
    """Each weight that changes, with its changes. All is checked, and nothing done yet."""
    uses = []
    for lora, unet, *rest in loras:
        text = rest[0] if rest else unet
        if not (math.isfinite(unet) and math.isfinite(text)):
            raise RequestError(f"a LoRA's multiplier must be a finite number, got {unet} and {text}")
        uses.append((lora if isinstance(lora, LoraFile) else read(lora), unet, text))
    if not uses:  # then the network need not be a UNet
        return []
    known, networks = names(models), parts(models)
    leave(*networks.values())
    plan: dict[Place, list[Change]] = {}
    for lora, unet, text in uses:
        for match in _match(models, lora, known)[0]:
            multiplier = unet if match.place.part == "unet" else text
            if multiplier:
                weight = Place(match.place.part, f"{match.place.name}.{match.kind}")
                plan.setdefault(weight, []).append(Change(str(lora.path), multiplier, match.delta))
    return [(networks[part].get_parameter(name), changes) for (part, name), changes in plan.items()]


@torch.no_grad()
def _add(weight: nn.Parameter, changes: list[Change]) -> None:
    _MERGED[weight].changes.extend(changes)
    merged = _sum(*_MERGED[weight]).to(weight.dtype)
    if not merged.float().isfinite().all():
        dtype = str(weight.dtype).removeprefix("torch.")
        raise CheckpointError(f"with these LoRA files a weight overflows in {dtype}; use smaller multipliers")
    weight.copy_(merged)


@torch.no_grad()
def _remove(weight: nn.Parameter, changes: list[Change]) -> None:
    pristine, present = _MERGED[weight]
    present[:] = [change for change in present if not any(change is own for own in changes)]
    if present:
        weight.copy_(_sum(pristine, present))
    else:
        weight.copy_(pristine)
        del _MERGED[weight]


def _sum(pristine: Tensor, changes: list[Change]) -> Tensor:
    """The merged weight in float32, added up in an order that does not depend on when a file was applied."""
    base, total = pristine.float(), torch.zeros_like(pristine, dtype=torch.float32)
    for _, multiplier, delta in sorted(changes, key=lambda change: (change.file, change.multiplier)):
        total += multiplier * delta.to(base.device).change(base)
    return base + total


class Match(NamedTuple):
    key: str  # the file's name of a module
    place: Place  # the model's
    kind: str  # "weight" or "bias"
    delta: Delta


def _match(models: Models, lora: LoraFile, known: Mapping[str, Place]) -> tuple[list[Match], list[str]]:
    """Find the file's modules in the model and check that the shapes fit. Also the names not found."""
    _check_family(models, lora)
    networks = parts(models)
    matched: list[Match] = []
    missing: list[str] = []
    taken: set[Place] = set()
    for key, changes in lora.modules.items():
        place = locate(key, known)
        if place is None:
            missing.append(key)
            continue
        if place in taken:
            raise file_error(lora.path, f"it changes '{place.name}' twice, under two names")
        taken.add(place)
        module = networks[place.part].get_submodule(place.name)
        for kind, delta in changes.items():
            weight = getattr(module, kind, None)
            if not isinstance(weight, nn.Parameter):
                missing.append(f"{key} ({kind})")
                continue
            try:
                delta.check(weight.shape)
            except CheckpointError as error:
                raise file_error(
                    lora.path, f"'{printable(key, 80)}': {error}; is it for another model?"
                ) from None
            matched.append(Match(key, place, kind, delta))
    if not matched:
        raise file_error(
            lora.path, f"none of its {len(missing)} modules is in this model ({models.family.title})"
        )
    return matched, missing


def _check_family(models: Models, lora: LoraFile) -> None:
    """Compare the width of the text that the file's cross-attention reads with that of the model."""
    if any("double_blocks" in key or "joint_blocks" in key for key in lora.modules):
        raise file_error(lora.path, "this LoRA was made for a transformer (Flux, SD3), the model is a UNet")
    widths = (
        _inputs(changes["weight"])
        for key, changes in lora.modules.items()
        if key.endswith(("attn2_to_k", "attn2.to_k")) and "weight" in changes
    )
    width, own = next(widths, None), models.unet.config.context_dim
    if width is not None and width != own:
        family = next((family.title for family in FAMILIES if width in family.context_dims), "another model")
        raise file_error(
            lora.path,
            f"this LoRA was made for {family} (text width {width}), "
            f"the model is {models.family.title} (text width {own})",
        )


def _inputs(delta: Delta) -> int | None:
    """How many inputs the layer has that `delta` was made for; None: not seen at once."""
    match delta:
        case LowRank(down=Tensor() as tensor) | Full(diff=tensor) | Hadamard(hada_w1_b=tensor):
            return tensor.shape[1] if tensor.ndim > 1 else None
        case Decomposed():
            return _inputs(delta.delta)
    return None
