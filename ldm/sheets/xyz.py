"""Plots over settings: what changes along the columns, along the rows, and from sheet to sheet.

The web UI's script "X/Y/Z plot":

    plot(request, chosen("CFG Scale: 3, 7, 11"), chosen("Seed: 1-4"))
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ldm import library, styles
from ldm.checkpoint import DEFAULT_MODEL
from ldm.errors import LdmError, RequestError
from ldm.formats.mapped import printable
from ldm.request import Request
from ldm.sheets.axes import AXES, Axis, axis
from ldm.sheets.cells import MAX_CELLS, Cell, Layout
from ldm.sheets.titles import Label, Title


@dataclass(frozen=True)
class Chosen:
    """An axis with the values to draw."""

    axis: Axis
    values: Sequence[Any]

    @property
    def titles(self) -> tuple[Title, ...]:
        return tuple(self._title(value) for value in self.values)

    def _title(self, value: Any) -> Title:
        match value:
            case None:
                return ()
            case float():
                text = repr(round(value, 8)).removesuffix(".0")
            case tuple():
                text = ", ".join(map(str, value))
            case Path():
                text = value.name
            case _:
                text = str(value)
        return (Label(f"{self.axis.name}: {text}" if self.axis.named else text),)


NOTHING = Chosen(AXES["Nothing"], [None])


def chosen(text: str) -> Chosen:
    """An axis with its values: "Seed: 1-4", or "seed=1-4". Raises RequestError with the axis's name."""
    end = min((i for i in map(text.find, ":=") if i >= 0), default=len(text))
    found = axis(text[:end])
    try:
        values = found.read(text[end + 1 :])
    except LdmError as error:
        raise RequestError(printable(f"{found.name}: {error}", 200)) from None
    if not values:
        raise RequestError(f"{found.name}: no values; write it as {found.name.lower()}=1, 2, 3")
    return Chosen(found, values)


def plot(
    request: Request,
    x: Chosen,
    y: Chosen = NOTHING,
    z: Chosen = NOTHING,
    *,
    names: Sequence[str] = (),
    known: Mapping[str, styles.Style] = MappingProxyType({}),
    models: Path | None = None,
) -> Layout:
    """A plot with the values of x as columns, those of y as rows and those of z as sheets.

    The values of x act on the request first, then those of y, then those of z; styles are applied last.

    names, known: the styles of all cells, and those there are.
    models: the folder where checkpoints and autoencoders are found by their names.
    Raises RequestError for too many cells, and for a value with which there is not one cell. A combination of
    values that cannot be is a cell with the reason.
    """
    count = len(x.values) * len(y.values) * len(z.values)
    if count > MAX_CELLS:
        raise RequestError(f"the plot would have {count} pictures; at most {MAX_CELLS} can be drawn at once")

    found = cache(lambda name: find(name, models))

    def cell(*values: Any) -> Cell | LdmError:
        """values: of z, y and x."""
        made = Cell(request, styles=tuple(names))
        try:
            for chosen, value in zip((x, y, z), reversed(values), strict=True):
                made = chosen.axis.apply(made, value, chosen.values)
            styled = styles.apply(made.request, known, made.styles)
            return Cell(styled, made.checkpoint and found(made.checkpoint), made.vae and found(made.vae))
        except LdmError as error:
            return error

    cells = {
        place: cell(*(chosen.values[i] for chosen, i in zip((z, y, x), place, strict=True)))
        for place in itertools.product(*(range(len(chosen.values)) for chosen in (z, y, x)))
    }
    for side in range(3):
        usable = {place[side] for place, made in cells.items() if isinstance(made, Cell)}
        for place, made in cells.items():
            if isinstance(made, LdmError) and place[side] not in usable:
                raise made

    slowest = sorted(range(3), key=lambda side: -(z, y, x)[side].axis.cost)
    places = list(cells)
    order = sorted(range(count), key=lambda i: [places[i][side] for side in slowest])
    return Layout(tuple(cells.values()), tuple(order), x.titles, y.titles, z.titles)


def find(name: Path, folder: Path | None) -> Path:
    """A file with weights: its path, its name in a folder, or a part of that which only one has.

    "embedded" is the embedded model. Raises RequestError if there is no such file.
    """
    if str(name).lower() == "embedded":
        return DEFAULT_MODEL
    if name.is_file():
        return name
    there = {} if folder is None else library.files(folder)
    for fits in (
        lambda key: name.as_posix() in (key, f"{key}{there[key].suffix}"),
        lambda key: name.stem == key.rpartition("/")[2] or name.name == key.rpartition("/")[2],
        lambda key: str(name).lower() in key.lower(),
    ):
        matches = [key for key in there if fits(key)]
        if len(matches) == 1:
            return there[matches[0]]
        if matches:
            listed = printable(", ".join(matches), 100)
            raise RequestError(f"{len(matches)} files are called '{printable(str(name))}': {listed}")
    where = "; give its path, or the folder with --models-dir" if folder is None else f" in {folder}"
    raise RequestError(printable(f"there is no file '{printable(str(name))}'{where}", 200))
