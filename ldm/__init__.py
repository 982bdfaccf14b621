"""Latent diffusion from scratch: original weights, every sampler, one small readable library.

import ldm
models = ldm.load()  # the embedded model, or ldm.load("v1-5-pruned-emaonly.safetensors")
ldm.txt2img(models, ldm.Request(prompt="a red apple", seed=7))[0].save("apple.png")
"""

from ldm.checkpoint import load, load_vae
from ldm.compat import PROFILES, Compatibility
from ldm.errors import CheckpointError, LdmError, PromptError, RequestError, SamplerError
from ldm.explanation import explain
from ldm.library import Library
from ldm.models import Models
from ldm.pipeline import decode, pictures, plan, sample, txt2img
from ldm.reproduce import diff, replay
from ldm.request import Request
from ldm.samplers import SAMPLERS

__all__ = [
    "PROFILES",
    "SAMPLERS",
    "CheckpointError",
    "Compatibility",
    "LdmError",
    "Library",
    "Models",
    "PromptError",
    "Request",
    "RequestError",
    "SamplerError",
    "__version__",
    "decode",
    "diff",
    "explain",
    "load",
    "load_vae",
    "pictures",
    "plan",
    "replay",
    "sample",
    "txt2img",
]

__version__ = "0.1.0"
