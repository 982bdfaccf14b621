"""Files are merged into models of their family, in any number and order, and leave no trace."""

import hashlib
import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ldm.lora
from ldm.errors import CheckpointError, RequestError
from ldm.formats import write_safetensors
from ldm.lora import applied, coverage, read, short_hash
from ldm.lora_names import Place, kohya_key, parts, trained
from ldm.models import Models
from tests.tiny_families import tiny

FAMILIES = ("sd1", "sd2", "sdxl", "embedded")


def weights(models: Models) -> dict[str, Tensor]:
    """A copy of all that a LoRA could change."""
    return {
        f"{part}/{name}": w.clone()
        for part, network in parts(models).items()
        for name, w in network.state_dict().items()
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def lora_tensors(models: Models, seed: int = 0, rank: int = 2, size: float = 0.1) -> dict[str, Tensor]:
    """A LoRA on all modules that kohya adapts, convolutions too."""
    random = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for place in trained(models, convolutions=True):
        weight = parts(models)[place.part].get_parameter(f"{place.name}.weight")
        key, ones = kohya_key(models, place), [1] * (weight.ndim - 2)
        tensors[f"{key}.lora_up.weight"] = size * torch.randn(len(weight), rank, *ones, generator=random)
        tensors[f"{key}.lora_down.weight"] = size * torch.randn(rank, *weight.shape[1:], generator=random)
        tensors[f"{key}.alpha"] = torch.tensor(rank / 2)
    return tensors


def write(path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    write_safetensors(path, tensors, metadata)
    return path


def in_half(models: Models, dtype: torch.dtype) -> Models:
    """A copy in another precision."""
    unet, text = deepcopy(models.unet).to(dtype), tuple(deepcopy(part).to(dtype) for part in models.text)
    return replace(models, denoiser=replace(models.denoiser, network=unet), text=text)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_module_is_matched_merged_and_restored(family: str, tmp_path):
    models = tiny(family)
    before = weights(models)
    pointers = [w.data_ptr() for w in models.unet.parameters()]
    tensors = lora_tensors(models)
    lora = read(write(tmp_path / "all.safetensors", tensors))
    places = trained(models, convolutions=True)
    assert len(coverage(models, lora).matched) == len(places)
    assert coverage(models, lora).unmatched == ()
    with applied(models, [(lora, 0.8, -0.5)]):
        merged = weights(models)
        assert [w.data_ptr() for w in models.unet.parameters()] == pointers  # in place: no recompilation
    changed = {f"{place.part}/{place.name}.weight" for place in places}
    for name, now in merged.items():
        if name not in changed:
            assert torch.equal(now, before[name])
            continue
        part, _, module = name.removesuffix(".weight").partition("/")
        key = kohya_key(models, Place(part, module))
        up, down = tensors[f"{key}.lora_up.weight"], tensors[f"{key}.lora_down.weight"]
        delta = (0.8 if part == "unet" else -0.5) / 2 * (up.flatten(1) @ down.flatten(1)).view_as(now)
        torch.testing.assert_close(now, before[name] + delta, rtol=0, atol=1e-6)
    assert same(before, weights(models))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_any_number_in_any_order_gives_the_same_bits_and_restores_them(dtype: torch.dtype, tmp_path):
    models = in_half(tiny("sd1"), dtype)
    before = weights(models)
    uses = [
        (write(tmp_path / f"{i}.safetensors", lora_tensors(models, i)), multiplier)
        for i, multiplier in enumerate((0.7, -0.3, 1.1, 0.2))
    ]
    with applied(models, uses):
        first = weights(models)
    for order in (uses[::-1], uses[2:] + uses[:2]):
        with applied(models, order):
            assert same(first, weights(models))
    assert not same(first, before)
    assert same(before, weights(models))


def test_in_half_precision_the_merge_is_rounded_once(tmp_path):
    models, half = tiny("sd1"), in_half(tiny("sd1"), torch.bfloat16)
    files = [(write(tmp_path / f"{i}.safetensors", lora_tensors(models, i)), 0.6) for i in range(3)]
    exact = in_half(half, torch.float32)  # the weights that the half model has
    with applied(half, files), applied(exact, files):
        rounded = {name: w.to(torch.bfloat16) for name, w in weights(exact).items()}
        assert same(rounded, weights(half))


def test_nested_blocks_are_one(tmp_path):
    models = in_half(tiny("sd1"), torch.bfloat16)
    before = weights(models)
    one, two = (write(tmp_path / f"{i}.safetensors", lora_tensors(models, i)) for i in range(2))
    with applied(models, [(two, 0.5), (one, 1.0)]):
        both = weights(models)
    with applied(models, [(one, 1.0)]):
        outer = weights(models)
        with applied(models, [(two, 0.5)]):
            assert same(both, weights(models))
        assert same(outer, weights(models))
    assert same(before, weights(models))


def test_blocks_may_end_in_any_order(tmp_path):
    # As two runs do that are drawn by turns, or one whose iterator is given up late.
    models = tiny("sd1")
    before = weights(models)
    one, two = (write(tmp_path / f"{i}.safetensors", lora_tensors(models, i)) for i in range(2))
    with applied(models, [(two, 0.5)]):
        only_two = weights(models)
    first, second = applied(models, [(one, 1.0)]), applied(models, [(two, 0.5)])
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert same(only_two, weights(models))
    second.__exit__(None, None, None)
    assert same(before, weights(models))


def interrupted(models: Models, path: Path) -> None:
    with applied(models, [(path, 1.0)]):
        raise KeyboardInterrupt


def test_an_exception_restores_too(tmp_path):
    models = tiny("sd1")
    before = weights(models)
    with pytest.raises(KeyboardInterrupt):
        interrupted(models, write(tmp_path / "a.safetensors", lora_tensors(models)))
    assert same(before, weights(models))


def test_a_compiled_network_sees_the_change_and_is_not_compiled_again(tmp_path):
    models = tiny("sd1")
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(models.unet, backend=backend, fullgraph=True)
    inputs = torch.ones(1, 4, 8, 8), torch.tensor([500.0]), torch.ones(1, 7, 64)
    with torch.no_grad():
        before = compiled(*inputs)
        with applied(models, [(write(tmp_path / "a.safetensors", lora_tensors(models)), 1.0)]):
            changed = compiled(*inputs)
            torch.testing.assert_close(changed, models.unet(*inputs))
        assert torch.equal(compiled(*inputs), before)
    assert not torch.allclose(changed, before, atol=0.01)
    assert len(graphs) == 1


def test_multiplier_zero_touches_nothing(tmp_path):
    models = tiny("sd1")
    before = weights(models)
    with applied(models, [(write(tmp_path / "a.safetensors", lora_tensors(models)), 0.0, 0.0)]):
        assert same(before, weights(models))


@pytest.mark.parametrize("multiplier", [float("nan"), float("inf")])
def test_a_multiplier_must_be_finite(multiplier: float, tmp_path):
    models = tiny("sd1")
    path = write(tmp_path / "a.safetensors", lora_tensors(models))
    with pytest.raises(RequestError, match="finite"), applied(models, [(path, multiplier)]):
        pass


@pytest.mark.parametrize("ending", [".pt", ".ckpt"])
def test_checkpoints_of_torch_are_read_too(ending: str, tmp_path):
    models = tiny("sd1")
    torch.save(lora_tensors(models), tmp_path / f"a{ending}")
    lora = read(tmp_path / f"a{ending}")
    assert coverage(models, lora).unmatched == ()


def test_names_without_effect_are_told(tmp_path):
    models = tiny("sd1")
    tensors = lora_tensors(models)
    tensors |= {
        "lora_unet_nowhere.lora_up.weight": torch.ones(4, 2),
        "lora_unet_nowhere.lora_down.weight": torch.ones(2, 4),
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.diff_b": torch.ones(64),
        "bundle_emb.word.string_to_param.*": torch.ones(1, 64),
    }
    covered = coverage(models, read(write(tmp_path / "a.safetensors", tensors)))
    assert covered.unmatched == (
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q (bias)",
        "lora_unet_nowhere",
        "bundle_emb.word.string_to_param.*",
    )
    assert "without effect: lora_unet_mid" in str(covered)


def attention(width: int) -> dict[str, Tensor]:
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    return {f"{key}.lora_up.weight": torch.ones(64, 2), f"{key}.lora_down.weight": torch.ones(2, width)}


@pytest.mark.parametrize(
    ("width", "title"),
    [
        (768, "Stable Diffusion 1.x"),
        (1024, "Stable Diffusion 2.x"),
        (2048, "Stable Diffusion XL"),
        (17, "another model"),
    ],
)
def test_a_file_for_another_family_is_refused_with_the_reason(width: int, title: str, tmp_path):
    models = tiny("embedded")
    before = weights(models)
    path = write(tmp_path / "style.safetensors", attention(width))
    message = (
        rf"style\.safetensors: this LoRA was made for {title} \(text width {width}\), "
        r"the model is ldm's embedded icon model \(text width 128\)"
    )
    with pytest.raises(CheckpointError, match=message), applied(models, [(path, 1.0)]):
        pass
    with pytest.raises(CheckpointError, match=message):
        coverage(models, read(path))
    assert same(before, weights(models))


def test_a_file_with_no_module_of_the_model_is_refused(tmp_path):
    pair = {"lora_up.weight": torch.ones(4, 2), "lora_down.weight": torch.ones(2, 4)}
    for module, message in (
        ("lora_unet_double_blocks_0_img_attn_qkv", "made for a transformer"),
        ("lora_unet_nowhere", "none of its 1 modules is in this model"),
    ):
        path = write(tmp_path / f"{module}.safetensors", {f"{module}.{k}": t for k, t in pair.items()})
        with pytest.raises(CheckpointError, match=message):
            coverage(tiny("sd1"), read(path))


def test_a_misshapen_file_leaves_the_model_and_other_files_untouched(tmp_path):
    models = tiny("sd1")
    before = weights(models)
    good = lora_tensors(models)
    last = next(reversed(good)).removesuffix(".alpha")
    bad = good | {f"{last}.lora_up.weight": good[f"{last}.lora_up.weight"][1:]}
    paths = [write(tmp_path / f"{i}.safetensors", t) for i, t in enumerate((good, bad))]
    with (
        pytest.raises(CheckpointError, match=r"1\.safetensors: 'lora_te_.*'"),
        applied(models, [(path, 1.0) for path in paths]),
    ):
        pass
    assert same(before, weights(models))


def test_a_weight_that_overflows_is_refused_and_all_are_restored(tmp_path):
    models = in_half(tiny("sd1"), torch.float16)
    before = weights(models)
    path = write(tmp_path / "a.safetensors", lora_tensors(models))
    with pytest.raises(CheckpointError, match="overflows in float16"), applied(models, [(path, 1e8)]):
        pass
    assert same(before, weights(models))


KEY = "lora_unet_mid_block_attentions_0_proj_in"
PAIR = {f"{KEY}.lora_up.weight": torch.ones(64, 2), f"{KEY}.lora_down.weight": torch.ones(2, 64)}


@pytest.mark.parametrize(
    "tensors",
    [
        {"model.weight": torch.ones(2)},  # no LoRA
        PAIR | {f"{KEY}.alpha": torch.tensor(torch.nan)},
        {f"{KEY}.lora_up.weight": torch.ones(64, 2)},  # half of it
        PAIR | {f"{KEY}.lora_B.weight": torch.ones(64, 2)},  # twice
    ],
)
def test_what_is_no_lora_is_refused_in_one_line_that_names_the_file(tensors: dict[str, Tensor], tmp_path):
    path = write(tmp_path / "bad.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"^bad\.safetensors: [ -~]{1,185}$"):
        read(path)


@pytest.mark.parametrize(
    "settings",
    [
        "{",
        "[]",
        "[" * 100_000,
        '{"unet.lora_alpha": NaN}',
        f'{{"unet.lora_alpha": 1{"0" * 400}}}',
        '{"unet.r": []}',
    ],
)
def test_strange_settings_of_peft_are_left_aside(settings: str, tmp_path):
    tensors = {key.replace(KEY, "unet.mid_block.attentions.0.proj_in"): t for key, t in PAIR.items()}
    [changes] = read(
        write(tmp_path / "a.safetensors", tensors, lora_adapter_metadata=settings)
    ).modules.values()
    assert torch.equal(changes["weight"].change(torch.zeros(64, 64)), torch.full((64, 64), 2.0))


def test_one_module_under_two_names_is_refused(tmp_path):
    other = {key.replace(KEY, "unet.mid_block.attentions.0.proj_in"): t for key, t in PAIR.items()}
    with pytest.raises(CheckpointError, match="twice, under two names"):
        coverage(tiny("sd1"), read(write(tmp_path / "a.safetensors", PAIR | other)))


def test_the_hash_is_of_the_tensors_alone(tmp_path):
    plain = write(tmp_path / "a.safetensors", PAIR)
    noted = write(tmp_path / "b.safetensors", PAIR, ss_output_name="x", note="y" * 100)
    data = plain.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    assert short_hash(plain) == short_hash(noted) == hashlib.sha256(data[begin:]).hexdigest()[:12]
    assert short_hash(write(tmp_path / "c.safetensors", PAIR, sshs_model_hash="ab" * 32)) == "ab" * 6
    torch.save(PAIR, tmp_path / "d.pt")
    whole = hashlib.sha256((tmp_path / "d.pt").read_bytes()).hexdigest()
    assert short_hash(tmp_path / "d.pt") == whole[:12]


def test_metadata_are_kept(tmp_path):
    path = write(tmp_path / "a.safetensors", PAIR, ss_network_dim="2", tags=json.dumps({"a": 1}))
    assert dict(ldm.lora.read(path).metadata) == {"ss_network_dim": "2", "tags": '{"a": 1}'}
