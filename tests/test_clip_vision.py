"""The image encoder equals those of transformers and open_clip, with their weights."""

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from ldm.clip_vision import ClipVisionConfig, ClipVisionModel, from_openclip

TINY = ClipVisionConfig(
    image_size=28, patch=7, width=64, mlp_width=160, layers=2, heads=2, quick_gelu=True, projection_dim=24
)
# Outputs are of order 1 after two layers in float32.
ROUNDING = 1e-5


def ours(weights: dict[str, torch.Tensor]) -> ClipVisionModel:
    model = ClipVisionModel(TINY).requires_grad_(False)
    model.load_state_dict(weights)
    return model


def test_equals_transformers():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=160,
        projection_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
    )
    peer = CLIPVisionModelWithProjection(config).eval().requires_grad_(False)
    for weight in peer.parameters():
        weight.copy_(torch.randn_like(weight) * 0.1)
    weights = {name: w for name, w in peer.state_dict().items() if not name.endswith("position_ids")}
    pixels = torch.randn(3, 3, 28, 28)
    torch.testing.assert_close(ours(weights)(pixels), peer(pixels).image_embeds, atol=ROUNDING, rtol=0)


def open_clip_transformer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """open_clip's module of that name, without the package, which needs a torchvision that fits torch."""
    spec = importlib.util.find_spec("open_clip")
    assert spec is not None
    package = ModuleType("open_clip")
    package.__path__ = list(spec.submodule_search_locations or [])
    monkeypatch.setitem(sys.modules, "open_clip", package)
    for name in ("torchvision", "torchvision.ops", "torchvision.ops.misc"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["torchvision.ops.misc"].FrozenBatchNorm2d = torch.nn.Module  # type: ignore[attr-defined]
    module = importlib.import_module("open_clip.transformer")
    for name in [name for name in sys.modules if name.startswith("open_clip.")]:
        monkeypatch.delitem(sys.modules, name)
    return module


def test_equals_open_clip(monkeypatch: pytest.MonkeyPatch):
    peers = open_clip_transformer(monkeypatch)
    torch.manual_seed(0)
    peer = peers.VisionTransformer(
        image_size=28,
        patch_size=7,
        width=64,
        layers=2,
        heads=2,
        mlp_ratio=2.5,
        output_dim=24,
        act_layer=peers.QuickGELU,
    )
    for weight in peer.eval().requires_grad_(False).parameters():
        weight.copy_(torch.randn_like(weight) * 0.1)
    pixels = torch.randn(3, 3, 28, 28)
    model = ours(from_openclip(peer.state_dict()))
    torch.testing.assert_close(model(pixels), peer(pixels), atol=ROUNDING, rtol=0)
