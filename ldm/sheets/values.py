"""The values of an axis as people write them: lists with commas, and ranges of numbers, as in the web UI.

    1, 5, 10          single values; "a, b" in quotes is one value
    1-5               1, 2, 3, 4, 5
    1-10(+3)          1, 4, 7, 10: in steps of 3; 10-1(-3) counts down
    1-10[4]           1, 4, 7, 10: so many, evenly spread; whole numbers lose their fraction

A range reaches its end where the steps lead there, and never goes beyond. (In the web UI 0-1(+0.3) ends in
1.2, and 10-1(-3) in 4.)
"""

import csv
import itertools
import math
import re
from fractions import Fraction

from ldm.errors import RequestError
from ldm.formats.mapped import printable, reason

MAX_VALUES = 1000  # of one axis
_MAX_LETTERS = 100  # of a number or a range

_WHOLE, _DECIMAL = r"[+-]?\s*\d+", r"[+-]?\s*\d+(?:\.\d*)?"


def _range(number: str) -> re.Pattern[str]:
    """start - end, then perhaps (+step) or [count]."""
    step, count = rf"\(\s*({number})\s*\)", r"\[\s*(\d+)\s*\]"
    return re.compile(rf"({number})\s*-\s*({number})\s*(?:{step}|{count})?", re.ASCII)


_WHOLE_RANGE, _DECIMAL_RANGE = _range(_WHOLE), _range(_DECIMAL)


def texts(text: str) -> list[str]:
    """A list with commas by the rules of CSV: quotes around a value protect its commas.

    Raises RequestError for too many values, or too long ones.
    """
    try:
        rows = list(csv.reader(text.splitlines(), skipinitialspace=True))
    except csv.Error as error:
        raise RequestError(f"this is no list of values: {reason(error)}") from None
    values = [value.strip() for row in rows for value in row]
    if len(values) > MAX_VALUES:
        raise _too_many(len(values))
    return values


def integers(text: str) -> list[int]:
    """Whole numbers and ranges of them. Raises RequestError for anything else."""
    values: list[int] = []
    for item in _items(text):
        if re.fullmatch(_WHOLE, item, re.ASCII):
            values.append(int("".join(item.split())))
        else:
            values += map(int, _members(_WHOLE_RANGE, item, "a whole number"))
    return values


def floats(text: str) -> list[float]:
    """Numbers and ranges of them. Raises RequestError for anything else."""
    values: list[float] = []
    for item in _items(text):
        try:
            values.append(float(item))  # first, as 1e-3 is no range
        except ValueError:
            values += map(float, _members(_DECIMAL_RANGE, item, "a number"))
    if not all(map(math.isfinite, values)):
        raise RequestError("values must be finite numbers")
    return values


def permutations(text: str) -> list[tuple[str, ...]]:
    """All orders of a list, the given one first. Raises RequestError for more than six texts."""
    values = texts(text)
    if len(values) > 6:
        raise RequestError(f"{len(values)} texts have too many orders; six have 720")
    return list(itertools.permutations(values))


def _items(text: str) -> list[str]:
    """The values of a list of numbers; empty ones are left out."""
    items = [item for item in texts(text) if item]
    for item in items:
        if len(item) > _MAX_LETTERS:
            raise RequestError(f"{printable(item)!r} is too long for a number")
    return items


def _members(pattern: re.Pattern[str], item: str, what: str) -> list[Fraction]:
    """The numbers of a range, in exact arithmetic: 0.1 three times is 0.3."""
    match = pattern.fullmatch(item)
    if match is None:
        raise RequestError(f"{printable(item)!r} is neither {what} nor a range like 1-5, 1-9(+2) or 1-9[3]")
    start, end = _exact(match[1]), _exact(match[2])
    if match[4]:
        count = int(match[4])
        if count > MAX_VALUES:
            raise _too_many(count)
        return [start + (end - start) * i / max(count - 1, 1) for i in range(count)]
    step = _exact(match[3] or "1")
    if not step or (end - start) / step < 0:
        raise RequestError(f"the range {printable(item)!r} does not reach its end; 5-1(-1) counts down")
    steps = (end - start) // step
    if steps >= MAX_VALUES:
        raise _too_many(steps + 1)
    return [start + step * i for i in range(steps + 1)]


def _exact(number: str) -> Fraction:
    return Fraction("".join(number.split()))


def _too_many(count: int) -> RequestError:
    return RequestError(f"there are {count} values; an axis has at most {MAX_VALUES}")
