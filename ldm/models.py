"""The loaded parts of a model, each replaceable by itself."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.denoise import Denoiser, Prediction
from ldm.errors import LdmError
from ldm.families.family import UNET, VAE, ClipPart, Family
from ldm.files import sha256
from ldm.formats import write_safetensors
from ldm.library import NO_LIBRARY, Library
from ldm.offload import device_of
from ldm.text.bert import WordPiece
from ldm.text.openclip_names import to_openclip
from ldm.text.tokenizer import Tokenizer
from ldm.unet import UNet
from ldm.vae import AutoencoderKL, VQModel

# What a file says of itself where names and shapes cannot: empty tensors under these names, as the tools of
# the community write them.
V_MARKER = "v_pred"
ZERO_SNR_MARKER = "ztsnr"


@dataclass(frozen=True)
class Limits:
    """How much may be in memory at once; see ldm.memory, which finds the limits for a budget."""

    rows: int | None = None  # of a batch that the UNet sees at once; None: all of them
    whole: int = 6 * 2**30  # bytes up to which a picture is decoded whole; beyond, in strips, which is slower


@dataclass(frozen=True)
class Models:
    """All that a run needs. Exchange one part with `dataclasses.replace(models, vae=other.vae)`."""

    family: Family
    denoiser: Denoiser
    vae: AutoencoderKL | VQModel | None  # None: the file had only a UNet
    text: tuple[nn.Module, ...]  # one for each of family.parts; empty if the file had none
    tokenizer: Tokenizer | WordPiece | None = None
    path: Path | None = None  # the file they came from
    vae_path: Path | None = None  # the file of the VAE, if it was another one
    ema: bool = False  # the UNet's weights are the averaged ones of that file
    library: Library = NO_LIBRARY  # where names in prompts are looked up
    refiner: "Models | None" = None  # takes over near the end of a run (SDXL), see Request.refiner_switch
    limits: Limits = Limits()

    @property
    def unet(self) -> UNet:
        """The UNet itself. Raises LdmError if the denoiser runs on something else."""
        if not isinstance(self.denoiser.network, UNet):
            raise LdmError("the denoiser's network is not a plain UNet")
        return self.denoiser.network

    @property
    def parts(self) -> tuple[object, ...]:
        """Network, autoencoder and text encoders; the network need not be a module."""
        return (self.denoiser.network, *([self.vae] if self.vae else []), *self.text)

    @property
    def all_parts(self) -> tuple[object, ...]:
        """The same, and those of the refiner."""
        return (*self.parts, *(self.refiner.parts if self.refiner else ()))

    @property
    def device(self) -> torch.device:
        """Where the networks run."""
        modules = (part for part in self.parts if isinstance(part, nn.Module))
        return next(map(device_of, modules), torch.device("cpu"))

    @property
    def name(self) -> str:
        """The name of the file without its ending."""
        return self.path.stem if self.path else "unsaved"

    @cached_property
    def hash(self) -> str | None:
        """The first 10 hexadecimal digits of the file's sha256, the "model hash" of pictures.

        None where there is no file, or no longer: a finished picture must not fail on that.
        """
        return _short_hash(self.path)

    @cached_property
    def vae_hash(self) -> str | None:
        """The same of the VAE's file; None if it has none of its own."""
        return _short_hash(self.vae_path)

    @property
    def default_size(self) -> int:
        """Width and height, in pixels, that the model was trained on."""
        v_size = self.family.size_v if self.denoiser.prediction is Prediction.V else None
        return v_size or self.family.size

    def describe(self) -> str:
        """One line on what was loaded."""
        parts = {"UNet": (self.unet,), "VAE": (self.vae,), "text": self.text}
        sizes = [
            f"{name} {sum(p.numel() for m in modules if m for p in m.parameters()) / 1e6:.1f}M"
            for name, modules in parts.items()
            if any(modules)
        ]
        dtype = str(self.denoiser.dtype).removeprefix("torch.")
        prediction = self.denoiser.prediction.value
        return f"{self.family.title}, predicts {prediction}, {dtype} on {self.device}: {', '.join(sizes)}"

    def state_dict(self) -> dict[str, Tensor]:
        """All weights by the names of the original single-file layout."""
        weights = {UNET + name: w for name, w in self.unet.state_dict().items()}
        if self.vae is not None:
            weights |= {VAE + name: w for name, w in self.vae.state_dict().items()}
        for part, encoder in zip(self.family.parts, self.text, strict=False):
            tensors = encoder.state_dict()
            if isinstance(part, ClipPart) and part.openclip:
                tensors = to_openclip(tensors)
            weights |= {part.prefix + name: w for name, w in tensors.items()}
        if self.denoiser.prediction is Prediction.V:
            weights[V_MARKER] = torch.empty(0)
        if self.denoiser.schedule.sigma_max > 1000:
            weights[ZERO_SNR_MARKER] = torch.empty(0)
        return weights

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        metadata: Mapping[str, str] | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write a .safetensors file in the original single-file layout, whole or not at all.

        dtype: of the written weights; None keeps them as they are.
        metadata: more facts to write into the file, beside what the network predicts.
        Raises LdmError if `path` exists and `overwrite` is False.
        """
        weights = self.state_dict()
        if dtype is not None:
            weights = {name: w.to(dtype) for name, w in weights.items()}
        predicts = "v" if self.denoiser.prediction is Prediction.V else "epsilon"
        facts = {"modelspec.prediction_type": predicts, **(metadata or {})}
        write_safetensors(path, weights, facts, overwrite=overwrite)


def _short_hash(path: Path | None) -> str | None:
    return sha256(path)[:10] if path is not None and path.exists() else None
