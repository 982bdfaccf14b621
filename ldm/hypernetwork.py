"""Hypernetworks of the web UI: small networks between the context and the keys and values of attention.

Not those of Ha et al. 2016: NovelAI's (2022), trained and loaded by AUTOMATIC1111's web UI. For each width
of what attention reads there is a pair of networks, one before the projection to keys, one before that to
values: k = W_k f_k(c), v = W_v f_v(c) with f(c) = c + multiplier * net(c). The context c is the text in
cross-attention and the pixels themselves in self-attention; both are altered, if the file has their widths.

f is not linear, so it cannot be merged into W as a LoRA is, and `forward` is nobody's to patch. `applied`
exchanges the projection, a part of the network, for one that runs f first, and puts the old one back. That
keeps the names and the tensors of all weights (a LoRA can be applied before, after or within), and a
compiled network sees it, which it would not for a hook.
"""

import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ldm.errors import CheckpointError, RequestError
from ldm.formats import read_tree
from ldm.formats.mapped import printable
from ldm.models import Models
from ldm.offload import device_of
from ldm.unet import CrossAttention

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "linear": nn.Identity,
    "relu": nn.ReLU,
    "leakyrelu": nn.LeakyReLU,
    "elu": nn.ELU,
    "swish": nn.Hardswish,  # so in the web UI
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "celu": nn.CELU,
    "gelu": nn.GELU,
    "hardshrink": nn.Hardshrink,
    "hardsigmoid": nn.Hardsigmoid,
    "hardswish": nn.Hardswish,
    "hardtanh": nn.Hardtanh,
    "logsigmoid": nn.LogSigmoid,
    "mish": nn.Mish,
    "relu6": nn.ReLU6,
    "rrelu": nn.RReLU,
    "selu": nn.SELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "softshrink": nn.Softshrink,
    "softsign": nn.Softsign,
    "tanhshrink": nn.Tanhshrink,
}
"""The web UI's names. Those left out need arguments or weights, or mix the channels."""

Pair = tuple[nn.Sequential, nn.Sequential]  # before the projections to keys and to values


@dataclass(frozen=True, eq=False)
class Hypernetwork:
    """What a file holds: a pair of networks (B, N, width) -> (B, N, width) for each width."""

    path: Path
    pairs: Mapping[int, Pair]

    @property
    def name(self) -> str:
        return self.path.stem


def read(path: str | os.PathLike[str]) -> Hypernetwork:
    """Read a hypernetwork (.pt) of any version of the web UI.

    Raises CheckpointError, one line that names the file, if it is damaged or something else.
    """
    path = Path(path)
    tree = read_tree(path)
    try:
        return Hypernetwork(path, _pairs(tree))
    except CheckpointError as error:
        raise CheckpointError(printable(f"{printable(path.name)}: {error}", 200)) from None


Use = tuple[Hypernetwork | str | os.PathLike[str], float]
"""A hypernetwork or its file, and the multiplier."""


@contextmanager
def applied(models: Models, hypernetworks: Iterable[Use]) -> Iterator[None]:
    """Within the block, the attention of the UNet reads what the hypernetworks make of its context.

    Several act one after the other, in the order given. At exit, also by an exception, the modules of the
    network are the ones they were. Blocks can be nested; then the inner block's act first.

    Raises CheckpointError if a file is damaged or was made for another family, RequestError for a multiplier
    that is not finite; then nothing has changed.
    """
    uses = list(hypernetworks)
    if not uses:  # then the network need not be a UNet
        yield
        return
    unet = models.unet
    attentions = [module for module in unet.modules() if isinstance(module, CrossAttention)]
    widths = {_width(a.to_k) for a in attentions}
    steps = _steps(uses, widths, unet.config.context_dim, device_of(unet), models.denoiser.dtype)
    exchanged: list[tuple[CrossAttention, str, nn.Module]] = []
    try:
        for attention in attentions:
            for i, name in enumerate(("to_k", "to_v")):
                projection = getattr(attention, name)
                before = [(pair[i], multiplier) for pair, multiplier in steps.get(_width(projection), ())]
                if before:
                    exchanged.append((attention, name, projection))
                    setattr(attention, name, Altered(projection, before))
        yield
    finally:
        for attention, name, projection in reversed(exchanged):
            setattr(attention, name, projection)


class Altered(nn.Module):
    """A projection that reads what networks make of its input. (B, N, width) -> (B, N, C)."""

    def __init__(self, projection: nn.Module, networks: Sequence[tuple[nn.Module, float]]) -> None:
        super().__init__()
        self.weight = projection.weight  # the same parameter, under the name that it has in the UNet
        # In a tuple, modules are not registered: the UNet gets no further weights.
        self.parts = projection, tuple(networks)

    def forward(self, context: Tensor) -> Tensor:
        projection, networks = self.parts
        for network, multiplier in networks:
            context = context + multiplier * network(context)
        return projection(context)


def _width(projection: nn.Module) -> int:
    return cast(Tensor, projection.weight).shape[1]


def _steps(
    hypernetworks: Iterable[Use],
    widths: Collection[int],
    context_dim: int | None,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[int, list[tuple[Pair, float]]]:
    """The networks to run for each width, in order."""
    steps: dict[int, list[tuple[Pair, float]]] = {}
    for file, multiplier in hypernetworks:
        if not math.isfinite(multiplier):
            raise RequestError(f"a hypernetwork's multiplier must be a finite number, got {multiplier}")
        hypernetwork = file if isinstance(file, Hypernetwork) else read(file)
        unknown = [width for width in hypernetwork.pairs if width not in widths]
        # The web UI offers to train all widths of SD1 and SD2 in one file: then those of one go unused.
        if unknown and context_dim not in hypernetwork.pairs:
            raise CheckpointError(
                f"{printable(hypernetwork.path.name)}: this hypernetwork is for contexts of width "
                f"{printable(', '.join(map(str, unknown)), 40)}, the model's is {context_dim or 'none'}; "
                "use one made for this model"
            )
        for width, pair in hypernetwork.pairs.items():
            if width in widths:
                k, v = (deepcopy(network).to(device, dtype) for network in pair)
                steps.setdefault(width, []).append(((k, v), multiplier))
    return steps


def _pairs(tree: object) -> dict[int, Pair]:
    widths = [width for width in tree if type(width) is int] if isinstance(tree, Mapping) else []
    if not isinstance(tree, Mapping) or not widths:
        raise CheckpointError("it has no networks by width; it is no hypernetwork of the web UI")
    activation = tree.get("activation_func")
    if activation is None:
        activation = "linear"
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise CheckpointError(
            f"its activation function '{printable(str(activation), 30)}' is not one that ldm knows; "
            "use another hypernetwork"
        )
    # Files from before this option activate the output, too; those of NovelAI have no activation at all.
    activate_output = tree.get("activate_output", True) is True
    pairs: dict[int, Pair] = {}
    for width in widths:
        match tree[width]:
            case (Mapping() as k, Mapping() as v):
                kind = ACTIVATIONS[activation]
                pairs[width] = (
                    _network(width, k, kind, activate_output),
                    _network(width, v, kind, activate_output),
                )
            case _:
                raise CheckpointError(f"it has no pair of networks for width {width}; download it again")
    return pairs


def _network(
    width: int, weights: Mapping[str, Tensor], activation: type[nn.Module], activate_output: bool
) -> nn.Sequential:
    """A network from its weights, which tell its layers by their shapes; only activations have none.

    A linear layer, its activation, perhaps a layer norm, and so on; the web UI numbers them "linear.0",
    "linear.2", ..., with gaps where activations and dropout are.
    """
    numbered: dict[int, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        # "linear1.weight" and "linear2.weight" in the oldest files, which have nothing between the two.
        match str(name).replace("linear1.", "linear.0.").replace("linear2.", "linear.1.").split("."):
            case ("linear", number, "weight" | "bias" as kind) if number.isdecimal() and len(number) < 4:
                numbered.setdefault(int(number), {})[kind] = tensor
            case _:
                raise CheckpointError(
                    f"it has the unknown weight '{printable(str(name), 40)}'; "
                    "it is no hypernetwork of the web UI"
                )
    layers: list[nn.Module] = []
    inner = width  # of the layer before
    for number, own in sorted(numbered.items()):
        layer = _layer(own, inner)
        if layer is None:
            raise CheckpointError(
                f"layer {number} of its network for width {width} has weights that fit no layer, or are not "
                "finite; do not use this file"
            )
        layers.append(layer)
        if isinstance(layer, nn.Linear):
            inner = layer.out_features
            layers.append(activation())
    linears = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Linear)]
    if not linears or inner != width:
        raise CheckpointError(
            f"its network for width {width} does not return that width; do not use this file"
        )
    if not activate_output:
        del layers[linears[-1] + 1]
    return nn.Sequential(*layers).eval().requires_grad_(False)


def _layer(own: Mapping[str, Tensor], inner: int) -> nn.Linear | nn.LayerNorm | None:
    """The layer with these weights that reads `inner` channels. None: there is none."""
    weight, bias = own.get("weight"), own.get("bias")
    if not (isinstance(weight, Tensor) and isinstance(bias, Tensor)):
        return None
    if weight.ndim not in (1, 2) or 0 in weight.shape or weight.shape[-1] != inner:
        return None
    if bias.shape != weight.shape[:1] or not (weight.is_floating_point() and bias.is_floating_point()):
        return None
    weights = {"weight": weight.float(), "bias": bias.float()}
    if not all(torch.isfinite(w).all() for w in weights.values()):
        return None
    if weight.ndim == 1:
        layer = nn.LayerNorm(inner, device="meta")
    else:
        layer = nn.Linear(inner, len(weight), device="meta")
    layer.load_state_dict(weights, assign=True)
    return layer
