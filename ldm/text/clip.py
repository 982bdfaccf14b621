"""The text encoders of Stable Diffusion: CLIP-L (SD1, SDXL), OpenCLIP ViT-H (SD2) and ViT-bigG (SDXL).

A causal pre-norm transformer over token and position embeddings. Parameter names are those of Hugging Face
(`text_model.encoder.layers.0.self_attn.q_proj.weight`), as in the checkpoints of Stable Diffusion 1;
`openclip_names` translates the other layout.

Radford et al. 2021, arXiv:2103.00020, section 2.4; OpenCLIP: Cherti et al. 2022, arXiv:2212.07143.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.clip_layers import Encoder, LayerConfig
from ldm.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class ClipTextConfig:
    """Shape of a CLIP text encoder; the defaults are the ones that CLIP-L and its relatives share."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    vocab_size: int = 49408
    context_length: int = 77
    quick_gelu: bool = False  # OpenAI's x * sigmoid(1.702 x) instead of the exact GELU
    projection_dim: int | None = None  # width of the pooled vector; None: not projected


CLIP_L = ClipTextConfig(quick_gelu=True)
OPENCLIP_H = ClipTextConfig(width=1024, layers=24, heads=16, projection_dim=1024)
OPENCLIP_BIGG = ClipTextConfig(width=1280, layers=32, heads=20, projection_dim=1280)


class Inserted(NamedTuple):
    """Learned vectors that stand in the place of tokens (textual inversion)."""

    row: int  # of the batch
    start: int  # position of the first one; START is position 0
    vectors: Tensor  # (n, D)


class TextFeatures(NamedTuple):
    """What the encoder says of a text."""

    hidden: Tensor  # (B, N, D) for cross-attention
    pooled: Tensor | None  # (B, projection_dim or D): the whole text in one vector


class Embeddings(nn.Module):
    """A learned vector for each token and one for each position. (B, N) int64 -> (B, N, D)."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context_length, config.width)

    def forward(self, tokens: Tensor, inserted: Sequence[Inserted]) -> Tensor:
        x = self.token_embedding(tokens)  # (B, N, D)
        for row, start, vectors in inserted:
            x[row, start : start + len(vectors)] = vectors.to(x)
        return x + self.position_embedding.weight[: tokens.shape[1]]


class Transformer(nn.Module):
    """Everything but the projection of the pooled vector, under the name that all its weights share."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(
            LayerConfig(
                width=config.width,
                mlp_width=4 * config.width,
                layers=config.layers,
                heads=config.heads,
                quick_gelu=config.quick_gelu,
                causal=True,
            )
        )
        self.final_layer_norm = nn.LayerNorm(config.width)

    def forward(
        self, tokens: Tensor, inserted: Sequence[Inserted], skip: int, last: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the states before the last `skip - 1` layers and, if wanted, those after all layers."""
        count = len(self.encoder.layers)
        if not 1 <= skip <= count:
            raise RequestError(f"clip skip must be 1 to {count} for this text encoder, got {skip}")
        x = self.embeddings(tokens, inserted)
        for layer in self.encoder.layers[: count - skip + 1]:
            x = layer(x)
        hidden = x
        if not last:
            return hidden, None
        for layer in self.encoder.layers[count - skip + 1 :]:
            x = layer(x)
        return hidden, x


class ClipTextModel(nn.Module):
    """A whole text encoder, see `forward`."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = Transformer(config)
        self.text_projection = (
            nn.Linear(config.width, config.projection_dim, bias=False) if config.projection_dim else None
        )

    def forward(
        self,
        tokens: Tensor,
        *,
        inserted: Sequence[Inserted] = (),
        skip: int = 1,
        final_norm: bool = True,
        pooled: bool = False,
    ) -> TextFeatures:
        """Encode texts.

        tokens: (B, N) int64 with START and END, N up to `context_length`.
        inserted: vectors instead of what the token table holds for some positions. The tokens there do not
            matter, but must be below END.
        skip: 1 takes the states after the last layer, 2 those before it, and so on ("clip skip").
        final_norm: pass them through the final layer norm. SD1 and SD2 do (SD2 with skip=2), SDXL does not.
        pooled: also run the skipped layers and return the last, normed state at END, times the projection.
        Raises RequestError if the model has fewer than `skip` layers.
        """
        hidden, last = self.text_model(tokens, inserted, skip, last=pooled)
        norm = self.text_model.final_layer_norm
        features = norm(hidden) if final_norm else hidden
        if last is None:
            return TextFeatures(features, None)
        # END has the largest id, and argmax finds its first place: CLIP-L pads with more of them.
        end = tokens.argmax(dim=-1)
        vector = norm(last[torch.arange(len(tokens), device=tokens.device), end])
        return TextFeatures(
            features, vector if self.text_projection is None else self.text_projection(vector)
        )
