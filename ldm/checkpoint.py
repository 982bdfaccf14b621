"""From a weight file to `Models`: names and shapes -> family -> rename -> build on meta -> strict assignment.

No network, no configuration file: names and shapes decide. Tensors stay in the file's memory map until they
are needed, and a part is built without memory of its own, so that loading costs about the bytes of the file,
once.
"""

import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.denoise import Denoiser, Prediction
from ldm.errors import CheckpointError, RequestError
from ldm.families import ClassPart, ClipPart, Family, recognise
from ldm.families.family import UNET, VAE, BertPart, Part, strip
from ldm.families.infer import bert_config, clip_config, unet_config, vae_config
from ldm.formats import WeightFile, read
from ldm.formats.mapped import printable
from ldm.library import NO_LIBRARY, Library
from ldm.models import V_MARKER, ZERO_SNR_MARKER, Models
from ldm.storage import prepare
from ldm.text.bert import BertTextModel, WordPiece
from ldm.text.clip import ClipTextModel
from ldm.text.openclip_names import to_hf
from ldm.text.tokenizer import Tokenizer
from ldm.unet import UNet
from ldm.vae import AutoencoderKL, VQModel

DEFAULT_MODEL = Path(__file__).parent / "default_model.safetensors"

DROPPED = (
    (r"model_ema\..*", "moving averages of the UNet; `ema=True` takes them in its place"),
    (r".*position_ids", "0, 1, 2, ... , stored by old versions of transformers"),
    (r"(.*\.)?(logit_scale|attn_mask)", "used by CLIP's training and by no text encoder"),
    (r"(.*\.)?loss\..*", "the training losses' own networks (LPIPS, discriminator)"),
    (r"depth_model\..*", "MiDaS: makes depth pictures, and is a program of its own"),
    (r"low_scale_model\..*", "the noise schedule of the x4 upscaler's input, which is computed"),
    (r"denoiser\.sigmas", "the noise schedule, which is computed"),
    (
        r"(model\.)?(betas|.*alphas_cumprod.*|posterior_.*|log_one_minus_.*|lvlb_weights|logvar|scale_factor)",
        "the noise schedule and other constants of training, which are computed",
    ),
    (rf"{V_MARKER}|{ZERO_SNR_MARKER}", "markers, read before"),
)
"""(pattern of names, why a loader leaves these weights out)."""

STATED = {"v": Prediction.V, "v_prediction": Prediction.V, "epsilon": Prediction.EPS, "eps": Prediction.EPS}
"""Values of `modelspec.prediction_type` in metadata (Stability AI's model specification, and trainers)."""

_DROP = re.compile("|".join(pattern for pattern, _ in DROPPED))

M = TypeVar("M", bound=nn.Module)
TextEncoder = ClipTextModel | BertTextModel | nn.Embedding

logger = logging.getLogger(__name__)


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    vae: str | os.PathLike[str] | None = None,
    storage: torch.dtype | None = None,
    prediction: Prediction | str | None = None,
    ema: bool = False,
    vocabulary: str | os.PathLike[str] | None = None,
    library: Library = NO_LIBRARY,
) -> Models:
    """Load a checkpoint of any known family.

    path: a .safetensors or .ckpt file in the original layout, whole or only its UNet; None: the embedded
        model.
    dtype: of UNet and text encoders; None: float16 on CUDA, else float32. The VAE is always float32: some
        overflow in float16, and it runs once.
    storage: in which to hold the large weights, to save memory, see ldm.storage; None: in those.
    vae: another file to take the autoencoder from.
    prediction: "eps" or "v", to overrule what the file says.
    ema: take the averaged UNet weights, where the file holds both.
    vocabulary: BERT's vocab.txt, which text2image-large needs for its prompts.
    library: the folders with LoRA files, embeddings and hypernetworks that prompts may name.

    Raises CheckpointError, one line, if the file is damaged, incomplete or something else.
    """
    if prediction is not None:
        prediction = _as_prediction(prediction)
    source = Path(path) if path is not None else DEFAULT_MODEL
    if path is None and not source.exists():
        raise CheckpointError("the embedded model is not in this installation; give the path of a checkpoint")
    device = torch.device(device)
    if dtype is None:
        dtype = torch.float16 if device.type == "cuda" else torch.float32

    file = read(source)
    weights = normalised(file)
    if ema:
        weights = _with_averages(weights, source)
    try:
        family = recognise({name: tuple(w.shape) for name, w in weights.items()})
        unet = _unet(weights, family, device, dtype, storage)
        autoencoder = None if vae is not None else _vae(strip(weights, VAE), family.scale, device, storage)
        encoders = _encoders(weights, family, device, dtype, storage)
    except CheckpointError as error:
        raise named(source, error) from None
    if vae is not None:
        autoencoder = load_vae(vae, scale=family.scale, device=device)
    try:
        _check_fit(unet, autoencoder, encoders)
    except CheckpointError as error:
        raise named(source, error) from None
    _report_unknown(weights, family, source)

    schedule = family.schedule()
    if ZERO_SNR_MARKER in file.tensors:
        schedule = schedule.zero_terminal_snr()
    predicts = prediction or _stated_prediction(file) or family.prediction or probe_prediction(unet)
    denoiser = Denoiser(unet, schedule, predicts, dtype)
    return Models(
        family,
        denoiser,
        autoencoder,
        encoders,
        _tokenizer(family, vocabulary),
        source,
        vae_path=None if vae is None else Path(vae),
        ema=ema,
        library=library,
    )


def load_vae(
    path: str | os.PathLike[str], *, scale: float = 0.18215, device: torch.device | str = "cpu"
) -> AutoencoderKL | VQModel:
    """Load an autoencoder from a file of its own or from a whole checkpoint.

    scale: as in VAEConfig; no file says it. Raises CheckpointError.
    """
    weights = dict(read(path).tensors)
    inside = strip(weights, VAE)
    try:
        loaded = _vae(inside or weights, scale, torch.device(device))
    except CheckpointError as error:
        raise named(Path(path), error) from None
    if loaded is None:
        raise CheckpointError(f"{Path(path).name}: there is no autoencoder in this file")
    return loaded


def _check_fit(
    unet: UNet, autoencoder: AutoencoderKL | VQModel | None, encoders: Iterable[TextEncoder]
) -> None:
    """Raise CheckpointError if the parts cannot work together: somebody put two models into one."""
    if autoencoder is not None and autoencoder.config.embed_dim != unet.config.out_channels:
        raise CheckpointError(
            f"the autoencoder is another model's: its latents have {autoencoder.config.embed_dim} channels, "
            f"those of the UNet {unet.config.out_channels}"
        )
    widths = [e.embedding_dim if isinstance(e, nn.Embedding) else e.config.width for e in encoders]
    if widths and sum(widths) != unet.config.context_dim:
        raise CheckpointError(
            f"the text encoder is another model's: its states are {sum(widths)} wide, "
            f"the UNet reads {unet.config.context_dim}"
        )


def _as_prediction(name: Prediction | str) -> Prediction:
    try:
        return Prediction(name)
    except ValueError:
        raise RequestError(f"prediction must be 'eps' or 'v', got {name!r}") from None


def named(path: Path, error: CheckpointError) -> CheckpointError:
    """The error with the file's name, as one printable line: names of weights come from the file."""
    return CheckpointError(printable(f"{path.name}: {error}", 200))


def _report_unknown(weights: Mapping[str, Tensor], family: Family, source: Path) -> None:
    """Warn of weights that belong to no part: harmless, but somebody put them there."""
    parts = (UNET, VAE, *(part.prefix for part in family.parts))
    unknown = [name for name in weights if not name.startswith(parts) and not _DROP.fullmatch(name)]
    if unknown:
        logger.warning(
            printable(f"{source.name}: {len(unknown)} unknown weights left out: {_few(unknown)}", 200)
        )


def normalised(file: WeightFile) -> dict[str, Tensor]:
    """The file's weights under the names of a whole checkpoint of today."""
    weights = dict(file.tensors)
    if "input_blocks.0.0.weight" in weights:  # only a UNet, without its prefix
        weights = {UNET + name: w for name, w in weights.items()}
    clip = "cond_stage_model.transformer."
    if f"{clip}embeddings.token_embedding.weight" in weights:  # files older than transformers' `text_model`
        weights = {
            re.sub(rf"^{re.escape(clip)}(?!text_model)", f"{clip}text_model.", name): w
            for name, w in weights.items()
        }
    return weights


def _with_averages(weights: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """The UNet's weights replaced by their averages, stored without the dots of the names (CompVis)."""
    average_of = {
        name: "model_ema." + name.removeprefix("model.").replace(".", "")
        for name in weights
        if name.startswith(UNET)
    }
    missing = sum(average not in weights for average in average_of.values())
    if missing:
        error = f"{missing} of {len(average_of)} averaged (EMA) weights are not in this file"
        raise named(source, CheckpointError(error))
    return dict(weights) | {name: weights[average] for name, average in average_of.items()}


class _Blank(TorchFunctionMode):
    """Leaves the weights of new modules as they are: they get others at once, so no numbers need be drawn.

    On meta there is nothing to draw anyway; but torch would import its compiler for it, which takes a second.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def build(
    make: Callable[[], M],
    weights: Mapping[str, Tensor],
    part: str,
    device: torch.device,
    dtype: torch.dtype,
    storage: torch.dtype | None = None,
) -> M:
    """A module with these weights: built on meta, every name and shape checked, assigned.

    storage: the dtype to hold the large weights in; None: `dtype`, like the others.
    """
    try:
        with torch.device("meta"), _Blank():
            module = make()
    except (ArithmeticError, IndexError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the shapes of the {part} weights make no network: {error}") from None
    expected = {name: tuple(w.shape) for name, w in module.state_dict().items()}
    given = {name: w for name, w in weights.items() if name in expected or not _DROP.fullmatch(name)}

    missing = [name for name in expected if name not in given]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(expected)} {part} weights are missing, first: {_few(missing)}; "
            "the file is incomplete or another model's"
        )
    unexpected = [name for name in given if name not in expected]
    if unexpected:
        raise CheckpointError(
            f"{len(unexpected)} unknown {part} weights, first: {_few(unexpected)}; is it another family's?"
        )
    wrong = [name for name in expected if tuple(given[name].shape) != expected[name]]
    if wrong:
        shape, right = list(given[wrong[0]].shape), list(expected[wrong[0]])
        raise CheckpointError(
            f"{len(wrong)} {part} weights have a wrong shape, first: {_few(wrong[:1])} is {shape}, "
            f"not {right}"
        )
    strange = [name for name in expected if not given[name].is_floating_point()]
    if strange:
        kind = str(given[strange[0]].dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{len(strange)} {part} weights are of a kind that is not used, first: {_few(strange[:1])} "
            f"is {kind}; get the file in float16 or float32"
        )
    large = {*prepare(module)} if storage else ()
    converted = {name: w.to(device, storage if name in large else dtype) for name, w in given.items()}
    # One number tells of a whole tensor. A weight may also have become infinite just now, in float16.
    broken = [name for name, w in converted.items() if not torch.isfinite(_sum(w))]
    if broken:
        raise CheckpointError(
            f"{len(broken)} {part} weights hold NaN or infinity (as {str(dtype).removeprefix('torch.')}), "
            f"first: {_few(broken)}"
        )
    module.load_state_dict(converted, assign=True)
    return module.eval().requires_grad_(False)


def _sum(w: Tensor) -> Tensor:
    return w.sum(dtype=torch.float32) if w.itemsize > 1 else w.float().sum()  # no sums of 8 bits


def _few(names: Iterable[str]) -> str:
    listed = [name[:60] for name in names]
    return ", ".join(listed[:2]) + (" ..." if len(listed) > 2 else "")


def shapes_of(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(w.shape) for name, w in weights.items()}


def _unet(
    weights: Mapping[str, Tensor],
    family: Family,
    device: torch.device,
    dtype: torch.dtype,
    storage: torch.dtype | None,
) -> UNet:
    own = strip(weights, UNET)
    config = unet_config(shapes_of(own), num_heads=family.num_heads, head_dim=family.head_dim)
    return build(lambda: UNet(config), own, "UNet", device, dtype, storage)


def _vae(
    weights: Mapping[str, Tensor], scale: float, device: torch.device, storage: torch.dtype | None = None
) -> AutoencoderKL | VQModel | None:
    if "encoder.conv_in.weight" not in weights and "decoder.conv_in.weight" not in weights:
        return None
    config = vae_config(shapes_of(weights), scale=scale)
    kind = AutoencoderKL if config.codebook_size is None else VQModel
    return build(lambda: kind(config), weights, "VAE", device, torch.float32, storage)


def _encoders(
    weights: Mapping[str, Tensor],
    family: Family,
    device: torch.device,
    dtype: torch.dtype,
    storage: torch.dtype | None,
) -> tuple[TextEncoder, ...]:
    """The text encoders; none for a file that holds only a UNet."""
    if not any(strip(weights, part.prefix) for part in family.parts):
        return ()
    return tuple(_encoder(strip(weights, part.prefix), part, device, dtype, storage) for part in family.parts)


def _encoder(
    own: Mapping[str, Tensor],
    part: Part,
    device: torch.device,
    dtype: torch.dtype,
    storage: torch.dtype | None,
) -> TextEncoder:
    match part:
        case ClipPart():
            if part.openclip:
                own = to_hf(own)
            clip = clip_config(shapes_of(own), quick_gelu=part.quick_gelu)
            return build(lambda: ClipTextModel(clip), own, "text encoder", device, dtype, storage)
        case BertPart():
            bert = bert_config(shapes_of(own))
            return build(lambda: BertTextModel(bert), own, "text encoder", device, dtype, storage)
        case ClassPart():
            count, width = own["weight"].shape
            return build(lambda: nn.Embedding(count, width), own, "class table", device, dtype)


def _tokenizer(family: Family, vocabulary: str | os.PathLike[str] | None) -> Tokenizer | WordPiece | None:
    if any(isinstance(part, BertPart) for part in family.parts):
        return None if vocabulary is None else WordPiece(Path(vocabulary))
    return Tokenizer() if any(isinstance(part, ClipPart) for part in family.parts) else None


def _stated_prediction(file: WeightFile) -> Prediction | None:
    """What a file says itself, by a marker or in its metadata, of what the network predicts."""
    if V_MARKER in file.tensors:
        return Prediction.V
    return STATED.get(file.metadata.get("modelspec.prediction_type", "").lower())


@torch.no_grad()
def probe_prediction(unet: UNet) -> Prediction:
    """Tell eps from v by one run at the highest noise level, where the two differ most.

    There, almost all of the input is noise: a network for eps gives its input back, one for v (which is
    about minus the picture) does not. The web UI's probe: a constant input of 0.5, and v if the mean of
    output minus input lies below -1.
    """
    weight = next(unet.parameters())
    assert unet.config.context_dim is not None
    x = torch.full((1, unet.config.in_channels, 8, 8), 0.5, dtype=weight.dtype, device=weight.device)
    context = torch.full((1, 2, unet.config.context_dim), 0.5, dtype=weight.dtype, device=weight.device)
    output = unet(x, torch.tensor([999.0], device=weight.device), context)
    return Prediction.V if float((output - x).mean()) < -1 else Prediction.EPS
