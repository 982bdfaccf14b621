r"""Prompts that change while the picture is drawn: [from:to:when] and [a|b], as in the web UI.

    [cat:dog:0.5]   cat in the first half of the steps, dog in the second
    [cat:dog:8]     cat for 8 steps
    [dog:0.5]       dog only in the second half
    [cat::0.5]      cat only in the first half
    [cat|dog|]      cat, dog, nothing, cat, ... step by step

They nest, and (weights) may stand inside and outside. `schedule` reads such a prompt once and tells for each
step which text holds; those texts are then prompts without editing.

The steps are those at hand, not calls of the model: samplers that call it twice per step, or an adaptive
number of times, need nothing special.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from ldm.text.prompt import too_many

_MARK = re.compile(r"([\[\]():|\\](?:(?<=\\).)?)")  # with the character behind a backslash
_WHEN = re.compile(r"\s*([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*")
_BARS = re.compile(r"\[\|+\]")


class _Choice(NamedTuple):
    """An edit or an alternation, as places in a list of tokens."""

    options: tuple[tuple[int, int], ...]  # each from its first token up to the one behind its last
    end: int  # the place behind the closing bracket
    when: int | None  # edits: the first option holds up to and with this step, counted from 1

    def at(self, step: int) -> tuple[int, int]:
        if self.when is None:
            return self.options[(step - 1) % len(self.options)]
        return self.options[0] if step <= self.when else self.options[1]


@dataclass(frozen=True, eq=False)
class Schedule:
    """The texts of a run, in segments of steps. Texts are made when asked for: each step may have its own."""

    ends: tuple[int, ...]  # the step that each segment ends with, counted from 1; the last is `steps`
    _tokens: Sequence[str] = field(repr=False)
    _choices: Mapping[int, _Choice] = field(repr=False)  # by the place of the opening bracket

    def at(self, step: int, *, late: bool = False) -> int:
        """The segment that holds in a step, counted from 0.

        late: switch one step later than the prompt says, as the web UI does: it compares steps counted from
        0 with ends counted from 1.
        """
        segment = (bisect_left if late else bisect_right)(self.ends, step)
        return min(segment, len(self.ends) - 1)

    def text(self, segment: int) -> str:
        """The prompt of a segment, without editing."""
        step = self.ends[segment]
        texts: list[str] = []
        unread = [(0, len(self._tokens))]  # instead of recursion, as brackets may nest deeply
        while unread:
            place, end = unread.pop()
            while place < end:
                choice = self._choices.get(place)
                if choice is None:
                    texts.append(self._tokens[place])
                    place += 1
                else:
                    unread.append((choice.end, end))
                    place, end = choice.at(step)
        return "".join(texts)

    def segments(self) -> Iterator[tuple[int, str]]:
        """The step that each segment ends with, counted from 1, and its text."""
        return ((end, self.text(i)) for i, end in enumerate(self.ends))


def schedule(text: str, steps: int, *, hires_after: int | None = None, old: bool = False) -> Schedule:
    """Read a prompt with editing, for a run of `steps` steps.

    `when` with a decimal point is a share of the steps, without one a number of steps. Both count the steps
    that the run performs: in image to image at strength 0.5, [a:b:0.5] switches in the middle of these.
    hires_after: this is the second pass after a first one of so many steps. Its shares are 1.0 to 2.0 and its
    numbers of steps go on from there, so that one prompt describes both passes.
    old: the web UI's rule before version 1.6: below 1 a share, else a number of steps, of the first pass.
    """
    first_share, first_step = (0.0, 0) if hires_after is None else (1.0, hires_after)
    if old:
        steps, first_share, first_step = hires_after or steps, 0.0, 0

    def last_step(when: str) -> int:
        value = float(when)
        share = value < 1 if old else "." in when
        passed = (value - first_share) * steps if share else value - first_step
        return int(max(0, min(steps, passed)))  # no number of steps is too large for this

    tokens, choices = _parse(text, last_step)
    ends = {steps}
    for choice in choices.values():
        ends.update(range(1, steps + 1) if choice.when is None else [choice.when])
    return Schedule(tuple(sorted(ends - {0})), tokens, choices)


def _parse(text: str, last_step: Callable[[str], int]) -> tuple[list[str], dict[int, _Choice]]:
    """Split at the marks, and find the brackets that make up an edit or an alternation; others are text.

    The web UI's grammar without its ambiguities: brackets nest properly; round ones hold at most one colon;
    square ones hold no separator, or one or two colons with a number behind the last, or only bars. A bracket
    that is not like this is no bracket, and neither are those around it. One bar or backslash that is left
    over makes the whole prompt plain text.
    """
    if "[" not in text or too_many(text):
        return [text], {}
    tokens = _MARK.split(text)  # text at even places, marks at odd ones
    choices: dict[int, _Choice] = {}
    brackets: list[list[int]] = []  # those open: the places of the mark and of the separators behind it
    bars = 0  # how many are left over
    for place in range(1, len(tokens), 2):
        mark = tokens[place]
        if mark in "([":
            brackets.append([place])
        elif mark in ":|":
            bars += mark == "|"
            if brackets:
                brackets[-1].append(place)
        elif mark == "\\":
            return [text], {}
        elif mark in ")]" and brackets:
            places = [*brackets.pop(), place]
            gaps = tuple((left + 1, right) for left, right in pairwise(places))
            shape = "".join(tokens[i] for i in places)
            number = _WHEN.fullmatch(tokens[place - 1]) if places[-2] == place - 2 else None
            if shape in ("[:]", "[::]") and number:
                options = ((0, 0), *gaps[:-1])[-2:]  # [after:when] has nothing before
                choices[places[0]] = _Choice(options, place + 1, last_step(number[1]))
            elif _BARS.fullmatch(shape):
                bars -= len(gaps) - 1
                choices[places[0]] = _Choice(gaps, place + 1, None)
            elif shape not in ("()", "(:)", "[]"):
                brackets.clear()
    return ([text], {}) if bars else (tokens, choices)
