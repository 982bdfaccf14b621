"""Training a LoRA: its objective, its steps, its settings, and that it can be stopped anywhere."""

import json
import os
import random
import signal
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ldm.denoise import Prediction
from ldm.errors import LdmError
from ldm.formats import read
from ldm.schedules import NoiseSchedule
from ldm.training.lora import (
    LoraConfig,
    check_trainable,
    cut_captions,
    denoising_loss,
    encoded,
    steps_per_epoch,
    train_lora,
)
from ldm.training.lora_data import Dataset, Drawn
from ldm.training.lora_metadata import metadata
from ldm.training.lora_network import LoraNetwork
from tests.tiny_families import tiny
from tests.training.lora_cases import (
    CONFIG,
    DORA,
    FAMILIES,
    LOCON,
    LORA,
    dataset,
    generator,
    output,
    seen,
    snapshot,
)

# --- the objective

ABAR = torch.tensor(NoiseSchedule.scaled_linear().alphas_cumprod, dtype=torch.float32)


def loss(
    prediction: Prediction, t: int, off: float, gamma: float, weights: tuple[float, ...] = (1, 1)
) -> float:
    """Of a network whose idea of the picture is `off` everywhere."""
    z, noise = (torch.randn(2, 4, 8, 8, generator=generator(i)) for i in (0, 1))
    a = ABAR[t]

    def predict(x: Tensor, _: Tensor) -> Tensor:
        wrong = z + off
        eps = (x - a.sqrt() * wrong) / (1 - a).sqrt()
        return eps if prediction is Prediction.EPS else a.sqrt() * eps - (1 - a).sqrt() * wrong

    level, each = torch.tensor([t, t]), torch.tensor(weights)
    return denoising_loss(predict, z, noise, level, ABAR, prediction, gamma=gamma, weights=each).item()


@pytest.mark.parametrize("prediction", Prediction)
def test_the_truth_has_no_loss(prediction: Prediction):
    assert loss(prediction, 400, 0.0, 5.0) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("prediction", Prediction)
@pytest.mark.parametrize("t", [10, 200, 500, 999])
def test_min_snr_weighs_an_error_in_the_picture_by_the_smaller_of_snr_and_gamma(
    prediction: Prediction, t: int
):
    snr = (ABAR[t] / (1 - ABAR[t])).item()
    # Cancellation in x - sqrt(abar) z at low noise leaves three digits.
    assert loss(prediction, t, 0.1, 5.0) == pytest.approx(0.01 * min(snr, 5.0), rel=2e-3)
    unweighted = snr if prediction is Prediction.EPS else snr + 1
    assert loss(prediction, t, 0.1, 0.0) == pytest.approx(0.01 * unweighted, rel=2e-3)


def test_prior_pictures_count_by_their_weight():
    both, own = loss(Prediction.V, 500, 0.1, 0.0), loss(Prediction.V, 500, 0.1, 0.0, (1, 0))
    assert own == pytest.approx(both / 2)
    assert loss(Prediction.V, 500, 0.1, 0.0, (1, 0.3)) == pytest.approx(own * 1.3)


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_are_encoded_as_prompts_are(family: str):
    models = tiny(family)
    drawn = [seen("a cat"), seen("two dogs and a very long story")]
    batch = encoded(models, drawn, None)
    for i, one in enumerate(drawn):
        alone = models.family.condition(models.text, models.tokenizer, one.caption, one.picture)
        for ours, theirs in ((batch.context, alone.context), (batch.vector, alone.vector)):
            assert (ours is None) == (theirs is None)
            if ours is not None and theirs is not None:
                torch.testing.assert_close(ours[i : i + 1], theirs, atol=1e-5, rtol=1e-5)  # batched products


def test_captions_that_are_cut_off_are_counted():
    data = dataset((1, 1))
    long = replace(data.examples[0], caption="cat " * 76)
    fits = replace(data.examples[0], caption="cat " * 75)
    assert cut_captions(tiny("sd1"), replace(data, examples=[long, fits])) == (1, 75)


def test_sdxl_is_told_the_original_size_and_the_crop():
    models = tiny("sdxl")
    plain, cut = (
        encoded(models, [one], None).vector for one in (seen(), seen(original=(100, 80), corner=(7, 3)))
    )
    assert plain is not None
    assert cut is not None
    parts = (cut - plain)[0, -6 * 256 :].unflatten(0, (6, 256)).abs().amax(1) > 0
    assert parts.tolist() == [True, True, True, True, False, False]


# --- the run


@dataclass(frozen=True, eq=False)
class Interrupted(Dataset):
    """Presses Ctrl-C when so many pictures have been drawn."""

    after: int = 0
    drawn: list[int] = field(default_factory=list)

    def draw(self, index: int, rng: random.Random) -> Drawn:
        self.drawn.append(index)
        if len(self.drawn) == self.after:
            os.kill(os.getpid(), signal.SIGINT)
        return super().draw(index, rng)


def test_steps_are_counted_over_buckets_batches_and_accumulation():
    data = dataset((5, 4))
    for batch, accumulated, steps in ((1, 1, 9), (2, 1, 5), (4, 1, 3), (2, 2, 3), (9, 1, 2), (1, 4, 3)):
        config = replace(CONFIG, batch_size=batch, gradient_accumulation=accumulated)
        assert steps_per_epoch(data, config) == steps
    assert steps_per_epoch(dataset((5, 4), prior=2), replace(CONFIG, batch_size=3)) == 7  # 9 of each kind


HARD = replace(
    CONFIG,
    gradient_accumulation=2,
    noise_offset=0.1,
    prior_loss_weight=0.5,
    ema_decay=0.9,
    scheduler="cosine",
    warmup=2,
)


def test_a_run_in_pieces_is_the_run_in_one_to_the_bit(tmp_path: Path):
    data = dataset(
        (3, 2), prior=1, flip=True, shuffle_caption=True, caption_dropout=0.2, tag_dropout=0.2, keep_tokens=1
    )
    models = tiny("embedded")
    whole = train_lora(models, data, DORA, HARD, tmp_path / "whole")
    stops = 0
    pieces = None
    for _ in range(9):
        piece = Interrupted(**vars(data), after=5)
        pieces = train_lora(models, piece, DORA, HARD, tmp_path / "pieces")
        stops += pieces is None
        if pieces is not None:
            break
    assert stops > 1
    assert whole is not None
    assert pieces is not None
    assert pieces.step == whole.step == 2 * steps_per_epoch(data, HARD)
    assert all(torch.equal(w, pieces.weights[name]) for name, w in whole.weights.items())
    one, other = (read(tmp_path / name / "state.safetensors") for name in ("whole", "pieces"))
    assert one.metadata == other.metadata
    assert all(torch.equal(w, other.tensors[name]) for name, w in one.tensors.items())
    logs = [(tmp_path / name / "loss.csv").read_text() for name in ("whole", "pieces")]
    assert logs[0] == logs[1]
    assert len(logs[0].splitlines()) == 1 + whole.step


def test_all_of_the_additions_are_trained_and_nothing_else(tmp_path: Path):
    models = tiny("embedded")
    before = {name: w.clone() for name, w in models.state_dict().items()}
    start = LoraNetwork(models, DORA, seed=CONFIG.seed).state_dict()
    drawn = output(models)
    done = train_lora(models, dataset((4,)), DORA, replace(CONFIG, gradient_checkpointing=True), tmp_path)
    assert done is not None
    same = [name for name, w in done.weights.items() if torch.equal(w, start[name])]
    assert all(name.endswith("alpha") for name in same)
    assert all(torch.equal(w, before[name]) for name, w in models.state_dict().items())
    assert torch.equal(output(models), drawn)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"unet_lr": 1e-5}, "unet_lr"),
        ({"batch_size": 1}, "batch_size"),
        ({"min_snr_gamma": 5.0}, "min_snr_gamma"),
    ],
)
def test_other_settings_do_not_go_on_with_a_run(tmp_path: Path, change: dict[str, float], named: str):
    models, data = tiny("embedded"), dataset()
    train_lora(models, data, LORA, CONFIG, tmp_path, seconds=0)  # saves the state of step 0
    with pytest.raises(LdmError, match=f"another .*{named}"):
        train_lora(models, data, LORA, replace(CONFIG, **change), tmp_path)  # pyright: ignore[reportArgumentType]
    with pytest.raises(LdmError, match="another data"):
        train_lora(models, replace(data, digest="other"), LORA, CONFIG, tmp_path)
    with pytest.raises(LdmError, match="another network_alpha"):
        train_lora(models, data, replace(LORA, network_alpha=1.0), CONFIG, tmp_path)


def test_a_constant_rate_may_go_on_for_more_epochs_and_a_cosine_may_not(tmp_path: Path):
    models, data = tiny("embedded"), dataset((2,))
    for scheduler in ("constant", "cosine"):
        config = replace(CONFIG, scheduler=scheduler, epochs=1)
        train_lora(models, data, LORA, config, tmp_path / scheduler)
    longer = train_lora(models, data, LORA, CONFIG, tmp_path / "constant")
    at_once = train_lora(models, data, LORA, CONFIG, tmp_path / "at once")
    assert longer is not None
    assert at_once is not None
    assert all(torch.equal(w, at_once.weights[name]) for name, w in longer.weights.items())
    with pytest.raises(LdmError, match="ask for more epochs"):
        train_lora(models, data, LORA, replace(CONFIG, epochs=1), tmp_path / "constant")
    with pytest.raises(LdmError, match="another epochs"):
        train_lora(models, data, LORA, replace(CONFIG, scheduler="cosine"), tmp_path / "cosine")


def test_accumulation_makes_one_step_of_several_batches(tmp_path: Path):
    models, data = tiny("embedded"), dataset((3,))
    config = replace(CONFIG, batch_size=1, gradient_accumulation=3, epochs=1)
    assert train_lora(models, data, LORA, config, tmp_path) is not None
    moments = read(tmp_path / "state.safetensors").tensors
    assert len((tmp_path / "loss.csv").read_text().splitlines()) == 2  # one step of three batches
    assert all(w == 1 for name, w in moments.items() if name.startswith("optimizer.step."))


def test_it_learns(tmp_path: Path):
    models, data = tiny("embedded"), dataset((2,))
    config = replace(CONFIG, unet_lr=2e-2, text_encoder_lr=1e-3, epochs=15)
    z, noise = data.latents[0][:1].float(), torch.randn(1, 4, 4, 16, generator=generator(1))
    weights = torch.ones(1)

    @torch.no_grad()
    def error() -> float:
        told = encoded(models, [data.draw(0, random.Random(0))], None)
        return denoising_loss(
            lambda x, t: models.unet(x, t, told.context, told.vector),
            *(z, noise, torch.tensor([900]), ABAR, Prediction.V),
            gamma=0.0,
            weights=weights,
        ).item()

    before = error()
    done = train_lora(models, data, LOCON, config, tmp_path)
    assert done is not None
    network = LoraNetwork(models, LOCON)
    network.load_state_dict(done.weights)
    with network.attached():
        after = error()
    assert after < 0.97 * before  # 15 steps make it 0.95


def test_bfloat16_trains_additions_of_float32(tmp_path: Path):
    models = tiny("sdxl")
    half = replace(
        models,
        denoiser=replace(models.denoiser, network=_copy(models.unet), dtype=torch.bfloat16),
        text=tuple(_copy(text) for text in models.text),
    )
    done = train_lora(half, dataset((2,)), LORA, replace(CONFIG, epochs=1), tmp_path)
    assert done is not None
    assert all(w.dtype is torch.float32 and w.isfinite().all() for w in done.weights.values())


def _copy(module: nn.Module) -> nn.Module:
    with torch.device("meta"):
        made = type(module)(module.config)  # pyright: ignore[reportArgumentType, reportCallIssue]
    made.load_state_dict({n: w.to(torch.bfloat16) for n, w in module.state_dict().items()}, assign=True)
    return made.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("family", "says"),
    [
        ("class-f4", "autoencoder"),
        ("text2image-large", "CLIP"),
        ("sd1-inpaint", "more than a text"),
        ("sd2-depth", "more"),
    ],
)
def test_models_without_a_use_for_it_are_refused(family: str, says: str):
    with pytest.raises(LdmError, match=says):
        check_trainable(tiny(family))


@pytest.mark.parametrize(
    "wrong",
    [{"epochs": 0}, {"unet_lr": -1.0}, {"unet_lr": float("nan")}, {"unet_lr": 0, "text_encoder_lr": 0}],
)
def test_settings_that_make_no_sense_are_told(wrong: dict[str, float]):
    with pytest.raises(LdmError):
        LoraConfig(**wrong)  # pyright: ignore[reportArgumentType]


def test_metadata_are_those_that_tools_read():
    data = dataset((4, 4), prior=2)
    network = LoraNetwork(tiny("embedded"), LOCON)
    facts = metadata(tiny("sd1"), data, LOCON, CONFIG, snapshot(network), "cat")
    assert facts["ss_base_model_version"] == "sd_v1"
    assert (facts["ss_network_module"], facts["ss_network_dim"], facts["ss_network_alpha"]) == (
        "networks.lora",
        "4",
        "2.0",
    )
    assert json.loads(facts["ss_network_args"]) == {"conv_dim": 2, "conv_alpha": 3.0}
    assert json.loads(facts["ss_dataset_dirs"]) == {"3_cat": {"n_repeats": 4, "img_count": 2}}
    assert json.loads(facts["ss_tag_frequency"])["3_cat"]["a cat"] == 2
    assert (facts["ss_num_train_images"], facts["ss_num_reg_images"]) == ("8", "8")
    assert all(isinstance(value, str) for value in facts.values())
