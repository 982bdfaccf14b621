"""Tileable textures: pictures that continue at the opposite edge."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ldm import vae


@contextmanager
def seamless(*networks: nn.Module) -> Iterator[None]:
    """Within the block, every convolution of the networks sees the picture as a torus; then all is as before.

    What a convolution finds beyond the right edge is then the left edge, and so on, instead of zeros. The
    other layers know no edges, so the whole network commutes with shifts around the torus. That holds where
    every level has an even width and height; elsewhere halving and doubling leaves a seam.

    Blocks may be nested and may end in any order, as abandoned runs do: all is as before when the last ends.

    The idea is that of the web UI ("Tiling"), which leaves out the encoder's one-sided padding.
    """
    with ExitStack() as undo:
        for layer in (layer for network in networks for layer in network.modules()):
            if isinstance(layer, vae.Downsample) or (
                isinstance(layer, nn.Conv2d) and layer.padding != (0, 0)
            ):
                _close(layer)
                undo.callback(_open, layer)
        yield


class Closed(NamedTuple):
    """A layer that sees a torus at the moment."""

    undo: Callable[[], object]
    blocks: int  # in which it does


# Kept beside the layers and not in the blocks, since two blocks may overlap and each may end first.
_CLOSED: dict[nn.Module, Closed] = {}


def _close(layer: nn.Conv2d | vae.Downsample) -> None:
    """Make a layer seamless for one more block."""
    if layer in _CLOSED:
        undo, blocks = _CLOSED[layer]
    elif isinstance(layer, vae.Downsample):
        undo, blocks = layer.conv.register_forward_pre_hook(_close_right_and_bottom).remove, 0
    else:
        undo, blocks = partial(setattr, layer, "padding_mode", layer.padding_mode), 0
        layer.padding_mode = "circular"  # torch's convolution looks at this whenever it runs
    _CLOSED[layer] = Closed(undo, blocks + 1)


def _open(layer: nn.Module) -> None:
    """One block less; after the last, the layer is as before."""
    undo, blocks = _CLOSED.pop(layer)
    if blocks == 1:
        undo()
    else:
        _CLOSED[layer] = Closed(undo, blocks - 1)


def _close_right_and_bottom(conv: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """Put the first column and row where `vae.Downsample` has padded with zeros."""
    return F.pad(inputs[0][..., :-1, :-1], (0, 1, 0, 1), mode="circular")
