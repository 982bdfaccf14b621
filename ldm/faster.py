"""Less work for nearly the same picture. What it saves and what it costs is measured in docs/faster.md.

- Guidance in an interval (Kynkäänniemi et al. 2024, arXiv:2404.07724): at high noise levels guidance narrows
  the choice of pictures, at low ones it does little. Without it, a step takes half the time.
- Feature reuse (DeepCache: Ma, Fang and Wang 2023, arXiv:2312.00858): from one step to the next, what the
  deeper layers of a UNet make hardly changes. So they run in every N-th step, the outer blocks in all.

Token merging has a page of its own, token_merging.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ldm import offload
from ldm.denoise import Denoise
from ldm.errors import RequestError
from ldm.guidance import Guides
from ldm.samplers import Sampler
from ldm.unet import UNet

if TYPE_CHECKING:
    from ldm.models import Models
    from ldm.planning import Plan
    from ldm.request import Request


def check(models: Models, request: Request, sampler: Sampler) -> None:
    """Raise RequestError where features cannot be used again."""
    if request.reuse == 1:
        return
    if sampler.name == "DPM adaptive":
        raise RequestError(
            "DPM adaptive would take features that are used again for a small error; "
            "choose another sampler, or leave out reuse"
        )
    if models.unet._compiled_call_impl is not None:
        raise RequestError(
            "a compiled network runs as a whole and cannot leave blocks out; choose either reuse or --fast"
        )


def guided_steps(run: Plan) -> list[bool]:
    """Which steps the request wants guided.

    Not step i of n at level sigma if sigma <= guidance_low ("NGMS" in the web UI), if sigma > guidance_high,
    or if i / n <= guidance_skip ("Skip Early CFG"; there, 0 does not skip step 0).
    """
    request, steps = run.request, len(run.sigmas) - 1
    high = float("inf") if request.guidance_high is None else request.guidance_high
    early = [request.guidance_skip > 0 and i / steps <= request.guidance_skip for i in range(steps)]
    return [request.guidance_low < run.sigmas[i] <= high and not early[i] for i in range(steps)]


def guided_in_part(run: Plan, guides: Sequence[Guides]) -> list[Guides]:
    """What leads each step, without the negative half where the request wants no guidance."""

    @cache
    def alone(one: Guides) -> Guides:
        return one.alone()

    return [one if wanted else alone(one) for one, wanted in zip(guides, guided_steps(run), strict=True)]


def savings(run: Plan) -> Iterator[str]:
    """What a run leaves out, in words."""
    request, guided = run.request, guided_steps(run)
    if not all(guided):
        yield f"guidance in {sum(guided)} of {len(guided)} steps"
    if request.reuse > 1:
        yield f"the UNet's deep features in 1 of {request.reuse} evaluations"
    if request.token_merging > 0:
        least = request.token_merging_downsample
        where = "on maps of the latent's size" + (f" down to 1/{least} of it" if least > 1 else "")
        yield f"self-attention with {request.token_merging:.0%} of the tokens merged, {where}"


@dataclass(eq=False)
class Evaluations:
    """Counts them in a run, the halves of guidance and the parts of a prompt not one by one."""

    count: int = 0

    def counted(self, denoise: Denoise) -> Denoise:
        """The same denoiser, counted."""

        def count(x: Tensor, sigma: float) -> Tensor:
            self.count += 1
            return denoise(x, sigma)

        return count


@dataclass(eq=False)
class Reusing:
    """A UNet that makes its deep features in every N-th evaluation only; called like the UNet, for one run.

    Each batch of conditioning has features of its own. They are made anew when they are N evaluations old:
    what comes back later in a run, such as one of two prompts by turns, finds no features of long ago.
    """

    unet: UNet
    every: int
    evaluations: Evaluations
    # By the conditioning: (what enters the last block (B, C, h, w), in which evaluation it was made).
    kept: MutableMapping[Tensor, tuple[Tensor, int]] = field(default_factory=WeakIdKeyDictionary)
    unconditional: Tensor = field(default_factory=lambda: torch.empty(0))

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        control: Sequence[Tensor] | None = None,
        adapter: Mapping[int, Tensor] | None = None,
    ) -> Tensor:
        """As `UNet.forward`."""
        unet, now = self.unet, self.evaluations.count
        offload.bring(unet)
        emb = unet.embedding(x, t, context, y)
        key = next(one for one in (context, y, self.unconditional) if one is not None)
        if key in self.kept and now - self.kept[key][1] < self.every:
            # An adapter adds nothing to the first block.
            first = unet.input_blocks[0](x, emb, context, x.shape[2:])
            first = first if control is None else first + control[0]
            deep, _ = self.kept[key]
        else:
            outputs = unet.down(x, emb, context, adapter or {})
            if control is not None:
                outputs = [output + residual for output, residual in zip(outputs, control, strict=True)]
            first, *skips, deep = outputs
            for layers in unet.output_blocks[:-1]:
                size = (skips[-2] if len(skips) > 1 else first).shape[2:]
                deep = layers(torch.cat([deep, skips.pop()], dim=1), emb, context, size)
            self.kept[key] = deep, now
        h = unet.output_blocks[-1](torch.cat([deep, first], dim=1), emb, context, first.shape[2:])
        return unet.out(h)
