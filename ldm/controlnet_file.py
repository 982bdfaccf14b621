"""ControlNet files: the original layout, alone or in a whole checkpoint, and diffusers'; T2I-Adapters."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from ldm import offload, t2i_adapter
from ldm.building import Destination, build, shapes_of
from ldm.checkpoint import named
from ldm.controlnet import ControlNet, ControlNetConfig, check_fit
from ldm.errors import CheckpointError, RequestError
from ldm.families.family import strip
from ldm.families.infer import Shapes, length, reading, unet_config
from ldm.formats import read
from ldm.models import Models
from ldm.rename import from_diffusers
from ldm.t2i_adapter import Adapter

CONTROL = "control_model."
BUILT_IN: Mapping[str, Path] = MappingProxyType(
    {"canny": Path(__file__).parent / "controlnet_canny.safetensors"}
)
"""The ControlNets in this package, for the embedded model, by name."""

# What people pass for a ControlNet by mistake, by a piece of a name in it.
_MISTAKES = (
    (
        ("difference",),
        "this ControlNet holds only differences from Stable Diffusion 1.5; use the full or the pruned file",
    ),
    (("lora_controlnet",), "this is a Control-LoRA, which ldm does not read; use a whole ControlNet"),
    (("lllite_",), "this is a ControlNet-LLLite, which ldm does not read; use a whole ControlNet"),
    (("task_embedding", "control_add_embedding"), "this is a ControlNet Union, which ldm does not read"),
    (("model.diffusion_model.",), "this is a model without a ControlNet in it; it belongs to --ckpt"),
)


def load_controlnet(
    path: str | os.PathLike[str],
    models: Models,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> ControlNet | Adapter:
    """Load a ControlNet or T2I-Adapter for a model, from a file of any layout; names and shapes decide.

    path: a .safetensors, .ckpt or .pth file, or a name in BUILT_IN.
    models: tells what no shape does, the number of attention heads.
    device, dtype: None: those of `models`; beside offloaded ones, it comes and goes as their parts do.

    Raises CheckpointError, one line, if the file is damaged, incomplete, something else, or for another
    model.
    """
    path = BUILT_IN.get(os.fspath(path), Path(path))
    file = read(path)
    weights = file.tensors
    joins = device is None and offload.is_offloaded(models.unet)
    device = torch.device("cpu") if joins else models.device if device is None else torch.device(device)
    to = Destination(device, dtype or models.denoiser.dtype, read_once=file.read_once)
    try:
        if t2i_adapter.is_adapter(weights):
            weights = t2i_adapter.original_names(weights)
            shape = t2i_adapter.adapter_config(shapes_of(weights))
            network = build(lambda: Adapter(shape), weights, "T2I-Adapter", to)
        else:
            weights = original_names(weights)
            heads = models.unet.config
            config = controlnet_config(shapes_of(weights), num_heads=heads.num_heads, head_dim=heads.head_dim)
            network = build(lambda: ControlNet(config), weights, "ControlNet", to)
        check_fit(network, models.unet.config, None if models.vae is None else models.vae.config.factor)
    except (CheckpointError, RequestError) as error:
        raise named(path, CheckpointError(str(error))) from None
    if joins:
        offload.join(network, models)
    return network


def original_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The ControlNet's weights by the names of the original code. Raises CheckpointError if it is none."""
    inside = strip(weights, CONTROL)
    if inside:
        weights = inside
    elif "controlnet_mid_block.weight" in weights:
        shapes = shapes_of(weights)
        blocks = length(shapes, "down_blocks.0.resnets.{}.norm1.weight")
        hint_layers = length(shapes, "controlnet_cond_embedding.blocks.{}.weight")
        weights = {from_diffusers(name, blocks, hint_layers): w for name, w in weights.items()}
    for pieces, what in _MISTAKES:
        if any(piece in name for name in weights for piece in pieces):
            raise CheckpointError(what)
    if "input_hint_block.0.weight" not in weights:
        raise CheckpointError("this is no ControlNet; it has no network for the hint")
    return dict(weights)


def controlnet_config(shapes: Shapes, *, num_heads: int | None, head_dim: int | None) -> ControlNetConfig:
    """The configuration of a ControlNet. num_heads or head_dim: as in UNetConfig; one of them is None.

    Raises CheckpointError if the names make none.
    """
    # A ControlNet has no output of its own; the UNet that it steers gives as many channels as it takes.
    with_output = {**shapes, "out.2.weight": shapes.get("input_blocks.0.0.weight", ())[1:2]}
    unet = unet_config(with_output, num_heads=num_heads, head_dim=head_dim)
    # The convolutions are at 0, 2, 4, ...: one, two for each halving, and one to the width of the UNet.
    widths: list[int] = []
    with reading("ControlNet"):
        while f"input_hint_block.{4 * len(widths) + 2}.weight" in shapes:
            widths.append(shapes[f"input_hint_block.{4 * len(widths)}.weight"][0])
        channels = shapes["input_hint_block.0.weight"][1]
    if channels != 3:
        raise CheckpointError(f"this ControlNet wants a hint of {channels} channels; a picture has 3")
    return ControlNetConfig(unet=unet, hint_widths=tuple(widths))
