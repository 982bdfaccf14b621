"""Measuring inside one process: rivals in turns, on the same weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks.speed_networks import Setting, our_unet, our_vae, randomised, shared_unets, their_vae


class Timed(NamedTuple):
    cpu: float  # seconds of the processor, all threads together
    wall: float  # seconds of the clock


def timed(function: Callable[[], object]) -> Timed:
    cpu, wall = time.process_time(), time.perf_counter()
    function()
    return Timed(time.process_time() - cpu, time.perf_counter() - wall)


def turns(rounds: int, rivals: Mapping[str, Callable[[], object]]) -> dict[str, Any]:
    """The fastest of some rounds of each, after one to warm up; and of a matrix product beside them."""
    a = torch.randn(1024, 1024)
    everybody = {**rivals, "product": lambda: [a @ a for _ in range(4)]}
    for function in everybody.values():
        function()
    best: dict[str, Timed] = {}
    for _ in range(rounds):
        for name, function in everybody.items():
            now = timed(function)
            old = best.get(name, now)
            best[name] = Timed(min(old.cpu, now.cpu), min(old.wall, now.wall))
    product = best.pop("product")
    figures: dict[str, Any] = {name: dict(one._asdict()) for name, one in best.items()}
    figures["gemm GFLOP per cpu s"] = 4 * 2 * 1024**3 / product.cpu / 1e9
    return figures


def work(function: Callable[[], object]) -> float:
    """GFLOP, multiplications and additions counted apart."""
    # torch itself counts only the attention of graphics cards.
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mapping = {attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        function()
    return counter.get_total_flops() / 1e9


def optimized(network: nn.Module, function: Callable[[], object], on: bool) -> Callable[[], object]:
    """The function with the network optimized, or not."""
    from ldm.optimization import FastConv2d

    def exchange() -> object:
        # Not `optimize(network, False)`, which would also forget the transformed weights between the rounds.
        for module, kind in kinds.items():
            module.__class__ = FastConv2d if on and kind is nn.Conv2d else kind
        return function()

    kinds = {module: type(module) for module in network.modules()}
    return exchange


def with_error(
    setting: Setting,
    rivals: dict[str, Callable[[], Any]],
    reference: Callable[[], torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Time the rivals; add the work, and how far results lie from the plain ones, relative to the maximum."""
    plain = rivals["plain"]()
    facts = {"error": float((rivals["optimized"]() - plain).abs().max() / plain.abs().max())}
    if reference is not None:
        facts["plain against diffusers"] = float((reference() - plain).abs().max() / plain.abs().max())
    facts["GFLOP"] = work(rivals["plain"])
    return turns(setting.rounds, rivals) | facts


def unet(pixels: int, setting: Setting) -> dict[str, Any]:
    ours, theirs = shared_unets(setting)
    side = setting.side(pixels)
    x, t, context = torch.randn(2, 4, side, side), torch.tensor([500.0, 500.0]), torch.randn(2, 77, 768)
    run = partial(ours, x, t, context)
    rivals = {
        "plain": optimized(ours, run, False),
        "optimized": optimized(ours, run, True),
        "diffusers": lambda: theirs(x, t, context),
    }
    return with_error(setting, rivals, lambda: theirs(x, t, context).sample)


def growth(setting: Setting) -> dict[str, Any]:
    """The optimized UNet at several batch sizes, and at twice the width and height."""
    ours = our_unet(setting)
    cases = {f"batch {n}": (n, 256) for n in (1, 2, 4, 8)} | {"batch 2, 512 px": (2, 512)}
    rivals = {}
    for name, (batch, pixels) in cases.items():
        side = setting.side(pixels)
        x, t, context = (
            torch.randn(batch, 4, side, side),
            torch.full((batch,), 500.0),
            torch.randn(batch, 77, 768),
        )
        rivals[name] = optimized(ours, partial(ours, x, t, context), True)
    figures = turns(1 if setting.quick else 2, rivals)
    figures["growth"] = figures["batch 2, 512 px"]["cpu"] / figures["batch 2"]["cpu"]
    return figures


def vae(way: str, pixels: int, setting: Setting) -> dict[str, Any]:
    ours, theirs = our_vae(setting), their_vae(setting)
    if way == "decode":
        side = setting.side(pixels)
        z = torch.randn(1, 4, side, side)
        run, other = partial(ours.decode, z), partial(theirs.decode, z)
    else:
        side = 8 * setting.side(pixels)
        x = torch.randn(1, 3, side, side).clamp(-1, 1)
        run, other = partial(ours.encode, x), partial(theirs.encode, x)
    rivals = {
        "plain": optimized(ours, run, False),
        "optimized": optimized(ours, run, True),
        "diffusers": other,
    }
    return with_error(setting, rivals)


def clip(setting: Setting) -> dict[str, Any]:
    from transformers import CLIPTextConfig, CLIPTextModel

    from ldm.text.clip import CLIP_L, ClipTextModel

    ours = randomised(lambda: ClipTextModel(CLIP_L))
    config = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    theirs = CLIPTextModel(config).eval().requires_grad_(False)
    tokens = torch.randint(1000, 40000, (2, 77))
    return turns(4 * setting.rounds, {"plain": lambda: ours(tokens), "diffusers": lambda: theirs(tokens)})


def overhead(setting: Setting) -> dict[str, Any]:
    """One step beside the networks: a guided Euler step, with a network that is one multiplication."""
    from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

    from ldm.denoise import Conditioning, Denoiser, Prediction
    from ldm.guidance import Guides, cfg
    from ldm.samplers import SAMPLERS
    from ldm.schedules import NoiseSchedule

    steps = 200
    x0, context = torch.randn(1, 4, 64, 64), torch.zeros(1, 77, 768)
    schedule = NoiseSchedule.scaled_linear()
    network: Any = lambda x, t, context, y=None: x * 0.5  # noqa: E731
    denoiser = Denoiser(network, schedule, Prediction.EPS)
    sampler = SAMPLERS["Euler"]
    sigmas = sampler.sigmas(schedule, steps)

    def bare() -> None:
        both = torch.cat([x0, x0])
        for _ in range(steps):
            network(both, None, context)

    def ours() -> None:
        one = Conditioning(context)
        denoise = cfg(denoiser, Guides.one(one, one), 7.5)
        for _ in sampler(denoise, x0 * sigmas[0], sigmas, None):  # type: ignore[arg-type]  (draws no noise)
            pass

    def theirs() -> None:
        scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        scheduler.set_timesteps(steps)
        x = x0 * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            both = scheduler.scale_model_input(torch.cat([x, x]), t)
            away, towards = network(both, t, context).chunk(2)
            x = scheduler.step(away + 7.5 * (towards - away), t, x).prev_sample  # type: ignore[union-attr]

    figures = turns(5 * setting.rounds, {"bare": bare, "plain": ours, "diffusers": theirs})
    for name in ("plain", "diffusers"):
        figures[f"{name}, ms per step"] = (figures[name]["cpu"] - figures["bare"]["cpu"]) / steps * 1000
    return figures
