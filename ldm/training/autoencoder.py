"""Training the autoencoder: reconstruct crops of pictures through a narrow latent.

Rombach et al. 2022, arXiv:2112.10752, section 3.1, without the adversarial and perceptual terms: flat artwork
needs sharp edges, which an L1 loss on pixels and on their differences gives.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ldm.training.icons import IconSet, composite
from ldm.training.loop import LoopConfig, Run, averaged, rank_and_world
from ldm.vae import AutoencoderKL, VAEConfig

KL_WEIGHT = 1e-5  # keeps the latent bounded without adding visible noise
GRADIENT_WEIGHT = 1.0


def draw_crops(data: IconSet, train: Tensor, count: int, size: int, generator: torch.Generator) -> Tensor:
    """Random windows of random pictures on random colours.

    train: (M,) int64, the pictures to draw from. Returns (count, 3, size, size) in [-1, 1].
    """
    full = data.images.shape[-1]
    chosen = train[torch.randint(len(train), (count,), generator=generator)]
    corners = torch.randint(full - size + 1, (count, 2), generator=generator).tolist()
    crops = torch.stack(
        [data.images[i, :, y : y + size, x : x + size] for i, (y, x) in zip(chosen, corners, strict=True)]
    )
    # Half on white, as most pictures will be; half on any colour, so that every colour survives.
    colours = torch.randint(256, (count, 3), generator=generator)
    colours[torch.rand(count, generator=generator) < 0.5] = 255
    return composite(crops, colours)


def reconstruction_loss(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute error of pixels and of their horizontal and vertical differences."""
    error = y - x
    dx = (error[..., :, 1:] - error[..., :, :-1]).abs().mean()
    dy = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return error.abs().mean() + GRADIENT_WEIGHT * (dx + dy) / 2


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) per latent value. Kingma and Welling 2013, appendix B."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def train_autoencoder(
    data: IconSet,
    config: VAEConfig,
    loop: LoopConfig,
    folder: Path,
    *,
    batch_size: int,
    crop: int,
    device: torch.device,
    seconds: float,
) -> AutoencoderKL | None:
    """Train, or go on training. Returns the averaged, normalised model when all steps are done, else None."""
    torch.manual_seed(loop.seed)
    model = AutoencoderKL(config).to(device)
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - not in torch's stubs
    run = Run(model, loop, folder)
    run.resume()
    train = torch.tensor(data.indices(holdout=False))
    _, world = rank_and_world()

    def loss(generator: torch.Generator) -> Tensor:
        x = draw_crops(data, train, batch_size // world, crop, generator)
        h = crop // config.factor
        noise = torch.randn(len(x), config.embed_dim, h, h, generator=generator)
        x = x.to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            mean, logvar = model.moments(x)
            z = mean + torch.exp(0.5 * logvar) * noise.to(device)
            y = model.decode(z * config.scale)
        return reconstruction_loss(x, y.float()) + KL_WEIGHT * kl_divergence(mean.float(), logvar.float())

    done = run.train(loss, samples_per_step=batch_size, seconds=seconds)
    model.load_state_dict(averaged(model, run.ema))
    model.eval()
    if not done:
        return None
    normalise_latent(model, (composite(data.images[some]) for some in train.split(64)))
    return model


@torch.no_grad()
def normalise_latent(model: AutoencoderKL, pictures: Iterable[Tensor]) -> None:
    """Rescale the 1x1 convolutions around the latent so that encode() gives zero mean and unit variance.

    The usual way is to divide by one measured number, the scale factor. Here every latent channel is shifted
    and scaled by its own, and both are folded into the weights: the decoded picture stays the same, and the
    scale factor stays Stable Diffusion's 0.18215.

    pictures: batches (B, 3, H, W) in [-1, 1].
    """
    device = model.quant_conv.weight.device
    latents = torch.cat([model.encode(batch.to(device)) for batch in pictures])
    mean = latents.mean(dim=(0, 2, 3)) / model.config.scale  # (D,) of the unscaled latent
    std = latents.std(dim=(0, 2, 3))  # (D,): unscaled std / the wanted unscaled std, 1 / scale

    quant, post = model.quant_conv, model.post_quant_conv
    assert quant.bias is not None  # for the type checker: both convolutions are made with a bias
    assert post.bias is not None
    dim = model.config.embed_dim
    post.bias += post.weight[:, :, 0, 0] @ mean  # z = std * z' + mean, before z' changes meaning
    post.weight *= std[None, :, None, None]
    quant.bias[:dim] -= mean
    quant.bias[:dim] /= std
    quant.bias[dim:] -= 2 * std.log()  # the log variance of z' = (z - mean) / std
    quant.weight[:dim] /= std[:, None, None, None]
