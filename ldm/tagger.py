"""Taggers: networks with a fixed list of tags, such as the "wd14" ones, from ONNX files.

They name everything they see at once, each tag with a probability. The files are made by others; onnxruntime
runs them (`pip install onnxruntime`).
"""

import csv
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.errors import LdmError
from ldm.formats.mapped import printable, reason
from ldm.images import opaque
from ldm.text_file import read_utf8

RATING = "9"  # the category of the tags that only say how decent a picture is


@dataclass(frozen=True)
class Tagger:
    """A network in onnxruntime and what its outputs mean."""

    session: Any  # onnxruntime.InferenceSession
    tags: tuple[str, ...]
    shown: tuple[bool, ...]  # False: a rating

    def probabilities(self, image: Image.Image) -> dict[str, float]:
        """Of every tag that is no rating. Raises LdmError if the list of tags is another network's."""
        given = self.session.get_inputs()[0]
        side = given.shape[1]
        found = self.session.run(None, {given.name: prepared(image, side)})[0][0].tolist()
        if len(found) != len(self.tags):
            raise LdmError(
                f"the tagger has {len(found)} outputs but its list {len(self.tags)} tags; "
                "give the list that belongs to it with --tags"
            )
        return {tag: p for tag, p, shown in zip(self.tags, found, self.shown, strict=True) if shown}

    def prompt(self, image: Image.Image, *, threshold: float = 0.35, leave_out: Sequence[str] = ()) -> str:
        """The tags that are surer than `threshold`, alphabetically, as a prompt.

        leave_out: tags that are never given, with blanks or underscores.
        """
        unwanted = {tag.replace("_", " ") for tag in leave_out}
        likely = (tag.replace("_", " ") for tag, p in self.probabilities(image).items() if p > threshold)
        # Brackets are attention in prompts: those of a tag are escaped.
        return ", ".join(re.sub(r"([\\()\[\]])", r"\\\1", tag) for tag in sorted(set(likely) - unwanted))


def load_tagger(path: str | os.PathLike[str], tags: str | os.PathLike[str] | None = None) -> Tagger:
    """A tagger from an ONNX file that takes one square picture (1, side, side, 3), BGR from 0 to 255.

    tags: a table with the columns `name` and `category`; None: the file beside it that ends in .csv, or
        selected_tags.csv in its folder.
    Raises LdmError if onnxruntime is missing, or a file is missing, damaged or of another kind.
    """
    path = Path(path)
    try:
        import onnxruntime
    except ImportError:
        raise LdmError("taggers need onnxruntime; install it with: pip install onnxruntime") from None
    beside = path.with_suffix(".csv")
    table = Path(tags) if tags else beside if beside.exists() else path.with_name("selected_tags.csv")
    names, shown = _read_tags(table)
    try:
        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no common class of errors
        raise LdmError(
            printable(f"{path.name}: onnxruntime cannot use it: {str(error).partition(chr(10))[0]}", 200)
        ) from None
    given = session.get_inputs()[0].shape
    if len(given) != 4 or given[3] != 3 or given[1] != given[2] or not isinstance(given[1], int):
        raise LdmError(
            printable(f"{path.name}: it takes {given}, not one square picture (1, side, side, 3)", 200)
        )
    return Tagger(session, names, shown)


def _read_tags(path: Path) -> tuple[tuple[str, ...], tuple[bool, ...]]:
    try:
        rows = list(csv.DictReader(StringIO(read_utf8(path), newline="")))
        return tuple(row["name"] for row in rows), tuple(row.get("category") != RATING for row in rows)
    except csv.Error as error:
        raise LdmError(f"cannot read the tags of {printable(path.name)}: {reason(error)}") from None
    except KeyError:
        raise LdmError(f"{printable(path.name)} has no column 'name'; give the table of the tagger") from None


def prepared(image: Image.Image, side: int) -> np.ndarray:
    """The whole picture on a white square, as wd14 taggers want it: (1, side, side, 3), BGR, 0 to 255."""
    image = opaque(image)
    longer = max(image.size)
    scale = side / longer
    small = image.resize(
        (max(round(image.width * scale), 1), max(round(image.height * scale), 1)), Image.Resampling.BICUBIC
    )
    square = Image.new("RGB", (side, side), "white")
    square.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
    return np.asarray(square, np.float32)[None, :, :, ::-1].copy()
