"""What changes a run wraps the denoiser: functions that return a `Denoise`."""

import torch
from torch import Tensor

from ldm.denoise import Conditioning, Denoise, Denoiser


def cfg(
    denoiser: Denoiser,
    cond: Conditioning,
    uncond: Conditioning | None,
    scale: float,
    rescale: float = 0.0,
) -> Denoise:
    """Classifier-free guidance: away from `uncond`, towards `cond`.

    denoised = uncond + scale * (cond - uncond). Ho and Salimans 2022, arXiv:2207.12598, equation 6, with
    scale = w + 1. At scale 1, or without `uncond`, only the conditional half is computed.
    rescale: 0 to 1, how far to bring the contrast back to that of the conditional prediction (`rescaled`).
    """
    if uncond is None or scale == 1.0:
        return lambda x, sigma: denoiser(x, sigma, cond)

    if _same_length(cond, uncond):
        both = cond.joined(uncond)

        def predict(x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
            positive, negative = denoiser(torch.cat([x, x]), sigma, both).chunk(2)
            return positive, negative
    else:

        def predict(x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
            return denoiser(x, sigma, cond), denoiser(x, sigma, uncond)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        positive, negative = predict(x, sigma)
        guided = negative + scale * (positive - negative)
        return rescaled(x, sigma, guided, positive, rescale) if rescale > 0 else guided

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


def _same_length(a: Conditioning, b: Conditioning) -> bool:
    if a.context is None or b.context is None:
        return a.context is b.context
    return a.context.shape[1] == b.context.shape[1]
