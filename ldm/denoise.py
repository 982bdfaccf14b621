"""From a network's prediction to a denoised latent: the one interface that all samplers share.

Everything here is in the variance-exploding view: a noisy latent is x = x0 + sigma * noise, with x0 of about
unit variance. The networks were trained in the variance-preserving view, sqrt(abar) x0 + sqrt(1 - abar)
noise, which is x / sqrt(1 + sigma^2); `Denoiser` is the only place that knows this (Karras et al. 2022,
arXiv:2206.00364, section 3 and table 1).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from ldm.schedules import NoiseSchedule

Denoise = Callable[[Tensor, float], Tensor]
"""(x (B, C, h, w) float32, sigma) -> the denoised latent, same shape."""


class Network(Protocol):
    """What predicts: the UNet, a controlled or compiled one, a test's closed form. Shapes: `UNet.forward`."""

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        control: Sequence[Tensor] | None = None,
        adapter: Mapping[int, Tensor] | None = None,
    ) -> Tensor: ...


class Prediction(Enum):
    """What a network was trained to predict."""

    EPS = "eps"  # the noise (Ho et al. 2020, arXiv:2006.11239)
    V = "v"  # sqrt(abar) noise - sqrt(1 - abar) x0 (Salimans and Ho 2022, arXiv:2202.00512)


@dataclass(frozen=True)
class Conditioning:
    """What a network is told beside the noisy latent. None: this network has no such input."""

    context: Tensor | None = None  # (B, N, D) for cross-attention
    vector: Tensor | None = None  # (B, V) SDXL's pooled text and sizes, or (B,) int64 classes
    concat: Tensor | None = None  # (B, C, h, w) further input channels: mask, masked picture, depth

    def expanded(self, batch_size: int) -> "Conditioning":
        """A batch of one, repeated without copying."""

        def expand(a: Tensor | None) -> Tensor | None:
            return None if a is None else a.expand(batch_size, *a.shape[1:])

        return Conditioning(expand(self.context), expand(self.vector), expand(self.concat))

    def joined(self, other: "Conditioning") -> "Conditioning":
        """Both in one batch, this one first. The contexts must be equally long."""

        def join(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return None if a is None or b is None else torch.cat([a, b])

        return Conditioning(
            join(self.context, other.context),
            join(self.vector, other.vector),
            join(self.concat, other.concat),
        )


@dataclass(frozen=True)
class Denoiser:
    """A network with the knowledge of what it predicts and on which noise levels it was trained."""

    network: Network
    schedule: NoiseSchedule
    prediction: Prediction
    dtype: torch.dtype = torch.float32  # in which the network computes

    def __call__(self, x: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        """Estimate x0.

        x: (B, C, h, w) float32, the latent with noise of standard deviation `sigma`.
        Returns (B, C, h, w) float32.

        eps: D = x - sigma eps; v: D = x / (1 + sigma^2) - v sigma / sqrt(1 + sigma^2).
        """
        scale = 1 / math.sqrt(1 + sigma**2)
        model_input = x * scale
        if conditioning.concat is not None:
            model_input = torch.cat([model_input, conditioning.concat], dim=1)
        t = torch.full((len(x),), self.schedule.t(sigma), device=x.device)
        output = self.network(
            model_input.to(self.dtype), t, conditioning.context, conditioning.vector
        ).float()
        if self.prediction is Prediction.EPS:
            return x - sigma * output
        return x * scale**2 - output * (sigma * scale)
