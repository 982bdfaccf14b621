"""Names of open_clip's text weights <-> those of Hugging Face, which `clip.ClipTextModel` has.

open_clip keeps the projections to queries, keys and values in one matrix, and multiplies by its
`text_projection` from the right. What no rule knows keeps its name, for the loader to report.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

# (open_clip, Hugging Face), to be replaced wherever they occur in a name.
_PARTS = (
    ("transformer.resblocks.", "text_model.encoder.layers."),
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
    (".attn.out_proj.", ".self_attn.out_proj."),
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.", "text_model.final_layer_norm."),
)


def to_hf(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate to Hugging Face's layout. No bytes are copied: split tensors are views."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        for openclip, hf in _PARTS:
            name = name.replace(openclip, hf)
        layer, joint, kind = name.rpartition(".attn.in_proj_")  # kind: weight or bias
        if joint and tensor.ndim > 0:
            for letter, part in zip("qkv", tensor.chunk(3), strict=False):
                renamed[f"{layer}.self_attn.{letter}_proj.{kind}"] = part
        elif name == "text_projection" and tensor.ndim == 2:
            renamed["text_projection.weight"] = tensor.t()
        else:
            renamed[name] = tensor
    return renamed


def to_openclip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `to_hf`, bit for bit. Raises KeyError for a layer with queries but no keys or values."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        layer, query, kind = name.rpartition(".self_attn.q_proj.")
        if query:
            parts = [weights[f"{layer}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            name, tensor = f"{layer}.attn.in_proj_{kind}", torch.cat(parts)
        elif ".self_attn.k_proj." in name or ".self_attn.v_proj." in name:
            continue  # came along with the queries
        elif name == "text_projection.weight":
            name, tensor = "text_projection", tensor.t()
        for openclip, hf in _PARTS:
            name = name.replace(hf, openclip)
        renamed[name] = tensor
    return renamed
