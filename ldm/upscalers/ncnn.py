"""Networks in the format of ncnn, in which some registries carry Real-ESRGAN, back under their own names.

A .param file is a text, one layer a line: kind, name, number of inputs and outputs, their names, settings
`number=value`. The .bin file beside it is nothing but their weights in that order.
https://github.com/Tencent/ncnn/wiki/param-and-model-file-structure
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.errors import CheckpointError
from ldm.formats.mapped import printable

MAGIC = "7767517"
FLOAT16, FLOAT32 = 0x01306B47, 0  # the tag before a convolution's weights; others mean quantised ones
MAX_BYTES = 500_000_000  # of the .bin file; x4plus has 33 million
WITHOUT_WEIGHTS = {"Input", "Split", "Concat", "Eltwise", "BinaryOp", "Interp", "PixelShuffle"}


class Layer(NamedTuple):
    """The weights of a convolution (out, in, 3, 3) with bias (out,), or the slopes (out,) of a PReLU."""

    weight: Tensor
    bias: Tensor | None


def read_ncnn(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The weights of an RRDBNet or SRVGGNetCompact, as its .pth file names them; dtypes as stored.

    path: the .param file; the .bin file of the same name lies beside it.
    Raises CheckpointError if a byte is left over or missing, or if it is another kind of network.
    """
    path = Path(path)
    weights = path.with_suffix(".bin")
    for file in (path, weights):
        if not file.is_file():
            raise CheckpointError(f"there is no file {printable(str(file), 150)}")
    if weights.stat().st_size > MAX_BYTES or path.stat().st_size > MAX_BYTES // 100:
        raise CheckpointError(f"{printable(path.name)} is larger than any upscaler; it is not read")
    try:
        lines = [line.split() for line in path.read_text("utf-8").splitlines()]
        layers = list(_layers(lines, weights.read_bytes()))
        found: dict[str, Tensor] = {}
        for name, layer in zip(_names([layer.bias is None for layer in layers], lines), layers, strict=True):
            found[f"{name}.weight"] = layer.weight
            if layer.bias is not None:
                found[f"{name}.bias"] = layer.bias
    except CheckpointError as error:
        raise CheckpointError(f"{printable(path.name)}: {error}") from None
    except (ValueError, IndexError, KeyError, OverflowError, RuntimeError):
        raise CheckpointError(f"{printable(path.name)} is no ncnn network, or damaged") from None
    return found


def _layers(lines: list[list[str]], data: bytes) -> Iterator[Layer]:
    """The layers with weights, in the order of their execution."""
    if lines[0] != [MAGIC] or int(lines[1][0]) != len(lines) - 2:
        raise CheckpointError("it is no text of ncnn layers, or incomplete")
    position = 0

    def take(count: int, dtype: type[np.generic]) -> Tensor:
        nonlocal position
        if count < 0:  # which numpy takes for all
            raise ValueError
        values = np.frombuffer(data, dtype, count, position).copy()  # raises ValueError beyond the end
        position += -(-values.nbytes // 4) * 4  # each block begins at a multiple of four bytes
        return torch.from_numpy(values)

    for kind, _, inputs, outputs, *rest in lines[2:]:
        settings = dict(entry.split("=", 1) for entry in rest[int(inputs) + int(outputs) :])
        if kind == "PReLU":
            yield Layer(take(int(settings["0"]), np.float32), None)
        elif kind == "Convolution":
            out, kernel, count = (int(settings[key]) for key in ("0", "1", "6"))
            tag = int(take(1, np.uint32))
            if tag not in (FLOAT16, FLOAT32):
                raise CheckpointError("its weights are quantised; get the file in float16 or float32")
            weight = take(count, np.float16 if tag == FLOAT16 else np.float32)
            yield Layer(weight.reshape(out, -1, kernel, kernel), take(out, np.float32))
        elif kind not in WITHOUT_WEIGHTS:
            raise CheckpointError(f"its layer {printable(kind)} does not occur in the known upscalers")
    if position != len(data):
        raise CheckpointError(f"{len(data) - position} bytes of the .bin file are left over")


def _names(is_prelu: list[bool], lines: list[list[str]]) -> list[str]:
    """The name of each layer with weights."""
    count = len(is_prelu)
    if lines[-1][0] == "Interp":
        raise CheckpointError("it shrinks its result at the end; take the variant of the full factor")
    if any(is_prelu):
        if is_prelu != [i % 2 == 1 for i in range(count)]:
            raise CheckpointError("it is another kind of network than SRVGGNetCompact")
        return [f"body.{i}" for i in range(count)]
    blocks, rest = divmod(count - 4, 15)  # the first, one after the blocks, and two at the end
    dense = [
        f"body.{block}.rdb{part}.conv{i}"
        for block in range(blocks)
        for part in (1, 2, 3)
        for i in (1, 2, 3, 4, 5)
    ]
    ups = [f"conv_up{i}" for i in range(1, rest + 1)]
    return ["conv_first", *dense, "conv_body", *ups, "conv_hr", "conv_last"]
