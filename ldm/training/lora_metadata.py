"""What a LoRA file says of its training: kohya's `ss_*` entries, which tools show and search."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import ldm
from ldm.models import Models
from ldm.training.loop import rank_and_world
from ldm.training.lora import LoraConfig, Snapshot, steps_per_epoch
from ldm.training.lora_data import Dataset, Example, tag_frequency
from ldm.training.lora_network import NetworkConfig

# (kohya's name, that of Stability AI's model specification) of families that others know.
_NAMES = {
    "sd1": ("sd_v1", "stable-diffusion-v1/lora"),
    "sd2": ("sd_v2", "stable-diffusion-v2-512/lora"),
    "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
}


def metadata(
    models: Models,
    data: Dataset,
    network: NetworkConfig,
    config: LoraConfig,
    snapshot: Snapshot,
    name: str,
) -> dict[str, str]:
    """The settings and data of a training, by the names and in the spelling of kohya's trainer.

    name: of the LoRA. No date and no computer: the same training gives the same file.
    """
    own = [e for e in data.examples if not e.prior]
    prior = [e for e in data.examples if e.prior]
    per_epoch = steps_per_epoch(data, config)
    base, architecture = _NAMES.get(models.family.name, (models.family.name, f"{models.family.name}/lora"))
    extra: dict[str, Any] = {}
    if network.conv_dim:
        extra |= {"conv_dim": network.conv_dim, "conv_alpha": network.conv_alpha}
    if network.dora:
        extra |= {"algo": "lora", "dora_wd": True, "wd_on_output": False}
    predicts = "v" if models.denoiser.prediction.value == "v" else "epsilon"
    buckets = Counter(data.buckets[i] for i in data.samples)
    entries: dict[str, Any] = {
        "modelspec.architecture": architecture,
        "modelspec.title": name,
        "modelspec.prediction_type": predicts,
        "ss_output_name": name,
        "ss_base_model_version": base,
        "ss_v2": base == "sd_v2",
        "ss_sd_model_name": models.path.name if models.path else models.name,
        "ss_sd_model_hash": models.hash,
        "ss_network_module": "lycoris.kohya" if network.dora else "networks.lora",
        "ss_network_dim": network.network_dim,
        "ss_network_alpha": network.network_alpha,
        "ss_network_args": extra,
        "ss_learning_rate": config.unet_lr or config.text_encoder_lr,
        "ss_unet_lr": config.unet_lr,
        "ss_text_encoder_lr": config.text_encoder_lr,
        "ss_lr_scheduler": config.scheduler,
        "ss_lr_warmup_steps": config.warmup,
        "ss_optimizer": config.optimizer,
        "ss_num_train_images": sum(e.repeats for e in own),
        "ss_num_reg_images": len(data.samples) - sum(e.repeats for e in own),
        "ss_num_batches_per_epoch": len(data.batches(config.batch_size, config.seed, 0)),
        "ss_num_epochs": config.epochs,
        "ss_epoch": snapshot.epoch,
        "ss_steps": snapshot.step,
        "ss_max_train_steps": config.epochs * per_epoch,
        "ss_batch_size_per_device": config.batch_size,
        "ss_total_batch_size": config.batch_size * config.gradient_accumulation * rank_and_world()[1],
        "ss_gradient_accumulation_steps": config.gradient_accumulation,
        "ss_gradient_checkpointing": config.gradient_checkpointing,
        "ss_max_grad_norm": config.max_grad_norm,
        "ss_min_snr_gamma": config.min_snr_gamma or None,
        "ss_noise_offset": config.noise_offset or None,
        "ss_prior_loss_weight": config.prior_loss_weight,
        "ss_mixed_precision": "bf16" if "bfloat16" in str(models.denoiser.dtype) else "no",
        "ss_clip_skip": config.clip_skip,
        "ss_seed": config.seed,
        "ss_resolution": (data.config.resolution, data.config.resolution),
        "ss_enable_bucket": data.config.buckets,
        "ss_bucket_no_upscale": not data.config.upscale,
        "ss_min_bucket_reso": data.config.min_bucket,
        "ss_max_bucket_reso": data.config.max_bucket,
        "ss_bucket_info": {
            "buckets": {
                str(i): {"resolution": size, "count": count}
                for i, (size, count) in enumerate(sorted(buckets.items()))
            }
        },
        "ss_cache_latents": True,
        "ss_flip_aug": data.config.flip,
        "ss_shuffle_caption": data.config.shuffle_caption,
        "ss_keep_tokens": data.config.keep_tokens,
        "ss_caption_dropout_rate": data.config.caption_dropout,
        "ss_caption_tag_dropout_rate": data.config.tag_dropout,
        "ss_dataset_dirs": _folders(own),
        "ss_reg_dataset_dirs": _folders(prior),
        "ss_tag_frequency": tag_frequency(own),
        "ldm_version": ldm.__version__,
        "ldm_settings": asdict(network) | asdict(config),
    }
    return {key: _text(value) for key, value in entries.items()}


def _folders(examples: Sequence[Example]) -> dict[str, dict[str, int]]:
    counts = Counter((e.folder, e.repeats) for e in examples)
    return {
        folder: {"n_repeats": repeats, "img_count": count}
        for (folder, repeats), count in sorted(counts.items())
    }


def _text(value: Any) -> str:
    """As kohya's trainer writes it: Python's spelling, but JSON for what is nested."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)
