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
    negative: Conditioning | None = None  # None: not needed, see `needs_negative`
    bare: Conditioning | None = None  # `negative` without the given picture, for InstructPix2Pix

    @classmethod
    def one(cls, positive: Conditioning, negative: Conditioning | None = None) -> "Guides":
        """One prompt, of weight 1."""
        return cls(((positive, 1.0),), negative)

    def alone(self) -> "Guides":
        """Towards the prompts only."""
        return Guides(self.positive)


def needs_negative(weights: Sequence[float], scale: float) -> bool:
    """Whether the prediction without the prompt counts: at scale 1 it cancels out of the formula of `cfg`."""
    return scale * sum(weights) != 1.0


def cfg(
    denoiser: Denoiser,
    guides: Guides,
    scale: float,
    rescale: float = 0.0,
    *,
    image_scale: float = 1.0,
    away: Denoiser | None = None,
) -> Denoise:
    """Classifier-free guidance, with any number of prompts.

    denoised = D(negative) + scale * sum of w_i (D(positive_i) - D(negative)). Ho and Salimans 2022,
    arXiv:2207.12598, equation 6, with scale = w + 1; for several prompts Liu et al. 2022, arXiv:2206.01714,
    equation 11. Without `negative`, the mean of the positive predictions.
    With `bare`, the first term is D(bare) + image_scale (D(negative) - D(bare)): Brooks et al. 2022,
    arXiv:2211.09800, equation 3.
    rescale: 0 to 1, how far to bring the contrast back to that of the prediction at scale 1 (`rescaled`).
    away: predicts the negative half, if another denoiser than for the positive one shall do that.
    """
    conditionings, weights = zip(*guides.positive, strict=True)
    pairs = [(denoiser, one) for one in conditionings]
    if guides.negative is not None and (guides.bare is not None or needs_negative(weights, scale)):
        pairs += [(away or denoiser, one) for one in (guides.negative, guides.bare) if one is not None]
    batches = [*_batches(pairs)]

    def predict(x: Tensor, sigma: float) -> list[Tensor]:
        return [
            one
            for count, listener, batch in batches
            for one in listener(torch.cat([x] * count) if count > 1 else x, sigma, batch).chunk(count)
        ]

    def weighted(predictions: Sequence[Tensor]) -> Tensor:
        return reduce(
            torch.add, (p if w == 1.0 else w * p for w, p in zip(weights, predictions, strict=True))
        )

    if len(pairs) == len(weights):
        total = sum(weights)
        return lambda x, sigma: (
            weighted(predict(x, sigma)) if total == 1.0 else weighted(predict(x, sigma)) / total
        )

    def denoise(x: Tensor, sigma: float) -> Tensor:
        found = predict(x, sigma)
        predictions, (least, *bare) = found[: len(weights)], found[len(weights) :]
        direction = weighted([p - least for p in predictions])
        base = bare[0] + image_scale * (least - bare[0]) if bare else least
        guided = base + scale * direction
        return rescaled(x, sigma, guided, base + direction, rescale) if rescale > 0 else guided

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


def _batches(
    pairs: Sequence[tuple[Denoiser, Conditioning]],
) -> Iterator[tuple[int, Denoiser, Conditioning]]:
    """Neighbours with the same denoiser and equally long contexts in one batch, and how many they are."""

    def kind(pair: tuple[Denoiser, Conditioning]) -> tuple[int, int | None]:
        denoiser, one = pair
        return id(denoiser), None if one.context is None else one.context.shape[1]

    for _, group in groupby(pairs, kind):
        listeners, joined = zip(*group, strict=True)
        yield len(joined), listeners[0], reduce(Conditioning.joined, joined)
