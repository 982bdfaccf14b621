"""One peer in its own environment, doing one piece of work whenever it is told to.

    .peers/CompVis/bin/python benchmarks/peers_worker.py CompVis UNet 32 result.npy

Makes the network, runs it once and writes what comes out; then says how many parameters ran, and answers
every line on stdin with the seconds of one more run. It is run by its path and imports nothing of ours, since
the original code, too, is a package named `ldm`. What both sides need is defined here for the same reason.
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

SCALE = 0.18215
"""Of the latents of Stable Diffusion 1, which the peers' decoders leave to their callers."""


class Timed(NamedTuple):
    cpu: float  # seconds of the processor, all threads together
    wall: float  # seconds of the clock


def timed(function: Callable[[], object]) -> Timed:
    cpu, wall = time.process_time(), time.perf_counter()
    function()
    return Timed(time.process_time() - cpu, time.perf_counter() - wall)


def inputs(kind: str, side: int) -> tuple[Tensor, ...]:
    """The same everywhere. UNet: latents, times and words of a guided step; decode: latents; encode: pixels.

    side: of the latents.
    """
    generator = torch.Generator().manual_seed(0)
    if kind == "UNet":
        x, context = (torch.randn(shape, generator=generator) for shape in ((2, 4, side, side), (2, 77, 768)))
        return x, torch.tensor([500.0, 500.0]), context
    shape = (1, 4, side, side) if kind == "decode" else (1, 3, 8 * side, 8 * side)
    return (torch.randn(shape, generator=generator),)


def fill(network: nn.Module, run: Callable[..., object], kind: str) -> int:
    """Random weights, equal in every implementation whatever its names, that keep the size of what passes.

    The n-th layer of each shape that runs gets the same numbers; 1x1 convolutions count as linear layers.
    Returns the number of the parameters of all layers that run.
    """
    for name, p in network.named_parameters():
        nn.init.constant_(p, float(p.ndim == 1 and name.endswith("weight")))  # norms: 1; biases: 0
    ran: dict[Any, None] = {}
    layers = [m for m in network.modules() if getattr(m, "weight", None) is not None]
    hooks = [layer.register_forward_pre_hook(lambda layer, _: ran.setdefault(layer)) for layer in layers]
    run(*inputs(kind, 8))
    for hook in hooks:
        hook.remove()
    seen: Counter[tuple[int, ...]] = Counter()
    for weight in (layer.weight for layer in ran if layer.weight.ndim > 1):
        shape = tuple(n for i, n in enumerate(weight.shape) if i < 2 or n > 1)
        generator = torch.Generator().manual_seed(zlib.crc32(repr((shape, seen[shape])).encode()))
        bound = (3 / weight[0].numel()) ** 0.5
        nn.init.uniform_(weight, -bound, bound, generator=generator)
        seen[shape] += 1
    return sum(p.numel() for layer in ran for p in layer.parameters(recurse=False))


class Decoder(nn.Module):
    """The decoding half of an autoencoder, from a peer's own parts."""

    def __init__(self, conv: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = conv, decoder

    def forward(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z / SCALE))


# The networks of Stable Diffusion 1 in the words of the original, which ComfyUI has kept.
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "channel_mult": (1, 2, 4, 4),
    "num_heads": 8,
    "use_spatial_transformer": True,
    "context_dim": 768,
}
DECODER = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch_mult": (1, 2, 4, 4),
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def compvis(kind: str, small: bool) -> nn.Module:
    from ldm.modules.diffusionmodules.model import Decoder as TheirDecoder  # type: ignore
    from ldm.modules.diffusionmodules.openaimodel import UNetModel  # type: ignore

    if kind == "decode":
        return Decoder(nn.Conv2d(4, 4, 1), TheirDecoder(ch=32 if small else 128, **DECODER))
    return UNetModel(
        model_channels=64 if small else 320,
        num_res_blocks=2,
        attention_resolutions=(4, 2, 1),
        legacy=False,
        use_checkpoint=False,
        **UNET,
    )


def comfyui(kind: str, small: bool) -> nn.Module:
    import comfy.cli_args  # type: ignore

    # torch's own attention, which everybody else but the original has; its default here is another.
    comfy.cli_args.args.cpu = comfy.cli_args.args.use_pytorch_cross_attention = True
    from comfy.ldm.modules.diffusionmodules.model import Decoder as TheirDecoder  # type: ignore
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # type: ignore

    if kind == "decode":
        return Decoder(nn.Conv2d(4, 4, 1), TheirDecoder(ch=32 if small else 128, **DECODER))
    return UNetModel(
        model_channels=64 if small else 320,
        num_res_blocks=[2, 2, 2, 2],
        transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
        transformer_depth_middle=1,
        transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        dtype=torch.float32,
        **UNET,
    )


class Refined(nn.Module):
    """The UNet of refiners, called like the others."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        self.unet.set_timestep(t)
        self.unet.set_clip_text_embedding(context)
        return self.unet(x)


def refiners(kind: str, small: bool) -> nn.Module:
    from refiners.foundationals.latent_diffusion import SD1UNet  # type: ignore
    from refiners.foundationals.latent_diffusion.auto_encoder import Decoder as TheirDecoder  # type: ignore

    if small:
        raise ValueError("refiners has one size only")
    return Decoder(nn.Identity(), TheirDecoder()) if kind == "decode" else Refined(SD1UNet(in_channels=4))


MAKERS = {"CompVis": compvis, "ComfyUI": comfyui, "refiners": refiners}


def empty(make: Callable[[], nn.Module]) -> Any:
    """A network with weights of any value, made without initialising them."""
    with torch.device("meta"):
        network = make()
    return network.to_empty(device="cpu").eval().requires_grad_(False)


@torch.no_grad()
def main(name: str, kind: str, side: str, result: str, small: str = "") -> None:
    # Some of them print while they are imported.
    answers, sys.stdout = sys.stdout, sys.stderr
    network = empty(lambda: MAKERS[name](kind, bool(small)))
    parameters = fill(network, network, kind)
    run = partial(network, *inputs(kind, int(side)))
    np.save(result, run().numpy())
    print(parameters, file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(timed(run)), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
