"""What is written in a prompt reaches the network: weights, editing, AND, and the files it names."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ldm
from ldm.compat import Compatibility
from ldm.conditioning import conditioning
from ldm.denoise import Conditioning
from ldm.errors import LdmError, PromptError
from ldm.formats import write_safetensors
from ldm.guidance import Guides
from ldm.library import Library
from ldm.models import Models
from ldm.pipeline import plan, start
from ldm.samplers import SAMPLERS
from ldm.text.clip import ClipTextModel
from ldm.text.tokenizer import Tokenizer
from ldm.textual_inversion import load_folder
from tests.tiny_families import tiny

SMALL = ldm.Request(width=32, height=24, steps=4, seed=7)


def guides(prompt: str, models: Models | None = None, **changes: object) -> list[Guides]:
    models = models or tiny("sd1")
    return conditioning(models, plan(models, replace(SMALL, prompt=prompt, **changes)))  # pyright: ignore


def context(conditioning: Conditioning | None) -> Tensor:
    assert conditioning is not None
    assert conditioning.context is not None
    return conditioning.context


def positive(prompt: str, models: Models | None = None, **changes: object) -> Tensor:
    return context(guides(prompt, models, **changes)[0].positive[0][0])


def test_weights_scale_the_states_of_their_tokens():
    plain = positive("a cat")
    heavy = positive("a (cat:2)", compat=Compatibility(emphasis="no norm"))
    torch.testing.assert_close(heavy[0, 2], 2 * plain[0, 2])  # START, a, cat
    torch.testing.assert_close(
        torch.cat([heavy[0, :2], heavy[0, 3:]]), torch.cat([plain[0, :2], plain[0, 3:]])
    )
    towards = positive("a (cat:2)", compat=Compatibility(emphasis="comfyui"))
    empty = positive("")
    torch.testing.assert_close(towards[0, 2], empty[0, 2] + 2 * (plain[0, 2] - empty[0, 2]))
    assert torch.equal(positive("a (cat:2)", compat=Compatibility(emphasis="ignore")), plain)
    literal = positive("a (cat:2)", compat=Compatibility(emphasis="none"))
    assert not torch.equal(literal, plain)


@pytest.mark.parametrize("name", ["sd2", "sdxl", "embedded"])
def test_weights_keep_the_mean_in_every_family(name: str):
    models = tiny(name)
    plain, heavy = (positive(text, models=models) for text in ("a cat", "a (cat:1.5)"))
    assert not torch.equal(plain, heavy)
    if name != "sdxl":  # there each encoder's half has its own mean
        torch.testing.assert_close(plain.mean(), heavy.mean())


def test_weights_act_on_the_vector_of_the_embedded_model_too():
    models = tiny("embedded")

    def vector(prompt: str, **compat: object) -> Tensor:
        found = guides(prompt, models, compat=Compatibility(**compat))[0].positive[0][0].vector  # pyright: ignore
        assert found is not None
        return found

    whole, alone = vector("sun, blue"), vector("sun,")
    torch.testing.assert_close(vector("sun, (blue:0)"), alone)
    torch.testing.assert_close(vector("sun, (blue:1.5)"), whole + 0.5 * (whole - alone))
    assert torch.equal(vector("sun, (blue:1.5)", emphasis="ignore"), whole)
    # SDXL's is as its makers left it.
    pooled = [guides(p, tiny("sdxl"))[0].positive[0][0].vector for p in ("a sun", "a (sun:2)")]
    assert torch.equal(pooled[0], pooled[1])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("late", [False, True])
def test_editing_takes_the_step_at_hand(late: bool):
    edited = guides("a [cat:dog:0.5]", compat=Compatibility(late_first_edit=late))
    cat, dog = positive("a cat"), positive("a dog")
    expected = [cat, cat, cat, dog] if late else [cat, cat, dog, dog]
    for found, text in zip(edited, expected, strict=True):
        assert torch.equal(context(found.positive[0][0]), text)
    assert edited[0] is edited[1]  # encoded once


def test_times_of_editing_before_version_1_6_of_the_web_ui():
    cat, dog = positive("a cat"), positive("a dog")
    old = guides("a [cat:dog:1.0]", compat=Compatibility(old_edit_times=True))  # after one step
    new = guides("a [cat:dog:1.0]")  # never
    assert [torch.equal(context(g.positive[0][0]), dog) for g in old] == [False, True, True, True]
    assert all(torch.equal(context(g.positive[0][0]), cat) for g in new)


class Watched(nn.Module):
    """A network that notes which context each of its evaluations reads."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.seen = network, []

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None, *rest: object) -> Tensor:
        assert context is not None
        self.seen.append(context)
        return self.network(x, t, context, *rest)


@pytest.mark.parametrize(
    ("sampler", "evaluations"),
    [("Euler", [1, 1, 1, 1]), ("Heun", [2, 2, 2, 1]), ("DPM2", [2, 2, 2, 1]), ("DPM++ 2S a", [2, 2, 2, 1])],
)
def test_samplers_with_more_evaluations_switch_at_the_same_step(sampler: str, evaluations: list[int]):
    models = tiny("sd1")
    watched = Watched(models.unet)
    watching = replace(models, denoiser=replace(models.denoiser, network=watched))
    request = replace(SMALL, prompt="[cat:dog:2]", sampler=sampler, cfg_scale=1.0)
    steps = [*ldm.sample(watching, request)]
    assert len(steps) == 4
    expected = [
        text
        for text, count in zip(["cat", "cat", "dog", "dog"], evaluations, strict=True)
        for _ in range(count)
    ]
    assert len(watched.seen) == len(expected)
    for seen, text in zip(watched.seen, expected, strict=True):
        assert torch.equal(seen, positive(text))


@pytest.mark.parametrize("sampler", ["DPM adaptive", "Restart", "DPM fast", "UniPC", "PLMS"])
def test_every_sampler_ends_with_the_last_text(sampler: str):
    assert sampler in SAMPLERS
    models = tiny("sd1")
    watched = Watched(models.unet)
    watching = replace(models, denoiser=replace(models.denoiser, network=watched))
    request = replace(SMALL, prompt="[cat:dog:0.5]", sampler=sampler, steps=6, cfg_scale=1.0)
    assert [*ldm.sample(watching, request)]
    assert torch.equal(watched.seen[0], positive("cat"))
    assert torch.equal(watched.seen[-1], positive("dog"))


def test_prompts_joined_by_and_guide_together():
    models = tiny("sd1")
    [first, *_] = [*ldm.sample(models, replace(SMALL, prompt="cat AND dog :0.5", sampler="Euler", steps=1))]
    run = plan(models, replace(SMALL, steps=1, sampler="Euler"))
    x, _, _ = start(models, run, None)
    cat, dog, empty = (
        models.denoiser(x, run.sigmas[0], Conditioning(positive(t))) for t in ("cat", "dog", "")
    )
    expected = empty + run.cfg_scale * ((cat - empty) + 0.5 * (dog - empty))
    # Rounding in eps, 1e-6, is multiplied by sigma = 14.6 and the scale 7.
    torch.testing.assert_close(first.denoised, expected, atol=2e-4, rtol=1e-5)


def test_comments_are_left_out():
    assert torch.equal(positive("a cat # on a mat"), positive("a cat "))
    assert guides("", negative_prompt="# nothing")[0].negative is not None


def test_each_prompt_of_an_and_is_edited_by_itself():
    edited = guides("[cat:dog:0.5] AND sun :0.5")
    for step, text in ((0, "cat"), (3, "dog")):
        (first, one), (second, half) = edited[step].positive
        assert torch.equal(context(first), positive(text))
        assert torch.equal(context(second), positive(" sun"))
        assert (one, half) == (1.0, 0.5)


def test_malformed_prompts_are_text():
    for prompt in ("((((", "[a:b:c]", "AND", "a AND", "[|", "<lora", "(:1.2", ":0.5", "\\", "BREAK BREAK"):
        assert len(ldm.txt2img(tiny("sd1"), replace(SMALL, prompt=prompt, steps=1))) == 1


@pytest.fixture
def stocked(tmp_path: Path) -> Models:
    """A model whose library holds one LoRA, changing one layer, and one embedding."""
    models = tiny("sd1")
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    weight = models.unet.state_dict()["middle_block.1.transformer_blocks.0.attn2.to_k.weight"]
    generator = torch.Generator().manual_seed(0)
    down, up = (
        torch.randn(shape, generator=generator) for shape in ((2, weight.shape[1]), (weight.shape[0], 2))
    )
    (tmp_path / "loras").mkdir()
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
    write_safetensors(tmp_path / "loras/style.safetensors", {f"{key}.{n}": t for n, t in tensors.items()})
    (tmp_path / "embeddings").mkdir()
    encoder = models.text[0]
    assert isinstance(encoder, ClipTextModel)
    vectors = {"emb_params": torch.randn(3, encoder.config.width, generator=generator)}
    write_safetensors(tmp_path / "embeddings/my-style.safetensors", vectors)
    return replace(models, library=Library(loras=tmp_path / "loras", embeddings=tmp_path / "embeddings"))


def test_a_tag_changes_the_picture_and_leaves_the_model_as_it_was(stocked: Models):
    before = {name: w.clone() for name, w in stocked.state_dict().items()}
    plain = ldm.txt2img(stocked, replace(SMALL, prompt="a cat"))[0]
    [styled] = ldm.txt2img(stocked, replace(SMALL, prompt="a cat<lora:style:5>"))
    assert styled.tobytes() != plain.tobytes()
    assert re.search(r'Lora hashes: "style: [0-9a-f]{12}"', styled.info["parameters"])
    assert styled.info["parameters"].startswith("a cat<lora:style:5>\n")
    assert ldm.txt2img(stocked, replace(SMALL, prompt="a cat<lora:style:0>"))[0].tobytes() == plain.tobytes()
    run = ldm.sample(stocked, replace(SMALL, prompt="a cat<lora:style:5>"))
    next(run)
    del run  # in the middle
    assert all(torch.equal(w, before[name]) for name, w in stocked.state_dict().items())


def test_an_embedding_stands_for_its_vectors(stocked: Models):
    found = positive("a my-style cat", models=stocked)
    assert stocked.library.embeddings is not None
    vectors = load_folder(stocked.library.embeddings, stocked.text, "my-style")["my-style"].vectors[0]
    encoder, tokenizer = stocked.text[0], stocked.tokenizer
    assert isinstance(encoder, ClipTextModel)
    assert isinstance(tokenizer, Tokenizer)
    words = torch.tensor(tokenizer.encode("one two three"))
    table = encoder.text_model.embeddings.token_embedding.weight.data
    saved = table[words].clone()
    try:
        table[words] = vectors
        assert torch.equal(found, positive("a one two three cat", models=stocked))
    finally:
        table[words] = saved


def test_names_that_lead_nowhere_are_one_sentence(stocked: Models):
    for prompt, message in (
        ("<lora:stile:1>", "no LoRA 'stile'.*did you mean style"),
        ("<lora:../secret:1>", "secret"),
        ("<hypernet:x:1>", "no folder"),
        ("<lora:style:much>", "must be numbers"),
    ):
        with pytest.raises((LdmError, PromptError), match=message):
            plan(stocked, replace(SMALL, prompt=prompt))
    with pytest.raises(LdmError, match="no folder with LoRA files is given"):
        plan(tiny("sd1"), replace(SMALL, prompt="<lora:style:1>"))
