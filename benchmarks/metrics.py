"""Numbers that the evaluation reports, each with its uncertainty."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

RESAMPLES = 10_000
COPY_SIDE = 32  # pixels; at this size pictures are compared by what they show, not by the sharpness of edges


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % bootstrap interval (percentile method) over n captions.

    Efron 1979, "Bootstrap methods: another look at the jackknife".
    """

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def resamples(n: int, seed: int = 0) -> np.ndarray:
    """(RESAMPLES, n) positions, drawn with replacement."""
    return np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))


def mean(values: Tensor) -> Estimate:
    """values: (n,), one for each caption."""
    array = values.double().numpy()
    draws = array[resamples(len(array))].mean(axis=1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return Estimate(float(array.mean()), float(low), float(high), len(array))


def ratio(values: Tensor, reference: Tensor) -> Estimate:
    """Mean of `values` over the mean of `reference`, both (n,) and of the same captions in the same order.

    Captions are drawn with both of their values, so that hard captions are hard for both. Raises
    ZeroDivisionError if the reference's mean is 0: then it is no scale for anything.
    """
    a, b = values.double().numpy(), reference.double().numpy()
    if b.mean() == 0:
        raise ZeroDivisionError("the reference's mean is 0")
    chosen = resamples(len(a))
    draws = a[chosen].mean(axis=1) / np.maximum(b[chosen].mean(axis=1), 1 / len(b))
    low, high = np.quantile(draws, (0.025, 0.975))
    return Estimate(float(a.mean() / b.mean()), float(low), float(high), len(a))


def nearest(pictures: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """How far each picture is from the most similar reference or its mirror image, and which one it is.

    pictures: (B, 3, S, S), references: (R, 3, S, S), in [-1, 1], S at least COPY_SIDE.
    Returns (B,) root mean square differences of colours from 0 (the same) to 1 (black and white), measured at
    COPY_SIDE pixels, and (B,) int64 positions.
    """

    def flat(x: Tensor) -> Tensor:
        return F.interpolate(x, size=(COPY_SIDE, COPY_SIDE), mode="area").flatten(1) / 2

    values = flat(pictures)
    # Differences, not the expanded square: that would lose small distances to rounding.
    distances = torch.minimum(
        *(
            torch.cdist(values, flat(side), compute_mode="donot_use_mm_for_euclid_dist")
            for side in (references, references.flip(3))
        )
    )
    best = distances.min(dim=1)
    return best.values / values.shape[1] ** 0.5, best.indices


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair, in dB. x, y: (B, C, H, W) in [-1, 1]; returns (B,)."""
    return 10 * torch.log10(4 / (x - y).square().mean(dim=(1, 2, 3)))
