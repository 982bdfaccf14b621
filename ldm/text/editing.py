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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from ldm.text.prompt import too_many

_MARK = re.compile(r"((?:\\.)+|[\[\]():|\\])")
_WHEN = re.compile(r"\s*([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*")


class _Edit(NamedTuple):
    """[before:after:when]"""

    before: "_Parts"
    after: "_Parts"
    when: int  # `before` holds up to and with this step, counted from 1


class _Alternation(NamedTuple):
    """[a|b|c]"""

    options: "list[_Parts]"


_Part: TypeAlias = "str | _Edit | _Alternation | _Parts"
_Parts: TypeAlias = list[_Part]


@dataclass(frozen=True, eq=False)
class Schedule:
    """The texts of a run, in segments of steps. Texts are made when asked for: each step may have its own."""

    ends: tuple[int, ...]  # the step that each segment ends with, counted from 1; the last is `steps`
    _parts: _Parts = field(repr=False)

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
        unread = [iter(self._parts)]  # instead of recursion, as brackets may nest deeply
        while unread:
            part = next(unread[-1], None)
            if part is None:
                unread.pop()
            elif isinstance(part, str):
                texts.append(part)
            elif isinstance(part, _Edit):
                unread.append(iter(part.before if step <= part.when else part.after))
            elif isinstance(part, _Alternation):
                unread.append(iter(part.options[(step - 1) % len(part.options)]))
            else:
                unread.append(iter(part))
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

    parts = _parse(text, last_step)
    ends = {steps}
    for part in _walk(parts):
        ends.update(range(1, steps + 1) if isinstance(part, _Alternation) else [part.when])
    return Schedule(tuple(sorted(ends - {0})), parts)


class _Malformed(Exception):
    pass


class _Bracket(NamedTuple):
    """A bracket that is not closed yet."""

    mark: str
    groups: list[_Parts]  # what stands in it, cut at the separators
    separators: list[str]  # ":" and "|"


def _parse(text: str, last_step: Callable[[str], int]) -> _Parts:
    """Read the brackets that make up an edit or an alternation, and leave all others as text.

    The web UI's grammar, without its ambiguities: brackets nest properly; round ones hold at most one colon;
    square ones hold no separator, or one or two colons with a number behind the last, or only bars. A bracket
    that is not like this is text, and so are those around it. One bar or backslash that is left over makes
    the whole prompt plain text.
    """
    if "[" not in text or too_many(text):
        return [text]
    outside: _Parts = []
    brackets: list[_Bracket] = []

    def give_up() -> None:
        """Turn the open brackets into text."""
        for bracket in brackets:
            outside.append(bracket.mark)
            for group, separator in zip(bracket.groups, [*bracket.separators, ""], strict=True):
                if separator == "|":
                    raise _Malformed
                outside.extend((group, separator))
        brackets.clear()

    def close(mark: str) -> None:
        if brackets and (part := _closed(brackets[-1], mark, last_step)) is not None:
            brackets.pop()
        else:
            give_up()
            part = mark
        (brackets[-1].groups[-1] if brackets else outside).append(part)

    try:
        for i, piece in enumerate(_MARK.split(text)):
            here = brackets[-1].groups[-1] if brackets else outside
            if i % 2 == 0 or len(piece) > 1:  # between the marks, or escaped characters
                here.append(piece)
            elif piece in "([":
                brackets.append(_Bracket(piece, [[]], []))
            elif piece in ")]":
                close(piece)
            elif brackets and piece != "\\":
                brackets[-1].groups.append([])
                brackets[-1].separators.append(piece)
            elif piece == ":":
                here.append(piece)
            else:
                raise _Malformed
        give_up()
    except _Malformed:
        return [text]
    return outside


def _closed(bracket: _Bracket, mark: str, last_step: Callable[[str], int]) -> "_Part | None":
    """What a bracket means that ends in `mark`; None: it is not well formed."""
    groups, separators = bracket.groups, bracket.separators
    if bracket.mark + mark not in ("()", "[]"):
        return None
    if not separators:
        return [bracket.mark, groups[0], mark]
    if mark == ")":
        return ["(", groups[0], ":", groups[1], ")"] if separators == [":"] else None
    if ":" not in separators:
        return _Alternation(groups)
    if separators not in ([":"], [":", ":"]) or not all(isinstance(part, str) for part in groups[-1]):
        return None
    when = _WHEN.fullmatch("".join(part for part in groups[-1] if isinstance(part, str)))
    return when and _Edit(groups[0] if len(separators) == 2 else [], groups[-2], last_step(when[1]))


def _walk(parts: _Parts) -> Iterator[_Edit | _Alternation]:
    """All edits and alternations, also those inside others."""
    unread = [parts]
    while unread:
        for part in unread.pop():
            if isinstance(part, _Edit):
                yield part
                unread += [part.before, part.after]
            elif isinstance(part, _Alternation):
                yield part
                unread += part.options
            elif not isinstance(part, str):
                unread.append(part)
