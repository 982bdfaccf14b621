"""From a weight file to `Models`: names and shapes -> family -> rename -> build on meta -> strict assignment.

No network, no configuration file: names and shapes decide. Tensors stay in the file's memory map until a part
is built of them (building.py).
"""

import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.building import Destination, build, few, is_dropped, shapes_of
from ldm.denoise import Denoiser, Prediction
from ldm.errors import CheckpointError, RequestError
from ldm.families import ClassPart, ClipPart, Family, recognise
from ldm.families.family import UNET, VAE, BertPart, Part, strip
from ldm.families.infer import bert_config, clip_config, unet_config, vae_config
from ldm.formats import WeightFile, read
from ldm.formats.mapped import printable
from ldm.library import NO_LIBRARY, Library
from ldm.models import V_MARKER, ZERO_SNR_MARKER, Models
from ldm.text.bert import BertTextModel, WordPiece
from ldm.text.clip import ClipTextModel
from ldm.text.openclip_names import to_hf
from ldm.text.tokenizer import Tokenizer
from ldm.unet import UNet
from ldm.vae import AutoencoderKL, VQModel

DEFAULT_MODEL = Path(__file__).parent / "default_model.safetensors"

STATED = {"v": Prediction.V, "v_prediction": Prediction.V, "epsilon": Prediction.EPS, "eps": Prediction.EPS}
"""Values of `modelspec.prediction_type` in metadata (Stability AI's model specification, and trainers)."""

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
    to = Destination(device, dtype, storage, file.read_once)
    weights = normalised(file)
    if ema:
        weights = _with_averages(weights, source)
    try:
        family = recognise({name: tuple(w.shape) for name, w in weights.items()})
        unet = _unet(weights, family, to)
        autoencoder = None if vae is not None else _vae(strip(weights, VAE), family.scale, to)
        encoders = _encoders(weights, family, to)
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
    file = read(path)
    inside = strip(file.tensors, VAE)
    to = Destination(torch.device(device), read_once=file.read_once)
    try:
        loaded = _vae(inside or file.tensors, scale, to)
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
    unknown = [name for name in weights if not name.startswith(parts) and not is_dropped(name)]
    if unknown:
        logger.warning(
            printable(f"{source.name}: {len(unknown)} unknown weights left out: {few(unknown)}", 200)
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


def _unet(weights: Mapping[str, Tensor], family: Family, to: Destination) -> UNet:
    own = strip(weights, UNET)
    config = unet_config(shapes_of(own), num_heads=family.num_heads, head_dim=family.head_dim)
    return build(lambda: UNet(config), own, "UNet", to)


def _vae(weights: Mapping[str, Tensor], scale: float, to: Destination) -> AutoencoderKL | VQModel | None:
    if "encoder.conv_in.weight" not in weights and "decoder.conv_in.weight" not in weights:
        return None
    config = vae_config(shapes_of(weights), scale=scale)
    kind = AutoencoderKL if config.codebook_size is None else VQModel
    return build(lambda: kind(config), weights, "VAE", replace(to, dtype=torch.float32))


def _encoders(
    weights: Mapping[str, Tensor],
    family: Family,
    to: Destination,
) -> tuple[TextEncoder, ...]:
    """The text encoders; none for a file that holds only a UNet."""
    if not any(strip(weights, part.prefix) for part in family.parts):
        return ()
    return tuple(_encoder(strip(weights, part.prefix), part, to) for part in family.parts)


def _encoder(
    own: Mapping[str, Tensor],
    part: Part,
    to: Destination,
) -> TextEncoder:
    match part:
        case ClipPart():
            if part.openclip:
                own = to_hf(own)
            clip = clip_config(shapes_of(own), quick_gelu=part.quick_gelu)
            return build(lambda: ClipTextModel(clip), own, "text encoder", to)
        case BertPart():
            bert = bert_config(shapes_of(own))
            return build(lambda: BertTextModel(bert), own, "text encoder", to)
        case ClassPart():
            count, width = own["weight"].shape
            return build(lambda: nn.Embedding(count, width), own, "class table", replace(to, storage=None))


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
    if weight.is_meta:  # no numbers: the one whose pictures are larger, for ldm.memory
        return Prediction.V
    assert unet.config.context_dim is not None
    x = torch.full((1, unet.config.in_channels, 8, 8), 0.5, dtype=weight.dtype, device=weight.device)
    context = torch.full((1, 2, unet.config.context_dim), 0.5, dtype=weight.dtype, device=weight.device)
    output = unet(x, torch.tensor([999.0], device=weight.device), context)
    return Prediction.V if float((output - x).mean()) < -1 else Prediction.EPS
