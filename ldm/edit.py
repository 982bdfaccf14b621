"""How a run uses a given picture, and how a finished one is drawn again larger: two parts of a request."""

from dataclasses import dataclass
from typing import Literal, get_args

from ldm.errors import RequestError, check_range
from ldm.soft_inpainting import Soft

ResizeMode = Literal["resize", "crop", "fill", "latent"]
"""How a picture of another shape fits: stretched, cut, with its edges stretched, or stretched as a latent."""

Content = Literal["fill", "original", "latent noise", "latent nothing"]
"""What stands behind a mask at the start: the colours around it, the picture, noise, or zeros."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """Image to image and inpainting: everything but the picture and the mask themselves.

    The fields below `mask_blur` need a mask. Raises RequestError for values that make no sense.
    """

    strength: float | None = None  # above 0, to 1: how many of the noise levels to visit; None: the family's
    resize: ResizeMode = "resize"
    noise_multiplier: float = 1.0  # of the noise at the start
    extra_noise: float = 0.0  # more of the same noise, which the levels do not know of: more detail
    color_correction: bool = False  # give the result the colours of the picture

    mask_blur: int = 4  # pixels, softens the edge
    mask_invert: bool = False  # repaint what is not masked
    masked_content: Content = "original"
    only_masked: bool = False  # work on the part around the mask alone, in full resolution
    padding: int = 32  # pixels around that part
    keep_size: bool = False  # the result is as large as the picture, as it is where no size is named
    mask_weight: float = 1.0  # inpainting models: how far the mask hides the picture, 0 to 1
    soft: Soft | None = None  # soft inpainting: let pixels keep a share of the picture

    def __post_init__(self) -> None:
        if self.strength is not None and not 0 < self.strength <= 1:
            raise RequestError(f"strength must be above 0 and at most 1, got {self.strength}")
        check_range("noise_multiplier", self.noise_multiplier, 0, 10)
        check_range("extra_noise", self.extra_noise, 0, 10)
        check_range("mask_blur", self.mask_blur, 0, 1000)
        check_range("padding", self.padding, 0, 16_384)
        check_range("mask_weight", self.mask_weight, 0, 1)
        _check_choice("resize", self.resize, get_args(ResizeMode))
        _check_choice("masked_content", self.masked_content, get_args(Content))


@dataclass(frozen=True, kw_only=True)
class Hires:
    """A second pass: the finished picture is enlarged, noised again and finished at the new size.

    Fields that are None, and empty prompts, are as in the first pass. Raises RequestError for values that
    make no sense.
    """

    scale: float = 2.0
    width: int | None = None  # pixels; with `height` the size to fill, alone it keeps the shape; beat `scale`
    height: int | None = None
    upscaler: str = "Latent"  # one of LATENT_MODES, of ldm.upscalers, or a file of models.library.upscalers
    steps: int | None = None  # exactly so many
    strength: float = 0.7  # 0: the enlarged picture as it is
    prompt: str | None = None
    negative_prompt: str | None = None
    sampler: str | None = None
    schedule: str | None = None
    cfg_scale: float | None = None
    token_merging: float | None = None  # see ldm.token_merging

    def __post_init__(self) -> None:
        check_range("the scale of the second pass", self.scale, 1, 16)
        check_range("its width", self.width, 8, 16_384)
        check_range("its height", self.height, 8, 16_384)
        check_range("its steps", self.steps, 1, 10_000)
        check_range("its strength", self.strength, 0, 1)
        check_range("its cfg_scale", self.cfg_scale, 0, 1000)
        check_range("its token_merging", self.token_merging, 0, 1)

    def target(self, width: int, height: int, multiple: int) -> tuple[int, int]:
        """The size to enlarge a picture of this size to, which `size` may cut from. Both multiples."""
        if not self.width and not self.height:
            wanted = width * self.scale, height * self.scale
        else:
            shares = [s for s in ((self.width or 0) / width, (self.height or 0) / height) if s]
            wanted = width * max(shares), height * max(shares)
        # The size of an enlarged side may miss a multiple by a rounding of the division.
        return tuple(max(int(side / multiple + 1e-6), 1) * multiple for side in wanted)  # type: ignore[return-value]

    def size(self, width: int, height: int, multiple: int) -> tuple[int, int]:
        """The size of the result, for a first pass of this size."""
        covering = self.target(width, height, multiple)
        if not (self.width and self.height):
            return covering
        return self.width // multiple * multiple, self.height // multiple * multiple


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise RequestError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
