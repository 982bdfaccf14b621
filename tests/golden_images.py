"""What the web UI's own code made of small pictures and masks (tests/golden/README.md)."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import load

from tests.golden import golden


def _cases() -> tuple[dict, dict]:
    if "LDM_GOLDEN" in os.environ:  # all of them
        folder = Path(os.environ["LDM_GOLDEN"]) / "image"
        text, tensors = (folder / "image.json").read_bytes(), (folder / "image.safetensors").read_bytes()
    else:
        text = gzip.decompress(golden("image/image.json.gz").read_bytes())
        tensors = gzip.decompress(golden("image/image.safetensors.gz").read_bytes())
    return json.loads(text), load(tensors)


CASES, _TENSORS = _cases()


def picture(name: str) -> Image.Image:
    return Image.fromarray(_TENSORS[name].numpy())


def difference(a: Image.Image, b: Image.Image) -> int:
    """The largest difference of two pictures, in levels."""
    assert a.size == b.size
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())
