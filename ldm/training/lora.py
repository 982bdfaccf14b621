"""Training a LoRA on a few pictures of one's own.

The objective is the model's own, the error of its predicted noise or velocity (Ho et al. 2020,
arXiv:2006.11239, equation 14), with the options of kohya's trainer, whose names the settings have.
"""

from __future__ import annotations

import importlib.util
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.clip_layers import Encoder
from ldm.denoise import Conditioning, Prediction
from ldm.errors import LdmError
from ldm.families import ClipPart
from ldm.files import atomic_write
from ldm.formats import write_safetensors
from ldm.models import Models
from ldm.text.clip import ClipTextModel
from ldm.text.tokenizer import Tokenizer
from ldm.training.diffusion import stratified_timesteps
from ldm.training.loop import LoopConfig, Run, averaged, rank_and_world
from ldm.training.lora_data import Dataset, Drawn
from ldm.training.lora_network import LoraNetwork, NetworkConfig
from ldm.unet import Block
from ldm.vae import AutoencoderKL


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """How the additions are trained."""

    unet_lr: float = 1e-4  # 0: the UNet gets no additions
    text_encoder_lr: float = 5e-5  # 0: the text encoders get none
    epochs: int = 10
    batch_size: int = 1  # pictures at once, on each process
    gradient_accumulation: int = 1  # batches for each step
    scheduler: Literal["constant", "cosine"] = "constant"
    warmup: int = 0  # steps of linear rise
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0  # gradients longer than this are cut to it; 0: never
    min_snr_gamma: float = 0.0  # 5 gives levels of little noise less weight; 0: all count alike
    noise_offset: float = 0.0  # noise in the mean of each channel, for darker and lighter pictures
    prior_loss_weight: float = 1.0  # of the pictures for prior preservation
    clip_skip: int | None = None  # None: as the model's family
    ema_decay: float = 0.0  # 0: the last weights are kept, not their average
    seed: int = 0
    gradient_checkpointing: bool = False  # a third slower, for a fraction of the memory

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "gradient_accumulation"):
            if getattr(self, name) < 1:
                raise LdmError(f"{name} must be 1 or more, got {getattr(self, name)}")
        numbers = {name: value for name, value in asdict(self).items() if isinstance(value, float | int)}
        for name, value in numbers.items():
            if not 0 <= value < math.inf:
                raise LdmError(f"{name} must be a number from 0, got {value:g}")
        if self.unet_lr == self.text_encoder_lr == 0:
            raise LdmError("unet_lr and text_encoder_lr are both 0: there is nothing to train")
        if self.ema_decay >= 1:
            raise LdmError(f"ema_decay must be below 1, got {self.ema_decay:g}")
        if self.optimizer == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
            raise LdmError(
                "adamw8bit needs the package bitsandbytes: pip install bitsandbytes, or take adamw"
            )


def steps_per_epoch(data: Dataset, config: LoraConfig) -> int:
    """Batches of all buckets, over accumulation and processes, rounded up."""
    _, world = rank_and_world()
    batches = len(data.batches(config.batch_size, config.seed, 0))
    return -(-batches // (config.gradient_accumulation * world))


def check_trainable(models: Models) -> None:
    """Raise LdmError, one sentence, if no LoRA can be trained on this model."""
    family = models.family
    if not isinstance(models.vae, AutoencoderKL):
        raise LdmError(f"{models.name} holds no autoencoder to encode pictures with; give one with --vae")
    if not all(isinstance(part, ClipPart) for part in family.parts) or not family.parts:
        raise LdmError(f"{family.title} has no CLIP text encoder; a LoRA needs Stable Diffusion 1, 2 or XL")
    if len(models.text) != len(family.parts):
        raise LdmError(f"{models.name} holds no text encoder; give a whole checkpoint")
    if models.denoiser.dtype not in (torch.float32, torch.bfloat16):
        raise LdmError("gradients vanish in float16; load the model in bfloat16 or float32")
    if family.concat is not None:
        raise LdmError(f"{family.title} needs more than a text; train on the plain text-to-image model")


def cut_captions(models: Models, data: Dataset) -> tuple[int, int]:
    """How many captions are longer than what the text encoders read, and that many tokens."""
    tokenizer = models.tokenizer or Tokenizer()
    positions = min(e.config.context_length for e in models.text if isinstance(e, ClipTextModel))
    limit = positions - 2  # START and END
    return sum(len(tokenizer.encode(one.caption)) > limit for one in data.examples), limit


def encoded(models: Models, drawn: Sequence[Drawn], clip_skip: int | None) -> Conditioning:
    """What the UNet is told of a batch. Texts longer than the encoder's positions are cut off."""
    tokenizer = models.tokenizer or Tokenizer()
    assert isinstance(tokenizer, Tokenizer)
    texts = [tokenizer.encode(one.caption) for one in drawn]
    contexts: list[Tensor] = []
    pooled: Tensor | None = None
    for encoder, part in zip(models.text, models.family.parts, strict=True):
        assert isinstance(encoder, ClipTextModel) and isinstance(part, ClipPart)  # noqa: PT018
        rows = [tokenizer.pad(ids, encoder.config.context_length, part.pad_id) for ids in texts]
        features = encoder(
            torch.tensor(rows, device=models.device),
            skip=clip_skip or part.skip,
            final_norm=part.final_norm,
            pooled=part.pooled,
        )
        contexts.append(features.hidden)
        pooled = features.pooled if part.pooled else pooled
    context = torch.cat(contexts, dim=2)
    if models.family.vector is None or pooled is None:
        return Conditioning(context)
    vectors = [models.family.vector(pooled[i : i + 1], one.picture) for i, one in enumerate(drawn)]
    return Conditioning(context, torch.cat(vectors))


def denoising_loss(
    predict: Callable[[Tensor, Tensor], Tensor],
    z: Tensor,
    noise: Tensor,
    t: Tensor,
    abar: Tensor,
    prediction: Prediction,
    *,
    gamma: float,
    weights: Tensor,
) -> Tensor:
    """Weighted mean error of the predicted noise or velocity.

    predict: (x_t, t) -> eps or v; z, noise: (B, C, h, w); t: (B,) int64; abar: (T,) cumulative alphas.
    gamma: of min-SNR weighting (Hang et al. 2023, arXiv:2303.09556, section 3.4), 0 for none.
    weights: (B,), of each picture.
    """
    a = abar[t][:, None, None, None]
    x = a.sqrt() * z + (1 - a).sqrt() * noise
    target = noise if prediction is Prediction.EPS else a.sqrt() * noise - (1 - a).sqrt() * z
    error = (predict(x, t).float() - target).square().mean(dim=(1, 2, 3))  # (B,)
    if gamma:
        # The paper's weight min(SNR, gamma) is of an error in z; an error in eps is SNR times one in z, and
        # an error in v is SNR + 1 times one.
        snr = abar[t] / (1 - abar[t])
        error = error * snr.clamp(max=gamma) / (snr if prediction is Prediction.EPS else snr + 1)
    return (error * weights).mean()


@contextmanager
def checkpointed(models: Models) -> Iterator[None]:
    """While this is open, the networks keep only the inputs of their blocks for the backward pass.

    Chen et al. 2016, arXiv:1604.06174.
    """
    rows = [m for m in models.unet.modules() if isinstance(m, Block)]
    rows += [m.layers for text in models.text for m in text.modules() if isinstance(m, Encoder)]
    layers = [list(row) for row in rows]
    try:
        for row in rows:
            for i, layer in enumerate(row):
                row[i] = _Checkpointed(layer)
        yield
    finally:
        for row, before in zip(rows, layers, strict=True):
            for i, layer in enumerate(before):
                row[i] = layer


class _Checkpointed(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Any) -> Tensor:
        return checkpoint(self.layer, *inputs, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class Snapshot:
    """A LoRA as it is at the end of an epoch."""

    epoch: int
    step: int
    weights: dict[str, Tensor]

    def save(
        self,
        path: str | os.PathLike[str],
        metadata: Mapping[str, str],
        dtype: torch.dtype = torch.float16,
    ) -> None:
        """Write a file in kohya's layout, in place of an older one."""
        weights = {name: w.to("cpu", dtype).contiguous() for name, w in self.weights.items()}
        write_safetensors(path, weights, metadata, overwrite=True)


def train_lora(
    models: Models,
    data: Dataset,
    network_config: NetworkConfig,
    config: LoraConfig,
    folder: Path,
    *,
    seconds: float = math.inf,
    after_epoch: Callable[[Snapshot], None] | None = None,
) -> Snapshot | None:
    """Train, or go on training. Returns the finished LoRA, or None if time ran out or Ctrl-C came before.

    models: its weights should be frozen, as `ldm.load` returns them; they are never changed.
    folder: keeps the state of the run and its losses.
    after_epoch: called on the first process only, while the additions are attached to the model.
    Raises LdmError if the training diverges or `folder` holds a run with other settings or data.
    """
    check_trainable(models)
    device = models.device
    network = LoraNetwork(
        models,
        network_config,
        unet=config.unet_lr > 0,
        text=config.text_encoder_lr > 0,
        seed=config.seed,
    )
    rank, world = rank_and_world()
    per_epoch = steps_per_epoch(data, config)
    loop = LoopConfig(
        steps=config.epochs * per_epoch,
        lr=1.0,  # the groups of the optimizer have their own
        warmup=config.warmup,
        decay=1.0 if config.scheduler == "cosine" else 0.0,
        weight_decay=config.weight_decay,
        ema_decay=config.ema_decay,
        clip_norm=config.max_grad_norm or math.inf,
        seed=config.seed,
        save_every=100,
    )
    facts = _facts(models, data, network_config, config)
    run = Run(network, loop, folder, optimizer=_optimizer(network, config), facts=facts)
    run.resume()
    if run.step > loop.steps:
        raise LdmError(f"the run in {folder} is at step {run.step}, beyond {loop.steps}; ask for more epochs")

    abar = torch.tensor(models.denoiser.schedule.alphas_cumprod, dtype=torch.float32, device=device)
    prediction = models.denoiser.prediction
    order = lru_cache(maxsize=1)(lambda epoch: data.batches(config.batch_size, config.seed, epoch))
    autocast = models.denoiser.dtype is torch.bfloat16

    def loss_of(batch: Sequence[int], generator: torch.Generator) -> Tensor:
        rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
        drawn = [data.draw(i, rng) for i in batch]
        z = torch.stack([one.z for one in drawn]).to(device)
        t = stratified_timesteps(len(z), len(abar), generator).to(device)
        noise = torch.randn(z.shape, generator=generator)
        noise += config.noise_offset * torch.randn(*z.shape[:2], 1, 1, generator=generator)
        weights = torch.tensor([config.prior_loss_weight if one.prior else 1.0 for one in drawn])
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            told = encoded(models, drawn, config.clip_skip)
            return denoising_loss(
                lambda x, t: models.unet(x, t, told.context, told.vector),
                z,
                noise.to(device),
                t,
                abar,
                prediction,
                gamma=config.min_snr_gamma,
                weights=weights.to(device),
            )

    def losses(generator: torch.Generator) -> Iterator[Tensor]:
        epoch, position = divmod(run.step, per_epoch)
        batches, count = order(epoch), config.gradient_accumulation
        for i in range(count):
            # What is missing to a whole last step of an epoch is taken from its beginning.
            batch = batches[((position * count + i) * world + rank) % len(batches)]
            yield loss_of(batch, generator) / count

    def snapshot() -> Snapshot:
        return Snapshot(run.step // per_epoch, run.step, averaged(network, run.ema))

    log = LossLog(folder, run, config) if rank == 0 else None
    with network.attached(), checkpointed(models) if config.gradient_checkpointing else nullcontext():
        done = run.train(
            losses,
            samples_per_step=config.batch_size * config.gradient_accumulation * world,
            seconds=seconds,
            every=(per_epoch, lambda: after_epoch(snapshot())) if after_epoch else None,
            watch=log,
        )
    return snapshot() if done else None


def _facts(
    models: Models, data: Dataset, network_config: NetworkConfig, config: LoraConfig
) -> dict[str, Any]:
    """What decides the result to the bit, beside `LoopConfig`: a run goes on only where it is the same."""
    facts = asdict(config) | asdict(network_config) | asdict(data.config)
    del facts["gradient_checkpointing"]  # the same numbers, computed twice
    if config.scheduler == "constant":
        del facts["epochs"]  # a longer run begins as the shorter one
    return facts | {
        "data": data.digest,
        "model": models.hash,
        "prediction": models.denoiser.prediction.value,
        "dtype": str(models.denoiser.dtype),
        "device": models.device.type,
        "threads": torch.get_num_threads() if models.device.type == "cpu" else 0,
        "processes": rank_and_world()[1],
        "torch": torch.__version__,
    }


def _optimizer(network: LoraNetwork, config: LoraConfig) -> torch.optim.Optimizer:
    groups = network.groups(config.unet_lr, config.text_encoder_lr)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)
    bitsandbytes: Any = importlib.import_module("bitsandbytes")
    return bitsandbytes.optim.AdamW8bit(groups, weight_decay=config.weight_decay)


class LossLog:
    """The loss of each step in loss.csv, and for TensorBoard where that is installed."""

    def __init__(self, folder: Path, run: Run, config: LoraConfig) -> None:
        self.run = run
        self.config = config
        self.path = folder / "loss.csv"
        # A process that was killed may have logged steps that its saved state does not have.
        kept = self.path.read_text().splitlines()[1 : run.step + 1] if self.path.exists() else []
        with atomic_write(self.path, overwrite=True) as file:
            file.write(("\n".join(["step,loss,unet_lr,text_encoder_lr", *kept]) + "\n").encode())
        self.board: Any = None
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=run.step + 1)

    def __call__(self, loss: float) -> None:
        step = self.run.step
        rate = self.run.config.rate(step - 1)
        rates = {"unet_lr": rate * self.config.unet_lr, "text_encoder_lr": rate * self.config.text_encoder_lr}
        with self.path.open("a") as file:
            file.write(f"{step},{loss:.6f}," + ",".join(f"{lr:.6g}" for lr in rates.values()) + "\n")
        if self.board is not None:
            for label, value in {"loss": loss, **rates}.items():
                self.board.add_scalar(label, value, step)
