"""Where the golden data lie: values made by running the original implementations (tests/golden/README.md)."""

from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> Path:
    """The file `name`, relative to tests/golden, such as "modules/unet_sd1.safetensors"."""
    return GOLDEN / name
