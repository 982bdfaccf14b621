"""Hypernetworks act on attention as the web UI's formula says, and leave nothing behind."""

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ldm import hypernetwork
from ldm.denoise import Denoiser, Prediction
from ldm.errors import CheckpointError, LdmError, RequestError
from ldm.families.sd1 import SD1
from ldm.hypernetwork import applied, read
from ldm.models import Models
from ldm.storage import stored
from ldm.unet import CrossAttention, UNet, UNetConfig

CONTEXT, CHANNELS = 48, (32, 64)  # widths of the text, and of the pixels at the two levels with attention


@cache
def models() -> Models:
    config = UNetConfig(
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        depth=(1, 1),
        context_dim=CONTEXT,
        num_heads=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet(config).eval().requires_grad_(False)
    return Models(SD1, Denoiser(unet, SD1.schedule(), Prediction.EPS), None, ())


def run(model: Models) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    context = torch.randn(2, 5, CONTEXT, generator=generator)
    return model.unet(x, torch.tensor([3.0, 700.0]), context)


@dataclass(frozen=True)
class Recipe:
    """The settings that the web UI writes into a file."""

    structure: tuple[float, ...] = (1, 2, 1)
    activation: str | None = "relu"
    layer_norm: bool = False
    activate_output: bool = False
    dropout: tuple[float, ...] | None = None

    def network(self, width: int) -> nn.Sequential:
        """Straight from the web UI's rule, dropout included: linear, activation, layer norm, dropout."""
        kinds = {"relu": nn.ReLU, "swish": nn.Hardswish, "leakyrelu": nn.LeakyReLU, "softsign": nn.Softsign}
        layers: list[nn.Module] = []
        for i in range(len(self.structure) - 1):
            inner, outer = int(width * self.structure[i]), int(width * self.structure[i + 1])
            layers.append(nn.Linear(inner, outer))
            last = i == len(self.structure) - 2
            if self.activation not in (None, "linear") and (not last or self.activate_output):
                layers.append(kinds[self.activation]())
            if self.layer_norm:
                layers.append(nn.LayerNorm(outer))
            if self.dropout is not None and self.dropout[i + 1] > 0:
                layers.append(nn.Dropout(self.dropout[i + 1]))
        return nn.Sequential(*layers).eval().requires_grad_(False)

    def settings(self) -> dict[str, object]:
        return {
            "step": 100,
            "name": "inside",
            "layer_structure": list(self.structure),
            "activation_func": self.activation,
            "is_layer_norm": self.layer_norm,
            "weight_initialization": "Normal",
            "activate_output": self.activate_output,
            "use_dropout": self.dropout is not None,
            "dropout_structure": self.dropout,
            "last_layer_dropout": False,
            "optional_info": None,
        }


Networks = dict[int, tuple[nn.Sequential, nn.Sequential]]


def make(path: Path, recipe: Recipe, widths: Sequence[int] = (CONTEXT, *CHANNELS), seed: int = 2) -> Networks:
    """Write a file as the web UI does. Returns its networks for keys and values."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        networks = {width: (recipe.network(width), recipe.network(width)) for width in widths}
    tree = {
        width: tuple({f"linear.{name}": w for name, w in net.state_dict().items()} for net in pair)
        for width, pair in networks.items()
    }
    torch.save({**tree, **recipe.settings()}, path)
    return networks


def attended(attention: CrossAttention, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by its formula, in float64, with what the projections to keys and values are to read."""
    weight = {name: w.double() for name, w in attention.named_parameters()}

    def heads(tokens: Tensor, name: str) -> Tensor:
        return (tokens.double() @ weight[name].T).unflatten(2, (attention.heads, -1)).transpose(1, 2)

    q, keys, values = heads(x, "to_q.weight"), heads(k, "to_k.weight"), heads(v, "to_v.weight")
    scores = q @ keys.transpose(2, 3) / q.shape[-1] ** 0.5
    h = (scores.softmax(dim=-1) @ values).transpose(1, 2).flatten(2)
    return h @ weight["to_out.0.weight"].T + weight["to_out.0.bias"]


def attentions(model: Models) -> list[CrossAttention]:
    return [module for module in model.unet.modules() if isinstance(module, CrossAttention)]


RECIPES = [
    Recipe(),
    Recipe(activation=None),
    Recipe(activation="linear", activate_output=True),
    Recipe(structure=(1, 2, 0.5, 1), activation="swish", layer_norm=True, activate_output=True),
    Recipe(structure=(1, 1.5, 2, 1), activation="leakyrelu", dropout=(0, 0.3, 0.3, 0)),
    Recipe(structure=(1, 2, 2, 1), activation="softsign", layer_norm=True, dropout=(0, 0.3, 0, 0)),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_keys_and_values_are_of_the_altered_context(tmp_path: Path, recipe: Recipe):
    """f(c) = c + m net(c), for text and pixels; of two, the second reads what the first made."""
    first, second = tmp_path / "first.pt", tmp_path / "second.pt"
    nets = make(first, recipe), make(second, recipe, seed=3)
    with applied(models(), [(first, 0.7), (read(second), -1.5)]):
        for attention in attentions(models()):
            width = attention.to_k.weight.shape[1]
            x = torch.randn(2, 6, attention.to_q.weight.shape[1])
            context = x if width != CONTEXT else torch.randn(2, 5, CONTEXT)
            k, v = context, context
            for pairs, multiplier in zip(nets, (0.7, -1.5), strict=True):
                k = k + multiplier * pairs[width][0](k)
                v = v + multiplier * pairs[width][1](v)
            expected = attended(attention, x, k, v)
            torch.testing.assert_close(attention(x, context).double(), expected, atol=1e-6, rtol=0)


def test_the_picture_changes_and_all_is_as_before_afterwards(tmp_path: Path):
    make(tmp_path / "style.pt", Recipe())
    before, names = run(models()), list(models().unet.state_dict())
    modules = list(models().unet.modules())
    with applied(models(), [(tmp_path / "style.pt", 1.0)]):
        assert (run(models()) - before).abs().max() > 1e-3
        assert list(models().unet.state_dict()) == names
    assert torch.equal(run(models()), before)
    assert all(a is b for a, b in zip(models().unet.modules(), modules, strict=True))
    with pytest.raises(ZeroDivisionError), applied(models(), [(tmp_path / "style.pt", 1.0)]):
        raise ZeroDivisionError
    assert all(a is b for a, b in zip(models().unet.modules(), modules, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in models().unet.modules())
    with applied(models(), [(tmp_path / "style.pt", 0.0)]), applied(models(), []):
        assert torch.equal(run(models()), before)


def test_weights_changed_meanwhile_count(tmp_path: Path):
    """A LoRA that is merged in place within the block acts on the same tensors."""
    make(tmp_path / "style.pt", Recipe())
    weight = attentions(models())[0].to_k.weight
    original = weight.clone()
    with applied(models(), [(tmp_path / "style.pt", 1.0)]):
        parameters = dict(models().unet.named_parameters())
        inside = next(p for p in parameters.values() if p is weight)
        before = run(models())
        inside.mul_(2)
        assert not torch.equal(run(models()), before)
        inside.copy_(original)
        assert torch.equal(run(models()), before)


def test_nested_blocks_act_from_the_inside_out(tmp_path: Path):
    a, b = tmp_path / "a.pt", tmp_path / "b.pt"
    make(a, Recipe())
    make(b, Recipe(), seed=3)
    with applied(models(), [(a, 1.0), (b, 0.5)]):
        together = run(models())
    with applied(models(), [(b, 0.5)]), applied(models(), [(a, 1.0)]):
        assert torch.equal(run(models()), together)
    with applied(models(), [(b, 0.5), (a, 1.0)]):
        assert not torch.equal(run(models()), together)


def test_a_compiled_network_sees_the_change(tmp_path: Path):
    make(tmp_path / "style.pt", Recipe())
    attention = attentions(models())[0]
    compiled = torch.compile(attention, backend="eager", fullgraph=True)
    x = torch.randn(1, 6, attention.to_q.weight.shape[1])
    with torch.no_grad():
        before = compiled(x, x)
        with applied(models(), [(tmp_path / "style.pt", 1.0)]):
            torch.testing.assert_close(compiled(x, x), attention(x, x))
            assert not torch.allclose(compiled(x, x), before)
        assert torch.equal(compiled(x, x), before)


def test_only_the_widths_in_the_file_are_altered(tmp_path: Path):
    make(tmp_path / "text.pt", Recipe(), widths=[CONTEXT])
    with applied(models(), [(tmp_path / "text.pt", 1.0)]):
        for attention in attentions(models()):
            reads_text = attention.to_k.weight.shape[1] == CONTEXT
            assert isinstance(attention.to_k, hypernetwork.Altered) == reads_text
            assert isinstance(attention.to_v, hypernetwork.Altered) == reads_text


def test_a_network_in_half_precision_stays_in_it(tmp_path: Path):
    make(tmp_path / "style.pt", Recipe())
    half = UNet(models().unet.config).bfloat16().eval().requires_grad_(False)
    model = replace(models(), denoiser=replace(models().denoiser, network=half, dtype=torch.bfloat16))
    with applied(model, [(tmp_path / "style.pt", 1.0)]):
        x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 5, CONTEXT)
        assert half(x.bfloat16(), torch.tensor([5.0]), context.bfloat16()).dtype == torch.bfloat16
    assert read(tmp_path / "style.pt").pairs[CONTEXT][0][0].weight.dtype == torch.float32


def test_a_network_held_in_half_precision_computes_as_ever(tmp_path: Path):
    make(tmp_path / "style.pt", Recipe())
    held = stored(deepcopy(models()), torch.float16)
    with applied(held, [(tmp_path / "style.pt", 1.0)]):
        result = run(held)
    with applied(models(), [(tmp_path / "style.pt", 1.0)]):
        assert (result - run(models())).abs().max() < 5e-3  # what half precision takes from the weights


def test_another_familys_hypernetwork_is_refused_and_nothing_changes(tmp_path: Path):
    make(tmp_path / "sd2.pt", Recipe(), widths=[96, *CHANNELS])
    make(tmp_path / "good.pt", Recipe())
    make(tmp_path / "all.pt", Recipe(), widths=[CONTEXT, 96, *CHANNELS])  # as the web UI offers it
    modules = list(models().unet.modules())
    uses = [(tmp_path / "good.pt", 1.0), (tmp_path / "sd2.pt", 1.0)]
    with (
        pytest.raises(CheckpointError, match=r"^sd2.pt: .*width 96, the model's is 48"),
        applied(models(), uses),
    ):
        pass
    with (
        pytest.raises(RequestError, match="finite"),
        applied(models(), [(tmp_path / "good.pt", float("nan"))]),
    ):
        pass
    assert all(a is b for a, b in zip(models().unet.modules(), modules, strict=True))
    with applied(models(), [(tmp_path / "all.pt", 1.0)]):
        pass


def test_the_oldest_files_read(tmp_path: Path):
    """Two linear layers with nothing between them, named before there was a choice; no settings."""
    networks = {48: (Recipe(activation=None).network(48), Recipe(activation=None).network(48))}
    old = {"0": "linear1", "1": "linear2"}
    tree = {
        width: [
            {re.sub(r"^\d", lambda m: old[m[0]], name): w for name, w in net.state_dict().items()}
            for net in pair
        ]
        for width, pair in networks.items()
    }
    torch.save(tree, tmp_path / "nai.pt")
    (k, v) = read(tmp_path / "nai.pt").pairs[48]
    c = torch.randn(1, 3, 48)
    torch.testing.assert_close(k(c), networks[48][0](c), atol=1e-6, rtol=0)
    torch.testing.assert_close(v(c), networks[48][1](c), atol=1e-6, rtol=0)
    assert read(tmp_path / "nai.pt").name == "nai"


def test_without_the_option_the_output_is_activated(tmp_path: Path):
    """Files from before the option was there were trained so."""
    recipe = Recipe(activate_output=True)
    networks = make(tmp_path / "new.pt", recipe)
    tree = torch.load(tmp_path / "new.pt")
    del tree["activate_output"], tree["dropout_structure"], tree["layer_structure"]
    torch.save(tree, tmp_path / "old.pt")
    c = torch.randn(1, 3, CONTEXT)
    torch.testing.assert_close(
        read(tmp_path / "old.pt").pairs[CONTEXT][0](c), networks[CONTEXT][0](c), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("name", [name for name in hypernetwork.ACTIVATIONS if name != "linear"])
def test_activations_are_named_as_in_the_web_ui(name: str):
    """It takes any of torch's by the name of its class in lower case, and "swish" is Hardswish."""
    kind = hypernetwork.ACTIVATIONS[name]
    assert kind.__name__.lower() == ("hardswish" if name == "swish" else name)


def linear(width: int, **other: Tensor) -> dict[str, Tensor]:
    return {"linear.0.weight": torch.ones(width, width), "linear.0.bias": torch.ones(width), **other}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"emb_params": torch.ones(1, 768)}, "no networks by width"),
        ([1], "no networks by width"),
        ({"optimizer_state_dict": {0: 1}}, "no networks by width"),
        ({8: linear(8)}, "no pair of networks for width 8"),
        ({8: (linear(8),)}, "no pair"),
        ({8: (linear(8), linear(4))}, "layer 0 of its network for width 8"),
        ({8: (linear(8), {})}, "does not return that width"),
        ({8: (linear(8), {"linear.0.weight": torch.ones(8, 8)})}, "layer 0"),
        ({8: (linear(8), linear(8, **{"linear.0.bias": torch.ones(7)}))}, "layer 0"),
        (
            {
                8: (
                    linear(8),
                    linear(8, **{"linear.0.weight": torch.ones(4, 8), "linear.0.bias": torch.ones(4)}),
                )
            },
            "not return",
        ),
        ({8: (linear(8), linear(8, **{"linear.0.weight": torch.full((8, 8), torch.nan)}))}, "not finite"),
        ({8: (linear(8), linear(8, **{"linear.0.weight": torch.ones(8, 8, dtype=torch.int64)}))}, "layer 0"),
        ({8: (linear(8), linear(8, **{"linear.1.weight": torch.ones(1, 8, 8)}))}, "layer 1"),
        ({8: (linear(8), linear(8, **{"res.0.weight": torch.ones(8)}))}, "unknown weight 'res.0.weight'"),
        ({8: (linear(8), {1: 2})}, "unknown weight '1'"),
        ({8: (linear(8), linear(8)), "activation_func": "prelu"}, "activation function 'prelu'"),
        ({8: (linear(8), linear(8)), "activation_func": ["x\n"]}, "activation function"),
        ({8: (linear(8), linear(8)), "activation_func": torch.ones(3)}, "activation function"),
        ({8: (linear(8), 0), "activate_output": torch.ones(3)}, "no pair"),
    ],
)
def test_what_is_no_hypernetwork_is_refused_in_one_line(tmp_path: Path, content: object, says: str):
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path / "bad.pt")
    message = str(caught.value)
    assert message.startswith("bad.pt: ")
    assert re.search(says, message)
    assert len(message) <= 200
    assert message.isprintable()


def test_a_network_that_is_no_unet_is_refused(tmp_path: Path):
    make(tmp_path / "style.pt", Recipe())
    model = replace(models(), denoiser=replace(models().denoiser, network=lambda *args: args[0]))
    with pytest.raises(LdmError), applied(model, [(tmp_path / "style.pt", 1.0)]):
        pass
    with applied(model, []):
        pass
