r"""The language of prompts, as the web UI by AUTOMATIC1111 reads it.

A prompt goes through these functions in turn; each is of use alone:

    tags             <lora:name:0.8>        out of the text, into a list
    compose          a AND b :0.5           prompts that guide together, each with a weight
    editing.schedule [cat:dog:0.5] [a|b]    the texts of the steps of a run
    emphasis         (cat:1.3) [dog] \(     pieces of text, each with a weight
    chunks.chunks    BREAK                  pieces of as many tokens as a text encoder takes at once

Nothing here fails on any text: what is not well formed is plain text. All of it takes time in proportion to
the length. The rules are those of the web UI's prompt_parser.py and sd_hijack_clip.py, and tests hold us to
the results of these.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, groupby
from operator import itemgetter, mul

from ldm.compat import Emphasis
from ldm.errors import PromptError
from ldm.formats.mapped import printable

MARKS = ("(", ")", "[", "]", ":", "|", "\\", "<", "AND", "BREAK")
LIMIT = 20_000  # of these in one prompt; if there are more, all is plain text, see `too_many`
UP, DOWN = 1.1, 1 / 1.1  # the factors of (text) and [text]
_POWERS = dict(enumerate(accumulate([1.0] + [UP] * 100, mul))) | {
    -n: power for n, power in enumerate(accumulate([1.0] + [DOWN] * 100, mul))
}  # of 1.1, by repeated multiplication, as in the original: pieces are joined where weights are equal

_TAG = re.compile(r"<(lora|lyco|hypernet):([^>]+)>")
# Whole words; not r"\bAND\b", which is tried at every letter: these skip to the next "AND" at once.
_AND = re.compile(r"AND(?<=\bAND)\b")
_BREAK = re.compile(r"BREAK(?<=\bBREAK)\b")
_COMPOSE_WEIGHT = re.compile(r"[-+]?(?:\d+\.?|\d*\.\d+)")
_EMPHASIS_MARKS = re.compile(r"[^\\()\[\]:]+|\(+|\[+|\)+|\]+|:\s*[+-]?[.\d]+\s*\)|:|\\[()\[\]\\]?")


def too_many(text: str) -> bool:
    """Whether brackets and the like are too many to be meant; without this, 1 MB of them takes a second."""
    return sum(map(text.count, MARKS)) > LIMIT


@dataclass(frozen=True)
class Tag:
    """An extra network: <lora:name:0.8>, <lora:name:0.8:0.5>, <lora:name:unet=0.5>, <hypernet:name:1>."""

    kind: str  # "lora", "lyco" (which is the same) or "hypernet"; others are plain text
    args: tuple[str, ...]
    named: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.args[0] if self.args else ""

    def multipliers(self) -> tuple[float, float]:
        """The strengths for the text encoder (1 if not given) and the UNet (the former if not given).

        Raises PromptError if one is no number, or an argument is unknown.
        """
        given: dict[str, str] = {**dict(zip(("te", "unet"), self.args[1:], strict=False)), **self.named}
        unknown = [*self.args[3:], *(name for name in self.named if name not in ("te", "unet"))]
        if unknown:
            raise PromptError(
                f"{self}: cannot use '{printable(unknown[0], 20)}'; "
                "expected <lora:name:strength for the text encoder:strength for the UNet>"
            )
        te = _number(given.get("te", "1"))
        unet = te if "unet" not in given else _number(given["unet"])
        if te is None or unet is None:
            raise PromptError(f"{self}: the strengths must be numbers, such as <lora:name:0.8:0.5>")
        return te, unet

    def __str__(self) -> str:
        arguments = [*self.args, *(f"{name}={value}" for name, value in self.named.items())]
        return printable(f"<{':'.join([self.kind, *arguments])}>")


def tags(text: str) -> tuple[str, list[Tag]]:
    """Take the tags out of a prompt: the text without them, and the tags in their order."""
    found: list[Tag] = []

    def take(match: re.Match[str]) -> str:
        args, named = [], {}
        for argument in match[2].split(":"):
            key, equals, value = argument.partition("=")
            if equals and "=" not in value:
                named[key] = value
            else:
                args.append(argument)
        found.append(Tag(match[1], tuple(args), named))
        return ""

    # Behind the last ">" no tag can end. Looking for its end from every "<" there would be quadratic.
    end = 0 if too_many(text) else text.rfind(">") + 1
    return _TAG.sub(take, text[:end]) + text[end:], found


def without_comments(text: str) -> str:
    """Drop what stands behind "#" in each line, and the lines that hold nothing else."""
    if "#" not in text:
        return text
    lines = ((line.partition("#"), line) for line in text.split("\n"))
    return "\n".join(before for (before, _, _), line in lines if before or not line)


def compose(text: str) -> list[tuple[str, float]]:
    """Split at AND into prompts with weights: "a AND b :0.5" is a with 1 and b with 0.5.

    A prompt without AND is one of these, too: "a cat :0.5" weighs 0.5. The weights are factors of guidance,
    D = D(uncond) + scale * sum of w_i (D(prompt_i) - D(uncond)). Liu et al. 2022, arXiv:2206.01714,
    equation 11.
    """
    prompts = []
    for part in [text] if too_many(text) else _AND.split(text):
        part = part.rstrip()
        before, colon, after = part.rpartition(":")
        weight = _number(after) if colon and _COMPOSE_WEIGHT.fullmatch(after.lstrip()) else None
        prompts.append((part, 1.0) if weight is None else (before.rstrip(), weight))
    return prompts


def emphasis(text: str, mode: Emphasis = "original") -> list[tuple[str, float]]:
    r"""Split into pieces of text with weights; neighbours of equal weight are one piece.

    (text) weighs 1.1, [text] 1/1.1, (text:1.3) 1.3, and nested ones their product. A bracket that is never
    closed reaches to the end, one that was never opened is text. \( \) \[ \] \\ are the characters
    themselves, and any other backslash goes away. BREAK becomes a piece of its own with weight -1.
    mode: "none" leaves all of this as plain text; the other modes differ in `ldm.text.emphasis` only.

    As in the web UI, a BREAK inside brackets has another weight than -1 and is a word like any other, and
    round and square brackets need not nest in one another: "(a [b) c]".
    """
    if mode == "none" or too_many(text):
        return [(text, 1.0)]
    pieces: list[str] = []
    breaks: list[int] = []  # which of the pieces are a BREAK
    spans: list[tuple[int, int, float]] = []  # (first piece, end, factor), inner ones first
    rounds: list[int] = []  # where brackets not yet closed were opened
    squares: list[int] = []
    for mark in _EMPHASIS_MARKS.findall(text):
        first = mark[0]
        if first == "(":
            rounds += [len(pieces)] * len(mark)
        elif first == "[":
            squares += [len(pieces)] * len(mark)
        elif first in ")]":
            opened, factor = (rounds, UP) if first == ")" else (squares, DOWN)
            for bracket in mark:
                if opened:
                    spans.append((opened.pop(), len(pieces), factor))
                else:
                    pieces.append(bracket)
        elif first == ":" and len(mark) > 1 and rounds:
            weight = _number(mark[1:-1])
            if weight is None:  # (a:1.2.3)
                pieces.append(mark[:-1])
            spans.append((rounds.pop(), len(pieces), UP if weight is None else weight))
        elif first == "\\":
            pieces.append(mark[1:])
        elif "BREAK" in mark:
            before, *others = _BREAK.split(mark)
            for after in others:
                pieces += [before.rstrip(), "BREAK"]
                breaks.append(len(pieces) - 1)
                before = after.lstrip()
            pieces.append(before)
        else:
            pieces.append(mark)
    spans += [(start, len(pieces), UP) for start in rounds]
    spans += [(start, len(pieces), DOWN) for start in squares]

    weights = _weights(len(pieces), spans)
    for i in breaks:
        weights[i] *= -1
    runs = groupby(zip(pieces, weights, strict=True), key=itemgetter(1))
    return [("".join(text for text, _ in run), weight) for weight, run in runs] or [("", 1.0)]


def _weights(count: int, spans: list[tuple[int, int, float]]) -> list[float]:
    """For each of `count` pieces the product of the factors of the spans that it lies in.

    The factors of brackets without a number are counted, not multiplied, as round and square ones may cross;
    those with a number nest. So one walk over the pieces will do, however deep they are.
    """
    steps = [0] * (count + 1)  # by how much the power of 1.1 changes in front of each piece
    begins: defaultdict[int, list[float]] = defaultdict(list)
    ends = [0] * (count + 1)
    for start, end, factor in spans:
        if start == end:
            continue
        if factor in (UP, DOWN):
            step = 1 if factor == UP else -1
            steps[start] += step
            steps[end] -= step
        else:
            begins[start].append(factor)
            ends[end] += 1

    weights, power, products = [], 0, [1.0]
    for i in range(count):
        power += steps[i]
        if ends[i]:
            del products[-ends[i] :]
        for factor in reversed(begins.get(i, ())):
            products.append(_bounded(products[-1] * factor))
        weights.append(products[-1] * _POWERS[max(-100, min(100, power))])
    return weights


def _number(text: str) -> float | None:
    """The number that is written there, if it is a finite one."""
    try:
        value = float(text)
    except ValueError:
        return None
    return _bounded(value) if math.isfinite(value) else None


def _bounded(weight: float) -> float:
    """Keep a weight finite whatever is multiplied: 0 times infinity would be a picture of NaN."""
    return max(-1e6, min(1e6, weight))
