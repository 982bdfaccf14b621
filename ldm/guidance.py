"""What changes a run wraps the denoiser: functions that return a `Denoise`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import groupby

import torch
from torch import Tensor

from ldm.denoise import Conditioning, Denoise, Denoiser


@dataclass(frozen=True, eq=False)
class Guides:
    """What leads one step: towards each of `positive` by its weight, away from `negative`."""

    positive: tuple[tuple[Conditioning, float], ...]
    negative: Conditioning | None  # None: not needed, see `needs_negative`

    @classmethod
    def one(cls, positive: Conditioning, negative: Conditioning | None = None) -> "Guides":
        """One prompt, of weight 1."""
        return cls(((positive, 1.0),), negative)


def needs_negative(weights: Sequence[float], scale: float) -> bool:
    """Whether the prediction without the prompt counts: at scale 1 it cancels out of the formula of `cfg`."""
    return scale * sum(weights) != 1.0


def cfg(denoiser: Denoiser, guides: Guides, scale: float, rescale: float = 0.0) -> Denoise:
    """Classifier-free guidance, with any number of prompts.

    denoised = D(negative) + scale * sum of w_i (D(positive_i) - D(negative)). Ho and Salimans 2022,
    arXiv:2207.12598, equation 6, with scale = w + 1; for several prompts Liu et al. 2022, arXiv:2206.01714,
    equation 11. Without `negative`, the mean of the positive predictions.
    rescale: 0 to 1, how far to bring the contrast back to that of the prediction at scale 1 (`rescaled`).
    """
    conditionings, weights = zip(*guides.positive, strict=True)
    negative = guides.negative if needs_negative(weights, scale) else None
    batches = [*_batches([*conditionings, *([] if negative is None else [negative])])]

    def predict(x: Tensor, sigma: float) -> list[Tensor]:
        return [
            one
            for count, batch in batches
            for one in denoiser(torch.cat([x] * count) if count > 1 else x, sigma, batch).chunk(count)
        ]

    def weighted(predictions: Sequence[Tensor]) -> Tensor:
        return reduce(
            torch.add, (p if w == 1.0 else w * p for w, p in zip(weights, predictions, strict=True))
        )

    if negative is None:
        total = sum(weights)
        return lambda x, sigma: (
            weighted(predict(x, sigma)) if total == 1.0 else weighted(predict(x, sigma)) / total
        )

    def denoise(x: Tensor, sigma: float) -> Tensor:
        *predictions, away = predict(x, sigma)
        direction = weighted([p - away for p in predictions])
        guided = away + scale * direction
        return rescaled(x, sigma, guided, away + direction, rescale) if rescale > 0 else guided

    return denoise


def rescaled(x: Tensor, sigma: float, guided: Tensor, positive: Tensor, amount: float) -> Tensor:
    """Give the guided prediction the standard deviation of the conditional one, by a share `amount`.

    Lin et al. 2023, arXiv:2305.08891, equations 15 and 16. Their networks predict v, so the deviations are
    compared in v, whatever the network predicts: up to a factor, v = D - x / (1 + sigma^2).
    """
    origin = x / (1 + sigma**2)
    v_guided, v_positive = guided - origin, positive - origin
    dims = tuple(range(1, x.ndim))
    ratio = v_positive.std(dims, keepdim=True) / v_guided.std(dims, keepdim=True)  # (B, 1, 1, 1)
    return origin + v_guided * (amount * ratio + (1 - amount))


def _batches(conditionings: Sequence[Conditioning]) -> Iterator[tuple[int, Conditioning]]:
    """Neighbours with equally long contexts in one batch: (how many, all of them)."""
    for _, group in groupby(conditionings, lambda c: None if c.context is None else c.context.shape[1]):
        joined = [*group]
        yield len(joined), reduce(Conditioning.joined, joined)
