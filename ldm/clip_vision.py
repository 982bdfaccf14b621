"""CLIP's image encoder: pictures to the space in which CLIP's texts lie.

A vision transformer: the picture is cut into square patches, each becomes a token, and a learned token in
front of them gathers what the picture shows. Parameter names are those of Hugging Face
(`vision_model.encoder.layers.0.self_attn.q_proj.weight`), as in the text encoder; see `from_openclip`.

Radford et al. 2021, arXiv:2103.00020, section 2.4; Dosovitskiy et al. 2020, arXiv:2010.11929.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.clip_layers import Encoder, LayerConfig
from ldm.text.openclip_names import to_hf


@dataclass(frozen=True, kw_only=True)
class ClipVisionConfig:
    """Shape of a CLIP image encoder; the defaults are ViT-L/14."""

    image_size: int = 224
    patch: int = 14  # pixels
    width: int = 1024
    mlp_width: int = 4096
    layers: int = 24
    heads: int = 16
    quick_gelu: bool = False  # OpenAI's x * sigmoid(1.702 x) instead of the exact GELU
    projection_dim: int = 768


class Embeddings(nn.Module):
    """A token for each patch and one in front, plus their positions. (B, 3, S, S) -> (B, N, D)."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(config.width))
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch, stride=config.patch, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // config.patch) ** 2 + 1, config.width)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class Transformer(nn.Module):
    """Everything but the projection. (B, 3, S, S) -> (B, D), the state of the token in front."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.width)  # misspelt as in the files
        self.encoder = Encoder(
            LayerConfig(
                width=config.width,
                mlp_width=config.mlp_width,
                layers=config.layers,
                heads=config.heads,
                quick_gelu=config.quick_gelu,
                causal=False,
            )
        )
        self.post_layernorm = nn.LayerNorm(config.width)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.post_layernorm(self.encoder(self.pre_layrnorm(self.embeddings(pixels)))[:, 0])


class ClipVisionModel(nn.Module):
    """A whole image encoder."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = Transformer(config)
        self.visual_projection = nn.Linear(config.width, config.projection_dim, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, image_size, image_size), each channel of mean 0 and variance 1 -> (B, projection_dim)."""
        return self.visual_projection(self.vision_model(pixels))


_EMBEDDINGS = "vision_model.embeddings."
_NAMES = {
    "class_embedding": _EMBEDDINGS + "class_embedding",
    "conv1.weight": _EMBEDDINGS + "patch_embedding.weight",
    "ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "ln_post.weight": "vision_model.post_layernorm.weight",
    "ln_post.bias": "vision_model.post_layernorm.bias",
}


def from_openclip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate open_clip's names, those after "visual.", to the ones here. No bytes are copied."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name == "proj" and tensor.ndim == 2:
            renamed["visual_projection.weight"] = tensor.t()
        elif name in _NAMES:
            renamed[_NAMES[name]] = tensor
        else:  # the layers are those of a text encoder
            parts = to_hf({name: tensor})
            renamed |= {part.replace("text_model.", "vision_model."): t for part, t in parts.items()}
    return renamed
