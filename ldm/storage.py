"""Weights held in fewer bytes than they are computed with.

    models = ldm.load("v1-5-pruned-emaonly.safetensors", storage=torch.float16)

Each layer brings its weight to the dtype of its input when it runs, and drops that copy after it. So a file
in half precision takes no more memory than it has bytes, on a CPU that computes in float32, and the pictures
are the same to the bit. In torch.float8_e4m3fn it takes half of that, and draws other pictures: 8 bits leave
a weight hardly two decimal digits (Micikevicius et al. 2022, arXiv:2209.05433); docs/memory.md has figures.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from ldm.models import Models

# Weights with fewer numbers stay as they are: those of first and last layers, and all tests of a dtype.
SMALL = 2**14


class StoredLinear(nn.Linear):
    """A linear layer whose weight may have another dtype than its input."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype), self.bias)


class StoredConv2d(nn.Conv2d):
    """The same of a convolution."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight.to(input.dtype), self.bias)


STORED: Mapping[type[nn.Module], type[nn.Module]] = {nn.Linear: StoredLinear, nn.Conv2d: StoredConv2d}
"""What these very classes become; their parameters and their names stay."""


def prepare(module: nn.Module) -> Iterator[str]:
    """Make the layers of a module take weights of any dtype; the names of their weights."""
    for name, layer in module.named_modules():
        if type(layer) in STORED and layer.get_parameter("weight").numel() >= SMALL:
            layer.__class__ = STORED[type(layer)]
            yield f"{name}.weight"


def computed_with(module: nn.Module) -> Iterator[Tensor]:
    """The weights of a module but for those that it holds in another dtype than it computes in."""
    for layer in module.modules():
        for name, weight in layer.named_parameters(recurse=False):
            if name != "weight" or type(layer) not in STORED.values():
                yield weight


def held_in(module: object) -> torch.dtype | None:
    """The dtype in which a module holds its large weights, if it may be another than it computes in."""
    layers = module.modules() if isinstance(module, nn.Module) else ()
    held = (layer for layer in layers if type(layer) in STORED.values())
    return next((layer.get_parameter("weight").dtype for layer in held), None)


def stored(models: "Models", dtype: torch.dtype) -> "Models":
    """The same models, changed in place: from now on they hold the large weights in this dtype.

    `ldm.load(storage=...)` does this without a moment in which both are in memory. A weight that was made
    faster before (ldm.optimize) stays as it is.
    """
    for part in models.all_parts:
        if isinstance(part, nn.Module):
            for name in prepare(part):
                weight = part.get_parameter(name)
                weight.data = weight.data.to(dtype)
    return models
