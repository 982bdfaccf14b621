"""What is trained instead of the weights: a small addition to each of many layers.

LoRA: Hu et al. 2021, arXiv:2106.09685, section 4.1; with convolutions (LoCon): Yeh et al. 2023,
arXiv:2309.14859, section 3.1; DoRA: Liu et al. 2024, arXiv:2402.09353, section 4.

The additions are attached to the layers as hooks, so that the model itself, its weights and its names, stays
what it was; detached, it is as before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.lora_names import kohya_key, parts, trained
from ldm.models import Models


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Size and kind of the additions; the names are those of kohya's trainer."""

    network_dim: int = 16  # the rank: how much can be learned, and the size of the file
    network_alpha: float = 8.0  # the addition is scaled by alpha / dim
    conv_dim: int = 0  # rank for 3x3 convolutions (LoCon), which also adapts all of the ResBlocks; 0: neither
    conv_alpha: float = 1.0
    dora: bool = False

    def __post_init__(self) -> None:
        if self.network_dim < 1 or self.conv_dim < 0:
            dims = f"{self.network_dim} and {self.conv_dim}"
            raise LdmError(f"network_dim must be 1 or more and conv_dim 0 or more, got {dims}")
        if not (0 < self.network_alpha < math.inf and 0 < self.conv_alpha < math.inf):
            raise LdmError(f"alpha must be above 0, got {self.network_alpha:g} and {self.conv_alpha:g}")


class Addition(nn.Module):
    """The trained change of one linear layer or convolution, W + alpha / rank * up @ down.

    With DoRA, the columns of the sum also get trained norms: W' = m (W + dW) / |W + dW|.
    """

    def __init__(
        self,
        base: nn.Linear | nn.Conv2d,
        *,
        rank: int,
        alpha: float,
        dora: bool,
        generator: torch.Generator,
    ) -> None:
        """Random `down`, zero `up`: at first, nothing is changed. Hu et al. 2021, section 4.1."""
        super().__init__()
        with torch.device("meta"):  # the weights are drawn below, from our own generator
            if isinstance(base, nn.Linear):
                self.lora_down = nn.Linear(base.in_features, rank, bias=False)
                self.lora_up = nn.Linear(rank, base.out_features, bias=False)
            else:
                # The networks have no groups, no dilation and only zero padding.
                shape: Any = (base.kernel_size, base.stride, base.padding)
                self.lora_down = nn.Conv2d(base.in_channels, rank, *shape, bias=False)
                self.lora_up = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        self.to_empty(device="cpu")
        self.scale = alpha / rank
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        # Uniform as in kohya's trainer; the paper draws from a Gaussian.
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.lora_up.weight)
        self.to(base.weight.device)
        self.dora_scale = nn.Parameter(self.column_norms(base.weight).detach()) if dora else None

    def column_norms(self, weight: Tensor) -> Tensor:
        """|W + dW| of what each input is multiplied by: (1, in) or (1, in, 1, 1), float32.

        The columns are those of the paper, and of the files that all peers read alike; PEFT and the later
        LyCORIS take the rows.
        """
        product = self.lora_up.weight.flatten(1) @ self.lora_down.weight.flatten(1)
        changed = weight.float() + self.scale * product.reshape(weight.shape)
        axes = [axis for axis in range(weight.ndim) if axis != 1]
        return changed.square().sum(axes, keepdim=True).sqrt().clamp(min=torch.finfo(torch.float32).tiny)

    def before(self, base: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Hook before the layer: DoRA scales columns of the weight, which is to scale the inputs."""
        if self.dora_scale is None:
            return None
        assert isinstance(base, nn.Linear | nn.Conv2d)
        with torch.no_grad():  # the norm counts as a constant: Liu et al. 2024, section 4.3
            norms = self.column_norms(base.weight)
        x, *others = inputs
        return (x * (self.dora_scale / norms).to(x.dtype), *others)

    def after(self, base: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Hook after the layer: adds what the change adds to its output."""
        added = self.lora_up(self.lora_down(inputs[0].to(self.lora_down.weight.dtype)))
        return output + (self.scale * added).to(output.dtype)


class LoraNetwork(nn.ModuleDict):
    """All additions to a model, by their names in a file: its state dict is what a LoRA file holds."""

    def __init__(
        self, models: Models, config: NetworkConfig, *, unet: bool = True, text: bool = True, seed: int = 0
    ) -> None:
        """Additions that change nothing yet. unet, text: whether the UNet, the text encoders get some."""
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        networks = parts(models)
        self.layers: dict[str, nn.Linear | nn.Conv2d] = {}  # the model's own, no children of this module
        for place in trained(models, convolutions=config.conv_dim > 0):
            if unet if place.part == "unet" else text:
                base = networks[place.part].get_submodule(place.name)
                assert isinstance(base, nn.Linear | nn.Conv2d)
                wide = isinstance(base, nn.Conv2d) and base.kernel_size != (1, 1)
                rank = config.conv_dim if wide else config.network_dim
                alpha = config.conv_alpha if wide else config.network_alpha
                key = kohya_key(models, place)
                self[key] = Addition(base, rank=rank, alpha=alpha, dora=config.dora, generator=generator)
                self.layers[key] = base

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While this is open, the model has the additions; those that are trained get gradients."""
        hooks = []
        try:
            for key, addition in self.items():
                assert isinstance(addition, Addition)
                hooks.append(self.layers[key].register_forward_pre_hook(addition.before))
                hooks.append(self.layers[key].register_forward_hook(addition.after))
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def groups(self, unet_lr: float, text_encoder_lr: float) -> list[dict[str, Any]]:
        """The parameters of the UNet and of the text encoders, for an optimizer; see `loop.Run`."""
        found = []
        for text, lr in ((False, unet_lr), (True, text_encoder_lr)):
            of_part = [p for key, p in self.named_parameters() if key.startswith("lora_te") == text]
            if of_part:
                found.append({"params": of_part, "lr": lr, "factor": lr})
        return found
