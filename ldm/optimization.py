"""The same networks, faster on a CPU: exact but for rounding, weights and their names unchanged.

    ldm.optimize(models)  # and ldm.optimize(models, False) is the way back

unet.py and vae.py stay the textbook. Here, some of their layers get another class: the same module with the
same parameters, which computes its result in another way where it can and as ever where it cannot (training,
`torch.compile`, half precision, textures).

- 3x3 convolutions on all but small maps: Winograd's algorithm, four times fewer multiplications, the inner
  loops compiled by the machine's own compiler (native.py). Its transformed weights take four times the memory
  of the layer's own, which stay. They are made when the layer is first used, and again whenever the weight
  has changed, so that a LoRA may come and go.
- 3x3 convolutions on maps so small that most time goes into fetching the weights: one matrix product, for
  which they need not be brought into another order first.
- 1x1 convolutions: a matrix product.

All of this runs on channels-last maps, which the layers between pass on as they come.
"""

import threading
from collections.abc import MutableMapping
from ctypes import CDLL

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ldm.models import Models
from ldm.native import LANES, kernels

# When Winograd's algorithm pays, as measured: from 8 tiles of 4x4 pixels, or from 24 where its weights, four
# times the layer's own, do not stay in a cache (16 MB) and must be fetched for them.
TILES, TILES_OF_LARGE = 8, 24
LARGE = 4 * 2**20  # numbers in a weight in Winograd's form

# And what it may cost: 200 MB for one layer. This leaves out the layers from 1280 to 1280 channels, which are
# most of the UNet's weights and work on small maps only.
TOO_LARGE = 50 * 2**20

# When one matrix product pays: for weights of a million pairs of channels and more, and up to 512 pixels of a
# whole batch.
PRODUCT_CHANNELS, PRODUCT_PIXELS = 2**20, 512

# Numbers in the transformed tiles at hand, before and after: 8 MB in float32, which caches hold.
BLOCK = 2**21


def optimize(what: Models | nn.Module, on: bool = True) -> None:
    """Make UNet and VAE (or another network, such as a ControlNet) faster on a CPU, in place.

    on: False makes them what they were, to the bit.
    Results differ from the plain ones by rounding, by up to about 1e-5 of the largest number.
    """
    parts = [what]
    if not isinstance(what, nn.Module):
        refiner = what.refiner and what.refiner.denoiser.network
        parts = [what.denoiser.network, what.vae, refiner]
    kinds: tuple[type[nn.Module], type[nn.Module]] = (nn.Conv2d, FastConv2d)
    old, new = kinds if on else kinds[::-1]
    for module in (m for part in parts if isinstance(part, nn.Module) for m in part.modules()):
        if type(module) is old:
            module.__class__ = new  # type: ignore[assignment]
            if not on:
                _TRANSFORMED.pop(module.get_parameter("weight"), None)


class FastConv2d(nn.Conv2d):
    """A convolution that takes the fastest way for the size of its input."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        if not fits(input, weight):
            return super().forward(input)
        x = input.contiguous(memory_format=torch.channels_last)  # only the first layer's is not so already
        if self._is_plain(1):
            return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), self.bias).permute(0, 3, 1, 2)
        if self._is_plain(3):
            if winograd_pays(x, weight) and (library := kernels()) is not None:
                return winograd(library, x, weight, self.bias)
            if product_pays(x, weight):
                return product(x, weight, self.bias)
        return super().forward(x)

    def _is_plain(self, size: int) -> bool:
        """A square kernel, as many pixels out as in, zeros around them (`ldm.seamless` has none)."""
        padding, mode = size // 2, self.padding_mode if size > 1 else "zeros"
        shape = self.kernel_size, self.stride, self.padding, self.dilation, self.groups, mode
        return shape == ((size, size), (1, 1), (padding, padding), (1, 1), 1, "zeros")


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the fast ways are open: float32 on the CPU, neither training nor compiling."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not weight.is_inference()  # it would not tell when it changes
        and not torch.compiler.is_compiling()
    )


def product_pays(x: Tensor, weight: Tensor) -> bool:
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    return weight.shape[0] * weight.shape[1] >= PRODUCT_CHANNELS and pixels <= PRODUCT_PIXELS


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 3x3 convolution as one matrix product. (B, C_in, h, w) -> (B, C_out, h, w), channels-last."""
    pixels = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1)  # (B, h + 2, w + 2, C_in)
    windows = pixels.unfold(1, 3, 1).unfold(2, 3, 1)  # (B, h, w, C_in, 3, 3)
    return F.linear(windows.flatten(3), weight.flatten(1), bias).permute(0, 3, 1, 2)


def tile_count(x: Tensor) -> int:
    """The tiles of 4x4 pixels that cover the maps x (B, C, h, w)."""
    return x.shape[0] * -(-x.shape[2] // 4) * -(-x.shape[3] // 4)


def winograd_pays(x: Tensor, weight: Tensor) -> bool:
    c_out, c_in = weight.shape[:2]
    size = 36 * c_in * c_out
    least = TILES if size <= LARGE else TILES_OF_LARGE
    return c_out % LANES == c_in % LANES == 0 and tile_count(x) >= least and size <= TOO_LARGE


def winograd(library: CDLL, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 3x3 convolution by Winograd's algorithm, see kernels.cpp. Shapes as in `product`, x channels-last."""
    matrices = transformed(library, weight)
    (batch, c_in, height, width), c_out = x.shape, len(weight)
    y = torch.empty(batch, c_out, height, width, memory_format=torch.channels_last)
    zeros = torch.zeros(max(c_in, c_out))
    total = tile_count(x)
    block = min(total, max(BLOCK // (36 * (c_in + c_out)), 64))
    scratch = _scratch(36 * block * (c_in + c_out))
    for first in range(0, total, block):
        count = min(block, total - first)
        before = scratch[: 36 * count * c_in].view(36, count, c_in)
        after = scratch[36 * block * c_in :][: 36 * count * c_out].view(36, count, c_out)
        library.winograd_input(
            x.data_ptr(), before.data_ptr(), height, width, c_in, first, count, zeros.data_ptr()
        )
        torch.bmm(before, matrices, out=after)
        added = zeros if bias is None else bias
        library.winograd_output(
            after.data_ptr(), added.data_ptr(), y.data_ptr(), height, width, c_out, first, count
        )
    return y


_LOCAL = threading.local()


def _scratch(size: int) -> Tensor:
    """Memory of this thread that is used again: getting it anew takes as long as the work on it."""
    if getattr(_LOCAL, "scratch", None) is None or len(_LOCAL.scratch) < size:
        with torch.inference_mode(False):  # or it could be written to in that mode only
            _LOCAL.scratch = torch.empty(size)
    return _LOCAL.scratch


# Beside the modules and not in them, since copies of a module may share a weight (tiled_vae.py).
_TRANSFORMED: MutableMapping[Tensor, tuple[tuple[int, int], Tensor]] = WeakIdKeyDictionary()


def transformed(library: CDLL, weight: Tensor) -> Tensor:
    """The weight (C_out, C_in, 3, 3) in Winograd's form (36, C_in, C_out), kept until the weight changes."""
    state = weight.data_ptr(), weight._version
    kept = _TRANSFORMED.get(weight)
    if kept is None or kept[0] != state:
        _TRANSFORMED.pop(weight, None)  # first, for the sake of memory
        c_out, c_in = weight.shape[:2]
        matrices = torch.empty(36, c_in, c_out)
        library.winograd_filter(weight.contiguous().data_ptr(), matrices.data_ptr(), c_in, c_out)
        kept = _TRANSFORMED[weight] = state, matrices
    return kept[1]
