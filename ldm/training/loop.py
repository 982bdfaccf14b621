"""One training loop for everything: exact resume, moving average, progress, several GPUs.

Two decisions make a run resumable to the bit. The data of step s are a function of (seed, s, rank) alone:
each step gets a fresh random generator, so that no iterator state exists. And everything else (weights,
optimizer, moving average) is tensors, saved whole in one .safetensors file.
"""

import json
import math
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ldm.errors import CheckpointError, LdmError
from ldm.files import remove_unfinished
from ldm.formats import WeightFile, read, write_safetensors
from ldm.interrupts import patient

LossFunction = Callable[[torch.Generator], Tensor | Iterable[Tensor]]
"""Takes the random generator of the step, on the CPU; returns the loss, a scalar, or yields its summands one
by one: each is backpropagated before the next is asked for (gradient accumulation)."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Facts of one run; those that decide the result are stored with it and checked on resume."""

    steps: int  # in all; may be changed between resumes, since it only moves the final decay
    lr: float
    warmup: int = 200  # steps of linear rise
    decay: float = 0.4  # last part of the run, over which a half cosine takes the rate to zero
    weight_decay: float = 0.01
    ema_decay: float = 0.999  # 0: no average is kept
    clip_norm: float = 1.0
    seed: int = 0
    save_every: int = 500

    def rate(self, step: int) -> float:
        """Learning rate of a step: rise, plateau, half a cosine (Zhai et al. 2022, arXiv:2106.04560)."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        left = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.lr * rise * (0.5 - 0.5 * math.cos(math.pi * min(1.0, left)))


def rank_and_world() -> tuple[int, int]:
    """Number of this process and of all processes (torchrun); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def step_generator(seed: int, step: int, rank: int) -> torch.Generator:
    """The source of all randomness of one step on one process, on the CPU."""
    # Distinct for every (seed, step, rank) of a run below 10^6 steps and 1000 processes.
    return torch.Generator().manual_seed((seed * 1_000_000 + step) * 1_000 + rank)


class Ema:
    """Exponential moving average of a module's parameters, float32; with decay 0, just the parameters."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {
            name: p.detach().float().clone() if decay else p.detach() for name, p in model.named_parameters()
        }

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        if not self.decay:
            return
        # The early average is short, so that it forgets the random start: Karras et al. 2024, appendix C.
        decay = min(self.decay, (1 + step) / (10 + step))
        update = get_ema_multi_avg_fn(decay)
        update(list(self.shadow.values()), [p.detach().float() for p in model.parameters()], step)


class Run:
    """A model in training: its optimizer, its average, its step, and the folder they are kept in.

    optimizer: None for AdamW over all parameters. `config.rate` sets the learning rate of its groups, times
        their "factor", if they have one.
    facts: further settings that decide the result (what JSON can hold), checked on resume like `config`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LoopConfig,
        folder: Path,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self.folder)
        self.step = 0
        self.saved: int | None = (
            None  # the step of the last saved state; None: there is none, or it is damaged
        )
        self.ema = Ema(model, config.ema_decay)
        self.settings = {**asdict(config), **(facts or {})}
        self.optimizer = optimizer or torch.optim.AdamW(
            model.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True
        )

    @property
    def state_path(self) -> Path:
        return self.folder / "state.safetensors"

    @property
    def previous_path(self) -> Path:
        """The state before the last one, in case that is damaged."""
        return self.folder / "state.previous.safetensors"

    def save(self) -> None:
        """Write the whole state, if it is not that of the last save, which stays as the previous one."""
        if self.saved == self.step:
            return
        tensors = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        if self.ema.decay:
            tensors |= {f"ema.{name}": value for name, value in self.ema.shadow.items()}
        for name, p in self.model.named_parameters():
            for key, value in self.optimizer.state.get(p, {}).items():
                tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
        facts = {"step": str(self.step), "config": json.dumps(self.settings)}
        facts["crc32"] = _checksum(tensors, facts)
        if self.saved is not None:
            self.saved = None
            os.replace(self.state_path, self.previous_path)
        write_safetensors(self.state_path, tensors, facts, overwrite=True)
        self.saved = self.step

    def resume(self) -> bool:
        """Go on from the saved state, if there is one; from the one before, with a warning, if it is damaged.

        Raises LdmError if it is of another network or was made with other settings: going on would be neither
        the old run nor the new; CheckpointError if none that is there is sound.
        """
        paths = [path for path in (self.state_path, self.previous_path) if path.exists()]
        for path in paths:
            try:
                self._restore(_sound(path))
            except CheckpointError as error:
                if path == paths[-1]:
                    raise
                print(f"{error}; going on from the state before", file=sys.stderr)
            else:
                self.saved = self.step if path == self.state_path else None
                return True
        return False

    def _restore(self, state: WeightFile) -> None:
        stored, now = json.loads(state.metadata["config"]), json.loads(json.dumps(self.settings))
        changed = [k for k in now if k not in ("steps", "decay", "save_every") and now[k] != stored.get(k)]
        parameters = dict(self.model.named_parameters())
        shapes = {name: w.shape for name, w in state.tensors.items() if name.startswith("model.")}
        if shapes != {f"model.{name}": p.shape for name, p in parameters.items()}:
            changed.append("network")
        if changed:
            raise LdmError(
                f"{self.folder} holds a run with another {', '.join(changed)}; "
                "give the old value, or another folder to start anew"
            )
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(state.tensors[f"model.{name}"])
                if self.ema.decay:
                    self.ema.shadow[name].copy_(state.tensors[f"ema.{name}"])
        self._restore_optimizer(state.tensors)
        self.step = int(state.metadata["step"])

    def _restore_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        parameters = dict(self.model.named_parameters())
        for entry, value in tensors.items():
            if not entry.startswith("optimizer."):
                continue
            _, key, name = entry.split(".", 2)
            p = parameters[name]
            # A file knows no memory layout, and the fused optimizer goes through weights and moments in the
            # order of the memory: both must be in the same one, such as channels last.
            layout = p if value.shape == p.shape else value
            kept = torch.empty_like(layout, dtype=value.dtype, device=p.device).copy_(value)
            # Only a number that was none of torch's own is an int64: bitsandbytes counts its steps so.
            self.optimizer.state[p][key] = int(value) if value.dtype == torch.int64 else kept

    def train(
        self,
        loss_function: LossFunction,
        *,
        samples_per_step: int,
        seconds: float = math.inf,
        every: tuple[int, Callable[[], None]] | None = None,
        watch: Callable[[float], None] | None = None,
    ) -> bool:
        """Train until `config.steps` or for `seconds`; Ctrl-C ends it after the step at hand.

        samples_per_step: pictures of all processes together, for the display.
        every: (n, action): call `action` after each n steps (sample pictures).
        watch: called with the loss after each step, which makes a GPU wait; None: now and then, the loss
            goes to loss.csv.
        Returns whether all steps are done. The state is saved on return and each `save_every` steps.
        Raises LdmError when the training diverges; the last saved state is sound and kept.
        """
        rank, _ = rank_and_world()
        start, first, shown = time.monotonic(), self.step, 0.0
        average: float | None = None
        norm = torch.zeros(())
        self.model.train()
        with patient() as asked:
            while self.step < self.config.steps:
                if self._agree(asked() or time.monotonic() - start >= seconds):
                    break
                loss, norm = self._update(loss_function)
                if watch is not None:
                    watch(loss.item())

                now = time.monotonic()
                if now - shown > 10 or self.step == self.config.steps:
                    self._check(norm)
                    value = loss.item()
                    average = value if average is None else 0.8 * average + 0.2 * value
                    pace = (self.step - first) / (now - start)
                    if rank == 0:
                        self._show(average, pace * samples_per_step, (self.config.steps - self.step) / pace)
                        if watch is None:
                            self._log(average, samples_per_step)
                    shown = now
                if self.step % self.config.save_every == 0:
                    self._check(norm)
                    if rank == 0:
                        self.save()
                if rank == 0 and every is not None and self.step % every[0] == 0:
                    every[1]()
                    self.model.train()
        self._check(norm)
        if rank == 0:
            self.save()
        return self.step >= self.config.steps

    def _update(self, loss_function: LossFunction) -> tuple[Tensor, Tensor]:
        """One step. Returns the loss and the norm of its gradient before clipping, both scalars."""
        rank, world = rank_and_world()
        parameters = list(self.model.parameters())
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(self.step) * group.get("factor", 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        summands = loss_function(step_generator(self.config.seed, self.step, rank))
        loss = torch.zeros(())
        for summand in [summands] if isinstance(summands, Tensor) else summands:
            summand.backward()
            loss = loss + summand.detach()
        if world > 1:
            for p in parameters:
                if p.grad is not None:
                    dist.all_reduce(p.grad)
                    p.grad /= world
        norm = nn.utils.clip_grad_norm_(parameters, self.config.clip_norm)
        self.optimizer.step()
        self.ema.update(self.model, self.step)
        self.step += 1
        return loss, norm

    def _check(self, norm: Tensor) -> None:
        """Raise LdmError if the last gradient was not finite: then neither are the weights, from now on."""
        if not torch.isfinite(norm):
            raise LdmError(f"the training diverged before step {self.step}; lower the learning rate")

    def _agree(self, stop: bool) -> bool:
        """Whether any process wants to stop: all must do so at the same step, or some wait for ever."""
        _, world = rank_and_world()
        if world == 1:
            return stop
        if self.step % 10:  # to ask holds up the GPUs
            return False
        votes = torch.tensor(float(stop), device=next(self.model.parameters()).device)
        dist.all_reduce(votes)
        return votes.item() > 0

    def _show(self, loss: float, pace: float, left: float) -> None:
        """pace: samples a second; left: seconds."""
        speed = f"{pace:.0f}" if pace >= 10 else f"{pace:.2g}"
        hours, minutes = divmod(math.ceil(left / 60), 60)
        time_left = f"{hours} h {minutes} min" if hours else f"{minutes} min"
        print(
            f"step {self.step}/{self.config.steps}  loss {loss:.4f}  {speed} samples/s  {time_left} left",
            file=sys.stderr,
            flush=True,
        )

    def _log(self, loss: float, samples_per_step: int) -> None:
        with (self.folder / "loss.csv").open("a") as log:
            log.write(f"{self.step},{self.step * samples_per_step},{loss:.6f}\n")


def _checksum(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    """The CRC-32 of a state: of its step, its settings, and all tensors in the order of their names."""
    value = zlib.crc32((facts["step"] + facts["config"]).encode())
    for name in sorted(tensors):
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        value = zlib.crc32(flat.view(torch.uint8).numpy().data, zlib.crc32(name.encode(), value))
    return f"{value:08x}"


def _sound(path: Path) -> WeightFile:
    """A saved state. Raises CheckpointError if it is damaged; safetensors alone would not see all of that."""
    state = read(path)
    if not {"step", "config"} <= state.metadata.keys():
        raise CheckpointError(f"{path.name} is not the state of a training")
    # Those of the first versions have no checksum.
    if "crc32" in state.metadata and state.metadata["crc32"] != _checksum(state.tensors, state.metadata):
        raise CheckpointError(f"{path.name}: the state is damaged")
    return state


@torch.no_grad()
def averaged(model: nn.Module, ema: Ema) -> dict[str, Tensor]:
    """The state dict of `model` with the averaged parameters in place of the last ones."""
    return dict(model.state_dict()) | {name: value.clone() for name, value in ema.shadow.items()}
