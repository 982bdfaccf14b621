"""All that decides a picture, in one record."""

import math
from dataclasses import dataclass, fields, replace

from ldm.compat import DEFAULT, Compatibility
from ldm.edit import Edit, Hires
from ldm.errors import RequestError, check_range

MAX_SEED = 2**64 - 1  # of torch.Generator.manual_seed


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to draw and how. None means: what the model's family or the sampler prefers.

    Raises RequestError where a number makes no sense for any model.
    """

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = 0  # of the first picture; the next ones have seed + 1, seed + 2, ...
    batch_size: int = 1  # pictures made at once
    width: int | None = None  # pixels
    height: int | None = None
    steps: int | None = None
    cfg_scale: float | None = None  # strength of guidance; 1 switches it off
    cfg_rescale: float = 0.0  # 0 to 1, see ldm.guidance.rescaled
    sampler: str | None = None  # "DPM++ 2M", "DPM++ 2M Karras", "Euler a", ...
    schedule: str | None = None  # "karras", "exponential", ..., "automatic"; overrules the sampler's name
    tiling: bool = False  # a texture: left meets right and top meets bottom, see ldm.seamless
    clip_skip: int | None = None  # 1: the last layer of the text encoder, 2: the one before, ...

    # Options of samplers (those that have them) and of schedules.
    eta: float | None = None
    s_churn: float | None = None
    s_tmin: float | None = None
    s_tmax: float | None = None
    s_noise: float | None = None
    order: int | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float | None = None

    # Variations: the noise of another seed, or of another size, see ldm.noise.
    variation_seed: int = 0  # of the first picture; the next ones have variation_seed + 1, ..., the same seed
    variation_strength: float = 0.0  # 0: the noise of `seed`, 1: that of `variation_seed`, between: a turn
    seed_resize_from: tuple[int, int] | None = None  # (width, height) of a picture whose composition to keep
    ensd: int = 0  # "eta noise seed delta": what samplers draw after the start comes from seed + ensd

    # Faster, and not quite the same picture, see ldm.faster and docs/faster.md.
    guidance_low: float = 0.0  # no guidance at noise levels up to this one ...
    guidance_high: float | None = None  # ... and above this one; None: there is no such limit
    guidance_skip: float = 0.0  # nor in this share of the steps, the first ones
    reuse: int = 1  # the UNet's deep features are made in every so many steps, and used again between
    token_merging: float = 0.0  # share of the tokens that self-attention merges ...
    token_merging_downsample: int = 1  # ... on maps at most so many times smaller than the latent

    # Further passes and pictures. The pictures themselves are `ldm.inputs.Inputs`.
    edit: Edit | None = None  # how a run starts from a given picture; None: it starts from noise alone
    hires: Hires | None = None  # a second, larger pass
    image_cfg_scale: float = 1.5  # InstructPix2Pix: how closely to keep to the given picture
    refiner_switch: float = 0.8  # with `models.refiner`: share of the training steps to leave to it

    compat: Compatibility = DEFAULT

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise RequestError(f"{field.name} must be a finite number, got {value}")
        check_range("batch_size", self.batch_size, 1, 1024)
        check_range("seed", self.seed, 0, MAX_SEED + 1 - self.batch_size)
        check_range("steps", self.steps, 1, 10_000)
        check_range("width", self.width, 8, 16_384)
        check_range("height", self.height, 8, 16_384)
        check_range("cfg_scale", self.cfg_scale, 0, 1000)
        check_range("cfg_rescale", self.cfg_rescale, 0, 1)
        check_range("image_cfg_scale", self.image_cfg_scale, 0, 100)
        check_range("refiner_switch", self.refiner_switch, 0, 1)
        check_range("guidance_low", self.guidance_low, 0, 1_000_000)
        check_range("guidance_high", self.guidance_high, 0, 1_000_000)
        check_range("guidance_skip", self.guidance_skip, 0, 1)
        check_range("reuse", self.reuse, 1, 100)
        check_range("token_merging", self.token_merging, 0, 1)
        check_range("token_merging_downsample", self.token_merging_downsample, 1, 8)
        check_range("clip_skip", self.clip_skip, 1, 100)
        check_range("order", self.order, 1, 4)
        check_range("variation_seed", self.variation_seed, 0, MAX_SEED + 1 - self.batch_size)
        check_range("variation_strength", self.variation_strength, 0, 1)
        for side in self.seed_resize_from or ():
            check_range("seed_resize_from", side, 8, 16_384)
        check_range("ensd", self.ensd, -MAX_SEED, MAX_SEED)
        for name in ("eta", "s_churn", "s_tmin", "s_tmax", "s_noise", "sigma_min", "sigma_max", "rho"):
            check_range(name, getattr(self, name), 0, 1_000_000)
        for name in ("sigma_min", "sigma_max", "rho"):
            if getattr(self, name) == 0:
                raise RequestError(f"{name} must be above 0; leave it out for the usual value")
        if self.edit and self.hires:
            raise RequestError("a second pass follows a run from noise; for a given picture raise its size")
        if self.sigma_min is not None and self.sigma_max is not None and self.sigma_min >= self.sigma_max:
            raise RequestError(
                f"need 0 < sigma_min < sigma_max, got {self.sigma_min:g} and {self.sigma_max:g}"
            )

    def single(self, i: int) -> "Request":
        """The request that makes picture i of the batch by itself."""
        return replace(self, batch_size=1).later(i)

    def later(self, n: int) -> "Request":
        """The request whose first picture is the n-th of this one's row, however long the row goes on."""
        return replace(self, **{self.counted: getattr(self, self.counted) + n})

    @property
    def counted(self) -> str:
        """The seed that counts up from picture to picture; of variations the seed itself stays (web UI)."""
        return "variation_seed" if self.variation_strength else "seed"

    def sampler_options(self) -> dict[str, float]:
        """The options of the sampler that were given."""
        names = ("eta", "s_churn", "s_tmin", "s_tmax", "s_noise", "order")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}
