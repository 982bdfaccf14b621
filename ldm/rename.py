"""Names inside the UNet: those of the original checkpoints -> those of diffusers.

A rule derived from the configuration, not a table: diffusers groups the same layers by level, and counts
ResBlocks and transformers of a level apart. It holds for modules ("input_blocks.1.0") and parameters alike;
`{to_diffusers(name, config): name for name in names}` is its inverse. Where no configuration is known yet,
the input half, which is all that a ControlNet has, can be renamed back by `from_diffusers`.
"""

import re

from ldm.unet import UNetConfig

_TOP = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "label_emb": "class_embedding",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_IN_RESBLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_BLOCK = re.compile(r"(input|output)_blocks\.(\d+)\.(\d+)")
_DOWN = re.compile(r"down_blocks\.(\d+)\.(resnets|attentions|downsamplers)\.(\d+)")
_HINT = re.compile(r"controlnet_cond_embedding\.(conv_in|blocks\.(\d+)|conv_out)")


def to_diffusers(name: str, config: UNetConfig) -> str:
    """The name in diffusers' layout of a module or parameter of `UNet(config)`; unknown ones are kept."""
    for start, renamed in _TOP.items():
        if name == start or name.startswith(start + "."):
            return renamed + _inner(name[len(start) :])
    match = _BLOCK.match(name)
    if match is None:
        return name
    side, block, layer = match[1], int(match[2]), int(match[3])
    rest = name[match.end() :]
    if side == "input":  # after the first convolution, each level has its ResBlocks and a downsampler
        level, i = divmod(block - 1, config.num_res_blocks + 1)
        if i == config.num_res_blocks:
            return f"down_blocks.{level}.downsamplers.0{_inner(rest.replace('.op', '.conv'))}"
        return f"down_blocks.{level}.{'attentions' if layer else 'resnets'}.{i}{_inner(rest)}"
    level, i = divmod(block, config.num_res_blocks + 1)
    attends = config.depth[len(config.depth) - 1 - level] > 0
    if layer == (2 if attends else 1):
        return f"up_blocks.{level}.upsamplers.0{_inner(rest)}"
    return f"up_blocks.{level}.{'attentions' if layer else 'resnets'}.{i}{_inner(rest)}"


def from_diffusers(name: str, num_res_blocks: int, hint_layers: int) -> str:
    """The original name of a parameter of a ControlNet in diffusers' layout; unknown ones are kept.

    num_res_blocks: as in UNetConfig. hint_layers: the number of `controlnet_cond_embedding.blocks`.
    """
    for original, start in _TOP.items():
        if name.startswith(start + "."):
            return original + _original_inner(name[len(start) :])
    if match := _DOWN.match(name):
        level, kind, i = int(match[1]), match[2], int(match[3])
        block = 1 + level * (num_res_blocks + 1) + (num_res_blocks if kind == "downsamplers" else i)
        rest = name[match.end() :]
        inner = rest.replace(".conv", ".op") if kind == "downsamplers" else _original_inner(rest)
        return f"input_blocks.{block}.{int(kind == 'attentions')}{inner}"
    if match := _HINT.match(name):  # each convolution of the original has an activation after it
        i = {"conv_in": 0, "conv_out": hint_layers + 1}.get(match[1])
        i = 1 + int(match[2]) if i is None else i
        return f"input_hint_block.{2 * i}{name[match.end() :]}"
    name = re.sub(r"^controlnet_down_blocks\.(\d+)", r"zero_convs.\1.0", name)
    return re.sub(r"^controlnet_mid_block", "middle_block_out.0", name)


def _inner(rest: str) -> str:
    """The part of a name inside a layer, with its leading dot."""
    for start, renamed in _IN_RESBLOCK.items():
        if rest == f".{start}" or rest.startswith(f".{start}."):
            return f".{renamed}{rest[len(start) + 1 :]}"
    return rest


def _original_inner(rest: str) -> str:
    """The inverse of `_inner`."""
    for original, start in _IN_RESBLOCK.items():
        if rest.startswith(f".{start}."):
            return f".{original}{rest[len(start) + 1 :]}"
    return rest
