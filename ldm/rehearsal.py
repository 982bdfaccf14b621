"""How much memory networks take while they run, found by running them on tensors that have none.

    with torch.no_grad(), Ledger(torch.device("cpu")) as ledger:
        blank(models).unet(x, t, context)  # weights and inputs on torch's device "meta": shapes, no numbers
    ledger.turn()  # bytes

The modules are the very ones that draw, so nothing here knows of their layers. What a tensor would take is
written down when it is made and struck out when the last one to use it lets go. Only what the operators
take for themselves is not seen in that way; of it, this counts what was measured to matter on a CPU
(docs/memory.md).
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from math import prod
from typing import Any, TypeVar
from weakref import ref

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.heap import Block, Exact, Heap
from ldm.models import Models
from ldm.native import kernels
from ldm.optimization import BLOCK, product_pays, winograd_pays

META = torch.device("meta")


class Ledger(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within the block, without those of the weights."""

    def __init__(self, device: torch.device, *, fast: bool = False) -> None:
        """device: where the tensors would be. fast: with `ldm.optimize`, on a CPU."""
        super().__init__()
        self.on_cpu = device.type == "cpu"
        self.fast = fast and self.on_cpu and kernels() is not None
        self.peak = 0
        self._memory = Heap() if self.on_cpu else Exact()
        self._alive: dict[int, object] = {}  # by their addresses
        self._transformed: set[int] = set()  # weights that are held in Winograd's form, too
        self._operators = _Operators(self)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch would import its compiler, for a second, to switch it off

    def turn(self) -> int:
        """The most bytes since the last call of this."""
        peak, self.peak = self.peak, self._memory.taken
        return peak

    def __enter__(self) -> "Ledger":
        super().__enter__()
        self._operators.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._operators.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = _pointwise(args) if torch.Tag.pointwise in func.tags else func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}
        made = result if isinstance(result, tuple | list) else (result,)
        self._write_down([t for t in made if isinstance(t, Tensor)], given)
        return result

    def _write_down(self, made: Sequence[Tensor], given: set[int]) -> None:
        """Count new tensors; views of given ones are none."""
        for tensor in made:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in given or key in self._alive:
                continue

            block = self._take(size)

            def gone(_: object, key: int = key, block: Block = block) -> None:
                del self._alive[key]
                self._memory.give(block)

            self._alive[key] = ref(storage, gone)

    def _take(self, size: int) -> Block:
        block = self._memory.take(size)
        self.peak = max(self.peak, self._memory.taken)
        return block

    def convolution(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]
    ) -> Tensor:
        """The result of a convolution, and a note of what it takes beside that."""
        kernel = weight.shape[2:]
        sides = zip(x.shape[2:], kernel, stride, padding, strict=True)
        shape = (len(x), len(weight), *((n + 2 * p - k) // s + 1 for n, k, s, p in sides))
        plain = self.fast and kernel == (3, 3) and stride[0] == 1
        blocks: list[Block] = []
        if not self.on_cpu or max(kernel) == 1:
            pass  # a matrix product
        elif plain and winograd_pays(x, weight):
            key = weight.untyped_storage()._cdata
            if key not in self._transformed:
                self._take(weight.nbytes * 36 // 9)
                self._take(0 if self._transformed else BLOCK * x.itemsize)
                self._transformed.add(key)
            blocks = [self._take(x.nbytes)]  # in channels-last order
        elif plain and product_pays(x, weight):
            blocks = [self._take(x.nbytes), self._take(9 * x.nbytes)]  # with margins; nine shifted copies
        else:  # oneDNN works on copies in its own order: input, weight and result first, then two results
            ordered = [self._take(x.nbytes), self._take(weight.nbytes)]
            blocks = [self._take(prod(shape) * x.itemsize)]
            for block in ordered:
                self._memory.give(block)
        y = x.new_empty(shape)
        for block in blocks:
            self._memory.give(block)
        return y


def _pointwise(args: Sequence[Any]) -> Tensor:
    """The result of an operator on each number by itself; torch's own way on meta imports its compiler."""
    tensors = [one for one in args if isinstance(one, Tensor)]
    dtype = reduce(torch.promote_types, (one.dtype for one in tensors if one.ndim), tensors[0].dtype)
    shape = np.broadcast_shapes(*(one.shape for one in tensors))
    return torch.empty(shape, dtype=dtype, device=META)


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> list[int]:
    shape = list(tensors[0].shape)
    shape[dim] = sum(one.shape[dim] for one in tensors)
    return shape


def _enlarged(
    x: Tensor, size: Sequence[int] | None = None, scale_factor: float | None = None, **options: Any
) -> list[int]:
    return [*x.shape[:2], *(size or (round(side * (scale_factor or 1)) for side in x.shape[2:]))]


SHAPES: Mapping[Any, Callable[..., Sequence[int]]] = {
    F.linear: lambda x, weight, bias=None: (*x.shape[:-1], len(weight)),
    F.group_norm: lambda x, *rest, **options: x.shape,
    F.layer_norm: lambda x, *rest, **options: x.shape,
    F.interpolate: _enlarged,
    torch.cat: _joined,
}
"""The results of functions by their arguments."""


class _Operators(TorchFunctionMode):
    """Functions as they are on a device; on meta, some import torch's compiler, and some take more memory."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options, first = kwargs or {}, args[0] if args else None
        if func is Tensor.__bool__ and isinstance(first, Tensor) and first.is_meta:
            return True  # "are all of them finite?"
        if func in SHAPES:
            some = first[0] if isinstance(first, list | tuple) else first
            return some.new_empty(SHAPES[func](*args, **options))  # type: ignore[union-attr]
        if func in (F.conv1d, F.conv2d):
            return self.ledger.convolution(*args[:5])
        if func is F.scaled_dot_product_attention:  # without a matrix of all pairs
            q, _, v = args[:3]
            return v.new_empty(len(q), q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
        if func is torch.arange:
            return torch.empty(args[0], **options)
        if func is torch.var_mean:
            shape = [side for i, side in enumerate(args[0].shape) if i != options["dim"]]
            return args[0].new_empty(shape), args[0].new_empty(shape)
        return func(*args, **options)


ModuleT = TypeVar("ModuleT", bound=nn.Module)


def blank(models: Models) -> Models:
    """The same models without memory for their weights. `ldm.load(path, device="meta")` makes such ones."""
    return replace(
        models,
        denoiser=replace(models.denoiser, network=blank_module(models.unet)),
        vae=models.vae and blank_module(models.vae),
        text=tuple(blank_module(encoder) for encoder in models.text),
        refiner=models.refiner and blank(models.refiner),
    )


def blank_module(module: ModuleT) -> ModuleT:
    """The same module without memory for its weights, and without hooks."""
    known: dict[int, Any] = {
        id(w): nn.Parameter(w.to(META), requires_grad=False) for w in module.parameters()
    }
    known |= {id(part._forward_pre_hooks): OrderedDict() for part in module.modules()}  # of ldm.offload
    return copy.deepcopy(module, known)
