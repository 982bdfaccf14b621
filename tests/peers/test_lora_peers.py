"""LoRA files written by the peers act on our models as they do there."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.lora import applied, coverage, read
from ldm.models import Models
from tests.lora.test_lora import lora_tensors, write
from tests.peers.test_diffusers_pipeline import peer_pipeline, peer_unet
from tests.tiny_families import tiny


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


LYCORIS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoConModule", {}),
    "lora-cp": ("LoConModule", {"use_tucker": True}),
    "dora": ("LoConModule", {"weight_decompose": True}),
    "dora-in": ("LoConModule", {"weight_decompose": True, "wd_on_out": False}),
    "loha": ("LohaModule", {}),
    "loha-cp": ("LohaModule", {"use_tucker": True}),
    "loha-dora": ("LohaModule", {"weight_decompose": True}),
    "lokr": ("LokrModule", {"factor": 4}),
    "lokr-both": ("LokrModule", {"factor": 2, "decompose_both": True, "lora_dim": 1}),
    "lokr-cp": ("LokrModule", {"factor": 2, "use_tucker": True, "lora_dim": 1}),
    "lokr-dora": ("LokrModule", {"factor": 4, "weight_decompose": True}),
    "full": ("FullModule", {}),
    "glora": ("GLoRAModule", {}),
    "ia3": ("IA3Module", {}),
    "ia3-in": ("IA3Module", {"train_on_input": True}),
    "oft": ("DiagOFTModule", {"rescaled": True}),
    "oft-bounded": ("DiagOFTModule", {"constraint": 1e-3}),
}
LAYERS = {
    "linear": (lambda: nn.Linear(24, 16), (2, 5, 24)),
    "conv1": (lambda: nn.Conv2d(24, 16, 1), (2, 24, 5, 5)),
    "conv3": (lambda: nn.Conv2d(24, 16, 3, padding=1), (2, 24, 5, 5)),
}


@needs("lycoris")
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("way", LYCORIS)
def test_every_way_of_lycoris_gives_the_layer_that_it_trains(way: str, kind: str, tmp_path: Path):
    import lycoris.modules

    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape)
    name, options = LYCORIS[way]
    module = getattr(lycoris.modules, name)("layer", layer, **{"lora_dim": 3, "alpha": 2.0} | options)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()  # type: ignore[union-attr]
    module.apply_to()
    for parameter in module.parameters():
        parameter.data = parameter.data + 0.3 * torch.randn(parameter.shape)
    save_file(
        {f"layer.{key}": t.detach().clone().contiguous() for key, t in module.state_dict().items()},
        tmp_path / "a.safetensors",
    )
    expected = layer(x)

    lora = read(tmp_path / "a.safetensors")
    assert lora.unmatched == ()
    changes = lora.modules["layer"]
    merged = {"weight": weight, "bias": bias}
    for part, delta in changes.items():
        delta.check(tuple(merged[part].shape))
        merged[part] = delta.merged(merged[part], 1.0)
    with torch.no_grad():
        ours = torch.func.functional_call(make(), merged, (x,))
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)


@needs("lycoris")
@pytest.mark.parametrize("norm", [nn.LayerNorm(24), nn.GroupNorm(4, 24)])
def test_norms_of_lycoris(norm: nn.Module, tmp_path: Path):
    from lycoris.modules import NormModule

    torch.manual_seed(0)
    module: Any = NormModule("layer", norm, 1.0)
    for parameter in module.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape)
    save_file({f"layer.{k}": t.detach() for k, t in module.state_dict().items()}, tmp_path / "a.safetensors")
    expected_weight, expected_bias = module.get_merged_weight()
    changes = read(tmp_path / "a.safetensors").modules["layer"]
    weight, bias = (getattr(norm, part).detach() for part in ("weight", "bias"))
    assert torch.equal(changes["weight"].merged(weight, 1.0), expected_weight)
    assert torch.equal(changes["bias"].merged(bias, 1.0), expected_bias)


def prediction(network: Any, models: Models, peer: bool = False) -> Tensor:
    """Of one noisy latent, by our UNet or by that of diffusers."""
    random = torch.Generator().manual_seed(0)
    config = models.unet.config
    x, t = torch.randn(1, 4, 8, 8, generator=random), torch.tensor([500.0])
    assert config.context_dim is not None
    context = torch.randn(1, 7, config.context_dim, generator=random)
    sizes = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]])
    pooled = torch.randn(1, 64, generator=random)
    with torch.no_grad():
        if peer:
            added = {"text_embeds": pooled, "time_ids": sizes} if config.vector_dim else None
            return network(x, t, context, added_cond_kwargs=added).sample
        from ldm.families.sdxl import size_embedding

        y = torch.cat([pooled, size_embedding(sizes[0].tolist(), pooled)], 1) if config.vector_dim else None
        return network(x, t, context, y)


@needs("diffusers", "peft")
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_diffusers_reads_a_kohya_file_as_we_do(family: str, tmp_path: Path):
    models = tiny(family)
    tensors = {key: t for key, t in lora_tensors(models).items() if key.startswith("lora_unet_")}
    path = write(tmp_path / "kohya.safetensors", tensors)
    pipeline = peer_pipeline(models, None)
    pipeline.load_lora_weights(str(path), adapter_name="a")
    pipeline.set_adapters("a", 0.7)
    before = prediction(models.unet, models)
    with applied(models, [(path, 0.7)]):
        ours = prediction(models.unet, models)
    theirs = prediction(pipeline.unet, models, peer=True)
    assert (ours - before).abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@needs("diffusers", "peft")
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_we_read_a_file_of_diffusers_and_peft(family: str, dora: bool, tmp_path: Path):
    from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils.save_and_load import get_peft_model_state_dict

    models = tiny(family)
    peer = peer_unet(models)
    targets = [
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "proj_in",
        "ff.net.0.proj",
        "ff.net.2",
        "conv1",
        "time_emb_proj",
    ]
    peer.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets, use_dora=dora))
    torch.manual_seed(0)
    for name, parameter in peer.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    raw = get_peft_model_state_dict(peer)
    layouts = {
        "peft": {f"base_model.model.{key}": t for key, t in raw.items()},
        "diffusers": {f"unet.{key}": t for key, t in convert_state_dict_to_diffusers(raw).items()},
    }
    expected = prediction(peer, models, peer=True)
    for layout, tensors in layouts.items():
        save_file({key: t.detach().clone() for key, t in tensors.items()}, tmp_path / f"{layout}.safetensors")
        lora = read(tmp_path / f"{layout}.safetensors")
        assert coverage(models, lora).unmatched == ()
        with applied(models, [(lora, 1.0)]):
            torch.testing.assert_close(prediction(models.unet, models), expected, rtol=0, atol=2e-5)


@needs("diffusers", "peft")
def test_alpha_is_found_where_diffusers_keeps_it(tmp_path: Path):
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils.save_and_load import get_peft_model_state_dict

    models = tiny("sd1")
    pipeline = peer_pipeline(models, None)
    pipeline.unet.add_adapter(
        LoraConfig(
            r=4,
            lora_alpha=2,
            target_modules=["to_q", "to_k"],
            use_rslora=True,
            alpha_pattern={"attn1.to_q": 8},
        )
    )
    torch.manual_seed(0)
    for name, parameter in pipeline.unet.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    expected = prediction(pipeline.unet, models, peer=True)
    pipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet)),
        **_collate_lora_metadata({"unet": pipeline.unet}),
    )
    (path,) = tmp_path.iterdir()
    with applied(models, [(path, 1.0)]):
        torch.testing.assert_close(prediction(models.unet, models), expected, rtol=0, atol=2e-5)
