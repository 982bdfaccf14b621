"""LoRA files and their relatives: read, compare with a model, merge into its weights and take out again.

    with ldm.lora.applied(models, [("style.safetensors", 0.8), ("person.safetensors", 1.0, 0.5)]):
        image = ldm.txt2img(models, request)[0]

The changes are merged into the same tensors, which are restored bit for bit from kept copies: no cost per
step, nothing to compile anew, and only the touched layers are exchanged.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ldm import formats
from ldm.errors import CheckpointError, RequestError
from ldm.families import FAMILIES
from ldm.formats.mapped import printable
from ldm.lora_deltas import Decomposed, Delta, Full, Hadamard, LowRank, parse
from ldm.lora_names import Place, locate, names, parts
from ldm.models import Models

# How files end the name of a module's tensor, and what `lora_deltas` calls it (None: just that).
_ENDINGS = tuple(
    (re.compile(f"(?:{ending})$"), name)
    for ending, name in (
        (r"[._]lora(_up|\.up|_linear_layer\.up|_B(\.\w+)?)\.weight", "up"),
        (r"[._]lora(_down|\.down|_linear_layer\.down|_A(\.\w+)?)\.weight", "down"),
        (r"\.lora_mid\.weight", "mid"),
        (r"\.dora_scale|\.lora_magnitude_vector(\.\w+)*", "dora_scale"),
        (r"\.diff|\.w_norm", "diff"),
        (r"\.diff_b|\.b_norm", "diff_b"),
        (r"\.((hada|lokr)_\w+|oft_blocks|rescale|on_input|alpha)", None),
        (r"\.([ab][12])\.weight", None),
        (r"\.(weight)", None),
    )
)


@dataclass(frozen=True)
class LoraFile:
    """What a file changes, not yet matched with a model."""

    path: Path
    modules: Mapping[str, Mapping[str, Delta]]  # the file's name of a module -> changes of weight and bias
    unmatched: tuple[str, ...]  # names of tensors of no known kind
    metadata: Mapping[str, str]


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


def read(path: str | os.PathLike[str]) -> LoraFile:
    """Read a LoRA of any layout and kind from a .safetensors file or a checkpoint.

    Raises CheckpointError for a damaged or hostile file, for one that is no LoRA, and for one with a module
    that cannot be meant: a part is missing, rank 0, NaN.
    """
    file = formats.read(path)
    groups: dict[str, dict[str, Tensor]] = {}
    files_names: dict[tuple[str, str], str] = {}
    unmatched: list[str] = []
    for key, tensor in file.tensors.items():
        if (split := _split(key)) is None:
            unmatched.append(key)
            continue
        module, name = split
        if "lora_magnitude_vector" in key:
            tensor = tensor.flatten()  # PEFT: always one for each output
        if name in groups.setdefault(module, {}):
            raise _error(file.path, f"'{printable(module)}' has two tensors for '{name}'")
        groups[module][name] = tensor
        files_names[module, name] = key
    stated = _peft_settings(file.metadata)
    modules: dict[str, dict[str, Delta]] = {}
    for module, tensors in groups.items():
        if "down" in tensors and "alpha" not in tensors and tensors["down"].ndim:
            alpha = _peft_alpha(stated, module, len(tensors["down"]))
            tensors |= {} if alpha is None else {"alpha": torch.tensor(alpha)}
        try:
            changes, left = parse(tensors)
        except CheckpointError as error:
            raise _error(file.path, f"'{printable(module, 80)}': {error}") from None
        if changes:
            modules[module] = changes
        unmatched += [files_names[module, name] for name in left]
    if not modules:
        raise _error(
            file.path,
            f"it is no LoRA of a kind that ldm knows; it holds {printable(', '.join(unmatched[:3]))}",
        )
    return LoraFile(file.path, modules, tuple(unmatched), file.metadata)


def _split(key: str) -> tuple[str, str] | None:
    """The name of a tensor -> its module as the file calls it, and its name there; None: of no known kind."""
    for ending, name in _ENDINGS:
        if (match := ending.search(key)) and match.start():
            return key[: match.start()], name or match[1]
    return None


def _peft_settings(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What diffusers writes of PEFT's configuration, "unet.lora_alpha" and so on; empty where it did not."""
    try:
        settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _peft_alpha(settings: Mapping[str, Any], module: str, rank: int) -> float | None:
    """The alpha of a module of which the file has none: PEFT keeps it in the configuration."""
    part = module.partition(".")[0]
    alpha, patterns = settings.get(f"{part}.lora_alpha"), settings.get(f"{part}.alpha_pattern")
    for ending, value in patterns.items() if isinstance(patterns, dict) else ():
        if f".{module}".endswith(f".{ending}"):
            alpha = value
            break
    if not isinstance(alpha, (int, float)) or not abs(alpha) < 1e9:
        return None
    # Rank-stabilised LoRA divides by the root of the rank: Kalajdzievski 2023, arXiv:2312.03732, equation 3.
    return alpha * math.sqrt(rank) if settings.get(f"{part}.use_rslora") is True else float(alpha)


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
            done.append((weight, changes))
            _add(weight, changes)
        yield
    finally:
        for weight, changes in done:
            _remove(weight, changes)


def short_hash(path: str | os.PathLike[str]) -> str:
    """12 hexadecimal digits that tell a file by its weights: the web UI's "Lora hashes".

    sha256 over the tensors of a .safetensors file, whatever its metadata; its trainer may have written it
    there ("sshs_model_hash"), and then that is taken. Of other files, sha256 over all. Raises CheckpointError
    for what is no weight file.
    """
    file = formats.read(path)
    stated = file.metadata.get("sshs_model_hash", "")
    if re.fullmatch("[0-9a-f]{64}", stated):
        return stated[:12]
    digest = hashlib.sha256()
    with open(path, "rb") as data:
        if data.read(9)[8:] == b"{":  # 8 bytes with the length of the header, which is JSON
            data.seek(0)
            data.seek(8 + int.from_bytes(data.read(8), "little"))
        else:
            data.seek(0)
        while block := data.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:12]


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
    if weight not in _MERGED:
        _MERGED[weight] = Merged(weight.clone(), [])
    _MERGED[weight].changes.extend(changes)
    merged = _sum(*_MERGED[weight]).to(weight.dtype)
    if not merged.isfinite().all():
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
            raise _error(lora.path, f"it changes '{place.name}' twice, under two names")
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
                raise _error(
                    lora.path, f"'{printable(key, 80)}': {error}; is it for another model?"
                ) from None
            matched.append(Match(key, place, kind, delta))
    if not matched:
        raise _error(
            lora.path, f"none of its {len(missing)} modules is in this model ({models.family.title})"
        )
    return matched, missing


def _check_family(models: Models, lora: LoraFile) -> None:
    """Compare the width of the text that the file's cross-attention reads with that of the model."""
    if any("double_blocks" in key or "joint_blocks" in key for key in lora.modules):
        raise _error(lora.path, "this LoRA was made for a transformer (Flux, SD3), the model is a UNet")
    widths = (
        _inputs(changes["weight"])
        for key, changes in lora.modules.items()
        if key.endswith(("attn2_to_k", "attn2.to_k")) and "weight" in changes
    )
    width, own = next(widths, None), models.unet.config.context_dim
    if width is not None and width != own:
        family = next((family.title for family in FAMILIES if width in family.context_dims), "another model")
        raise _error(
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


def _error(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{printable(path.name)}: {what}")
