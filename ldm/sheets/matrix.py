"""Every combination of the parts of a prompt: "a town|at night|in the rain" makes four pictures.

The web UI's script "Prompt matrix".
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from ldm import styles
from ldm.errors import RequestError
from ldm.request import Request
from ldm.sheets.cells import MAX_CELLS, Cell, Layout
from ldm.sheets.titles import Label, Title
from ldm.styles import Style


def combinations(prompt: str, *, at_start: bool = False, delimiter: str = ", ") -> list[str]:
    """The 2^(k-1) prompts of k parts between "|": the first part is in all, part n + 1 where bit n is set.

    at_start: put the other parts before the first one. delimiter: what stands between parts.
    Raises RequestError for too many parts.
    """
    first, *parts = prompt.split("|")
    if 2 ** min(len(parts), 99) > MAX_CELLS:
        most = int(math.log2(MAX_CELLS))
        raise RequestError(f"a prompt matrix has at most {most} parts behind the first, got {len(parts)}")
    found = []
    for number in range(2 ** len(parts)):
        chosen = [part.strip().strip(",") for n, part in enumerate(parts) if number & 1 << n]
        found.append(delimiter.join([*chosen, first] if at_start else [first, *chosen]))
    return found


def matrix(
    request: Request,
    *,
    negative: bool = False,
    at_start: bool = False,
    different_seeds: bool = False,
    delimiter: str = ", ",
    names: Sequence[str] = (),
    known: Mapping[str, Style] = MappingProxyType({}),
) -> Layout:
    """A sheet with every combination of the parts of a request's prompt.

    The first half of the parts belongs to the columns, the second to the rows; titles strike a part through
    where it is not in the pictures.

    negative: the parts are those of the negative prompt.
    different_seeds: give picture n the seed of the request + n.
    names, known: the styles of all pictures, applied last, and those there are.
    Raises RequestError for too many parts, or if there is no such style.
    """
    name = "negative_prompt" if negative else "prompt"
    text: str = getattr(request, name)
    prompts = combinations(text, at_start=at_start, delimiter=delimiter)
    requests = (
        replace(request, seed=request.seed + (n if different_seeds else 0), **{name: prompt})
        for n, prompt in enumerate(prompts)
    )
    cells = tuple(Cell(styles.apply(each, known, names)) for each in requests)
    parts = text.split("|")[1:]
    across = math.ceil(len(parts) / 2)
    return Layout(
        cells,
        order=tuple(range(len(cells))),
        tops=_titles(parts[:across]),
        lefts=_titles(parts[across:]),
    )


def _titles(parts: list[str]) -> tuple[Title, ...]:
    return tuple(
        tuple(Label(part, active=bool(number & 1 << n)) for n, part in enumerate(parts))
        for number in range(2 ** len(parts))
    )
