"""Training a ControlNet for canny edges on the embedded model, which itself stays as it is.

Zhang, Rao and Agrawala 2023, arXiv:2302.05543, section 3.3: the model's own objective, with the hint as one
more input and half of the captions empty, so that the hint must tell what the words do not.
"""

import random
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.controlnet import ControlNet, ControlNetConfig
from ldm.hints import canny
from ldm.images import to_pil
from ldm.models import Models
from ldm.text.clip import ClipTextModel
from ldm.text.tokenizer import Tokenizer
from ldm.training.diffusion import (
    LatentViews,
    choose_view,
    stratified_timesteps,
    v_loss,
    view_pictures,
)
from ldm.training.icons import IconSet
from ldm.training.loop import LoopConfig, Run, averaged, rank_and_world
from ldm.unet import UNet
from ldm.vae import AutoencoderKL

EMPTY = 0.5  # share of empty captions (section 3.3)
LOOP = LoopConfig(
    steps=1200, lr=5e-4, warmup=50, decay=0.3, ema_decay=0.995, weight_decay=0.0, save_every=100
)
BATCH = 32


@torch.no_grad()
def copied(unet: UNet, factor: int) -> ControlNet:
    """A ControlNet that begins as a copy of the UNet's input half, without any effect.

    factor: of the autoencoder. The convolutions behind each block begin as zero (section 3.1). The original
    begins with a zero at the end of the hint's network, too; here it is random, so that all of it learns from
    the first step on.
    """
    widths = ControlNetConfig().hint_widths[: factor.bit_length()]
    network = ControlNet(ControlNetConfig(unet=unet.config, hint_widths=widths))
    weights = {name: w.clone() for name, w in unet.state_dict().items() if name in network.state_dict()}
    network.load_state_dict(weights, strict=False)
    for layer in (network.zero_convs, network.middle_block_out):
        for parameter in layer.parameters():
            parameter.zero_()
    return network


def edges(pictures: Tensor) -> Tensor:
    """Canny edges of pictures (B, 3, S, S) in [-1, 1]: bool (B, S, S)."""
    hints = [np.asarray(canny(to_pil(picture)).convert("L")) for picture in pictures]
    return torch.from_numpy(np.stack(hints)) > 0


class Batches:
    """What a training step sees: latents, captions and the edges of the same pictures."""

    def __init__(self, data: IconSet, views: LatentViews) -> None:
        self.views = views
        count = views.z.shape[1]
        self.edges = torch.stack(  # (M, 2 + K, S, S)
            [
                torch.cat([edges(batch) for batch in view_pictures(data, views.colours, view)])
                for view in range(count)
            ],
            dim=1,
        )
        self.weights = torch.tensor([icon.weight for icon in views.icons])

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, list[str]]:
        """Latents (B, D, h, w), hints (B, 3, S, S) in [0, 1], captions."""
        chosen = torch.multinomial(self.weights, count, replacement=True, generator=generator).tolist()
        rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
        views, captions = zip(*(choose_view(self.views, i, rng) for i in chosen), strict=True)
        hints = self.edges[chosen, views].float()[:, None].expand(-1, 3, -1, -1)
        return (
            self.views.z[chosen, views].float(),
            hints,
            ["" if rng.random() < EMPTY else c for c in captions],
        )


def train_controlnet(
    models: Models,
    data: IconSet,
    views: LatentViews,
    loop: LoopConfig,
    folder: Path,
    *,
    batch_size: int,
    seconds: float = float("inf"),
) -> ControlNet | None:
    """Train, or go on training. Returns the averaged network when all steps are done, else None.

    models: the embedded model, whose networks are frozen. views: of `data`, by its autoencoder.
    """
    unet, vae, text = models.unet, models.vae, models.text[0]
    assert isinstance(vae, AutoencoderKL)  # for the type checker: so are the embedded model's parts
    assert isinstance(text, ClipTextModel)
    device, tokenizer = models.device, Tokenizer()
    batches = Batches(data, views)
    torch.manual_seed(loop.seed)
    network, unet = copied(unet, vae.config.factor).to(device), deepcopy(unet)
    for module in (network, unet):
        module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - not in torch's stubs
    run = Run(network, loop, folder)
    run.resume()
    count = batch_size // rank_and_world()[1]
    abar = torch.tensor(models.denoiser.schedule.alphas_cumprod, dtype=torch.float32, device=device)

    def loss(generator: torch.Generator) -> Tensor:
        z, hints, captions = batches.draw(count, generator)
        z, hints = z.to(device), hints.to(device)
        length = text.config.context_length
        tokens = torch.tensor([tokenizer.pad(tokenizer.encode(words), length) for words in captions])
        t = stratified_timesteps(count, len(abar), generator).to(device)
        noise = torch.randn(z.shape, generator=generator).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            with torch.no_grad():
                said = text(tokens.to(device), pooled=True)

            def predict(x: Tensor, t: Tensor) -> Tensor:
                residuals = network(x, network.features(hints), t, said.hidden, said.pooled)
                return unet(x, t, said.hidden, said.pooled, residuals)

            return v_loss(predict, z, noise, t, abar)

    if not run.train(loss, samples_per_step=batch_size, seconds=seconds):
        return None
    network.load_state_dict(averaged(network, run.ema))
    return network.eval().requires_grad_(False)
