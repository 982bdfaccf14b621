"""Read a network's configuration off the shapes of its weights.

A checkpoint needs no configuration file: the shapes say everything but the number of attention heads, which
each family knows. So unusual sizes (small models, pruned ones) load like the published ones.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count

from ldm.errors import CheckpointError
from ldm.text.bert import BertConfig
from ldm.text.clip import ClipTextConfig
from ldm.unet import UNetConfig
from ldm.vae import VAEConfig

Shapes = Mapping[str, tuple[int, ...]]
"""Parameter name, relative to the part -> shape."""


@contextmanager
def reading(part: str) -> Iterator[None]:
    """Turn what goes wrong with the shapes of strange files into a CheckpointError."""
    try:
        yield
    except KeyError as error:
        raise CheckpointError(
            f"the {part} is incomplete or of an unknown kind: there is no {error}"
        ) from None
    except (IndexError, ValueError, ZeroDivisionError):
        raise CheckpointError(f"the {part} is of an unknown kind: its weights have other shapes") from None


def length(shapes: Shapes, pattern: str) -> int:
    """How many of `pattern` exist when its "{}" counts up from 0, as in "up.{}.block.0.conv1.weight"."""
    return next(i for i in count() if pattern.format(i) not in shapes)


def unet_config(shapes: Shapes, *, num_heads: int | None, head_dim: int | None) -> UNetConfig:
    """The configuration of a UNet. num_heads or head_dim: as in UNetConfig; one of them is None.

    Raises CheckpointError if the names make no UNet.
    """
    with reading("UNet"):
        model_channels, in_channels = shapes["input_blocks.0.0.weight"][:2]
        out_channels = shapes["out.2.weight"][0]
        widths: list[int] = []  # of each level
        blocks: list[int] = []  # ResBlocks of each level
        depth: list[int] = []
        cross_only: list[bool] = []
        open_level = True
        for i in count(1):
            if f"input_blocks.{i}.0.op.weight" in shapes:
                open_level = True
                continue
            conv = shapes.get(f"input_blocks.{i}.0.in_layers.2.weight")
            if conv is None:
                break
            if open_level:
                widths.append(conv[0])
                blocks.append(0)
                depth.append(_attention_depth(shapes, f"input_blocks.{i}.1"))
                keys = shapes.get(f"input_blocks.{i}.1.transformer_blocks.0.attn1.to_k.weight")
                cross_only.append(keys is not None and keys[0] != keys[1])
                open_level = False
            blocks[-1] += 1
        contexts = {s[1] for name, s in shapes.items() if name.endswith("attn2.to_k.weight")}
        proj_in = next((s for name, s in shapes.items() if name.endswith(".1.proj_in.weight")), ())
        embedding = shapes["input_blocks.1.0.emb_layers.1.weight"]
        classes = shapes.get("label_emb.weight")
        vector = shapes.get("label_emb.0.0.weight")
        return UNetConfig(
            in_channels=in_channels,
            out_channels=out_channels,
            model_channels=model_channels,
            channel_mult=tuple(width // model_channels for width in widths),
            num_res_blocks=blocks[0],
            depth=tuple(depth),
            middle_depth=_attention_depth(shapes, "middle_block.1"),
            context_dim=max(contexts, default=None),
            num_heads=num_heads,
            head_dim=head_dim,
            linear_projection=len(proj_in) == 2,
            cross_only=tuple(cross_only) if any(cross_only) else (),
            vector_dim=vector[1] if vector else None,
            num_classes=classes[0] if classes else None,
            scale_shift_norm=embedding[0] == 2 * widths[0],
        )


def _attention_depth(shapes: Shapes, block: str) -> int:
    """Number of transformer blocks, 1 for plain attention, 0 for none."""
    if f"{block}.qkv.weight" in shapes:
        return 1
    return length(shapes, block + ".transformer_blocks.{}.norm1.weight")


def vae_config(shapes: Shapes, *, scale: float) -> VAEConfig:
    """The configuration of an autoencoder. scale: as in VAEConfig; it is in no shape.

    Raises CheckpointError if the names make no autoencoder.
    """
    with reading("autoencoder"):
        ch, in_channels = shapes["encoder.conv_in.weight"][:2]
        # There is at least one level: the error of its absence says what is missing.
        levels = range(max(1, length(shapes, "encoder.down.{}.block.0.conv1.weight")))
        codebook = shapes.get("quantize.embedding.weight")
        return VAEConfig(
            in_channels=in_channels,
            ch=ch,
            ch_mult=tuple(shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] // ch for i in levels),
            num_res_blocks=length(shapes, "encoder.down.0.block.{}.conv1.weight"),
            attention_levels=tuple(i for i in levels if f"encoder.down.{i}.attn.0.q.weight" in shapes),
            mid_attention="encoder.mid.attn_1.q.weight" in shapes,
            z_channels=shapes["decoder.conv_in.weight"][1],
            embed_dim=shapes["post_quant_conv.weight"][1],
            codebook_size=codebook[0] if codebook else None,
            scale=scale,
        )


def clip_config(shapes: Shapes, *, quick_gelu: bool) -> ClipTextConfig:
    """The configuration of a CLIP text encoder from shapes in Hugging Face's layout."""
    with reading("text encoder"):
        vocab_size, width = shapes["text_model.embeddings.token_embedding.weight"]
        projection = shapes.get("text_projection.weight")
        return ClipTextConfig(
            width=width,
            layers=length(shapes, "text_model.encoder.layers.{}.layer_norm1.weight"),
            heads=max(1, width // 64),  # so in every CLIP: Radford et al. 2021, table 19
            vocab_size=vocab_size,
            context_length=shapes["text_model.embeddings.position_embedding.weight"][0],
            quick_gelu=quick_gelu,
            projection_dim=projection[0] if projection else None,
        )


def bert_config(shapes: Shapes) -> BertConfig:
    """The configuration of the BERT-style encoder of text2image-large."""
    with reading("text encoder"):
        vocab_size, width = shapes["transformer.token_emb.weight"]
        return BertConfig(
            width=width,
            # Attention and feed-forward are layers of their own, in turn.
            layers=length(shapes, "transformer.attn_layers.layers.{}.0.weight") // 2,
            vocab_size=vocab_size,
            context_length=shapes["transformer.pos_emb.emb.weight"][0],
        )
