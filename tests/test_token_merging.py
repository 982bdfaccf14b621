"""Merging tokens: which ones, what of it remains, and that nothing remains after it."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ldm
from ldm import infotext, interpret
from ldm.token_merging import matched, merged, merging, unmerged
from ldm.unet import BasicTransformerBlock, UNet, UNetConfig
from tests.test_offload import REQUEST, copied
from tests.tiny_families import tiny

# The tiny models have no attention on maps of the latent's size, like SDXL.
MERGING = replace(REQUEST, token_merging=0.5, token_merging_downsample=2)


def network(*depth: int, seed: int = 0) -> UNet:
    torch.manual_seed(seed)
    config = UNetConfig(
        model_channels=32,
        channel_mult=(1, 2, 2)[: len(depth)],
        num_res_blocks=1,
        depth=depth,
        context_dim=24,
        num_heads=2,
    )
    unet = UNet(config).eval().requires_grad_(False)
    for weight in unet.parameters():  # the last layers begin as zero otherwise
        if weight.ndim > 1:
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    return unet


def inputs(size: tuple[int, int], rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    x, context = torch.randn(rows, 4, *size, generator=random), torch.randn(rows, 7, 24, generator=random)
    return x, torch.arange(rows) * 300.0, context


# Of each of 5x7 tokens, the first with which it is merged: found by the authors' package tomesd 0.1.3
# (bipartite_soft_matching_random2d with no_rand) for the tokens in the test, half of them to be merged.
GROUPS = """
 0  1  2  2  4  5  0
 7  8  9  2  2 12 13
12  8  8  8  9  0 20
 4  0 23  0 25 26  0
28 29  0  4  4 33 34
"""


def test_tokens_are_matched_as_by_the_authors():
    x = torch.sin(torch.arange(5 * 7 * 3) ** 1.5).view(1, 35, 3)
    places, left = matched(x, 0.5, (5, 7))
    assert left == 35 - 17
    first = [places[0].tolist().index(place) for place in places[0].tolist()]
    assert first == [int(number) for number in GROUPS.split()]


def test_a_merged_token_is_the_mean_of_all_that_share_it():
    places = torch.tensor([[0, 1, 0, 2, 0], [0, 0, 1, 1, 2]])
    x = torch.arange(20.0).view(2, 5, 2)
    wanted = torch.tensor([[[4.0, 5], [2, 3], [6, 7]], [[11, 12], [15, 16], [18, 19]]])
    assert torch.equal(merged(x, places, 3), wanted)
    assert torch.equal(unmerged(wanted, places)[1, 1], wanted[1, 0])


def test_nothing_is_lost_where_all_tokens_of_a_square_are_alike():
    torch.manual_seed(0)
    block = BasicTransformerBlock(16, 24, 2, cross_only=False).double()
    squares = torch.randn(2, 16, 3, 4, dtype=torch.float64)
    x = squares.repeat_interleave(2, 2).repeat_interleave(2, 3).flatten(2).transpose(1, 2)  # (2, 6 * 8, 16)
    places, left = matched(x, 1.0, (6, 8))
    assert left == 12
    full, fewer = block.attn1(x, x), unmerged(block.attn1(*[merged(x, places, left)] * 2), places)
    assert torch.allclose(full, fewer, atol=1e-12)  # each mean stands for as many: the same weights


@pytest.mark.parametrize(("downsample", "levels"), [(1, 1), (2, 2), (3, 2), (8, 3)])
def test_only_maps_of_the_size_asked_for_are_merged(downsample: int, levels: int):
    unet = network(1, 1, 1)
    seen = set()
    for module in unet.modules():
        if type(module) is BasicTransformerBlock:
            module.attn1.register_forward_pre_hook(lambda _, given: seen.add(given[0].shape[1]))
    with merging(unet, 0.5, (12, 20), downsample):
        unet(*inputs((12, 20)))
    assert seen == {*(240 // 2, 60 // 2, 15 - 7)[:levels], *(240, 60, 15)[levels:]}


@pytest.mark.parametrize("size", [(9, 13), (1, 5), (2, 2), (7, 8)])
@pytest.mark.parametrize("ratio", [0.01, 0.5, 1.0])
def test_any_size_works(size: tuple[int, int], ratio: float):
    unet = network(1, 1, 1)
    plain = unet(*inputs(size))
    with merging(unet, ratio, size, 8):
        found = unet(*inputs(size))
    assert found.isfinite().all()
    assert torch.equal(found, plain) == (size == (1, 5) or (ratio == 0.01 and size != (9, 13)))


def test_without_attention_on_the_largest_maps_nothing_is_merged():
    unet = network(0, 1, 1)
    plain = unet(*inputs((8, 8)))
    with merging(unet, 0.5, (8, 8)):
        assert torch.equal(unet(*inputs((8, 8))), plain)
    with merging(unet, 0.5, (8, 8), 2):
        assert not torch.equal(unet(*inputs((8, 8))), plain)


def test_a_batch_is_its_rows_one_by_one():
    unet = network(1, 1, 0).double()  # in which no two tokens are equally alike but for rounding
    x, t, context = (one.double() for one in inputs((8, 12), rows=3))
    with merging(unet, 0.5, (8, 12), 2):
        whole = unet(x, t, context)
        rows = [unet(x[i : i + 1], t[i : i + 1], context[i : i + 1]) for i in range(3)]
    assert torch.allclose(whole, torch.cat(rows), atol=1e-10)


def test_everything_is_as_before_also_after_an_error():
    unet = network(1, 1, 1)
    plain, names, blocks = unet(*inputs((8, 8))), [*unet.state_dict()], [type(m) for m in unet.modules()]
    attributes = [set(vars(m)) for m in unet.modules()]

    def failing() -> None:
        with merging(unet, 0.5, (8, 8), 8):
            assert [*unet.state_dict()] == names
            unet(*inputs((8, 8))[:2])

    with pytest.raises(ValueError, match="this network needs context"):
        failing()
    assert [type(m) for m in unet.modules()] == blocks
    assert [set(vars(m)) for m in unet.modules()] == attributes
    assert torch.equal(unet(*inputs((8, 8))), plain)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_network_merges_too():
    unet, graphs = network(1), count()

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> nn.Module:
        next(graphs)
        return graph

    plain = unet(*inputs((8, 8)))
    with merging(unet, 0.5, (8, 8)):
        wanted = unet(*inputs((8, 8)))
    unet.input_blocks[1].compile(backend=backend, fullgraph=True, dynamic=False)
    for _ in range(2):
        assert torch.equal(unet(*inputs((8, 8))), plain)
        with merging(unet, 0.5, (8, 8)):
            assert torch.equal(unet(*inputs((8, 8))), wanted)
    assert next(graphs) == 2  # made once each


def pixels(request: ldm.Request, models: ldm.Models) -> np.ndarray:
    return np.asarray(ldm.txt2img(models, request)[0])


def test_a_run_merges_and_leaves_the_model_as_it_was():
    models = copied()
    plain = pixels(REQUEST, models)
    assert not np.array_equal(pixels(MERGING, models), plain)
    assert np.array_equal(pixels(replace(MERGING, token_merging_downsample=1), models), plain)
    assert np.array_equal(pixels(REQUEST, models), plain)


def test_the_second_pass_merges_as_the_first_unless_told_otherwise():
    models = tiny("sd1")

    def drawn(first: float, second: float | None) -> np.ndarray:
        hires = ldm.Hires(scale=1.5, steps=1, token_merging=second)
        return pixels(replace(MERGING, token_merging=first, hires=hires), models)

    assert np.array_equal(drawn(0.5, None), drawn(0.5, 0.5))
    assert not np.array_equal(drawn(0.5, 0.5), drawn(0.5, 0.0))
    assert not np.array_equal(drawn(0.0, 0.5), drawn(0.0, None))


def test_the_settings_come_back_from_the_picture():
    request = replace(MERGING, hires=ldm.Hires(scale=1.5, steps=1, token_merging=0.25))
    text = ldm.txt2img(tiny("sd1"), request)[0].info["parameters"]
    assert "Token merging ratio: 0.5, Token merging downsample: 2, " in text
    assert "Token merging ratio hr: 0.25" in text
    again, notes = interpret.request(infotext.parse(text))
    assert notes == []
    assert (again.token_merging, again.token_merging_downsample) == (0.5, 2)
    assert again.hires is not None
    assert again.hires.token_merging == 0.25


def test_the_web_ui_is_understood():
    text = "a cat\nSteps: 20, Sampler: Euler, Seed: 1, Token merging ratio: 0.5, Version: v1.10.1"
    request, notes = interpret.request(infotext.parse(text))
    assert notes == []
    assert (request.token_merging, request.token_merging_downsample) == (0.5, 1)
