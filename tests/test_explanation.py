"""What `ldm.explain` tells is what happens."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ldm
from ldm.explanation import explain
from ldm.rehearsal import blank
from tests.tiny_families import tiny

SMALL = ldm.Request(width=32, height=24, steps=4)


class Counted(nn.Module):
    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.calls = network, 0

    def forward(self, x: Tensor, *rest: object) -> Tensor:
        self.calls += 1
        return self.network(x, *rest)


@pytest.mark.parametrize("sampler", [name for name in ldm.SAMPLERS if name != "DPM adaptive"])
def test_the_network_is_evaluated_as_often_as_told(sampler: str):
    models, request = tiny("sd1"), replace(SMALL, sampler=sampler)
    counted = Counted(models.unet)
    watching = replace(models, denoiser=replace(models.denoiser, network=counted))
    for _ in ldm.sample(watching, request):
        pass
    assert explain(models, request).evaluations == counted.calls


def test_tokens_weights_steps_and_parts_are_told():
    told = explain(tiny("sd1"), replace(SMALL, prompt="a (red:1.3) [apple:pear:0.5] AND a dog :0.5"))
    spans = [(text.first, text.last, text.weight) for text in told.prompt]
    assert spans == [(1, 2, 1.0), (3, 4, 1.0), (1, 4, 0.5)]
    assert told.prompt[0].chunks == ((("a", 1.0), ("red", 1.3), ("apple", 1.0)),)
    assert told.prompt[1].chunks[0][-1] == ("pear", 1.0)
    text = str(told)
    assert "    3 of 75 tokens: a (red: 1.3) pear" in text
    assert "  steps 1 to 4, weight 0.5" in text
    assert "4 steps\nevaluations of the network: 4, cfg scale 7" in text
    assert text.splitlines()[4].endswith(" 0")  # sigmas
    assert "0 of 75 tokens" in text.split("negative prompt:")[1]


def test_a_negative_prompt_without_effect_is_told():
    assert explain(tiny("sd1"), replace(SMALL, cfg_scale=1.0)).negative == ()
    assert "negative prompt: not used" in str(explain(tiny("unconditional"), SMALL))


def test_long_prompts_are_told_in_chunks():
    [text] = explain(tiny("sd1"), replace(SMALL, prompt="apple " * 80)).prompt
    assert [len(chunk) for chunk in text.chunks] == [75, 5]
    assert text.space == 75


def test_what_changes_nothing_is_told():
    """The embedded model attends on maps of half the latent's size and less."""
    request = replace(SMALL, token_merging=0.5)
    models = blank(ldm.load())

    def told(**changed: Any) -> tuple[str, ...]:
        return explain(models, replace(request, **changed)).without_effect

    [line] = told()
    assert line.startswith("token merging, as this model has no tokens to merge at 32 x 24; ")
    assert line.endswith("--token-merging-downsample 2 changes that")
    assert f"without effect: {line}\nmemory: " in str(explain(models, request))
    assert told(token_merging_downsample=2) == told(token_merging=0.0) == ()
    [line] = told(width=8, height=8)
    assert line.endswith(" at 8 x 8")  # nor does any map of a single token
    [_, second] = told(hires=ldm.Hires(scale=2))
    assert "at 64 x 48" in second
    assert told(token_merging=0.0, reuse=2) == ()
    assert told(token_merging=0.0, reuse=2, steps=1) == ("feature reuse, as the network is evaluated once",)


def test_the_memory_is_that_of_the_plan():
    models = tiny("sd1")
    told = explain(models, SMALL)
    assert told.memory == ldm.plan(models, SMALL, budget=2**40).needs
    assert str(told).endswith(f"memory: about {told.memory / 2**30:.1f} GB on cpu")
    assert all(w.device.type == "cpu" for w in models.unet.parameters())


def test_explaining_draws_no_random_numbers():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    explain(tiny("sd1"), replace(SMALL, sampler="Euler a"))
    assert torch.equal(torch.get_rng_state(), before)
