"""When memory runs out: the same work in a way that needs less, and a word about it in the picture."""

import gc
import logging
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ldm.denoise import Network

T = TypeVar("T")

logger = logging.getLogger(__name__)

# What each part came down to in the run at hand. Beside the models and not within: they are frozen, and one
# run at a time is made on them.
_NOTES: MutableMapping[object, str] = WeakKeyDictionary()


def notes(*parts: object) -> list[str]:
    """How the parts of a model worked in the run at hand, where memory ran out."""
    return [_NOTES[part] for part in parts if part is not None and part in _NOTES]


def forget(*parts: object) -> None:
    """A new run begins: everything is tried in the usual way again."""
    for part in parts:
        _NOTES.pop(part, None)


# In plain RuntimeErrors, beside torch.OutOfMemoryError: of main memory, of oneDNN, of Apple's and NVIDIA's
# libraries.
_SIGNS = (
    "DefaultCPUAllocator",
    "could not create a primitive",
    "MPS backend out of memory",
    "STATUS_ALLOC_FAILED",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether this is what torch raises when memory runs out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def release() -> None:
    """Give memory that nothing needs back to the device.

    Call it behind an except block, never within: there, the error keeps all tensors of its frames alive.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def first_that_fits(part: object, ways: Mapping[str, Callable[[], T]]) -> T:
    """Do a work in the first way for which memory suffices.

    part: of the model; the next work of this run with it begins with the way that was found.
    ways: by what to say of them; each needs less memory than the one before. Raises as the last one does.
    """
    names = [*ways]
    first = names.index(_NOTES[part]) if _NOTES.get(part) in ways else 0
    for name, following in zip(names[first:], names[first + 1 :], strict=False):
        try:
            return ways[name]()
        except Exception as error:
            if not out_of_memory(error):
                raise
        release()
        _note(part, following)
    return ways[names[-1]]()


@dataclass(eq=False)
class InParts:
    """A network that takes batches in smaller parts once memory has run out; called like the network."""

    network: Network
    part: object  # of the model, for `notes`
    rows: int | None = None  # of a batch at once; None: all

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        control: Sequence[Tensor] | None = None,
        adapter: Mapping[int, Tensor] | None = None,
    ) -> Tensor:
        """As `UNet.forward`. Raises torch.OutOfMemoryError if a single row is too much."""
        while True:
            rows = min(self.rows or len(x), len(x))
            inputs = (x, t, context, y, control, adapter)
            try:
                if rows == len(x):
                    return self.network(*inputs)
                starts = range(0, len(x), rows)
                # Copied, as CUDA graphs (ldm.compiled) give each result in the same memory.
                return torch.cat([self.network(*_cut(inputs, slice(i, i + rows))).clone() for i in starts])
            except Exception as error:
                if not out_of_memory(error) or rows == 1:
                    raise
            release()
            self.rows = (rows + 1) // 2
            _note(self.part, f"UNet batch of {self.rows}")


def _cut(value: Any, rows: slice) -> Any:
    """These rows of all tensors in value; what has a single row counts for all."""
    match value:
        case Tensor():
            return value if len(value) == 1 else value[rows]
        case Mapping():
            return {key: _cut(one, rows) for key, one in value.items()}
        case list() | tuple():
            return [_cut(one, rows) for one in value]
        case _:
            return value


def _note(part: object, way: str) -> None:
    logger.warning(f"out of memory; going on with {way}")
    _NOTES[part] = way
