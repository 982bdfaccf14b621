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
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ldm.errors import CheckpointError


@dataclass(frozen=True, eq=False, kw_only=True)
class Delta(ABC):
    """A change of one weight or bias."""

    found_by: ClassVar[tuple[str, ...]] = ()  # tensors of which one is enough to tell the way

    @abstractmethod
    def change(self, base: Tensor) -> Tensor:
        """What to add to the pristine weight for multiplier 1.

        base: the weight, float32. Returns float32 of the same shape.
        Raises CheckpointError or RuntimeError if the shapes do not fit.
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

    def check(self, shape: torch.Size) -> None:
        """Raise CheckpointError if this does not fit a weight of `shape`. Computes nothing."""
        try:
            result = self.to("meta").change(torch.empty(shape, device="meta")).shape
        except CheckpointError:
            raise
        except (RuntimeError, IndexError, ValueError) as error:  # what torch says of shapes
            raise CheckpointError(f"it does not fit a weight of shape {tuple(shape)}") from error
        if result != shape:
            raise CheckpointError(f"it has shape {tuple(result)}, the weight {tuple(shape)}")


@dataclass(frozen=True, eq=False, kw_only=True)
class LowRank(Delta):
    """LoRA: up @ down. A kernel is in `down`, or between the two in `mid` (CP decomposition)."""

    found_by = ("up", "down", "mid")

    up: Tensor  # (O, r) or (O, r, 1, 1)
    down: Tensor  # (r, I) or (r, I, k, k); (r, I, 1, 1) if there is a `mid`
    mid: Tensor | None = None  # (r, r, k, k)
    alpha: float | None = None

    def change(self, base: Tensor) -> Tensor:
        up, down = self.up.flatten(1), self.down.flatten(1)
        if self.mid is None:
            product = (up @ down).reshape(len(up), *self.down.shape[1:])
        else:
            product = torch.einsum("or, rs..., si -> oi...", up, self.mid, down)
        return _scale(self.alpha, len(self.down)) * _fit(product, base)


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

    def change(self, base: Tensor) -> Tensor:
        one = _product(self.hada_w1_a, self.hada_w1_b, self.hada_t1)
        two = _product(self.hada_w2_a, self.hada_w2_b, self.hada_t2)
        _same(one.shape, two.shape)
        return _scale(self.alpha, len(self.hada_w1_b)) * _fit(one * two, base)


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

    def change(self, base: Tensor) -> Tensor:
        one = self._factor(self.lokr_w1, self.lokr_w1_a, self.lokr_w1_b, None)
        two = self._factor(self.lokr_w2, self.lokr_w2_a, self.lokr_w2_b, self.lokr_t2)
        if two.ndim == 2:
            two = two.reshape(len(two), -1, *base.shape[2:])
        inner = self.lokr_w2_b if self.lokr_w2_b is not None else self.lokr_w1_b
        scale = 1.0 if inner is None else _scale(self.alpha, len(inner))
        return scale * _fit(torch.kron(one.reshape(*one.shape, *(1 for _ in two.shape[2:])), two), base)

    @staticmethod
    def _factor(whole: Tensor | None, a: Tensor | None, b: Tensor | None, core: Tensor | None) -> Tensor:
        if whole is not None:
            return whole
        if a is None or b is None:
            raise CheckpointError("a factor of it is missing")
        return _product(a, b, core)


@dataclass(frozen=True, eq=False, kw_only=True)
class Full(Delta):
    """The change itself, of a weight or of a bias: "full" and "norm" of LyCORIS."""

    found_by = ("diff",)

    diff: Tensor

    def change(self, base: Tensor) -> Tensor:
        return _fit(self.diff, base)


@dataclass(frozen=True, eq=False, kw_only=True)
class General(Delta):
    """GLoRA: W @ a1 @ a2 + b1 @ b2. The web UI's older files swap the numbers in all names."""

    found_by = ("a1", "b1")

    a1: Tensor  # (I, r)
    a2: Tensor  # (r, I)
    b1: Tensor  # (O, r)
    b2: Tensor  # (r, I) or (r, I, k, k)
    alpha: float | None = None

    def change(self, base: Tensor) -> Tensor:
        a1, a2, b1, b2 = (self.a1, self.a2, self.b1, self.b2)
        if len(b1) != len(base):
            a1, a2, b1, b2 = a2, a1, b2, b1
        added = (b1.flatten(1) @ b2.flatten(1)).reshape(len(b1), *b2.shape[1:])
        mapped = torch.einsum("oi..., ir, rj -> oj...", base, a1.flatten(1), a2.flatten(1))
        return _scale(self.alpha, len(b2)) * (_fit(added, base) + mapped)


@dataclass(frozen=True, eq=False, kw_only=True)
class Scaling(Delta):
    """IA3: every output, or every input, of a layer is scaled by 1 + weight."""

    found_by = ("on_input",)

    weight: Tensor  # (O,) or (I,), or with ones for the other axes
    on_input: float  # 1: it is the inputs, 0: the outputs

    def change(self, base: Tensor) -> Tensor:
        axis = 1 if self.on_input else 0
        _same(torch.Size([self.weight.numel()]), base.shape[axis : axis + 1])
        shape = [1] * base.ndim
        shape[axis] = -1
        return base * self.weight.reshape(shape)


@dataclass(frozen=True, eq=False, kw_only=True)
class Rotation(Delta):
    """OFT: blocks of outputs are rotated, R = (1 + Q) / (1 - Q) for a skew-symmetric Q (Cayley)."""

    found_by = ("oft_blocks",)

    oft_blocks: Tensor  # (blocks, O / blocks, O / blocks); Q is this minus its transpose
    rescale: Tensor | None = None  # (O, 1, ...): a factor for each output
    alpha: float | None = None  # bounds the norm of Q, if positive, to alpha * O

    def change(self, base: Tensor) -> Tensor:
        count, size, _ = self.oft_blocks.shape
        q = self.oft_blocks - self.oft_blocks.transpose(1, 2)
        if self.alpha is not None and self.alpha > 0:
            q = q * (self.alpha * len(base) / (q.norm() + 1e-8)).clamp(max=1)
        one = torch.eye(size, device=q.device)
        r = (one + q) @ torch.linalg.inv(one - q)
        rotated = torch.einsum("bnm, bn... -> bm...", r, base.unflatten(0, (count, size))).flatten(0, 1)
        if self.rescale is not None:
            _same(self.rescale.shape, torch.Size([len(base), *(1 for _ in base.shape[1:])]))
            rotated = rotated * self.rescale
        return rotated - base


@dataclass(frozen=True, eq=False, kw_only=True)
class Decomposed(Delta):
    """DoRA: the changed weight W + dW is scaled to stored norms, W' = m (W + dW) / |W + dW|.

    The norms are those of the outputs (Liu et al. 2024, equation 5, and PEFT) or of the inputs (older
    LyCORIS); the shape tells. Multiplier 1 is what was trained, as in LyCORIS; the web UI takes the norms of
    W alone along the outputs there. Other multipliers blend W and W', as in the web UI.
    """

    delta: Delta
    magnitude: Tensor  # (O, 1, ...) or (1, I, 1, ...); (O,)

    def change(self, base: Tensor) -> Tensor:
        m = self.magnitude
        ones = [1] * (base.ndim - 1)
        if m.ndim == 1:
            m = m.reshape(-1, *ones)
        per_output = m.shape == torch.Size([len(base), *ones])
        if not per_output:
            _same(m.shape, torch.Size([1, base.shape[1], *ones[1:]]))
        merged = base + self.delta.change(base)
        axes = tuple(axis for axis in range(base.ndim) if axis != (0 if per_output else 1))
        norm = merged.square().sum(axes, keepdim=True).sqrt() + torch.finfo(torch.float32).eps
        return merged * (m / norm) - base


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
    if tensor.numel() != 1 or not math.isfinite(number := float(tensor)):
        raise CheckpointError(f"{name} is not a number")
    return number


def _scale(alpha: float | None, rank: int) -> float:
    if rank == 0:
        raise CheckpointError("its rank is 0")
    return 1.0 if alpha is None else alpha / rank


def _product(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    """a @ b, or the Tucker form with a core that has the kernel: (r, O), (r, I), (r, r, k, k)."""
    return a @ b if core is None else torch.einsum("pq..., po, qi -> oi...", core, a, b)


def _fit(change: Tensor, base: Tensor) -> Tensor:
    """`change` in the shape of `base`, which it has but for ones at the end or a flattened kernel."""
    flattened = change.ndim == 2 and change.shape[:1] == base.shape[:1] and change.numel() == base.numel()
    if not flattened:
        _same(_without_ones(change.shape), _without_ones(base.shape))
    return change.reshape(base.shape)


def _without_ones(shape: torch.Size) -> torch.Size:
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _same(shape: torch.Size, wanted: torch.Size) -> None:
    if shape != wanted:
        raise CheckpointError(f"a part of it has shape {tuple(shape)} where {tuple(wanted)} is needed")
