"""The CLIP text encoders equal the originals: golden outputs, and transformers live."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ldm.errors import RequestError
from ldm.text import openclip_names
from ldm.text.clip import ClipTextConfig, ClipTextModel
from tests.golden import module_case


def assert_equal_to_original(actual: Tensor, expected: Tensor) -> None:
    # Outputs are of order 1 and the originals' own float32 rounding is 2e-6.
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)


TINY = ClipTextConfig(width=32, layers=3, heads=2, vocab_size=600)


def openclip_weights(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    weights, values = module_case(name)
    del weights["model.logit_scale"]
    return {key.removeprefix("model."): tensor for key, tensor in weights.items()}, values


def openclip_case(name: str, projection_dim: int) -> tuple[ClipTextModel, dict[str, Tensor]]:
    weights, values = openclip_weights(name)
    model = ClipTextModel(replace(TINY, projection_dim=projection_dim))
    model.load_state_dict(openclip_names.to_hf(weights))
    return model.requires_grad_(False), values


def test_clip_l_equals_the_original_at_every_clip_skip():
    weights, values = module_case("clip_text_l_quick_gelu")
    del weights["text_model.embeddings.position_ids"]
    model = ClipTextModel(replace(TINY, quick_gelu=True)).requires_grad_(False)
    model.load_state_dict(weights)
    tokens = values["in/input_ids"]
    hidden, pooled = model(tokens, pooled=True)
    assert_equal_to_original(hidden, values["out/last_hidden_state"])
    assert_equal_to_original(pooled, values["out/pooler_output"])
    for skip in (2, 3):
        expected = values[f"out/clip_skip_{skip}_with_final_layer_norm"]
        assert_equal_to_original(model(tokens, skip=skip).hidden, expected)
    for skip in (1, 2, 3):
        expected = values[f"out/hidden_states_{4 - skip}"]
        assert_equal_to_original(model(tokens, skip=skip, final_norm=False).hidden, expected)


def test_openclip_equals_the_conditioner_of_sd2():
    model, values = openclip_case("openclip_text_sd2", projection_dim=24)
    assert_equal_to_original(model(values["in/tokens"]).hidden, values["out/last"])
    assert_equal_to_original(model(values["in/tokens"], skip=2).hidden, values["out/penultimate"])


def test_openclip_equals_the_conditioner_of_sdxl():
    model, values = openclip_case("openclip_text_sdxl_bigg_style", projection_dim=40)
    tokens = values["in/tokens"]
    hidden, pooled = model(tokens, skip=2, final_norm=False, pooled=True)
    assert_equal_to_original(hidden, values["out/penultimate_no_ln"])
    assert_equal_to_original(pooled, values["out/pooled"])
    last = model(tokens, final_norm=False).hidden
    assert_equal_to_original(last, values["out/last_no_ln"])
    with_norm = model(tokens, skip=2).hidden
    assert_equal_to_original(with_norm, values["out/legacy_penultimate_with_ln"])


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_equals_transformers(act: str):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=600,
        hidden_size=48,
        intermediate_size=192,
        projection_dim=20,
        num_hidden_layers=4,
        num_attention_heads=3,
        hidden_act=act,
        bos_token_id=598,
        eos_token_id=599,
    )
    peer = CLIPTextModelWithProjection(config).eval().requires_grad_(False)
    for parameter in peer.parameters():  # as initialised, biases are 0 and norms 1: errors there would hide
        parameter.add_(torch.randn_like(parameter) * 0.1)
    model = ClipTextModel(
        ClipTextConfig(
            width=48, layers=4, heads=3, vocab_size=600, quick_gelu=act == "quick_gelu", projection_dim=20
        )
    ).requires_grad_(False)
    model.load_state_dict(peer.state_dict())
    tokens = torch.randint(598, (2, 77))
    tokens[0, 9:], tokens[1, 40:] = 599, 599
    expected = peer(tokens, output_hidden_states=True)
    hidden, pooled = model(tokens, pooled=True)
    # Both sum in float32 in a different order.
    torch.testing.assert_close(hidden, expected.last_hidden_state, atol=1e-5, rtol=0)
    torch.testing.assert_close(pooled, expected.text_embeds, atol=1e-5, rtol=0)
    for skip in (2, 3, 4):
        states = model(tokens, skip=skip, final_norm=False).hidden
        torch.testing.assert_close(states, expected.hidden_states[-skip], atol=1e-5, rtol=0)


def test_skipped_layers_are_not_run():
    model = ClipTextModel(TINY).requires_grad_(False)
    tokens = torch.randint(600, (1, 8))
    expected = model(tokens, skip=2).hidden
    model.text_model.encoder.layers[-1] = torch.nn.Identity()
    assert torch.equal(model(tokens, skip=2).hidden, expected)
    model.text_model.encoder.layers[-1].forward = lambda x: pytest.fail("ran")
    model(tokens, skip=2)


def test_a_token_does_not_see_later_ones():
    model = ClipTextModel(TINY).requires_grad_(False)
    tokens = torch.randint(600, (1, 20))
    short = model(tokens[:, :7]).hidden
    torch.testing.assert_close(model(tokens).hidden[:, :7], short, atol=1e-6, rtol=0)


@pytest.mark.parametrize("skip", [0, 4, -1])
def test_impossible_clip_skip_is_refused(skip: int):
    with pytest.raises(RequestError, match="1 to 3"):
        ClipTextModel(TINY)(torch.zeros(1, 77, dtype=torch.long), skip=skip)


def test_openclip_names_there_and_back_are_the_same_bits():
    weights, _ = openclip_weights("openclip_text_sdxl_bigg_style")
    back = openclip_names.to_openclip(openclip_names.to_hf(weights))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_malformed_openclip_weights_keep_their_names():
    odd = {
        "transformer.resblocks.0.attn.in_proj_weight": torch.tensor(1.0),
        "text_projection": torch.ones(3),
        "visual.proj": torch.ones(2, 2),
    }
    renamed = openclip_names.to_hf(odd)
    assert set(renamed) == {
        "text_model.encoder.layers.0.attn.in_proj_weight",
        "text_projection",
        "visual.proj",
    }


def test_traces_to_one_graph():
    model = ClipTextModel(TINY).requires_grad_(False)
    tokens = torch.randint(600, (2, 77))
    graph = torch.export.export(model, (tokens,), {"skip": 2, "pooled": True}).module()
    for ours, traced in zip(
        model(tokens, skip=2, pooled=True), graph(tokens, skip=2, pooled=True), strict=True
    ):
        torch.testing.assert_close(ours, traced)
