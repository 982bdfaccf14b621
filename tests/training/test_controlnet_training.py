"""Training a ControlNet: it begins without effect, sees the right edges, learns, and resumes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.controlnet import Controlled, ControlNet, Prepared
from ldm.hints import canny
from ldm.images import to_pil
from ldm.models import Models
from ldm.training.controlnet import Batches, copied, train_controlnet
from ldm.training.diffusion import LatentViews, encode_views, view_pictures
from ldm.training.loop import LoopConfig
from ldm.vae import AutoencoderKL
from tests.tiny_families import tiny
from tests.training.icon_set import icon_set

DATA = icon_set()
LOOP = LoopConfig(steps=4, lr=3e-3, warmup=1, decay=0.0, ema_decay=0.0)


def models() -> Models:
    return tiny("embedded")


@pytest.fixture(scope="module")
def views() -> LatentViews:
    vae = models().vae
    assert isinstance(vae, AutoencoderKL)
    return encode_views(vae, DATA, coloured=1, seed=0)


@pytest.fixture(scope="module")
def batches(views: LatentViews) -> Batches:
    return Batches(DATA, views)


def train(
    views: LatentViews, folder: Path, loop: LoopConfig = LOOP, seconds: float = 60
) -> ControlNet | None:
    return train_controlnet(models(), DATA, views, loop, folder, batch_size=2, seconds=seconds)


def test_it_begins_as_a_copy_of_the_input_half_without_effect():
    unet = models().unet
    network = copied(unet, 4)
    assert network.factor == 4
    own = unet.state_dict()
    shared = [name for name in network.state_dict() if name in own]
    assert len(shared) == len([name for name in own if not name.startswith(("output_blocks.", "out."))])
    assert all(torch.equal(network.state_dict()[name], own[name]) for name in shared)
    x, context, y = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 128), torch.randn(1, 128)
    control = Prepared(network, network.features(torch.rand(1, 3, 32, 32)), (1.0,) * (len(network.skips) + 1))
    t = torch.tensor([500])
    assert torch.equal(Controlled(unet, [control])(x, t, context, y), unet(x, t, context, y))


def test_the_edges_belong_to_the_latents_of_the_same_view(views: LatentViews, batches: Batches):
    for view in range(views.z.shape[1]):
        pictures = torch.cat([*view_pictures(DATA, views.colours, view)])
        for i, picture in enumerate(pictures):
            expected = np.asarray(canny(to_pil(picture)).convert("L")) > 0
            assert np.array_equal(batches.edges[i, view].numpy(), expected)
    assert batches.edges.float().mean() > 0.02


def test_half_of_the_captions_are_empty_and_a_draw_depends_on_its_generator_alone(batches: Batches):
    def draw(seed: int, count: int = 400):
        return batches.draw(count, torch.Generator().manual_seed(seed))

    z, hints, captions = draw(0)
    again = draw(0)
    assert torch.equal(z, again[0])
    assert torch.equal(hints, again[1])
    assert captions == again[2] != draw(1)[2]
    assert 0.4 < captions.count("") / len(captions) < 0.6
    assert z.shape[1:] == (4, 8, 8)
    assert hints.shape[1:] == (3, 32, 32)
    assert set(hints.unique().tolist()) == {0.0, 1.0}


def test_only_the_controlnet_learns_and_a_resumed_run_equals_an_uninterrupted_one(
    views: LatentViews, tmp_path: Path
):
    before = {name: w.clone() for name, w in models().state_dict().items()}
    whole = train(views, tmp_path / "whole")
    assert whole is not None
    assert all(torch.equal(w, before[name]) for name, w in models().state_dict().items())
    assert all(layer[0].weight.abs().max() > 0 for layer in [*whole.zero_convs, whole.middle_block_out])
    assert not any(p.requires_grad for p in whole.parameters())

    half = train(views, tmp_path / "parts", replace(LOOP, steps=2))
    assert half is not None
    resumed = train(views, tmp_path / "parts")
    assert resumed is not None
    for name, w in resumed.state_dict().items():
        assert torch.equal(w, whole.state_dict()[name])


def test_a_session_may_end_early(views: LatentViews, tmp_path: Path):
    assert train(views, tmp_path, seconds=0) is None
