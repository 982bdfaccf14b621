"""What our training saves acts in the peers as it did in our own network."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.peers.test_diffusers_pipeline import peer_pipeline
from tests.peers.test_lora_peers import needs, prediction
from tests.tiny_families import tiny
from tests.training.lora_cases import DORA, LOCON, LORA, randomised, snapshot


@needs("diffusers", "peft")
@pytest.mark.parametrize(("family", "config"), [("sd1", LOCON), ("sd2", LORA), ("sdxl", LORA)])
def test_diffusers_draws_with_our_file_as_our_network_did(tmp_path: Path, family: str, config: Any):
    models = tiny(family)
    network = randomised(models, config)
    with network.attached():
        ours = prediction(models.unet, models)
    path = tmp_path / "style.safetensors"
    saved = snapshot(network)
    of_unet = {name: w for name, w in saved.weights.items() if name.startswith("lora_unet_")}
    replace(saved, weights=of_unet).save(path, {}, torch.float32)  # the peer pipeline has no text encoder
    pipeline = peer_pipeline(models, None)
    pipeline.load_lora_weights(str(path), adapter_name="style")
    pipeline.set_adapters("style", 1.0)
    theirs = prediction(pipeline.unet, models, peer=True)
    assert (ours - prediction(models.unet, models)).abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@needs("lycoris")
@pytest.mark.parametrize("layer", ["proj_in", "transformer_blocks_0_attn2_to_k", "resnets_1_conv1"])
def test_lycoris_merges_our_dora_as_we_trained_it(layer: str):
    import lycoris.modules

    models = tiny("sd1")
    network = randomised(models, replace(DORA, conv_dim=4, conv_alpha=2.0))
    key = next(key for key in network.layers if key.endswith(layer))
    base = network.layers[key]
    shape = (2, base.weight.shape[1], *(() if base.weight.ndim == 2 else (6, 6)))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with network.attached():
            ours = base(x)
        options: dict[str, Any] = {"alpha": 2.0, "weight_decompose": True, "wd_on_out": False}
        module: Any = lycoris.modules.LoConModule(key, base, lora_dim=4, **options)
        own = {
            name.removeprefix(f"{key}."): w
            for name, w in network.state_dict().items()
            if name.startswith(f"{key}.")
        }
        module.load_state_dict(own, strict=False)
        merged, _ = module.get_merged_weight(1.0)
        theirs = torch.func.functional_call(base, {"weight": merged}, (x,))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
