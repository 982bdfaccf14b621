"""Training of text encoder and UNet: the objective, the pictures and captions it sees, and that it learns."""

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ldm
from ldm.errors import LdmError
from ldm.schedules import NoiseSchedule
from ldm.text.clip import ClipTextConfig
from ldm.text.tokenizer import Tokenizer
from ldm.training.default_model import Scope, train_default_model
from ldm.training.diffusion import (
    COLOURED,
    EMPTY,
    SOFT_SNR,
    LatentViews,
    TextToImage,
    draw_view,
    encode_views,
    stratified_timesteps,
    train_diffusion,
    v_loss,
)
from ldm.training.icons import BACKGROUNDS, composite
from ldm.training.loop import LoopConfig
from ldm.unet import UNetConfig
from ldm.vae import AutoencoderKL, VAEConfig
from tests.training.icon_set import icon_set

DATA = icon_set()
CPU = torch.device("cpu")
ABAR = torch.tensor(NoiseSchedule.scaled_linear().alphas_cumprod, dtype=torch.float32)
VAE = VAEConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, mid_attention=False)
UNET = UNetConfig(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    depth=(0, 1),
    context_dim=128,
    num_heads=4,
    vector_dim=128,
)
TEXT = ClipTextConfig(width=128, layers=1, heads=2, context_length=16, quick_gelu=True)
LOOP = LoopConfig(steps=30, lr=3e-3, warmup=1, decay=0.0, ema_decay=0.8)


@pytest.fixture(scope="module")
def views() -> LatentViews:
    torch.manual_seed(0)
    vae = AutoencoderKL(VAE).eval().requires_grad_(False)
    vae.quant_conv.weight *= 20  # random weights make latents of little variance
    return encode_views(vae, DATA, coloured=2, seed=0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- the objective


def batch(count: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    z, noise = (torch.randn(count, 4, 8, 8, generator=generator(i)) for i in (0, 1))
    return z, noise, torch.tensor([0, 50, 200, 500, 900, 999])


def test_a_perfect_prediction_has_no_loss():
    z, noise, t = batch()
    signal, rest = (a.sqrt()[:, None, None, None] for a in (ABAR[t], 1 - ABAR[t]))
    assert v_loss(lambda x, t: signal * noise - rest * z, z, noise, t, ABAR).item() == 0


def test_levels_of_much_noise_count_whole_and_those_of_little_noise_hardly():
    z, noise, _ = batch()
    snr = ABAR / (1 - ABAR)
    half = int((snr - SOFT_SNR).abs().argmin())  # the level that counts half

    def share(t: int) -> float:
        """Of an error of 1 in v, at one level."""
        level = torch.full((len(z),), t)
        a = ABAR[level][:, None, None, None]
        v = a.sqrt() * noise - (1 - a).sqrt() * z
        return v_loss(lambda *_: v + 1, z, noise, level, ABAR).item()

    assert share(999) == pytest.approx(1, abs=0.01)
    assert share(half) == pytest.approx(0.5, abs=0.01)
    assert share(0) < 0.01
    shares = [share(t) for t in range(0, 1000, 111)]
    assert shares == sorted(shares)


def test_timesteps_are_one_of_each_stratum():
    for count in (1, 7, 64):
        for seed in range(20):
            t = stratified_timesteps(count, 1000, generator(seed))
            for i, step in enumerate(t.tolist()):  # a number from [i, i + 1) * 1000 / count, rounded down
                assert i * 1000 // count <= step < (i + 1) * 1000 / count
    drawn = torch.cat([stratified_timesteps(8, 1000, generator(seed)) for seed in range(3000)])
    assert len(drawn.unique()) == 1000  # all of them, 0 and 999 included


# --- what it sees


def test_every_picture_is_encoded_upright_mirrored_and_on_named_colours(views: LatentViews):
    torch.manual_seed(0)
    vae = AutoencoderKL(VAE).eval().requires_grad_(False)
    vae.quant_conv.weight *= 20
    train = DATA.indices(holdout=False)
    assert views.z.shape == (11, 4, 4, 8, 8)
    assert views.z.dtype == torch.float16
    assert [icon.subject for icon in views.icons] == [DATA.icons[i].subject for i in train]

    def encoded(image: torch.Tensor, colour: tuple[int, int, int]) -> torch.Tensor:
        return vae.encode(composite(image[None], colour))[0].half()

    white = (255, 255, 255)
    for i, (icon, names) in enumerate(zip(views.icons, views.colours, strict=True)):
        image = DATA.images[train[i]]
        mirrored = image.flip(2) if icon.flip else image
        expected = [encoded(image, white), encoded(mirrored, white)]
        expected += [encoded(image, BACKGROUNDS[names[0]]), encoded(mirrored, BACKGROUNDS[names[1]])]
        # Half precision is 1e-3 of the value, and the batch size changes the last digits before it.
        torch.testing.assert_close(views.z[i], torch.stack(expected), atol=2e-3, rtol=2e-3)


def test_captions_name_the_background_that_the_latent_has(views: LatentViews):
    rng = random.Random(0)
    draws = [(index, *draw_view(views, index, rng)) for index in range(11) for _ in range(200)]
    coloured = 0
    for index, z, text in draws:
        view = next(k for k in range(4) if torch.equal(z, views.z[index, k]))
        named = [name for name in BACKGROUNDS if f"{name} background" in text]
        if text and view >= 2:
            assert named == [views.colours[index][view - 2]]
        else:
            assert named == []
        coloured += view >= 2
    empty = sum(text == "" for _, _, text in draws)
    # Five standard deviations of 2200 draws.
    assert abs(coloured / len(draws) - COLOURED) < 0.05
    assert abs(empty / len(draws) - EMPTY) < 0.035


# --- that it learns


def train(views: LatentViews, folder: Path, steps: int = 30) -> TextToImage:
    loop = replace(LOOP, steps=steps)
    model, done = train_diffusion(
        views, UNET, TEXT, loop, folder, batch_size=16, device=CPU, seconds=float("inf")
    )
    assert done
    return model


@torch.no_grad()
def loss_of(model: TextToImage, views: LatentViews) -> float:
    """The mean loss over all pictures, with fixed noise and captions."""
    tokenizer = Tokenizer()
    tokens = torch.tensor([tokenizer.pad(tokenizer.encode(icon.subject), 16) for icon in views.icons])
    features = model.text(tokens, pooled=True)
    noise = torch.randn(11, 4, 8, 8, generator=generator(9))
    losses = [
        v_loss(
            lambda x, t: model.unet(x, t, features.hidden, features.pooled),
            views.z[:, 0].float(),
            noise,
            torch.full((11,), t),
            ABAR,
        ).item()
        for t in (100, 400, 700)
    ]
    return sum(losses) / 3


def test_the_untrained_model_predicts_zero(views: LatentViews):
    torch.manual_seed(0)
    model = TextToImage(UNET, TEXT)
    model.initialise()
    x = torch.randn(2, 4, 8, 8)
    out = model.unet(x, torch.tensor([3.0, 900.0]), torch.randn(2, 16, 128), torch.randn(2, 128))
    assert not out.any()


def test_thirty_steps_already_teach_something(views: LatentViews, tmp_path: Path):
    start = TextToImage(UNET, TEXT)
    start.initialise()
    trained = train(views, tmp_path)
    assert not trained.training
    assert loss_of(trained, views) < 0.9 * loss_of(start, views)


def test_a_run_in_pieces_gives_the_same_model_to_the_bit(views: LatentViews, tmp_path: Path):
    whole = train(views, tmp_path / "whole", 5)
    train(views, tmp_path / "pieces", 2)
    parts = train(views, tmp_path / "pieces", 5)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, parts.state_dict()[name]), name


def test_the_model_so_far_can_be_looked_at(views: LatentViews, tmp_path: Path):
    seen: list[TextToImage] = []
    model, _ = train_diffusion(
        views,
        UNET,
        TEXT,
        replace(LOOP, steps=2),
        tmp_path,
        batch_size=4,
        device=CPU,
        seconds=float("inf"),
        every=(1, seen.append),
    )
    assert len(seen) == 2
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, seen[1].state_dict()[name])
    first, second = (next(iter(model.parameters())) for model in seen)
    assert not torch.equal(first, second)


# --- the whole recipe


SCOPE = Scope(
    pixels=32,
    vae=VAE,
    vae_loop=replace(LOOP, steps=2),
    vae_batch=4,
    crop=16,
    coloured=1,
    unet=UNET,
    text=TEXT,
    loop=replace(LOOP, steps=2),
    batch=4,
)


def recipe(folder: Path, seconds: float = float("inf")) -> ldm.Models | None:
    return train_default_model(
        DATA, SCOPE, folder, device=CPU, seconds=seconds, compile=False, preview_every=1
    )


def test_the_recipe_makes_a_checkpoint_that_loads_as_the_embedded_family(tmp_path: Path):
    models = recipe(tmp_path)
    assert models is not None
    models.save(tmp_path / "model.safetensors", dtype=torch.float16)
    for name in ("model", "preview"):
        loaded = ldm.load(tmp_path / f"{name}.safetensors")
        assert loaded.family.name == "embedded"
        assert loaded.denoiser.prediction.value == "v"
        request = ldm.Request(prompt="a red disc", steps=2, width=32, height=32)
        assert ldm.txt2img(loaded, request)[0].size == (32, 32)


def test_the_model_can_be_watched_while_it_trains(tmp_path: Path):
    """As scripts/train_default_model.py does: a picture after each step, and the same model in the end."""
    seen = []

    def watch(models: ldm.Models) -> None:
        [image] = ldm.txt2img(models, ldm.Request(prompt="a red disc", steps=1, width=32, height=32))
        seen.append(image.size)

    watched, alone = (
        train_default_model(
            DATA, SCOPE, tmp_path / name, device=CPU, seconds=math.inf, compile=False, preview_every=1, **more
        )
        for name, more in (("watched", {"watch": watch}), ("alone", {}))
    )
    assert seen == [(32, 32)] * SCOPE.loop.steps
    assert watched is not None
    assert alone is not None
    weights = alone.state_dict()
    assert all(torch.equal(w, weights[name]) for name, w in watched.state_dict().items())


def test_the_recipe_goes_on_where_it_was_stopped(tmp_path: Path):
    assert recipe(tmp_path / "pieces", seconds=0.0) is None
    pieces, whole = recipe(tmp_path / "pieces"), recipe(tmp_path / "whole")
    assert pieces is not None
    assert whole is not None
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, pieces.state_dict()[name]), name


def test_latents_of_other_pictures_are_refused(tmp_path: Path):
    recipe(tmp_path)
    fewer = type(DATA)(DATA.images[:5], DATA.icons[:5], DATA.facts)
    with pytest.raises(LdmError, match="other pictures"):
        train_default_model(fewer, SCOPE, tmp_path, device=CPU, seconds=1.0, compile=False, preview_every=1)


def test_pictures_of_another_size_are_refused(tmp_path: Path):
    with pytest.raises(LdmError, match="32 px, got 16"):
        train_default_model(
            icon_set(16), SCOPE, tmp_path, device=CPU, seconds=1.0, compile=False, preview_every=1
        )
