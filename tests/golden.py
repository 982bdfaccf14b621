"""Where the golden data lie: values made by running the original implementations (tests/golden/README.md)."""

import gzip
import os
from pathlib import Path

import pytest
from safetensors.torch import load
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> Path:
    """The file `name`, relative to tests/golden, such as "modules/unet_sd1.safetensors"."""
    return GOLDEN / name


def module_case(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A small network's weights in float32, and the original's inputs and outputs ("in/x", "out/out").

    The largest cases are not in the repository but in the complete data, in the folder LDM_GOLDEN.
    """
    for path in (
        GOLDEN / f"modules/{name}.safetensors",
        GOLDEN / f"modules/{name}.safetensors.gz",
        Path(os.environ.get("LDM_GOLDEN", GOLDEN)) / f"modules/{name}.safetensors",
    ):
        if path.exists():
            data = path.read_bytes()
            break
    else:
        pytest.skip("only in the complete golden data; set LDM_GOLDEN to its folder")
    tensors = load(gzip.decompress(data) if path.suffix == ".gz" else data)
    start = "weights/"
    weights = {key.removeprefix(start): t.float() for key, t in tensors.items() if key.startswith(start)}
    return weights, {key: t for key, t in tensors.items() if not key.startswith(start)}
