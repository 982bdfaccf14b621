"""What the members of the Stable Diffusion family have in common, as a record to fill in.

A `Family` holds what the shapes of the weights do not tell (heads, noise schedule, scaling of the latents,
default settings), which names its checkpoints use, and how it turns a prompt into conditioning.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor, nn

from ldm.compat import DEFAULT, Compatibility
from ldm.denoise import Conditioning, Prediction
from ldm.errors import PromptError
from ldm.families.infer import Shapes
from ldm.offload import device_of
from ldm.schedules import NoiseSchedule
from ldm.text.bert import BertTextModel, WordPiece
from ldm.text.chunks import BACKTRACK, EMPTY, Chunk, EmbeddingNames, chunks
from ldm.text.clip import ClipTextModel, Inserted
from ldm.text.emphasis import weighted
from ldm.text.prompt import emphasis
from ldm.text.tokenizer import END, Tokenizer
from ldm.textual_inversion import Embedding
from ldm.unet import timestep_embedding

UNET = "model.diffusion_model."
VAE = "first_stage_model."


@dataclass(frozen=True, kw_only=True)
class ClipPart:
    """A CLIP text encoder inside a checkpoint, and how the family uses it."""

    prefix: str
    openclip: bool = False  # the layout of the names: open_clip's, or Hugging Face's
    quick_gelu: bool = False
    pad_id: int = END  # open_clip's models were trained with zeros after END
    skip: int = 1  # which layer's states to take, from the end; the user's clip skip if that is given
    final_norm: bool = True
    pooled: bool = False  # the family uses the vector of the whole text, too


@dataclass(frozen=True, kw_only=True)
class BertPart:
    """The text encoder of text2image-large."""

    prefix: str


@dataclass(frozen=True, kw_only=True)
class ClassPart:
    """A table with one vector for each class: the "text encoder" of class-conditional models."""

    prefix: str


Part = ClipPart | BertPart | ClassPart


class Concat(Enum):
    """What a UNet sees beside the noisy latent. The value says it for people."""

    INPAINT = "a mask, and the picture without what it hides"
    PICTURE = "a picture to edit"
    DEPTH = "a depth picture"
    LOW_RES = "a picture to enlarge"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What a prompt's conditioning may depend on beside the prompt."""

    width: int  # pixels
    height: int
    negative: bool  # this is the negative prompt
    clip_skip: int | None
    compat: Compatibility = DEFAULT
    embeddings: Mapping[str, Embedding] = field(default_factory=dict)  # by their names in the prompt
    original: tuple[int, int] | None = None  # (width, height) of what it was cut from, if another size
    corner: tuple[int, int] = (0, 0)  # (left, top) of the cut


@dataclass(frozen=True, kw_only=True)
class Family:
    name: str  # short, for code and metadata: "sd1"
    title: str  # for people: "Stable Diffusion 1.x"
    parts: tuple[Part, ...]  # the text encoders
    in_channels: int  # of the UNet: tells inpainting, depth and the like apart
    context_dims: tuple[
        int, ...
    ] = ()  # widths of the published models, to recognise a file without text encoder
    only_context_dims: bool = False  # ... and no other width belongs to this family

    num_heads: int | None = None  # as in UNetConfig: one of the two
    head_dim: int | None = None
    schedule: Callable[[], NoiseSchedule] = NoiseSchedule.scaled_linear
    prediction: Prediction | None = Prediction.EPS  # None: both exist, and the names do not tell
    scale: float = 0.18215  # as in VAEConfig

    size: int = 512  # default width and height, pixels
    size_v: int | None = None  # the same for a v-predicting model, where that differs
    steps: int = 20
    sampler: str = "DPM++ 2M Karras"
    cfg_scale: float = 7.0

    spacings: Mapping[str, str] = field(
        default_factory=dict
    )  # named spacings that are others for this family

    vector: Callable[[Tensor, Picture], Tensor] | None = None  # pooled text (B, P), sizes -> (B, V)
    weigh_pooled: bool = False  # weights in a prompt act on the pooled text, too, see `_clip_conditioning`
    zero_empty_negative: bool = False  # an empty negative prompt is zeros instead of the encoded ""
    concat: Concat | None = None  # what the UNet's further input channels hold
    strength: float = 0.75  # of image to image, see ldm.edit.Edit

    def recognise(self, shapes: Shapes) -> bool:
        """Whether a file with these names and shapes is of this family."""
        if input_channels(shapes) != self.in_channels:
            return False
        if (f"{UNET}label_emb.0.0.weight" in shapes) != (self.vector is not None):
            return False
        context_dim = context_width(shapes)
        known_width = context_dim in self.context_dims
        if self.only_context_dims and not known_width:
            return False
        if any(name.startswith(("cond_stage_model.", "conditioner.")) for name in shapes):
            return bool(self.parts) and all(_has(shapes, part) for part in self.parts)
        return known_width if self.parts else context_dim is None

    def condition(
        self,
        encoders: Sequence[nn.Module],
        tokenizer: "Tokenizer | WordPiece | None",
        prompt: str,
        picture: Picture,
    ) -> Conditioning:
        """Turn one prompt into the conditioning of a batch of one. Raises PromptError."""
        if not self.parts:
            return Conditioning()
        if isinstance(encoders[0], nn.Embedding):
            return Conditioning(_class_context(encoders[0], prompt, picture.negative))
        if isinstance(encoders[0], BertTextModel):
            if tokenizer is None:
                raise PromptError(
                    "this model reads BERT's tokens; load it with vocabulary= (bert-base-uncased's vocab.txt)"
                )
            tokens = _on(encoders[0], [tokenizer.pad(tokenizer.encode(prompt))])
            return Conditioning(encoders[0](tokens))
        return self._clip_conditioning(encoders, tokenizer or Tokenizer(), prompt, picture)

    def _clip_conditioning(
        self,
        encoders: Sequence[nn.Module],
        tokenizer: "Tokenizer | WordPiece",
        prompt: str,
        picture: Picture,
    ) -> Conditioning:
        """The chunks of a prompt in a row, and the vector of the first one.

        With `weigh_pooled`, p + sum of (w - 1) (p - p without the tokens of weight w): at weight 0 a word is
        as if it were not there. Published models do without; where the vector leads, weights would do little.
        """
        assert isinstance(tokenizer, Tokenizer)
        mode = picture.compat.emphasis
        length = context_length(encoders)
        pieces = chunked(tokenizer, prompt, picture, length)
        weights = torch.tensor([chunk.weight_row(length) for chunk in pieces])  # (chunks, length)
        rows = [*pieces, *([EMPTY] if mode == "comfyui" else [])]
        weighed = (
            sorted({w for w in pieces[0].weights if w != 1.0})
            if self.weigh_pooled and mode != "ignore"
            else []
        )
        rows += [pieces[0].without(weight) for weight in weighed]
        contexts, pooled = [], None
        for i, (encoder, part) in enumerate(zip(encoders, self.parts, strict=True)):
            assert isinstance(encoder, ClipTextModel) and isinstance(part, ClipPart)  # noqa: PT018
            features = encoder(
                _on(encoder, [tokenizer.pad([*chunk.ids], length, part.pad_id) for chunk in rows]),
                inserted=[
                    Inserted(row, 1 + place, picture.embeddings[name].fitted(encoders)[i])
                    for row, chunk in enumerate(rows)
                    for place, name in chunk.embeddings
                ],
                skip=picture.clip_skip or part.skip,
                final_norm=part.final_norm,
                pooled=part.pooled,
            )
            z, empty = features.hidden[: len(pieces)], features.hidden[len(pieces) : len(pieces) + 1]
            z = weighted(mode, z, weights, empty)
            contexts.append(z.flatten(0, 1).unsqueeze(0))  # (1, chunks * length, D)
            if part.pooled:
                pooled = features.pooled[:1]  # of the first chunk
                less = features.pooled[len(rows) - len(weighed) :]  # (weighed, P)
                factors = pooled.new_tensor(weighed).unsqueeze(1) - 1
                pooled = pooled + (factors * (pooled - less)).sum(0, keepdim=True)
        context = torch.cat(contexts, dim=2)
        zeros = self.zero_empty_negative and picture.compat.zero_empty_negative
        if picture.negative and zeros and not prompt.strip():
            context = torch.zeros_like(context)
            pooled = None if pooled is None else torch.zeros_like(pooled)
        if self.vector is None or pooled is None:
            return Conditioning(context)
        return Conditioning(context, self.vector(pooled, picture))


def context_length(encoders: Sequence[nn.Module]) -> int:
    """How many tokens CLIP encoders read at once, START and END included."""
    return min(e.config.context_length for e in encoders if isinstance(e, ClipTextModel))


def chunked(tokenizer: Tokenizer, prompt: str, picture: Picture, length: int) -> list[Chunk]:
    """A prompt without editing and AND, as its encoders read it: in chunks of `length` - 2 tokens."""
    vectors = {name: len(embedding) for name, embedding in picture.embeddings.items()}
    return chunks(
        emphasis(prompt, picture.compat.emphasis),
        tokenizer.encode,
        length=length - 2,
        embeddings=EmbeddingNames(tokenizer.encode, vectors),
        backtrack=min(BACKTRACK, length // 3),
    )


def size_embedding(numbers: Sequence[float], like: Tensor) -> Tensor:
    """Each number as 256 sinusoidal features, in a row. Podell et al. 2023, arXiv:2307.01952, section 2.2.

    Returns (1, 256 * len(numbers)) with the dtype and device of `like`.
    """
    return (
        timestep_embedding(torch.tensor(numbers, device=like.device), 256)
        .flatten()
        .unsqueeze(0)
        .to(like.dtype)
    )


def input_channels(shapes: Shapes) -> int | None:
    """Of the UNet in a whole checkpoint; None: there is no UNet."""
    return next(iter(shapes.get(f"{UNET}input_blocks.0.0.weight", ())[1:2]), None)


def context_width(shapes: Shapes) -> int | None:
    """Of the text that the UNet in a whole checkpoint reads; None: it reads none."""
    keys = (s for name, s in shapes.items() if name.startswith(UNET) and name.endswith("attn2.to_k.weight"))
    return next((s[1] for s in keys if len(s) == 2), None)


def _has(shapes: Shapes, part: Part) -> bool:
    match part:
        case ClipPart(openclip=True):
            return f"{part.prefix}token_embedding.weight" in shapes
        case ClipPart():
            return f"{part.prefix}text_model.embeddings.token_embedding.weight" in shapes
        case BertPart():
            return f"{part.prefix}transformer.token_emb.weight" in shapes
        case ClassPart():
            return f"{part.prefix}weight" in shapes


def _on(module: nn.Module, tokens: list[list[int]]) -> Tensor:
    return torch.tensor(tokens, device=device_of(module))


def _class_context(table: nn.Embedding, prompt: str, negative: bool) -> Tensor:
    """The vector of a class number, (1, 1, D). The last of 1001 classes is "no class"."""
    classes = table.num_embeddings
    text = prompt.strip() or (str(classes - 1) if negative and classes == 1001 else "")
    if not (text.isascii() and text.isdigit() and int(text) < classes):
        raise PromptError(
            f"this model draws classes: the prompt must be a number below {classes}, got {prompt!r}"
        )
    return table(_on(table, [[int(text)]]))


def strip(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights below `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
