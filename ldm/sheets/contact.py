"""A sheet of pictures that exist, with their names and seeds."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ldm.errors import LdmError
from ldm.images import opaque, read_picture, read_text
from ldm.infotext import parse
from ldm.sheets.titles import Label, Title, notice, sheet, shrunk


def contact_sheet(
    paths: Sequence[Path], columns: int, *, side: int = 256, margin: int = 8
) -> tuple[Image.Image, dict[Path, LdmError]]:
    """The pictures row by row, no side longer than `side` pixels, with the name and the seed below.

    Returns the sheet and the pictures that could not be read; in their places the sheet says why.
    Raises RequestError if the sheet would be too large.
    """
    pictures: list[Image.Image] = []
    failed: dict[Path, LdmError] = {}
    for path in paths:
        try:
            pictures.append(shrunk(opaque(read_picture(path)), side))
        except LdmError as error:
            failed[path] = error
            pictures.append(notice(str(error), side, side))
    captions = [_caption(path) for path in paths]
    return sheet(pictures, min(columns, len(pictures)), captions=captions, margin=margin), failed


def _caption(path: Path) -> Title:
    try:
        seed = parse(read_text(path)).fields.get("Seed")
    except LdmError:  # no settings, or no picture
        seed = None
    return (Label(path.name), *((Label(f"seed {seed}"),) if seed else ()))
