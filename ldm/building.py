"""From names and tensors to a network: built without memory of its own, checked, every weight assigned.

Loading costs about as much memory as the finished weights. Where a weight must be converted, the pages of the
file under it are given back as soon as that is done.
"""

import math
import mmap
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.errors import CheckpointError
from ldm.models import V_MARKER, ZERO_SNR_MARKER
from ldm.storage import prepare

DROPPED = (
    (r"model_ema\..*", "moving averages of the UNet; `ema=True` takes them in its place"),
    (r".*position_ids", "0, 1, 2, ... , stored by old versions of transformers"),
    (r"(.*\.)?(logit_scale|attn_mask)", "used by CLIP's training and by no text encoder"),
    (r"(.*\.)?loss\..*", "the training losses' own networks (LPIPS, discriminator)"),
    (r"depth_model\..*", "MiDaS: makes depth pictures, and is a program of its own"),
    (r"low_scale_model\..*", "the noise schedule of the x4 upscaler's input, which is computed"),
    (r"denoiser\.sigmas", "the noise schedule, which is computed"),
    (
        r"(model\.)?(betas|.*alphas_cumprod.*|posterior_.*|log_one_minus_.*|lvlb_weights|logvar|scale_factor)",
        "the noise schedule and other constants of training, which are computed",
    ),
    (rf"{V_MARKER}|{ZERO_SNR_MARKER}", "markers, read before"),
)
"""(pattern of names, why a loader leaves these weights out)."""

_DROP = re.compile("|".join(pattern for pattern, _ in DROPPED))

PIECE = 2**16  # numbers that are converted at a time: 256 KB, which the nearest caches hold
LARGE = 2**20  # bytes from which on a weight gets pages of its own, as torch's own allocator does
POPULATE = 23  # Linux' MADV_POPULATE_WRITE (5.14, 2021), for which mmap has no name

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Destination:
    """Where the weights of a network go."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    storage: torch.dtype | None = None
    """The dtype to hold the large weights in (ldm.storage); None: in `dtype`, like the others."""
    read_once: Callable[[Tensor], AbstractContextManager[object]] = nullcontext
    """Around the copying of each weight, see WeightFile.read_once."""

    def bring(self, w: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool]:
        """The weight on the device in this dtype, the very same tensor if it is so already; is it finite?"""
        if self.device.type == "meta":
            return w.to(self.device, dtype), True
        if (w.device, w.dtype) == (self.device, dtype):
            return w, _is_finite(w)
        with self.read_once(w):
            if self.device.type == "cpu":
                return converted(w, dtype)
            new = w.to(self.device, dtype)
            return new, _is_finite(new)


def converted(w: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """A copy of a weight on the CPU in another dtype, and whether all of it is finite.

    Loading is made of memory traffic, so this goes piece by piece: a piece is looked at while it is still in
    the cache, and its memory is asked for at once and not page by page. A fifth of the time is saved.
    """
    new, pages = _blank(w.shape, dtype)
    finite, position = True, 0
    for source, target in zip(w.reshape(-1).split(PIECE), new.view(-1).split(PIECE), strict=True):
        if pages is not None:
            with suppress(OSError):  # an older system takes the page faults
                pages.madvise(POPULATE, position, target.nbytes)
            position += target.nbytes
        finite = _adds_up(target.copy_(source)) and finite
    return new, finite


def _blank(shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor, mmap.mmap | None]:
    """A tensor without content, and its memory where that can be asked for before it is touched (Linux)."""
    size = shape.numel() * dtype.itemsize
    if sys.platform != "linux" or size < LARGE:
        return torch.empty(shape, dtype=dtype), None
    try:
        pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # there is no memory, which torch says in the way that ldm.stepdown knows
        return torch.empty(shape, dtype=dtype), None
    return torch.frombuffer(pages, dtype=dtype).view(shape), pages


def _is_finite(w: Tensor) -> bool:
    """Whether no number of a weight is NaN or infinite; other devices than the CPU are asked only once."""
    return all(map(_adds_up, w.reshape(-1).split(PIECE))) if w.device.type == "cpu" else _adds_up(w)


def _adds_up(piece: Tensor) -> bool:
    """A NaN or an infinity anywhere shows in the sum, which is the cheapest way to look at all numbers.

    In float32: in float16 the sum itself may overflow.
    """
    return math.isfinite(piece.sum(dtype=torch.float32).item())


class _Blank(TorchFunctionMode):
    """Leaves the weights of new modules as they are: they get others at once, so no numbers need be drawn.

    On meta there is nothing to draw anyway; but torch would import its compiler for it, which takes a second.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def build(make: Callable[[], M], weights: Mapping[str, Tensor], part: str, to: Destination) -> M:
    """A module with these weights: built on meta, every name and shape checked, assigned.

    Raises CheckpointError, which calls the module `part`.
    """
    try:
        with torch.device("meta"), _Blank():
            module = make()
    except (ArithmeticError, IndexError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the shapes of the {part} weights make no network: {error}") from None
    expected = {name: tuple(w.shape) for name, w in module.state_dict().items()}
    given = {name: w for name, w in weights.items() if name in expected or not is_dropped(name)}

    missing = [name for name in expected if name not in given]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(expected)} {part} weights are missing, first: {few(missing)}; "
            "the file is incomplete or another model's"
        )
    unexpected = [name for name in given if name not in expected]
    if unexpected:
        raise CheckpointError(
            f"{len(unexpected)} unknown {part} weights, first: {few(unexpected)}; is it another family's?"
        )
    wrong = [name for name in expected if tuple(given[name].shape) != expected[name]]
    if wrong:
        shape, right = list(given[wrong[0]].shape), list(expected[wrong[0]])
        raise CheckpointError(
            f"{len(wrong)} {part} weights have a wrong shape, first: {few(wrong[:1])} is {shape}, not {right}"
        )
    strange = [name for name in expected if not given[name].is_floating_point()]
    if strange:
        kind = str(given[strange[0]].dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{len(strange)} {part} weights are of a kind that is not used, first: {few(strange[:1])} "
            f"is {kind}; get the file in float16 or float32"
        )

    large = {*prepare(module)} if to.storage else ()
    brought: dict[str, Tensor] = {}
    broken = []
    for name, w in given.items():
        brought[name], finite = to.bring(w, to.storage if to.storage and name in large else to.dtype)
        if not finite:  # it was so in the file, or became infinite just now, in float16
            broken.append(name)
    if broken:
        raise CheckpointError(
            f"{len(broken)} {part} weights hold NaN or infinity (as {str(to.dtype).removeprefix('torch.')}), "
            f"first: {few(broken)}"
        )
    module.load_state_dict(brought, assign=True)
    return module.eval().requires_grad_(False)


def is_dropped(name: str) -> bool:
    """Whether weights of this name belong to no network here."""
    return _DROP.fullmatch(name) is not None


def few(names: Iterable[str]) -> str:
    """The first of some names, for a message."""
    listed = [name[:60] for name in names]
    return ", ".join(listed[:2]) + (" ..." if len(listed) > 2 else "")


def shapes_of(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(w.shape) for name, w in weights.items()}
