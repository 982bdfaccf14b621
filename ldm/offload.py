"""Models larger than the graphics card: a part comes to the device to run, and goes when the next one comes.

    models = ldm.load("sd_xl_base_1.0.safetensors", dtype=torch.float16)
    models = offloaded(models, "cuda")               # the largest part fits the card; or:
    models = offloaded(models, "cuda", blocks=True)  # the largest block of the UNet does

The weights stay where they were loaded, in main memory. What comes to the device is a copy that is thrown
away, never written back: a part goes at no cost. Whoever changes weights (LoRA) calls `leave` first.
"""

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import ReferenceType, WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn

from ldm.errors import RequestError
from ldm.unet import InputHalf

if TYPE_CHECKING:
    from ldm.models import Models


@dataclass(eq=False)
class Room:
    """A device with place for the weights of one module at a time."""

    device: torch.device
    home: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)  # the guest's own weights
    _guest: ReferenceType[nn.Module] | None = None  # weak, as a room shall not keep a model in memory

    @property
    def guest(self) -> nn.Module | None:
        """The module whose weights are here."""
        return None if self._guest is None else self._guest()

    def enter(self, module: nn.Module, *inputs: object) -> None:
        """Make the module the guest, if it is not. If memory runs out, the room is left empty."""
        if module is self.guest:
            return
        self.leave()
        self.home = [(weight, weight.data) for weight in module.parameters()]
        try:
            for weight, own in self.home:
                weight.data = own.to(self.device, copy=True)
            self._guest = ref(module)
        finally:
            if self.guest is None:
                self.leave()

    def leave(self) -> None:
        """Send the guest home."""
        for weight, own in self.home:
            weight.data = own
        self._guest, self.home = None, []


_ROOMS: MutableMapping[nn.Module, Room] = WeakKeyDictionary()  # of the parts that are offloaded
_IN_BLOCKS: WeakSet[nn.Module] = WeakSet()  # those of them that never come as a whole


def offloaded(models: "Models", device: torch.device | str, *, blocks: bool = False) -> "Models":
    """Make models run on `device`, one part at a time: text encoders, UNet, autoencoder.

    This changes the networks in place, for all who hold them, and for good; it returns the same models.

    blocks: of the UNet, too, one block at a time. A step then takes as long as the transfer of all weights.

    Raises RequestError if a part is offloaded already, be it with other models; then nothing has changed.
    """
    room = Room(torch.device(device))
    every = [one for one in (models, models.refiner) if one is not None]
    networks = dict.fromkeys(network for one in every for network in (*one.text, one.unet))
    vaes = [one.vae for one in every if one.vae]
    if any(map(is_offloaded, (*networks, *vaes))):
        raise RequestError("a part of these models is offloaded already; load the file anew to offload it")
    for network in networks:
        _admit(network, room, blocks)
    for vae in vaes:
        _ROOMS[vae] = room  # is not run by calling it, see `bring`
    return models


def join(network: nn.Module, models: "Models") -> None:
    """Let a ControlNet come and go with the parts of models, if they do."""
    if models.unet in _ROOMS:
        _admit(network, _ROOMS[models.unet], in_blocks(models.unet))


def _admit(network: nn.Module, room: Room, blocks: bool) -> None:
    for unit in units(network, blocks=blocks):
        unit.register_forward_pre_hook(room.enter)
    _ROOMS[network] = room
    if blocks and isinstance(network, InputHalf):
        _IN_BLOCKS.add(network)


def units(network: nn.Module, *, blocks: bool) -> Iterator[nn.Module]:
    """What of a network comes to the device at once: all of it, or a block of a UNet or ControlNet."""
    if not (blocks and isinstance(network, InputHalf)):
        yield network
        return
    for part in network.children():  # all that it calls in turn
        yield from part if isinstance(part, nn.ModuleList) else (part,)


def bring(module: nn.Module) -> None:
    """For parts that are not only run by calling them, as autoencoders: bring one in, if it is offloaded.

    The blocks of a UNet, where they come one by one, need no such call.
    """
    if module in _ROOMS and module not in _IN_BLOCKS:
        _ROOMS[module].enter(module)


def leave(*modules: object) -> None:
    """Send weights home before they are changed. Does nothing for what is not offloaded."""
    for module in modules:
        if isinstance(module, nn.Module) and module in _ROOMS:
            _ROOMS[module].leave()


def in_blocks(unet: nn.Module) -> bool:
    """Whether the blocks of an offloaded UNet come one by one."""
    return unet in _IN_BLOCKS


def is_offloaded(module: nn.Module) -> bool:
    """Whether a whole network, such as the UNet, comes to a device to run; a block of it does not count."""
    return module in _ROOMS


def device_of(module: nn.Module) -> torch.device:
    """Where a module runs; the CPU if it has no weights."""
    if module in _ROOMS:
        return _ROOMS[module].device
    return next((weight.device for weight in module.parameters()), torch.device("cpu"))
