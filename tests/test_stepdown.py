"""When memory runs out, the same picture comes another way, and says so."""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ldm
from ldm import infotext, tiled_vae
from ldm.denoise import Network
from ldm.latents import _on_cpu
from ldm.models import Limits, Models
from ldm.planning import autoencoder
from ldm.stepdown import InParts, first_that_fits, forget, notes, out_of_memory
from tests.tiny_families import tiny

STEPS = 3
REQUEST = ldm.Request(prompt="a cat", steps=STEPS, width=64, height=64, sampler="Euler", batch_size=2)


class Failing(TorchDispatchMode):
    """torch, with an allocator that fails at the n-th result, or with so many bytes."""

    def __init__(self, nth: int = 0, limit: float = float("inf")) -> None:
        super().__init__()
        self.nth, self.limit, self.count, self.bytes = nth, limit, 0, 0
        self.sizes: dict[int, int] = {}  # of the live results, by the numbers of their storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given in args:
            if isinstance(given, Tensor):  # weights, and what was there before, do not count
                self.see(given, 0)
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.count += 1
            self.see(result, result.untyped_storage().nbytes())
            if self.count == self.nth or self.bytes > self.limit:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    def see(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = size
            self.bytes += size
            weakref.finalize(storage, self.free, storage._cdata)

    def free(self, storage: int) -> None:
        self.bytes -= self.sizes.pop(storage, 0)


@dataclass(eq=False)
class Small:
    """A network that takes so many rows, counting its calls."""

    network: Network
    rows: int
    calls: int = 0

    def __call__(self, x: Tensor, *more: Any) -> Tensor:
        self.calls += 1
        if len(x) > self.rows:
            raise torch.OutOfMemoryError
        return self.network(x, *more)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Iterator[Models]:
    """A small model, and strips so narrow that it makes many of them."""
    monkeypatch.setattr(tiled_vae, "STRIP", 2**17)
    monkeypatch.setattr(tiled_vae.decode, "__kwdefaults__", {"strip": 2**17, "progress": None})
    models = tiny("sd1")
    yield models
    forget(*models.parts)


def latents(side: int) -> Tensor:
    return torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0))


def test_wherever_a_decoder_fails_the_picture_comes_all_the_same(models: Models):
    with Failing() as counting:
        wanted = ldm.decode(models, latents(8))
    came = 0
    for n in range(1, counting.count + 1, 7):
        forget(*models.parts)
        with Failing(nth=n):
            try:
                pixels = ldm.decode(models, latents(8))
            except torch.OutOfMemoryError:  # before or after the decoder itself, where nothing needs less
                assert n < 5 or n > counting.count - 10
                continue
        came += 1
        assert notes(models.vae) == ["the VAE in strips"]
        torch.testing.assert_close(pixels, wanted, atol=1e-5, rtol=0)  # sums in another order
    assert came > counting.count // 7 - 3
    forget(*models.parts)
    assert torch.equal(ldm.decode(models, latents(8)), wanted)
    assert notes(models.vae) == []


def test_a_decoder_comes_down_as_far_as_it_must(models: Models):
    wanted = ldm.decode(models, latents(16))
    found = []
    whole_map = 4 * 32 * 128 * 128  # bytes
    for maps in (8, 5.5, 4, 3.2, 2.6, 2.2, 1):
        forget(*models.parts)
        with Failing(limit=maps * whole_map):
            try:
                torch.testing.assert_close(ldm.decode(models, latents(16)), wanted, atol=1e-5, rtol=0)
                found += notes(models.vae) or ["the VAE whole"]
            except torch.OutOfMemoryError:
                found.append("failed")
    ways = ["the VAE whole", "the VAE in strips", "the VAE in narrow strips", "failed"]
    assert sorted(found, key=ways.index) == found
    assert set(found) == set(ways)


def test_a_decoder_on_the_cpu_is_the_same(models: Models):
    vae = autoencoder(models)
    twin = _on_cpu(vae)
    assert torch.equal(twin.decode(latents(8)), vae.decode(latents(8)))
    assert all(w.device.type == "cpu" for w in twin.parameters())


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_network_halves_its_batches(models: Models, rows: int):
    wanted = ldm.txt2img(models, REQUEST)
    network = Small(models.denoiser.network, rows)
    small = replace(models, denoiser=replace(models.denoiser, network=network))
    pictures = ldm.txt2img(small, REQUEST)  # guided pairs of two: batches of four
    fit = {1: 1, 2: 2, 3: 2}[rows]
    assert network.calls == {1: 2, 2: 1}[fit] + STEPS * 4 // fit  # it fails in the first step only
    for picture, other in zip(pictures, wanted, strict=True):
        difference = np.asarray(picture, dtype=int) - np.asarray(other)
        assert abs(difference).max() <= 1  # another batch size rounds otherwise
        fields = infotext.parse(picture.info["parameters"]).fields
        assert fields["Memory"] == f"UNet batch of {fit}"
        assert "Memory" not in infotext.parse(other.info["parameters"]).fields


def test_what_does_not_fit_at_all_is_an_error_and_the_model_works_after_it(models: Models):
    wanted = ldm.txt2img(models, REQUEST)[0]
    network = Small(models.denoiser.network, 0)
    with pytest.raises(torch.OutOfMemoryError):
        ldm.txt2img(replace(models, denoiser=replace(models.denoiser, network=network)), REQUEST)
    assert ldm.txt2img(models, REQUEST)[0].tobytes() == wanted.tobytes()


def test_limits_keep_batches_small_without_a_failure(models: Models):
    network = Small(models.denoiser.network, 1)
    limited = replace(models, denoiser=replace(models.denoiser, network=network), limits=Limits(rows=1))
    ldm.txt2img(limited, REQUEST)
    assert network.calls == STEPS * 4
    assert notes(network) == []


def test_controls_are_cut_with_their_batch():
    def network(
        x: Tensor, t: Tensor, context: Any = None, y: Any = None, control: Any = None, adapter: Any = None
    ) -> Tensor:
        return x + control[0] + control[1] + adapter[3]

    x, many, one = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2), torch.randn(1, 1, 2, 2)
    inputs = x, torch.zeros(3), None, None, [many, one], {3: many}
    assert torch.equal(InParts(network, network, rows=2)(*inputs), network(*inputs))


def test_the_failed_attempt_keeps_no_memory():
    """Its tensors are gone when the next way begins: the error, which holds them, is gone by then."""
    left: list[weakref.ref[Tensor]] = []

    def first() -> int:
        large = torch.zeros(1000)
        left.append(weakref.ref(large))
        raise torch.OutOfMemoryError

    def second() -> int:
        return sum(reference() is not None for reference in left)

    assert first_that_fits(torch.nn.Identity(), {"first": first, "second": second}) == 0


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory"),
        RuntimeError("could not create a primitive"),  # oneDNN, where there is no room for its scratch memory
        RuntimeError("MPS backend out of memory (MPS allocated: 5.00 GB, other allocations: 1.00 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["python", "cuda", "linux", "windows", "onednn", "mps", "cublas"],
)
def test_all_ways_to_say_that_memory_ran_out_are_known(error: Exception):
    assert out_of_memory(error)


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="something else"):
        first_that_fits(torch.nn.Identity(), {"a": lambda: fail("something else"), "b": lambda: None})
    assert out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."))
    assert out_of_memory(MemoryError())
    assert not out_of_memory(ValueError("memory"))


def fail(text: str) -> None:
    raise RuntimeError(text)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("share", [0.02, 0.01, 0.005])
def test_a_small_share_of_a_graphics_card_gives_the_same_picture(share: float):
    models = ldm.load(device="cuda")
    request = ldm.Request(prompt="a red apple", width=512, height=512, steps=2, batch_size=4)
    wanted = ldm.txt2img(models, request)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        found = ldm.txt2img(models, request)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    for one, other in zip(found, wanted, strict=True):
        assert abs(np.asarray(one, dtype=int) - np.asarray(other)).mean() < 2
