"""How the weights in a prompt act on its encoding, in the ways of the web UI and ComfyUI.

The text encoder does not see the weights: they scale the hidden states that it returns. `ldm.text.prompt`
reads the weights from the text.
"""

import torch
from torch import Tensor

from ldm.compat import Emphasis


def weighted(mode: Emphasis, z: Tensor, weights: Tensor, empty: Tensor | None = None) -> Tensor:
    """Apply weights to hidden states. Returns the shape and dtype of z.

    z: (chunks, N, D), the encoding of one prompt. weights: (chunks, N).
    empty: (1, N, D), the encoding of the empty prompt, needed for "comfyui".

    "original": w z, then each chunk is scaled to have the mean of before. Web UI, "Original".
    "no norm": w z. Web UI, "No norm".
    "comfyui": from the encoding of the empty prompt through z, e + w (z - e).
    "ignore" and "none": z; they differ in whether the brackets are taken out of the text.

    The web UI encodes one chunk after the other, with all prompts of a batch in one tensor, and takes the
    mean over that tensor, so that prompts act on each other. Here each is by itself, as in its batch of one.
    """
    if mode in ("ignore", "none") or bool((weights == 1).all()):
        return z
    w = weights.unsqueeze(-1).to(z)
    if mode == "comfyui":
        assert empty is not None
        return empty + w * (z - empty)
    scaled = w * z
    if mode == "no norm":
        return scaled
    before, after = (t.mean((1, 2), keepdim=True, dtype=torch.float32) for t in (z, scaled))  # (chunks, 1, 1)
    ratio = torch.where(after == 0, 1.0, before / after)  # no mean to bring back: a final norm without bias
    return scaled * ratio.to(z)
