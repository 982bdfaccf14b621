"""Tileable textures: pictures that continue at the opposite edge."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch.nn.functional as F
from torch import Tensor, nn

from ldm import vae


@contextmanager
def seamless(*networks: nn.Module) -> Iterator[None]:
    """Within the block, every convolution of the networks sees the picture as a torus; then all is as before.

    What a convolution finds beyond the right edge is then the left edge, and so on, instead of zeros. The
    other layers know no edges, so the whole network commutes with shifts around the torus. That holds where
    every level has an even width and height; elsewhere halving and doubling leaves a seam.

    The idea is that of the web UI ("Tiling"), which leaves out the encoder's one-sided padding.
    """
    with ExitStack() as undo:
        for module in (module for network in networks for module in network.modules()):
            if isinstance(module, nn.Conv2d) and module.padding != (0, 0):
                undo.callback(setattr, module, "padding_mode", module.padding_mode)
                module.padding_mode = "circular"  # torch's convolution looks at this whenever it runs
            elif isinstance(module, vae.Downsample):
                undo.callback(module.conv.register_forward_pre_hook(_close_right_and_bottom).remove)
        yield


def _close_right_and_bottom(conv: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """Put the first column and row where `vae.Downsample` has padded with zeros."""
    return F.pad(inputs[0][..., :-1, :-1], (0, 1, 0, 1), mode="circular")
