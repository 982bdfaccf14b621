"""The noise that PyTorch draws on NVIDIA cards, computed on the CPU.

People who made their pictures with noise from the GPU can make them again anywhere. The values agree with a
card as long as it has at least one thread for each number: PyTorch starts no more threads than the card can
hold at once, about 72,000 to 175,000 depending on the model, and beyond that count its threads draw several
numbers each, in an order that differs from card to card. The latent of a 1024 x 1024 picture (65,536 numbers)
is inside the limit on all of them, that of 1536 x 1536 (147,456) is not.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox 4x32-10); Box and Muller 1958. The
layout of counters follows PyTorch's CUDA `randn`.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)
_WEYL = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64)  # golden ratio and sqrt(3) - 1, as key increments
_LOW = np.uint64(0xFFFFFFFF)
_BITS = np.uint64(32)


class Philox:
    """A counter-based generator: its n-th draw depends on the seed and n alone."""

    def __init__(self, seed: int):
        self.key = np.array([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF], dtype=np.uint64)
        self.draws = 0

    def randn(self, shape: Sequence[int]) -> Tensor:
        """float32 normal numbers. One call counts as one draw, whatever its shape."""
        count = int(np.prod(shape))
        counter = np.zeros((4, count), dtype=np.uint64)
        counter[0] = self.draws
        counter[2] = np.arange(count)
        self.draws += 1
        u, v, _, _ = _philox(counter, self.key).astype(np.float32)
        u = u * np.float32(2**-32) + np.float32(2**-33)
        v = v * np.float32(2**-32 * 2 * np.pi) + np.float32(2**-33 * 2 * np.pi)
        return torch.from_numpy(np.sqrt(-2 * np.log(u)) * np.sin(v)).reshape(tuple(shape))


def _philox(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Ten rounds on 32-bit words held in uint64: counter (4, count), key (2,) -> (4, count)."""
    for _ in range(10):
        product = counter[::2] * _MULTIPLIERS[:, None]  # (2, count)
        high, low = product >> _BITS, product & _LOW
        counter = np.stack((high[1] ^ counter[1] ^ key[0], low[1], high[0] ^ counter[3] ^ key[1], low[0]))
        key = key + _WEYL & _LOW
    return counter
