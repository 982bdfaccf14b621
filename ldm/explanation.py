"""What a request will do, told before it is done: `print(ldm.explain(models, request))`."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from ldm import faster, lora, memory
from ldm.families import Picture
from ldm.families.family import chunked, context_length
from ldm.guidance import needs_negative
from ldm.inputs import NO_INPUTS, Inputs
from ldm.models import Models
from ldm.planning import Plan, plan
from ldm.request import Request
from ldm.spacings import SPACINGS
from ldm.text import editing
from ldm.text.clip import ClipTextModel
from ldm.text.prompt import compose
from ldm.text.tokenizer import Tokenizer
from ldm.token_merging import MergingBlock, merging
from ldm.unet import UNet


@dataclass(frozen=True)
class Text:
    """One prompt that guides a part of the run."""

    first: int  # step, counted from 1
    last: int
    weight: float  # beside others joined by AND
    chunks: tuple[tuple[tuple[str, float], ...], ...]  # (token, its weight) in each chunk
    space: int  # tokens that fit into a chunk

    def __str__(self) -> str:
        steps = f"step {self.first}" if self.first == self.last else f"steps {self.first} to {self.last}"
        head = steps if self.weight == 1.0 else f"{steps}, weight {self.weight:g}"
        return "\n".join([f"  {head}", *(f"    {self._chunk(i)}" for i in range(len(self.chunks)))])

    def _chunk(self, i: int) -> str:
        runs = groupby(self.chunks[i], key=lambda token: token[1])
        pieces = [
            text if weight == 1.0 else f"({text}: {weight:.4g})"
            for weight, run in runs
            for text in [" ".join(token for token, _ in run)]
        ]
        return f"{len(self.chunks[i])} of {self.space} tokens: {' '.join(pieces)}".rstrip(": ")


@dataclass(frozen=True)
class Explanation:
    """Everything that `explain` finds out; as text, a page for people."""

    model: str
    run: Plan
    evaluations: int  # of the network on one picture, the halves of guidance not counted twice
    prompt: tuple[Text, ...]
    negative: tuple[Text, ...]  # empty where it is not needed
    files: tuple[str, ...]  # LoRA files and the like, and what of them fits
    without_effect: tuple[str, ...]  # what was asked for and changes nothing here, and why
    memory: int  # bytes that the run takes at most on the device, weights included
    device: str

    def __str__(self) -> str:
        run = self.run
        label = SPACINGS[run.spacing].label
        sigmas = " ".join(f"{sigma:.4g}" for sigma in run.sigmas)
        lines = [
            f"model: {self.model}",
            f"picture: {run.width} x {run.height}, {run.request.batch_size} at once",
            f"sampler: {run.sampler.name}, schedule {label}, {len(run.sigmas) - 1} steps{self._share}",
            f"evaluations of the network: {self.evaluations}, cfg scale {run.cfg_scale:g}",
            *(f"less work: {line}" for line in faster.savings(run)),
            f"sigmas: {sigmas}",
            "prompt:",
            *map(str, self.prompt),
            *(
                ["negative prompt:", *map(str, self.negative)]
                if self.negative
                else ["negative prompt: not used"]
            ),
            *(f"file: {line}" for line in self.files),
        ]
        if run.second is not None:
            second = run.second
            lines.append(
                f"second pass: {second.width} x {second.height}, {second.sampler.name}, "
                f"{len(second.sigmas) - 1} steps from sigma {second.sigmas[0]:.4g}"
            )
            lines += [f"second pass, less work: {line}" for line in faster.savings(second)]
        lines += [f"without effect: {line}" for line in self.without_effect]
        lines.append(f"memory: about {self.memory / 2**30:.1f} GB on {self.device}")
        return "\n".join(lines)

    @property
    def _share(self) -> str:
        strength = self.run.strength
        return "" if strength is None else f" of {self.run.steps} at strength {strength:g}"


def explain(models: Models, request: Request, inputs: Inputs = NO_INPUTS) -> Explanation:
    """Tell what `txt2img` would do: tokens, weights, when prompts change, files, sigmas, evaluations.

    Costs no evaluation of the network. Raises what `plan` raises.
    """
    run = plan(models, request, inputs)
    parts = compose(run.prompt)
    needed = models.family.parts and needs_negative([weight for _, weight in parts], run.cfg_scale)
    networks = run.networks
    return Explanation(
        model=f"{models.name}: {models.describe()}",
        run=run,
        evaluations=_evaluations(run),
        prompt=tuple(text for part in parts for text in _texts(models, run, *part)),
        negative=tuple(_texts(models, run, run.negative_prompt, 1.0)) if needed else (),
        files=(
            *(
                f"{path.name}, {unet:g} for the UNet, {text:g} for the text: "
                f"{lora.coverage(models, lora.read(path))}"
                for path, unet, text in networks.loras
            ),
            *(f"{path.name}, hypernetwork, {multiplier:g}" for path, multiplier in networks.hypernetworks),
            *(f"{e.path.name}, embedding of {len(e)} vectors" for e in networks.embeddings.values()),
        ),
        without_effect=tuple(
            line for one in (run, run.second) if one for line in _without_effect(models, one)
        ),
        memory=memory.needed(models, request, inputs),
        device=str(models.device),
    )


def _texts(models: Models, run: Plan, prompt: str, weight: float) -> Iterator[Text]:
    first, steps = 1, len(run.sigmas) - 1
    compat = run.request.compat
    schedule = editing.schedule(prompt, steps, old=compat.old_edit_times)
    late = compat.late_first_edit
    for segment, run_of_steps in groupby(range(steps), key=lambda step: schedule.at(step, late=late)):
        last = first + len([*run_of_steps]) - 1
        yield Text(first, last, weight, *_tokens(models, run, schedule.text(segment)))
        first = last + 1


def _tokens(models: Models, run: Plan, text: str) -> tuple[tuple[tuple[tuple[str, float], ...], ...], int]:
    """The tokens of each chunk with their weights, and how many fit; words for encoders that are not CLIP."""
    tokenizer, request = models.tokenizer or Tokenizer(), run.request
    if not isinstance(tokenizer, Tokenizer) or not any(isinstance(e, ClipTextModel) for e in models.text):
        words = tuple((word, 1.0) for word in text.split())
        return (words,), len(words)
    picture = Picture(
        width=run.width,
        height=run.height,
        negative=False,
        clip_skip=request.clip_skip,
        compat=request.compat,
        embeddings=run.networks.embeddings,
    )
    length = context_length(models.text)
    found = []
    for chunk in chunked(tokenizer, text, picture, length):
        tokens = [tokenizer.decode([token]).strip() for token in chunk.ids]
        for place, name in chunk.embeddings:
            count = len(run.networks.embeddings[name])
            tokens[place : place + count] = [f"<{name} {i + 1}/{count}>" for i in range(count)]
        found.append(tuple(zip(tokens, chunk.weights, strict=True)))
    return tuple(found), length - 2


def _without_effect(models: Models, run: Plan) -> Iterator[str]:
    request, size = run.request, f"{run.width} x {run.height}"
    if request.reuse > 1 and _evaluations(run) == 1:
        yield "feature reuse, as the network is evaluated once"
    if request.token_merging > 0 and not _merges(models.unet, run, request.token_merging_downsample):
        better = next((n for n in range(2, 9) if _merges(models.unet, run, n)), None)
        advice = f"; --token-merging-downsample {better} changes that" if better else ""
        yield f"token merging, as this model has no tokens to merge at {size}{advice}"


def _merges(unet: UNet, run: Plan, downsample: int) -> bool:
    """Whether any self-attention sees fewer tokens than without merging."""
    with merging(unet, run.request.token_merging, run.latent_shape[1:], downsample):
        blocks = [module.merge for module in unet.modules() if isinstance(module, MergingBlock)]
    return any(min(size) > 1 and int(size[0] * size[1] * ratio) > 0 for ratio, size in blocks)


def _evaluations(run: Plan) -> int:
    """Counted by running the sampler on one number; adaptive samplers choose by the picture, too."""
    calls = 0

    def denoise(x: Tensor, sigma: float) -> Tensor:
        nonlocal calls
        calls += 1
        return x / (1 + sigma**2)

    x = torch.full((1, 1, 1, 1), run.sigmas[0])
    noise = torch.zeros_like(x)
    for _ in run.sampler(denoise, x, run.sigmas, lambda *_: noise, **run.request.sampler_options()):
        pass
    return calls
