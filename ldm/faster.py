"""Less work for nearly the same picture. What it saves and what it costs is measured in docs/faster.md.

- Guidance in an interval (Kynkäänniemi et al. 2024, arXiv:2404.07724): at high noise levels guidance narrows
  the choice of pictures, at low ones it does little. Without it, a step takes half the time.
- Feature reuse (DeepCache: Ma, Fang and Wang 2023, arXiv:2312.00858): from one step to the next, what the
  deeper layers of a UNet make hardly changes. So they run in every N-th step, the outer blocks in all.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ldm.guidance import Guides
from ldm.planning import Plan
from ldm.unet import UNet


def guided_in_part(run: Plan, guides: Sequence[Guides]) -> list[Guides]:
    """What leads each step, without the negative half where the request wants no guidance.

    No guidance at step i of n at level sigma if sigma <= guidance_low ("NGMS" in the web UI), if
    sigma > guidance_high, or if i / n <= guidance_skip ("Skip Early CFG"; there, 0 does not skip step 0).
    """
    request, steps = run.request, len(guides)
    high = float("inf") if request.guidance_high is None else request.guidance_high

    @cache
    def alone(one: Guides) -> Guides:
        return one.alone()

    def leads(i: int) -> bool:
        early = request.guidance_skip > 0 and i / steps <= request.guidance_skip
        return request.guidance_low < run.sigmas[i] <= high and not early

    return [one if leads(i) else alone(one) for i, one in enumerate(guides)]


@dataclass(eq=False)
class Reusing:
    """A UNet that makes its deep features in every N-th call only; called like the UNet, for one run.

    Calls are counted for each batch of conditioning by itself.
    """

    unet: UNet
    every: int
    # By the conditioning: (what enters the last block (B, C, h, w), calls so far).
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
        unet = self.unet
        emb = unet.embedding(x, t, context, y)
        key = next(one for one in (context, y, self.unconditional) if one is not None)
        deep, calls = self.kept.get(key, (x, 0))
        if calls % self.every == 0:
            outputs = unet.down(x, emb, context, adapter or {})
            if control is not None:
                outputs = [output + residual for output, residual in zip(outputs, control, strict=True)]
            first, *skips, deep = outputs
            for layers in unet.output_blocks[:-1]:
                size = (skips[-2] if len(skips) > 1 else first).shape[2:]
                deep = layers(torch.cat([deep, skips.pop()], dim=1), emb, context, size)
        else:  # an adapter adds nothing to the first block
            first = unet.input_blocks[0](x, emb, context, x.shape[2:])
            first = first if control is None else first + control[0]
        self.kept[key] = deep, calls + 1
        h = unet.output_blocks[-1](torch.cat([deep, first], dim=1), emb, context, first.shape[2:])
        return unet.out(h)
