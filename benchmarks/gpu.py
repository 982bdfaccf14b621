"""How fast on a graphics card: ours against diffusers, plain and compiled, turn by turn on the same weights.

    python -m benchmarks.gpu        # Stable Diffusion 1.5 at 512 px and SDXL at 1024 px, in float16
    python -m benchmarks.gpu --dry  # tiny networks on the CPU: does the measurement itself work?

A figure is guided steps a second (Euler, batch 1: two rows in the UNet at once), with all that a step does
beside the network; the best of all rounds. Weights are random. Writes benchmarks/results/gpu.json (not with
--dry) and prints it as a table, with the rate of a matrix product that was measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.speed_networks import randomised
from ldm.denoise import Conditioning, Denoiser, Prediction
from ldm.files import atomic_write
from ldm.guidance import Guides, cfg
from ldm.rename import to_diffusers
from ldm.samplers import SAMPLERS
from ldm.schedules import NoiseSchedule
from ldm.unet import SD1_UNET, SDXL_UNET, UNet, UNetConfig

RESULTS = Path(__file__).parent / "results" / "gpu.json"
SCALE = 7.0

Run = Callable[[int], Tensor]
"""Make so many steps; the latent at their end."""


class Setting(NamedTuple):
    device: str
    dtype: torch.dtype
    backend: str  # of torch.compile
    steps: int
    rounds: int


class Case(NamedTuple):
    config: UNetConfig
    side: int  # of the latent
    theirs: dict[str, Any]  # what diffusers' UNet is told beside the widths


SD15 = Case(SD1_UNET, 64, {"cross_attention_dim": 768, "attention_head_dim": 8})
SDXL = Case(
    SDXL_UNET,
    128,
    {
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
)
CASES = {"Stable Diffusion 1.5, 512 px": SD15, "SDXL, 1024 px": SDXL}


def conditioning(case: Case, setting: Setting) -> list[Conditioning]:
    """Of the prompt and of the negative one: noise."""
    config, where = case.config, {"device": setting.device, "dtype": setting.dtype}
    return [
        Conditioning(
            torch.randn(1, 77, config.context_dim or 0, **where),
            torch.randn(1, config.vector_dim, **where) if config.vector_dim else None,
        )
        for _ in range(2)
    ]


def our_run(unet: UNet, case: Case, setting: Setting, pair: list[Conditioning]) -> Run:
    """As `ldm.sample` does it."""
    denoiser = Denoiser(unet, NoiseSchedule.scaled_linear(), Prediction.EPS, setting.dtype)
    denoise, sampler = cfg(denoiser, Guides.one(*pair), SCALE), SAMPLERS["Euler"]
    x = torch.randn(1, 4, case.side, case.side, device=setting.device)

    def run(steps: int) -> Tensor:
        sigmas = sampler.sigmas(denoiser.schedule, steps)
        made = sampler(denoise, x * sigmas[0], sigmas, lambda a, b: torch.zeros_like(x))
        return deque(made, maxlen=1).pop().x

    return run


def their_run(unet: Any, case: Case, setting: Setting, pair: list[Conditioning]) -> Run:
    """As diffusers' pipelines do it."""
    from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading"
    )
    positive, negative = pair
    joined = negative.joined(positive)
    added = None
    if joined.vector is not None:
        sizes = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]] * 2, device=setting.device)
        added = {"text_embeds": joined.vector[:, :1280], "time_ids": sizes.to(setting.dtype)}
    start = torch.randn(1, 4, case.side, case.side, device=setting.device, dtype=setting.dtype)

    @torch.no_grad()
    def run(steps: int) -> Tensor:
        scheduler.set_timesteps(steps, device=setting.device)
        x = start * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            rows = scheduler.scale_model_input(torch.cat([x] * 2), t)
            output = unet(
                rows, t, encoder_hidden_states=joined.context, added_cond_kwargs=added, return_dict=False
            )[0]
            away, towards = output.chunk(2)
            x = scheduler.step(away + SCALE * (towards - away), t, x, return_dict=False)[0]
        return x

    return run


def networks(case: Case, setting: Setting) -> tuple[UNet, nn.Module]:
    """Ours and theirs, on the same tensors."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    ours = randomised(lambda: UNet(case.config)).to(setting.device, setting.dtype)
    with torch.device("meta"):
        theirs = UNet2DConditionModel(block_out_channels=case.config.widths, **case.theirs)
    weights = {to_diffusers(name, case.config): w for name, w in ours.state_dict().items()}
    theirs.load_state_dict(weights, assign=True)
    return ours, theirs.eval().requires_grad_(False)


def measure(case: Case, setting: Setting) -> dict[str, Any]:
    """Steps a second of each rival, and the seconds of its first run."""
    pair = conditioning(case, setting)
    ours, theirs = networks(case, setting)
    rivals = {"diffusers": their_run(theirs, case, setting, pair), "ours": our_run(ours, case, setting, pair)}
    compiled = {}
    for mode in ("default", "reduce-overhead") if setting.backend == "inductor" else (None,):
        ours, theirs = networks(case, setting)  # of their own: compiling and channels-last change a network
        for network in (ours, theirs):
            network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
            network.compile(backend=setting.backend, mode=mode, fullgraph=True, dynamic=False)
        compiled[f"diffusers, compiled ({mode})"] = their_run(theirs, case, setting, pair)
        compiled[f"ours, --fast ({mode})"] = our_run(ours, case, setting, pair)
    rivals |= compiled

    first = {name: seconds(run, 3, setting) for name, run in rivals.items()}
    best = dict.fromkeys(rivals, float("inf"))
    for _ in range(setting.rounds):
        for name, run in rivals.items():
            best[name] = min(best[name], seconds(run, setting.steps, setting))
    return {
        name: {"steps per second": setting.steps / best[name], "seconds of the first run": first[name]}
        for name in rivals
    }


def seconds(run: Run, steps: int, setting: Setting) -> float:
    begin = time.perf_counter()
    latent = run(steps)
    float(latent.flatten()[0])  # waits for the device
    return time.perf_counter() - begin


def product_rate(setting: Setting, side: int) -> float:
    """TFLOP/s of a matrix product."""
    a = torch.randn(side, side, device=setting.device, dtype=setting.dtype)

    def run(times: int) -> Tensor:
        b = a
        for _ in range(times):
            b = a @ a
        return b

    seconds(run, 3, setting)
    return 20 * 2 * side**3 / seconds(run, 20, setting) / 1e12


def dry(case: Case) -> Case:
    """The same kind of network, tiny."""
    config = replace(case.config, model_channels=64, depth=tuple(min(d, 1) for d in case.config.depth))
    config = replace(config, middle_depth=min(config.middle_depth, 1), num_res_blocks=1)
    theirs = case.theirs | {"layers_per_block": 1}
    if "transformer_layers_per_block" in theirs:
        theirs |= {"transformer_layers_per_block": 1, "attention_head_dim": (1, 2, 4)}
    return Case(config, 8, theirs)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dry", action="store_true", help="tiny networks on the CPU")
    a = p.parse_args()
    if not a.dry and not torch.cuda.is_available():
        p.exit(1, "there is no CUDA device here; --dry shows that the measurement works\n")
    setting = Setting("cuda", torch.float16, "inductor", steps=20, rounds=5)
    cases = CASES
    if a.dry:
        setting = Setting("cpu", torch.float32, "eager", steps=2, rounds=1)
        cases = {name: dry(case) for name, case in CASES.items()}
    torch.backends.cudnn.benchmark = True
    results: dict[str, Any] = {
        "device": "a dry run on the CPU" if a.dry else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "matrix product, TFLOP/s": product_rate(setting, 128 if a.dry else 8192),
        "cases": {name: measure(case, setting) for name, case in cases.items()},
    }
    print(f"{results['device']}, matrix product {results['matrix product, TFLOP/s']:.1f} TFLOP/s\n")
    print("| network | | steps per second | against diffusers | first run |\n|---|---|---|---|---|")
    for name, found in results["cases"].items():
        plain = found["diffusers"]["steps per second"]
        for rival, figures in found.items():
            rate, first = figures["steps per second"], figures["seconds of the first run"]
            print(f"| {name} | {rival} | {rate:.1f} | {rate / plain:.2f} | {first:.1f} s |")
    if not a.dry:
        with atomic_write(RESULTS, overwrite=True) as file:
            file.write((json.dumps(results, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
