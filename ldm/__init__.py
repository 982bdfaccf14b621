"""Latent diffusion from scratch: original weights, every sampler, one small readable library.

import ldm
models = ldm.load()  # the embedded model, or ldm.load("v1-5-pruned-emaonly.safetensors")
ldm.txt2img(models, ldm.Request(prompt="a red apple", seed=7))[0].save("apple.png")
"""

from ldm.checkpoint import load, load_vae
from ldm.compat import PROFILES, Compatibility
from ldm.controlnet import Control
from ldm.controlnet_file import load_controlnet
from ldm.edit import Edit, Hires
from ldm.errors import CheckpointError, LdmError, PromptError, RequestError, SamplerError
from ldm.explanation import explain
from ldm.images import read_picture
from ldm.inputs import Inputs
from ldm.latents import decode
from ldm.library import Library
from ldm.memory import plan
from ldm.models import Models
from ldm.optimization import optimize
from ldm.pipeline import img2img, inpaint, pictures, sample, txt2img
from ldm.reproduce import diff, replay
from ldm.request import Request
from ldm.samplers import SAMPLERS
from ldm.soft_inpainting import Soft
from ldm.upscalers import enlarged, load_upscaler

__all__ = [
    "PROFILES",
    "SAMPLERS",
    "CheckpointError",
    "Compatibility",
    "Control",
    "Edit",
    "Hires",
    "Inputs",
    "LdmError",
    "Library",
    "Models",
    "PromptError",
    "Request",
    "RequestError",
    "SamplerError",
    "Soft",
    "__version__",
    "decode",
    "diff",
    "enlarged",
    "explain",
    "img2img",
    "inpaint",
    "load",
    "load_controlnet",
    "load_upscaler",
    "load_vae",
    "optimize",
    "pictures",
    "plan",
    "read_picture",
    "replay",
    "sample",
    "txt2img",
]

__version__ = "0.1.0"
