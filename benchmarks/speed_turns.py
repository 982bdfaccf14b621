"""Measuring inside one process: rivals in turns, on the same weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks.peers import Worker, present
from benchmarks.peers_worker import SCALE, Timed, fill, inputs, timed
from benchmarks.speed_networks import Setting, our_unet, our_vae, randomised, shared_unets, their_vae


def local(rivals: Mapping[str, Callable[[], object]]) -> dict[str, Callable[[], Timed]]:
    """Those that run in this process."""
    return {name: partial(timed, function) for name, function in rivals.items()}


def turns(rounds: int, rivals: Mapping[str, Callable[[], Timed]]) -> dict[str, Any]:
    """The fastest of some rounds of each, and of a matrix product beside them."""
    a = torch.randn(1024, 1024)
    everybody = {**rivals, **local({"product": lambda: [a @ a for _ in range(4)]})}
    best: dict[str, Timed] = {}
    for _ in range(rounds):
        for name, turn in everybody.items():
            now = turn()
            old = best.get(name, now)
            best[name] = Timed(min(old.cpu, now.cpu), min(old.wall, now.wall))
    product = best.pop("product")
    figures: dict[str, Any] = {name: dict(one._asdict()) for name, one in best.items()}
    for key, seconds in product._asdict().items():
        figures[f"gemm GFLOP per {key} s"] = 4 * 2 * 1024**3 / seconds / 1e9
    return figures


def counted(function: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    """The result, and the work in GFLOP, multiplications and additions counted apart."""
    # torch itself counts only the attention of graphics cards.
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mapping = {attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        result = function()
    return result, counter.get_total_flops() / 1e9


def optimized(network: nn.Module, function: Callable[[], Any], on: bool) -> Callable[[], Any]:
    """The function with the network optimized, or not."""
    from ldm.optimization import FastConv2d

    def exchange() -> Any:
        # Not `optimize(network, False)`, which would also forget the transformed weights between the rounds.
        for module, kind in kinds.items():
            module.__class__ = FastConv2d if on and kind is nn.Conv2d else kind
        return function()

    kinds = {module: type(module) for module in network.modules()}
    return exchange


class Task(NamedTuple):
    """One piece of work for everybody."""

    kind: str  # of the inputs: "UNet", "decode" or "encode"
    side: int  # of the latents
    parameters: int
    network: nn.Module  # ours
    ours: Callable[..., torch.Tensor]
    theirs: Callable[..., torch.Tensor]  # diffusers


def compare(task: Task, rounds: int, peers: Sequence[str], small: bool) -> dict[str, Any]:
    """Turns of ours, plain and optimized, of diffusers and of the peers; and the work in GFLOP.

    Each first runs once, which gives its error: the difference to ours, plain, relative to the maximum.
    Raises RuntimeError if a peer has another network or result.
    """
    given = inputs(task.kind, task.side)
    plain, fast = (optimized(task.network, partial(task.ours, *given), on) for on in (False, True))
    here = {"plain": plain, "optimized": fast, "diffusers": partial(task.theirs, *given)}
    expected, gflop = counted(plain)
    results = {name: here[name]() for name in ("optimized", "diffusers")}
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name in peers:
            worker = workers[name] = stack.enter_context(Worker(name, task.kind, task.side, small))
            results[name] = worker.result
            if worker.parameters != task.parameters:
                raise RuntimeError(f"{name} has {worker.parameters} parameters, ours has {task.parameters}")
        figures = turns(rounds, local(here) | workers)
    for name, result in results.items():
        figures[name]["error"] = error = float((result - expected).abs().max() / expected.abs().max())
        if not error < 1e-4:
            raise RuntimeError(f"{name} is {error:.1e} away from ours")
    return figures | {"GFLOP": gflop, "parameters": task.parameters}


def unet(pixels: int, rounds: int, setting: Setting) -> dict[str, Any]:
    """rounds: added to those of the setting."""
    ours, theirs = shared_unets(setting)
    parameters = fill(ours, ours, "UNet")
    task = Task("UNet", setting.side(pixels), parameters, ours, ours, lambda *given: theirs(*given).sample)
    return compare(task, max(1, setting.rounds + rounds), present(setting.quick), setting.quick)


def vae(kind: str, pixels: int, setting: Setting) -> dict[str, Any]:
    ours, theirs = our_vae(setting), their_vae(setting)
    runs = {
        "decode": (ours.decode, lambda z: theirs.decode(z / SCALE).sample),
        "encode": (ours.encode, lambda x: theirs.encode(x).latent_dist.mean * SCALE),
    }
    our_run, their_run = runs[kind]
    parameters = fill(ours, our_run, kind)
    fill(theirs, their_run, kind)
    task = Task(kind, setting.side(pixels), parameters, ours, our_run, their_run)
    peers = present(setting.quick) if kind == "decode" else []
    return compare(task, setting.rounds, peers, setting.quick)


def growth(setting: Setting) -> dict[str, Any]:
    """The optimized UNet at several batch sizes, at twice the width and height, and on one thread."""
    ours = our_unet(setting)
    cases = {f"batch {n}": (n, 256) for n in (1, 2, 4, 8)} | {"batch 2, 512 px": (2, 512)}
    runs: dict[str, Callable[[], object]] = {}
    for name, (batch, pixels) in cases.items():
        side = setting.side(pixels)
        x, context = torch.randn(batch, 4, side, side), torch.randn(batch, 77, 768)
        runs[name] = optimized(ours, partial(ours, x, torch.full((batch,), 500.0), context), True)
    if (threads := torch.get_num_threads()) > 1:
        runs["batch 2, one thread"] = on_threads(1, threads, runs["batch 2"])
    figures = turns(setting.rounds, local(runs))
    for key in ("cpu", "wall"):
        figures[f"growth, {key}"] = figures["batch 2, 512 px"][key] / figures["batch 2"][key]
    return figures


def on_threads(number: int, usual: int, function: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        torch.set_num_threads(number)
        function()
        torch.set_num_threads(usual)

    return run


def clip(setting: Setting) -> dict[str, Any]:
    from transformers import CLIPTextConfig, CLIPTextModel

    from ldm.text.clip import CLIP_L, ClipTextModel

    ours = randomised(lambda: ClipTextModel(CLIP_L))
    config = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    theirs = CLIPTextModel(config).eval().requires_grad_(False)
    tokens = torch.randint(1000, 40000, (2, 77))
    runs = {"plain": lambda: ours(tokens), "diffusers": lambda: theirs(tokens)}
    return turns(4 * setting.rounds, local(runs))


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

    figures = turns(5 * setting.rounds, local({"bare": bare, "plain": ours, "diffusers": theirs}))
    for name in ("plain", "diffusers"):
        figures[f"{name}, ms per step"] = (figures[name]["cpu"] - figures["bare"]["cpu"]) / steps * 1000
    return figures
