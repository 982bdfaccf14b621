"""Checkpoints load to the bit, whatever of the usual variations they come in, or are refused in one line."""

import pickle
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ldm.checkpoint import load, load_vae, probe_prediction
from ldm.denoise import Denoiser, Prediction
from ldm.errors import CheckpointError, LdmError, RequestError
from ldm.families.family import UNET, VAE
from ldm.families.sd1 import SD1
from ldm.formats import read, write_safetensors
from ldm.models import Models
from ldm.unet import UNet, UNetConfig
from ldm.vae import AutoencoderKL, VAEConfig
from tests.tiny_families import BY_NAME, tiny

Weights = dict[str, Tensor]


def small_unet(context_dim: int = 768, **changes: object) -> UNetConfig:
    config = UNetConfig(
        model_channels=32,
        channel_mult=(1, 1),
        num_res_blocks=1,
        depth=(0, 1),
        context_dim=context_dim,
        num_heads=8,
    )
    return replace(config, **changes)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def textless() -> Weights:
    """UNet and VAE of Stable Diffusion 1, recognised by the published width of its context."""
    torch.manual_seed(0)
    unet = UNet(small_unet())
    vae = AutoencoderKL(VAEConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1))
    return Models(SD1, Denoiser(unet, SD1.schedule(), Prediction.EPS), vae, ()).state_dict()


def below(weights: Mapping[str, Tensor], prefix: str) -> Weights:
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def refusal(action: Callable[[], object]) -> str:
    """The message of the CheckpointError that the action must end in: one printable line."""
    with pytest.raises(CheckpointError) as caught:
        action()
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) <= 200
    return message


# --- whole files


@pytest.mark.parametrize("name", BY_NAME)
def test_saved_models_load_to_the_bit_and_save_to_the_same_file(tmp_path: Path, name: str):
    models = tiny(name)
    models.save(tmp_path / "first.safetensors")
    loaded = load(tmp_path / "first.safetensors")
    assert loaded.family == models.family
    assert (loaded.denoiser.schedule, loaded.denoiser.prediction) == (
        models.denoiser.schedule,
        models.denoiser.prediction,
    )
    assert loaded.unet.config == models.unet.config
    assert models.vae is not None
    assert loaded.vae is not None
    assert loaded.vae.config == models.vae.config
    assert [type(part) for part in loaded.text] == [type(part) for part in models.text]
    assert equal(loaded.state_dict(), models.state_dict())
    loaded.save(tmp_path / "second.safetensors")
    assert (tmp_path / "first.safetensors").read_bytes() == (tmp_path / "second.safetensors").read_bytes()


def test_loaded_models_are_ready_to_run_and_not_to_train(textless: Weights, tmp_path: Path):
    write_safetensors(tmp_path / "a.safetensors", textless)
    models = load(tmp_path / "a.safetensors")
    assert models.vae is not None
    for module in (models.unet, models.vae):
        assert not module.training
        assert not any(w.requires_grad or w.is_meta for w in module.state_dict(keep_vars=True).values())


def test_the_file_is_known_by_its_name_and_hash(textless: Weights, tmp_path: Path):
    path = tmp_path / "my model.safetensors"
    write_safetensors(path, {**textless, "model_ema.decay": torch.tensor(0.9)})
    models = load(path)
    assert models.name == "my model"
    assert models.describe().startswith("Stable Diffusion 1.x, predicts eps, float32 on cpu: UNet 0.")
    assert models.hash is not None
    assert len(models.hash) == 10
    assert tiny("sd1").hash is None
    gone = load(path)
    path.unlink()
    assert gone.hash is None


def test_mixed_dtypes_become_one(textless: Weights, tmp_path: Path):
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    mixed = {name: w.to(kinds[i % 4]) for i, (name, w) in enumerate(textless.items())}
    write_safetensors(tmp_path / "mixed.safetensors", mixed)
    expected = {name: w.float() for name, w in mixed.items()}
    assert equal(load(tmp_path / "mixed.safetensors").state_dict(), expected)
    half = load(tmp_path / "mixed.safetensors", dtype=torch.bfloat16)
    assert half.denoiser.dtype == torch.bfloat16
    assert half.vae is not None
    assert {w.dtype for w in half.unet.state_dict().values()} == {torch.bfloat16}
    assert {w.dtype for w in half.vae.state_dict().values()} == {torch.float32}  # some overflow in half


def test_8_bit_floats_load(textless: Weights, tmp_path: Path):
    weights = {name: w.to(torch.float8_e4m3fn) for name, w in textless.items()}
    write_safetensors(tmp_path / "fp8.safetensors", weights)
    assert equal(
        load(tmp_path / "fp8.safetensors").state_dict(), {name: w.float() for name, w in weights.items()}
    )


def test_saving_converts_to_the_dtype_asked_for(textless: Weights, tmp_path: Path):
    write_safetensors(tmp_path / "a.safetensors", textless)
    load(tmp_path / "a.safetensors").save(tmp_path / "half.safetensors", dtype=torch.float16)
    again = load(tmp_path / "half.safetensors", dtype=torch.float16)
    assert torch.equal(
        again.unet.state_dict()["out.2.weight"], textless[UNET + "out.2.weight"].to(torch.float16)
    )
    with pytest.raises(LdmError, match="exists"):
        again.save(tmp_path / "half.safetensors")


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_weights_stay_in_the_mapped_file(textless: Weights, tmp_path: Path):
    path = tmp_path / "mapped.safetensors"
    write_safetensors(path, textless)
    models = load(path)
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in lines if line.endswith(str(path))]
    mapped = [range(int(start, 16), int(end, 16)) for start, end in ranges]
    assert models.vae is not None
    for module in (models.unet, models.vae):
        for name, w in module.state_dict().items():
            assert any(w.data_ptr() in addresses for addresses in mapped), f"{name} was copied"


def test_writing_to_loaded_weights_leaves_the_file_alone(textless: Weights, tmp_path: Path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, textless)
    before = path.read_bytes()
    load(path).unet.out[2].weight.zero_()  # pyright: ignore
    assert path.read_bytes() == before


def test_no_length_of_the_header_looks_like_a_pickle(tmp_path: Path):
    # The file begins with that length: 128 or 384 begin with the first byte of a pickle.
    path = tmp_path / "a.safetensors"
    firsts = set()
    for padding in range(0, 512, 8):
        write_safetensors(path, {"w": torch.ones(1)}, {"padding": "x" * padding}, overwrite=True)
        firsts.add(path.read_bytes()[0])
        assert list(read(path).tensors) == ["w"]
    assert 0x80 in firsts


# --- variations of files


@pytest.mark.parametrize("prefix", [UNET, ""])
def test_a_file_may_hold_only_a_unet(textless: Weights, tmp_path: Path, prefix: str):
    unet = below(textless, UNET)
    write_safetensors(tmp_path / "unet.safetensors", {prefix + name: w for name, w in unet.items()})
    models = load(tmp_path / "unet.safetensors")
    assert models.family.name == "sd1"
    assert (models.vae, models.text) == (None, ())
    assert equal(models.unet.state_dict(), unet)


@pytest.mark.parametrize("prefix", [UNET, ""])
def test_a_bare_unet_keeps_its_markers(textless: Weights, tmp_path: Path, prefix: str):
    weights = {prefix + name: w for name, w in below(textless, UNET).items()}
    markers = {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
    write_safetensors(tmp_path / "unet.safetensors", weights | markers)
    denoiser = load(tmp_path / "unet.safetensors").denoiser
    assert denoiser.prediction is Prediction.V
    assert denoiser.schedule.sigma_max > 4000


@pytest.mark.parametrize("prefix", [VAE, ""])
def test_the_vae_may_come_from_another_file(textless: Weights, tmp_path: Path, prefix: str):
    other = {name: w + 1 for name, w in below(textless, VAE).items()}
    # As in published VAE files: the discriminator and LPIPS of the training are inside, too.
    extra = {f"{prefix}loss.logvar": torch.zeros(())}
    write_safetensors(tmp_path / "vae.safetensors", {prefix + name: w for name, w in other.items()} | extra)
    write_safetensors(tmp_path / "a.safetensors", textless)
    models = load(tmp_path / "a.safetensors", vae=tmp_path / "vae.safetensors")
    assert models.vae is not None
    assert equal(models.vae.state_dict(), other)
    assert models.vae.config.scale == 0.18215
    assert equal(load_vae(tmp_path / "vae.safetensors").state_dict(), other)


def test_averaged_weights_are_taken_when_asked_for(textless: Weights, tmp_path: Path):
    averages = {
        "model_ema.diffusion_model" + name.replace(".", ""): w * 2
        for name, w in below(textless, UNET).items()
    }
    numbers = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    write_safetensors(tmp_path / "a.safetensors", textless | averages | numbers)
    assert equal(load(tmp_path / "a.safetensors").state_dict(), textless)
    averaged = load(tmp_path / "a.safetensors", ema=True)
    doubled = {name: w * 2 for name, w in below(textless, UNET).items()}
    assert equal(averaged.unet.state_dict(), doubled)

    averages.popitem()
    write_safetensors(tmp_path / "b.safetensors", textless | averages)
    message = refusal(lambda: load(tmp_path / "b.safetensors", ema=True))
    assert "1 of " in message
    assert "EMA" in message


def test_text_encoders_of_older_files_lack_a_level_of_names(tmp_path: Path):
    weights = tiny("sd1").state_dict()
    older = {name.replace("text_model.", ""): w for name, w in weights.items()}
    assert older.keys() != weights.keys()
    position_ids = {"cond_stage_model.transformer.embeddings.position_ids": torch.arange(77)[None]}
    write_safetensors(tmp_path / "old.safetensors", older | position_ids)
    assert equal(load(tmp_path / "old.safetensors").state_dict(), weights)


class Callback:
    """Stands for a class of PyTorch Lightning, which a loader may neither need nor run."""

    def __reduce__(self):
        return print, ("a checkpoint ran code",)


@pytest.mark.parametrize("zipped", [True, False])
def test_training_checkpoints_load_without_running_code(
    textless: Weights, tmp_path: Path, zipped: bool, capsys: pytest.CaptureFixture[str]
):
    constants = {
        "betas": torch.rand(1000, dtype=torch.float64),
        "alphas_cumprod": torch.rand(1000),
        "posterior_mean_coef1": torch.rand(1000),
        "logvar": torch.zeros(1000),
    }
    tree = {
        "epoch": 3,
        "global_step": 470000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": textless | constants,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]}],
        "callbacks": {"checkpoint": {"best": 0.1}},
    }
    torch.save(tree, tmp_path / "last.ckpt", _use_new_zipfile_serialization=zipped)
    assert equal(load(tmp_path / "last.ckpt").state_dict(), textless)

    torch.save(tree | {"callbacks": [Callback()]}, tmp_path / "bad.ckpt", pickle_module=pickle)
    message = refusal(lambda: load(tmp_path / "bad.ckpt"))
    assert "print" in message
    assert capsys.readouterr().out == ""


def test_weights_of_no_part_are_left_out_and_reported(
    textless: Weights, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    write_safetensors(tmp_path / "a.safetensors", textless | {"betas": torch.zeros(3)})
    load(tmp_path / "a.safetensors")
    assert not caplog.records
    write_safetensors(tmp_path / "b.safetensors", textless | {"foo\x1b[31m.bar": torch.zeros(3)})
    load(tmp_path / "b.safetensors")
    assert "b.safetensors: 1 unknown weights left out: foo?[31m.bar" in caplog.text


# --- eps or v


def write_sd2(path: Path, metadata: Mapping[str, str] | None = None, *markers: str, bias: float = 0.5):
    """A bare UNet of SD2's kind that answers `bias` to everything: 0.5 is the noise in the probe's input."""
    torch.manual_seed(0)
    unet = UNet(
        small_unet(1024, model_channels=64, num_heads=None, head_dim=64, linear_projection=True)
    ).requires_grad_(False)
    unet.out[2].weight.zero_()  # pyright: ignore
    unet.out[2].bias.fill_(bias)  # pyright: ignore
    weights = {UNET + name: w for name, w in unet.state_dict().items()}
    write_safetensors(path, weights | {name: torch.empty(0) for name in markers}, metadata)
    return path


def test_a_network_that_returns_the_noise_is_told_from_one_that_does_not(tmp_path: Path):
    eps = load(write_sd2(tmp_path / "eps.safetensors"))
    assert eps.family.name == "sd2"
    assert (eps.denoiser.prediction, eps.default_size) == (Prediction.EPS, 512)
    v = load(write_sd2(tmp_path / "v.safetensors", bias=-1.0))
    assert (v.denoiser.prediction, v.default_size) == (Prediction.V, 768)
    assert probe_prediction(v.unet) is Prediction.V


STATES_V = {"modelspec.prediction_type": "v"}
STATES_EPS = {"modelspec.prediction_type": "epsilon"}


def test_the_users_word_beats_marker_beats_metadata_beats_probe(tmp_path: Path):
    metadata = load(write_sd2(tmp_path / "1.safetensors", STATES_V))
    assert metadata.denoiser.prediction is Prediction.V
    metadata = load(write_sd2(tmp_path / "2.safetensors", STATES_EPS, bias=-1.0))
    assert metadata.denoiser.prediction is Prediction.EPS
    marked = write_sd2(tmp_path / "3.safetensors", STATES_EPS, "v_pred")
    assert load(marked).denoiser.prediction is Prediction.V
    for given in ("eps", Prediction.EPS):
        assert load(marked, prediction=given).denoiser.prediction is Prediction.EPS
    assert load(write_sd2(tmp_path / "4.safetensors"), prediction="v").denoiser.prediction is Prediction.V


def test_metadata_beats_the_family(textless: Weights, tmp_path: Path):
    write_safetensors(tmp_path / "a.safetensors", textless, STATES_V)
    assert load(tmp_path / "a.safetensors").denoiser.prediction is Prediction.V


@pytest.mark.parametrize("name", ["sd1", "sd2", "embedded"])
@pytest.mark.parametrize("prediction", Prediction)
def test_saving_keeps_the_prediction(tmp_path: Path, name: str, prediction: Prediction):
    models = tiny(name)
    changed = replace(models, denoiser=replace(models.denoiser, prediction=prediction))
    changed.save(tmp_path / "a.safetensors")
    assert load(tmp_path / "a.safetensors").denoiser.prediction is prediction


def test_an_unknown_prediction_is_refused_before_the_file_is_read(tmp_path: Path):
    with pytest.raises(RequestError, match="'eps' or 'v', got 'x0'"):
        load(tmp_path / "missing.safetensors", prediction="x0")


def test_zero_terminal_snr_models_reach_the_sigma_of_pure_noise(textless: Weights, tmp_path: Path):
    write_safetensors(tmp_path / "a.safetensors", textless | {"ztsnr": torch.empty(0)})
    models = load(tmp_path / "a.safetensors")
    assert models.denoiser.schedule.sigma_max == pytest.approx(4518.8, abs=0.1)
    models.save(tmp_path / "b.safetensors")
    assert load(tmp_path / "b.safetensors").denoiser.schedule == models.denoiser.schedule


# --- what is refused

PROJ = UNET + "input_blocks.3.1.proj_in.weight"


def without(weights: Weights, *names: str) -> Weights:
    return {name: w for name, w in weights.items() if name not in names}


def spoiled(w: Tensor, value: float) -> Tensor:
    w = w.clone()
    w.view(-1)[3] = value
    return w


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda w: without(w, PROJ), "1 of 1?? UNet weights are missing, first: input_blocks.3.1.proj_in"),
        (lambda w: w | {UNET + "foo": torch.ones(1)}, "1 unknown UNet weights, first: foo"),
        (
            lambda w: w | {PROJ: w[PROJ][:5]},
            "first: input_blocks.3.1.proj_in.weight is [5, 32, 1, 1], not [3",
        ),
        (lambda w: w | {PROJ: spoiled(w[PROJ], float("nan"))}, "1 UNet weights hold NaN or infinity"),
        (lambda w: w | {PROJ: spoiled(w[PROJ], float("-inf"))}, "1 UNet weights hold NaN or infinity"),
        (lambda w: without(w, VAE + "decoder.mid.block_2.conv1.bias"), "VAE weights are missing, first: dec"),
        (lambda w: without(w, VAE + "post_quant_conv.weight"), "there is no 'post_quant_conv.weight'"),
        (lambda w: without(w, UNET + "out.2.weight"), "there is no 'out.2.weight'"),
        (lambda w: w | {UNET + "out.2.weight": torch.ones(())}, "of an unknown kind"),
    ],
)
def test_defects_are_named(
    textless: Weights, tmp_path: Path, change: Callable[[Weights], Weights], expected: str
):
    write_safetensors(tmp_path / "bad.safetensors", change(textless))
    message = refusal(lambda: load(tmp_path / "bad.safetensors"))
    assert message.startswith("bad.safetensors: ")
    before, _, after = expected.partition("1??")  # some number of weights
    assert before in message
    assert after in message


def test_a_weight_too_large_for_half_precision_is_named(textless: Weights, tmp_path: Path):
    write_safetensors(tmp_path / "a.safetensors", textless | {PROJ: spoiled(textless[PROJ], 1e5)})
    load(tmp_path / "a.safetensors", dtype=torch.bfloat16)
    message = refusal(lambda: load(tmp_path / "a.safetensors", dtype=torch.float16))
    assert "float16" in message
    assert "proj_in" in message


def rank_4(*names: str) -> Weights:
    return {name: torch.ones(4, 8) for name in names}


MISTAKES: dict[str, tuple[Weights, str]] = {
    "kohya LoRA": (
        rank_4("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "lora_te_text_model.alpha"),
        "a LoRA",
    ),
    "PEFT LoRA": (
        rank_4("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"),
        "a LoRA",
    ),
    "ControlNet": (rank_4("control_model.input_blocks.0.0.weight"), "a ControlNet"),
    "diffusers ControlNet": (
        rank_4("controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"),
        "a ControlNet",
    ),
    "diffusers UNet": (
        rank_4("down_blocks.0.attentions.0.norm.weight", "conv_in.weight"),
        "layout of diffusers",
    ),
    "diffusers VAE": (
        rank_4("encoder.conv_in.weight", "encoder.down_blocks.0.resnets.0.norm1.weight"),
        "layout of diffusers",
    ),
    "VAE": (rank_4("encoder.down.0.block.0.norm1.weight", "decoder.conv_in.weight"), "--vae"),
    "embedding": (rank_4("emb_params"), "a textual inversion embedding"),
    "SDXL embedding": (rank_4("clip_g", "clip_l"), "a textual inversion embedding"),
    "upscaler": (
        rank_4("params_ema.conv_first.weight", "params_ema.body.0.rdb1.conv1.weight"),
        "an upscaler",
    ),
    "Flux": (rank_4("double_blocks.0.img_attn.qkv.weight"), "Flux"),
    "anything": (rank_4("weight\n\x1b[2J", "b" * 300), "not a checkpoint of a known family"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_other_kinds_of_files_are_called_by_their_name(tmp_path: Path, kind: str):
    weights, expected = MISTAKES[kind]
    write_safetensors(tmp_path / "other.safetensors", weights)
    message = refusal(lambda: load(tmp_path / "other.safetensors"))
    assert message.startswith("other.safetensors: ")
    assert expected in message


@pytest.mark.parametrize("name", ["page.safetensors", "page.ckpt"])
def test_a_web_page_is_called_a_web_page(tmp_path: Path, name: str):
    (tmp_path / name).write_text("<!DOCTYPE html><html><body>Sign in to download</body></html>")
    assert "web page" in refusal(lambda: load(tmp_path / name))


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path):
    assert "no such file" in refusal(lambda: load(tmp_path / "none.safetensors"))


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (rank_4("foo"), "no autoencoder in this file"),
        (MISTAKES["diffusers VAE"][0] | rank_4("decoder.conv_in.weight"), "encoder.down.0.block.0.conv1"),
        ({"encoder.conv_in.weight": torch.ones(0, 3, 3, 3)}, "there is no"),
        ({"encoder.conv_in.weight": torch.ones(3)}, "of an unknown kind"),
    ],
)
def test_a_vae_file_without_one_is_refused_by_its_own_name(
    textless: Weights, tmp_path: Path, weights: Weights, expected: str
):
    write_safetensors(tmp_path / "a.safetensors", textless)
    write_safetensors(tmp_path / "vae.safetensors", weights)
    message = refusal(lambda: load(tmp_path / "a.safetensors", vae=tmp_path / "vae.safetensors"))
    assert message.startswith("vae.safetensors: ")
    assert expected in message


def test_parts_of_different_models_are_refused(textless: Weights, tmp_path: Path):
    write_safetensors(tmp_path / "a.safetensors", textless)
    vae = AutoencoderKL(VAEConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=3, embed_dim=3))
    write_safetensors(tmp_path / "vae.safetensors", vae.state_dict())
    message = refusal(lambda: load(tmp_path / "a.safetensors", vae=tmp_path / "vae.safetensors"))
    assert "its latents have 3 channels, those of the UNet 4" in message

    whole = tiny("sd1").state_dict()
    swapped = {name: w for name, w in whole.items() if not name.startswith(UNET)} | {
        name: w for name, w in textless.items() if name.startswith(UNET)
    }
    write_safetensors(tmp_path / "b.safetensors", swapped)
    message = refusal(lambda: load(tmp_path / "b.safetensors"))
    assert "its states are 64 wide, the UNet reads 768" in message


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_shapes_that_make_no_network_are_refused(tmp_path: Path):
    unet = UNet(small_unet())
    weights = {UNET + name: w.detach() for name, w in unet.state_dict().items()}
    for name, shape in (
        ("input_blocks.0.0.weight", (0, 4, 3, 3)),  # division by zero
        ("input_blocks.0.0.weight", (33, 4, 3, 3)),  # no multiple of the 32 groups
        ("input_blocks.1.0.in_layers.2.weight", (31, 32, 3, 3)),
        ("input_blocks.1.0.emb_layers.1.weight", (7,)),
    ):
        path = tmp_path / "bad.safetensors"
        write_safetensors(path, weights | {UNET + name: torch.zeros(shape)}, overwrite=True)
        refusal(lambda path=path: load(path))


def test_long_and_strange_names_do_not_reach_the_terminal(textless: Weights, tmp_path: Path):
    strange = {f"{UNET}\x1b]0;evil\x07\n{'x' * 500}{i}": torch.ones(1) for i in range(5)}
    path = tmp_path / f"{'n' * 100}.safetensors"
    write_safetensors(path, textless | strange)
    refusal(lambda: load(path))


def test_class_tables_and_bert_survive_the_file(tmp_path: Path):
    models = tiny("class-f4")
    models.save(tmp_path / "a.safetensors")
    loaded = load(tmp_path / "a.safetensors")
    assert isinstance(loaded.text[0], nn.Embedding)
    bert = tiny("text2image-large")
    bert.save(tmp_path / "b.safetensors")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "apple"]))
    assert load(tmp_path / "b.safetensors").tokenizer is None
    loaded = load(tmp_path / "b.safetensors", vocabulary=tmp_path / "vocab.txt")
    assert loaded.tokenizer is not None
    with pytest.raises(LdmError, match=r"cannot read nothing\.txt"):
        load(tmp_path / "b.safetensors", vocabulary=tmp_path / "nothing.txt")
