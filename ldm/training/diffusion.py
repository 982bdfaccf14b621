"""Training the text encoder and the UNet together on cached latents.

The objective is denoising score matching in the v-parameterisation (Salimans and Ho 2022, arXiv:2202.00512,
appendix D), with weights in the manner of min-SNR (Hang et al. 2023, arXiv:2303.09556, equation 8).
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ldm.schedules import NoiseSchedule
from ldm.text.clip import ClipTextConfig, ClipTextModel
from ldm.text.tokenizer import Tokenizer
from ldm.training.icons import BACKGROUNDS, WHITE, Icon, IconSet, caption, composite
from ldm.training.loop import LoopConfig, Run, averaged, rank_and_world
from ldm.unet import ResBlock, SpatialTransformer, UNet, UNetConfig
from ldm.vae import AutoencoderKL

COLOURED = 0.25  # share of pictures on a named colour, the rest on white
EMPTY = 0.10  # share of empty captions, for guidance (Ho and Salimans 2022, arXiv:2207.12598, section 3.2)
SOFT_SNR = 5.0  # signal-to-noise ratio at which a level counts half
NOISES = 2  # noise levels for each picture of a batch: they share one run of the text encoder


class TextToImage(nn.Module):
    """The two networks trained together."""

    def __init__(self, unet: UNetConfig, text: ClipTextConfig) -> None:
        super().__init__()
        self.unet = UNet(unet)
        self.text = ClipTextModel(text)

    @torch.no_grad()
    def initialise(self) -> None:
        """The start of the originals: every residual branch and the output are zero, the embeddings small.

        Dhariwal and Nichol 2021 (guided-diffusion's `zero_module`); Radford et al. 2021, section 2.4.
        """
        last = [self.unet.out[2]]
        for module in self.unet.modules():
            if isinstance(module, ResBlock):
                last.append(module.out_layers[3])
            elif isinstance(module, SpatialTransformer):
                last.append(module.proj_out)
        for parameter in (p for module in last for p in module.parameters()):
            parameter.zero_()
        embeddings = self.text.text_model.embeddings
        nn.init.normal_(embeddings.token_embedding.weight, std=0.02)
        nn.init.normal_(embeddings.position_embedding.weight, std=0.01)


@dataclass(frozen=True)
class LatentViews:
    """Every picture, encoded once for each of its views.

    z: (M, 2 + K, D, h, w) float16: upright on white, mirrored on white, then K views on named colours.
    colours: (M, K) names of those colours.
    """

    icons: Sequence[Icon]
    z: Tensor
    colours: Sequence[Sequence[str]]


def view_pictures(data: IconSet, colours: Sequence[Sequence[str]], view: int) -> Iterator[Tensor]:
    """All training pictures in one view, as `LatentViews` numbers them: batches (B, 3, S, S) in [-1, 1]."""
    indices = data.indices(holdout=False)
    mirrored = torch.tensor([data.icons[i].flip and view % 2 == 1 for i in indices])[:, None, None, None]
    images = data.images[indices]  # (M, 4, S, S) uint8
    images = torch.where(mirrored, images.flip(3), images)
    backgrounds = [WHITE if view < 2 else BACKGROUNDS[names[view - 2]] for names in colours]
    for batch, colour in zip(images.split(64), torch.tensor(backgrounds).split(64), strict=True):
        yield composite(batch, colour)


@torch.no_grad()
def encode_views(vae: AutoencoderKL, data: IconSet, *, coloured: int, seed: int) -> LatentViews:
    """Run the frozen autoencoder over all training pictures. Deterministic in `seed`."""
    rng = random.Random(seed)
    device = vae.quant_conv.weight.device
    icons = [data.icons[i] for i in data.indices(holdout=False)]
    colours = [rng.sample(sorted(BACKGROUNDS), coloured) for _ in icons]
    views = []
    total = len(icons) * (2 + coloured)
    with tqdm(total=total, desc="encode", unit="picture", dynamic_ncols=True) as bar:
        for view in range(2 + coloured):
            z = []
            for batch in view_pictures(data, colours, view):
                z.append(vae.encode(batch.to(device)).half().cpu())
                bar.update(len(batch))
            views.append(torch.cat(z))
    return LatentViews(icons, torch.stack(views, dim=1), colours)


def choose_view(views: LatentViews, index: int, rng: random.Random) -> tuple[int, str]:
    """One view of a picture, and a caption that is true of it."""
    icon, names = views.icons[index], views.colours[index]
    if names and rng.random() < COLOURED:
        colour = rng.randrange(len(names))
        return 2 + colour, caption(icon, rng, names[colour])
    return rng.randrange(2), caption(icon, rng)


def draw_view(views: LatentViews, index: int, rng: random.Random) -> tuple[Tensor, str]:
    """One latent (D, h, w) of a picture and a caption that is true of it."""
    view, text = choose_view(views, index, rng)
    return views.z[index, view], "" if rng.random() < EMPTY else text


def stratified_timesteps(count: int, steps: int, generator: torch.Generator) -> Tensor:
    """`count` timesteps in 0 .. steps - 1, one from each of `count` equal strata: less noise in the loss.

    Kingma et al. 2021, arXiv:2107.00630, appendix I.1.
    """
    offset = torch.rand(1, generator=generator)
    return (((torch.arange(count) + offset) / count) * steps).long().clamp(max=steps - 1)


def v_loss(
    predict: Callable[[Tensor, Tensor], Tensor], z: Tensor, noise: Tensor, t: Tensor, abar: Tensor
) -> Tensor:
    """Weighted error of the velocity v = sqrt(abar) noise - sqrt(1 - abar) z.

    predict: (x_t, t) -> v. z, noise: (B, D, h, w); t: (B,) int64; abar: (T,) cumulative alphas.
    """
    a = abar[t][:, None, None, None]
    x = a.sqrt() * z + (1 - a).sqrt() * noise
    target = a.sqrt() * noise - (1 - a).sqrt() * z
    error = (predict(x, t).float() - target).square().mean(dim=(1, 2, 3))  # (B,)
    snr = abar[t] / (1 - abar[t])
    # Levels of little noise count less, as in min-SNR weighting, but those of much noise count whole: there
    # the caption decides what is drawn, and min-SNR, SNR / (SNR + 1) at that end, would hardly teach it.
    return (error * SOFT_SNR / (SOFT_SNR + snr)).mean()


def train_diffusion(
    views: LatentViews,
    unet: UNetConfig,
    text: ClipTextConfig,
    loop: LoopConfig,
    folder: Path,
    *,
    batch_size: int,
    device: torch.device,
    seconds: float,
    compile: bool = False,
    every: tuple[int, Callable[[TextToImage], None]] | None = None,
) -> tuple[TextToImage, bool]:
    """Train, or go on training. Returns the averaged model and whether all steps are done."""
    torch.manual_seed(loop.seed)
    model = TextToImage(unet, text)
    model.initialise()
    model.to(device)
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - not in torch's stubs
    run = Run(model, loop, folder)
    run.resume()
    _, world = rank_and_world()
    count = batch_size // world // NOISES
    tokenizer = Tokenizer()
    abar = torch.tensor(NoiseSchedule.scaled_linear().alphas_cumprod, dtype=torch.float32, device=device)
    weights = torch.tensor([icon.weight for icon in views.icons])
    text_model = torch.compile(model.text) if compile else model.text
    unet_model = torch.compile(model.unet) if compile else model.unet

    def loss(generator: torch.Generator) -> Tensor:
        chosen = torch.multinomial(weights, count, replacement=True, generator=generator).tolist()
        rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
        drawn = [draw_view(views, i, rng) for i in chosen]
        z = torch.stack([latent for latent, _ in drawn]).float().to(device).repeat(NOISES, 1, 1, 1)
        tokens = torch.tensor(
            [tokenizer.pad(tokenizer.encode(words), text.context_length) for _, words in drawn]
        ).to(device)
        t = stratified_timesteps(len(z), len(abar), generator).to(device)
        noise = torch.randn(z.shape, generator=generator).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            features = text_model(tokens, pooled=True)
            assert features.pooled is not None
            context, vector = features.hidden.repeat(NOISES, 1, 1), features.pooled.repeat(NOISES, 1)
            return v_loss(lambda x, t: unet_model(x, t, context, vector), z, noise, t, abar)

    action = None
    if every is not None:
        steps, show = every
        action = (steps, lambda: show(average_of(model, run)))
    done = run.train(loss, samples_per_step=batch_size, seconds=seconds, every=action)
    return average_of(model, run), done


def average_of(model: TextToImage, run: Run) -> TextToImage:
    """A copy of the model with the averaged weights, in evaluation mode."""
    with torch.device("meta"):
        copy = TextToImage(model.unet.config, model.text.config)
    copy.load_state_dict(averaged(model, run.ema), assign=True)
    return copy.eval()
