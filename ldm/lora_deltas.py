"""The ways in which LoRA files store a change of a weight, each as one `Delta`.

LoRA: Hu et al. 2021, arXiv:2106.09685; its convolutions, LoHa, LoKr, full and norm: LyCORIS, Yeh et al. 2023,
arXiv:2309.14859; DoRA: Liu et al. 2024, arXiv:2402.09353; GLoRA: Chavan et al. 2023, arXiv:2306.07967;
IA3: Liu et al. 2022, arXiv:2205.05638; OFT: Qiu et al. 2023, arXiv:2306.07280. Fields are named as in the
files. To add a way is to add a class here and to KINDS.

Shapes: O outputs and I inputs of a layer, k k its kernel (none for a linear layer), r rank.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ldm.errors import CheckpointError

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Delta(ABC):
    """A change of one weight or bias."""

    found_by: ClassVar[tuple[str, ...]] = ()  # tensors of which one is enough to tell the way

    @abstractmethod
    def check(self, shape: Shape) -> None:
        """Raise CheckpointError if this does not fit a weight of `shape`. Looks at shapes only."""

    @abstractmethod
    def change(self, base: Tensor) -> Tensor:
        """What to add to the pristine weight for multiplier 1.

        base: the weight, float32, of a shape that passed `check`. Returns float32 of the same shape.
        """

    def merged(self, base: Tensor, multiplier: float) -> Tensor:
        """The weight with this change. Every way is linear in the multiplier, DoRA too (web UI)."""
        return base + multiplier * self.change(base)

    def to(self, device: torch.device | str) -> Delta:
        """The same with all tensors in float32 on `device`."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                moved[field.name] = value.to(device, torch.float32)
            elif isinstance(value, Delta):
                moved[field.name] = value.to(device)
        return replace(self, **moved)


def _refuse(shape: Sequence[int], wanted: Sequence[int] | str) -> CheckpointError:
    wanted = wanted if isinstance(wanted, str) else str(tuple(wanted))
    return CheckpointError(f"a part of it has shape {tuple(shape)} where {wanted} is needed")


def _fits(shape: Shape, wanted: Shape) -> None:
    """Demand the same shape, but for ones at the end or a kernel flattened into the inputs."""

    def core(sizes: Shape) -> Shape:
        return core(sizes[:-1]) if sizes[-1:] == (1,) else sizes

    flattened = len(shape) == 2 and shape[:1] == wanted[:1] and shape[1] == math.prod(wanted[1:])
    if not flattened and core(shape) != core(wanted):
        raise _refuse(shape, wanted)


Factors = tuple[Tensor, ...]
"""A matrix: (whole,); (a, b) for a @ b, where b may have the kernel behind its inputs, (r, I, k, k); or
(a, b, core) for LyCORIS' Tucker form, (r, O), (r, I) and (r, r, k, k)."""


def _shape(factors: Factors) -> Shape:
    """Of `_value(factors)`. Raises CheckpointError if they do not fit each other, or the rank is 0."""
    shapes = [tuple(factor.shape) for factor in factors]
    for shape in shapes:
        if len(shape) < 2:
            raise _refuse(shape, "a matrix")
    if len(shapes) == 1:
        return shapes[0]
    a, b, *core = shapes
    rank = b[0]
    if rank == 0:
        raise CheckpointError("its rank is 0")
    if not core:
        if math.prod(a[1:]) != rank:
            raise _refuse(a, (a[0], rank))
        return (a[0], *b[1:])
    if core[0][:2] != (a[0], rank):
        raise _refuse(core[0], (a[0], rank, *core[0][2:]))
    return (math.prod(a[1:]), math.prod(b[1:]), *core[0][2:])


def _value(factors: Factors) -> Tensor:
    if len(factors) == 1:
        return factors[0]
    a, b, *core = factors
    if core:
        return torch.einsum("pq..., po, qi -> oi...", core[0], a.flatten(1), b.flatten(1))
    return (a.flatten(1) @ b.flatten(1)).reshape(len(a), *b.shape[1:])


def _factors(whole: Tensor | None, a: Tensor | None, b: Tensor | None, core: Tensor | None) -> Factors:
    if whole is not None:
        return (whole,)
    if a is None or b is None:
        raise CheckpointError("a factor of it is missing")
    return (a, b) if core is None else (a, b, core)


def _scale(alpha: float | None, rank: int) -> float:
    return 1.0 if alpha is None else alpha / rank


@dataclass(frozen=True, eq=False, kw_only=True)
class LowRank(Delta):
    """LoRA: up @ down. A kernel is in `down`, or between the two in `mid` (CP decomposition)."""

    found_by = ("up", "down", "mid")

    up: Tensor  # (O, r) or (O, r, 1, 1)
    down: Tensor  # (r, I) or (r, I, k, k); (r, I, 1, 1) if there is a `mid`
    mid: Tensor | None = None  # (r, r, k, k)
    alpha: float | None = None

    def _factors(self) -> Factors:
        if self.mid is None or self.up.ndim < 2:
            return (self.up, self.down)
        return (self.up.flatten(1).T, self.down, self.mid)

    def check(self, shape: Shape) -> None:
        _fits(_shape(self._factors()), shape)

    def change(self, base: Tensor) -> Tensor:
        return _scale(self.alpha, len(self.down)) * _value(self._factors()).reshape(base.shape)


@dataclass(frozen=True, eq=False, kw_only=True)
class Hadamard(Delta):
    """LoHa: the product, element by element, of two products."""

    found_by = ("hada_w1_a", "hada_w2_a")

    hada_w1_a: Tensor  # (O, r); (r, O) if there are hada_t1 and hada_t2
    hada_w1_b: Tensor  # (r, I * k * k); (r, I)
    hada_w2_a: Tensor
    hada_w2_b: Tensor
    hada_t1: Tensor | None = None  # (r, r, k, k)
    hada_t2: Tensor | None = None
    alpha: float | None = None

    def _factors(self) -> tuple[Factors, Factors]:
        return (
            _factors(None, self.hada_w1_a, self.hada_w1_b, self.hada_t1),
            _factors(None, self.hada_w2_a, self.hada_w2_b, self.hada_t2),
        )

    def check(self, shape: Shape) -> None:
        for factors in self._factors():
            _fits(_shape(factors), shape)

    def change(self, base: Tensor) -> Tensor:
        one, two = (_value(factors).reshape(base.shape) for factors in self._factors())
        return _scale(self.alpha, len(self.hada_w1_b)) * (one * two)


@dataclass(frozen=True, eq=False, kw_only=True)
class Kronecker(Delta):
    """LoKr: the Kronecker product of two matrices, each stored whole or as a product.

    If both are whole there is no rank, and `alpha` means nothing (LyCORIS).
    """

    found_by = ("lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a")

    lokr_w1: Tensor | None = None  # (O1, I1), O = O1 * O2
    lokr_w1_a: Tensor | None = None  # (O1, r)
    lokr_w1_b: Tensor | None = None  # (r, I1)
    lokr_w2: Tensor | None = None  # (O2, I2, k, k)
    lokr_w2_a: Tensor | None = None  # (O2, r); (r, O2) if there is a lokr_t2
    lokr_w2_b: Tensor | None = None  # (r, I2 * k * k); (r, I2)
    lokr_t2: Tensor | None = None  # (r, r, k, k)
    alpha: float | None = None

    def _factors(self) -> tuple[Factors, Factors]:
        return (
            _factors(self.lokr_w1, self.lokr_w1_a, self.lokr_w1_b, None),
            _factors(self.lokr_w2, self.lokr_w2_a, self.lokr_w2_b, self.lokr_t2),
        )

    def check(self, shape: Shape) -> None:
        one, two = map(_shape, self._factors())
        pixels = math.prod(shape[2:])
        if len(one) != 2 or (len(two) == 2 and two[1] % pixels):
            raise _refuse(one, "a matrix")
        if len(two) == 2:  # the kernel is flattened into the inputs
            two = (two[0], two[1] // pixels, *shape[2:])
        _fits((one[0] * two[0], one[1] * two[1], *two[2:]), shape)

    def change(self, base: Tensor) -> Tensor:
        factors = self._factors()
        one, two = map(_value, factors)
        ranks = [len(factor[1]) for factor in factors if len(factor) > 1]
        scale = _scale(self.alpha, ranks[-1]) if ranks else 1.0
        kernel = base.shape[2:]
        one = one.reshape(*one.shape, *(1 for _ in kernel))
        return scale * torch.kron(one, two.reshape(len(two), -1, *kernel)).reshape(base.shape)


@dataclass(frozen=True, eq=False, kw_only=True)
class Full(Delta):
    """The change itself, of a weight or of a bias: "full" and "norm" of LyCORIS."""

    found_by = ("diff",)

    diff: Tensor

    def check(self, shape: Shape) -> None:
        _fits(tuple(self.diff.shape), shape)

    def change(self, base: Tensor) -> Tensor:
        return self.diff.reshape(base.shape)


@dataclass(frozen=True, eq=False, kw_only=True)
class General(Delta):
    """GLoRA: W @ a1 @ a2 + b1 @ b2. Older files of the web UI have 1 and 2 the other way round."""

    found_by = ("a1", "b1")

    a1: Tensor  # (I, r)
    a2: Tensor  # (r, I)
    b1: Tensor  # (O, r)
    b2: Tensor  # (r, I) or (r, I, k, k)
    alpha: float | None = None

    def _factors(self, outputs: int) -> tuple[Factors, Factors]:
        if self.b1.shape[:1] == (outputs,):
            return (self.a1, self.a2), (self.b1, self.b2)
        return (self.a2, self.a1), (self.b2, self.b1)

    def check(self, shape: Shape) -> None:
        if len(shape) < 2:
            raise CheckpointError("it is for a matrix or a convolution")
        mapped, added = map(_shape, self._factors(shape[0]))
        _fits(added, shape)
        _fits(mapped, (shape[1], shape[1]))

    def change(self, base: Tensor) -> Tensor:
        (a, b), added = self._factors(len(base))
        mapped = torch.einsum("oi..., ir, rj -> oj...", base, a.flatten(1), b.flatten(1))
        return _scale(self.alpha, len(b)) * (_value(added).reshape(base.shape) + mapped)


@dataclass(frozen=True, eq=False, kw_only=True)
class Scaling(Delta):
    """IA3: every output, or every input, of a layer is scaled by 1 + weight."""

    found_by = ("on_input",)

    weight: Tensor  # (O,) or (I,), or with ones for the other axes
    on_input: float  # 1: it is the inputs, 0: the outputs

    def check(self, shape: Shape) -> None:
        if len(shape) < 2 or self.weight.numel() != shape[1 if self.on_input else 0]:
            raise _refuse(
                tuple(self.weight.shape), f"one number for each {'in' if self.on_input else 'out'}put"
            )

    def change(self, base: Tensor) -> Tensor:
        shape = [1] * base.ndim
        shape[1 if self.on_input else 0] = -1
        return base * self.weight.reshape(shape)


@dataclass(frozen=True, eq=False, kw_only=True)
class Rotation(Delta):
    """OFT: blocks of outputs are rotated, R = (1 + Q) / (1 - Q) for a skew-symmetric Q (Cayley)."""

    found_by = ("oft_blocks",)

    oft_blocks: Tensor  # (blocks, O / blocks, O / blocks); Q is this minus its transpose
    rescale: Tensor | None = None  # (O, 1, ...): a factor for each output
    alpha: float | None = None  # bounds the norm of Q, if positive, to alpha * O

    def check(self, shape: Shape) -> None:
        blocks = tuple(self.oft_blocks.shape)
        if len(blocks) != 3 or blocks[1] != blocks[2] or blocks[0] * blocks[1] != shape[0]:
            raise _refuse(blocks, "blocks of all outputs")
        if self.rescale is not None:
            _fits(tuple(self.rescale.shape), shape[:1])

    def change(self, base: Tensor) -> Tensor:
        count, size, _ = self.oft_blocks.shape
        q = self.oft_blocks - self.oft_blocks.transpose(1, 2)
        if self.alpha is not None and self.alpha > 0:
            q = q * (self.alpha * len(base) / (q.norm() + 1e-8)).clamp(max=1)
        one = torch.eye(size, device=q.device)
        r = (one + q) @ torch.linalg.inv(one - q)
        rotated = torch.einsum("bnm, bn... -> bm...", r, base.unflatten(0, (count, size))).flatten(0, 1)
        if self.rescale is not None:
            rotated = rotated * self.rescale.reshape(-1, *(1 for _ in base.shape[1:]))
        return rotated - base


@dataclass(frozen=True, eq=False, kw_only=True)
class Decomposed(Delta):
    """DoRA: the changed weight W + dW is scaled to stored norms, W' = m (W + dW) / |W + dW|.

    The norms are those of the outputs (Liu et al. 2024, equation 5, and PEFT) or of the inputs (older
    LyCORIS); the shape tells. Multiplier 1 is what was trained, as in LyCORIS; the web UI takes the norms of
    W alone along the outputs there. Other multipliers blend W and W', as in the web UI.
    """

    delta: Delta
    magnitude: Tensor  # (O, 1, ...) or (O,) or (1, I, 1, ...)

    def check(self, shape: Shape) -> None:
        self.delta.check(shape)
        if len(shape) < 2 or tuple(self.magnitude.shape) not in ((shape[0],), *self._norms(shape)):
            raise _refuse(tuple(self.magnitude.shape), "one for each output or input")

    def change(self, base: Tensor) -> Tensor:
        outputs, inputs = self._norms(tuple(base.shape))
        per_input = self.magnitude.ndim > 1 and tuple(self.magnitude.shape) != outputs
        merged = base + self.delta.change(base)
        axes = tuple(axis for axis in range(base.ndim) if axis != (1 if per_input else 0))
        # The epsilon is LyCORIS'.
        norm = merged.square().sum(axes, keepdim=True).sqrt() + torch.finfo(torch.float32).eps
        return merged * (self.magnitude.reshape(inputs if per_input else outputs) / norm) - base

    @staticmethod
    def _norms(shape: Shape) -> tuple[Shape, Shape]:
        """The shapes of the norms of all outputs and of all inputs."""
        kernel = (1,) * len(shape[2:])
        return (shape[0], 1, *kernel), (1, shape[1], *kernel)


KINDS: tuple[type[Delta], ...] = (LowRank, Hadamard, Kronecker, Full, General, Scaling, Rotation)


def parse(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Delta], list[str]]:
    """What a file says of one module, by the names of the fields above, "dora_scale" and "diff_b".

    Returns the changes of its "weight" and its "bias", and the names that are part of none. Raises
    CheckpointError for what cannot be meant: a part is missing, rank 0, NaN.
    """
    values: dict[str, Any] = dict(tensors)
    for name, tensor in tensors.items():
        if name in ("alpha", "on_input"):
            values[name] = _number(name, tensor)
        elif not tensor.is_floating_point():
            raise CheckpointError(
                f"{name} holds {str(tensor.dtype).removeprefix('torch.')}, not real numbers"
            )
        elif not tensor.to(torch.float32).isfinite().all():
            raise CheckpointError(f"{name} holds NaN or infinity")
    changes: dict[str, Delta] = {}
    kind = next((kind for kind in KINDS if any(name in values for name in kind.found_by)), None)
    if kind is not None:
        own = {field.name: values.pop(field.name) for field in fields(kind) if field.name in values}
        try:
            changes["weight"] = kind(**own)
        except TypeError:
            raise CheckpointError(f"it has {', '.join(own)}, but a part is missing") from None
        if "dora_scale" in values:
            changes["weight"] = Decomposed(delta=changes["weight"], magnitude=values.pop("dora_scale"))
        values.pop("alpha", None)  # some trainers write it where it means nothing
    if "diff_b" in values:
        changes["bias"] = Full(diff=values.pop("diff_b"))
    return changes, list(values)


def _number(name: str, tensor: Tensor) -> float:
    if tensor.numel() != 1 or tensor.is_complex() or not math.isfinite(number := float(tensor)):
        raise CheckpointError(f"{name} is not a number")
    return number
