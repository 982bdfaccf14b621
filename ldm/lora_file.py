"""LoRA files of every layout, read to one form: the names of modules, and a `Delta` for each weight."""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm import formats
from ldm.errors import CheckpointError
from ldm.formats.mapped import printable
from ldm.lora_deltas import Delta, parse

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


def file_error(path: Path, what: str) -> CheckpointError:
    return CheckpointError(printable(f"{printable(path.name)}: {what}", 200))


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
            raise file_error(file.path, f"'{printable(module)}' has two tensors for '{name}'")
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
            raise file_error(file.path, f"'{printable(module, 80)}': {error}") from None
        if changes:
            modules[module] = changes
        unmatched += [files_names[module, name] for name in left]
    if not modules:
        raise file_error(
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
