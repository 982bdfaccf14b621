"""The pictures that a run is given beside its request."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from ldm.controlnet import Control
from ldm.errors import RequestError


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a run starts from or is led by. A request says how (`ldm.edit.Edit`), this says what.

    Raises RequestError for a mask without a picture.
    """

    picture: Image.Image | None = None  # any mode; see `ldm.images.read_picture`
    mask: Image.Image | None = None  # white: repaint, black: keep; of the picture's shape
    depth: Image.Image | None = None  # for depth models; white is near
    controls: tuple[Control, ...] = ()  # ControlNets with their hints

    def __post_init__(self) -> None:
        if self.mask is not None and self.picture is None:
            raise RequestError("a mask needs the picture that it belongs to")

    def fields(self) -> Iterator[tuple[str, str]]:
        """What the settings in a picture tell of them: fingerprints, by which one can check a file."""
        for name, image in (("Init image", self.picture), ("Mask", self.mask), ("Depth", self.depth)):
            if image is not None:
                yield f"{name} hash", fingerprint(image)
        for i, control in enumerate(self.controls):
            about = {
                "Module": control.preprocessor,
                "Model": control.name,
                "Weight": f"{control.weight:g}",
                "Guidance Start": f"{control.start:g}",
                "Guidance End": f"{control.end:g}",
                "Control Mode": control.mode,
                "Hint hash": fingerprint(control.hint),
            }
            yield f"ControlNet {i}", ", ".join(f"{key}: {value}" for key, value in about.items())


NO_INPUTS = Inputs()


def fingerprint(image: Image.Image) -> str:
    """The MD5 of the pixels, as the web UI writes it of the picture that a run started from."""
    return hashlib.md5(image.tobytes(), usedforsecurity=False).hexdigest()
