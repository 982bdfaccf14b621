"""The transformer that CLIP's text and image encoders share, under Hugging Face's names of its weights.

Radford et al. 2021, arXiv:2103.00020, section 2.4. Shapes: B batch, N tokens or patches, D width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Shape of one layer, and how many there are."""

    width: int
    mlp_width: int
    layers: int
    heads: int
    quick_gelu: bool  # OpenAI's x * sigmoid(1.702 x) instead of the exact GELU
    causal: bool  # a token sees itself and earlier ones; in pictures, all see all


class Attention(nn.Module):
    """Multi-head self-attention. (B, N, D) -> the same."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.heads, self.causal = config.heads, config.causal
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, D / heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        h = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(h.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers. (B, N, D) -> the same."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.quick_gelu = config.quick_gelu
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        h = h * torch.sigmoid(1.702 * h) if self.quick_gelu else F.gelu(h)
        return self.fc2(h)


class Layer(nn.Module):
    """Attention and MLP, each behind a layer norm and around a shortcut. (B, N, D) -> the same."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.width)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The layers in a row. (B, N, D) -> the same. A text encoder may run fewer of them by itself."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x
