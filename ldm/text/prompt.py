r"""The language of prompts, as the web UI by AUTOMATIC1111 reads it: text in, tokens and weights out.

A prompt goes through these functions in turn; each is of use alone, and `ldm.text.editing` stands between
the second and the third:

    tags       <lora:name:0.8>         out of the text, into a list
    compose    a AND b :0.5            prompts that guide together, each with a weight
    schedule   [cat:dog:0.5] [a|b]     the texts of the steps of a run, see `ldm.text.editing`
    emphasis   (cat:1.3) [dog] \(      pieces of text, each with a weight
    chunks     BREAK                   pieces of as many tokens as a text encoder takes at once

Nothing here fails on any text: what is not well formed is plain text. All of it takes time in proportion to
the length. The rules are those of the web UI's prompt_parser.py and sd_hijack_clip.py, held to its results
by tests.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from operator import mul
from typing import NamedTuple

from ldm.compat import Emphasis
from ldm.errors import PromptError

CHUNK = 75  # tokens between START and END in CLIP's 77 positions
BACKTRACK = 20  # how far a chunk is cut back to end in a comma (the web UI's setting)
MARKS = ("(", ")", "[", "]", ":", "|", "\\", "<", "AND", "BREAK")
LIMIT = 100_000  # of these in one prompt; if there are more, all is plain text, see `too_many`
_POWERS = dict(enumerate(accumulate([1.0] + [1.1] * 100, mul))) | {
    -n: power for n, power in enumerate(accumulate([1.0] + [1 / 1.1] * 100, mul))
}  # of 1.1, by repeated multiplication, as in the original: pieces are joined where weights are equal

_TAG = re.compile(r"<(\w+):([^>]+)>")
# Whole words; not r"\bAND\b", which is tried at every letter: these skip to the next "AND" at once.
_AND = re.compile(r"AND(?<=\bAND)\b")
_BREAK = re.compile(r"BREAK(?<=\bBREAK)\b")
_COMPOSE_WEIGHT = re.compile(r"[-+]?(?:\d+\.?|\d*\.\d+)")
_EMPHASIS_MARKS = re.compile(r"[^\\()\[\]:]+|\(+|\[+|\)+|\]+|:\s*[+-]?[.\d]+\s*\)|:|\\[()\[\]\\]?")

Encode = Callable[[str], list[int]]
"""Text to tokens without START and END, such as `Tokenizer.encode`."""


def too_many(text: str) -> bool:
    """Whether brackets and the like are too many to be meant; without this, 1 MB of them takes a second."""
    return sum(map(text.count, MARKS)) > LIMIT


@dataclass(frozen=True)
class Tag:
    """An extra network: <lora:name:0.8>, <lora:name:0.8:0.5>, <lora:name:unet=0.5>, <hypernet:name:1>."""

    kind: str  # "lora", "lyco", "hypernet", or whatever stood there
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
            raise PromptError(f"{self}: cannot use {unknown[0]!r}; expected <{self.kind}:name:te:unet>")
        te = _number(given.get("te", "1"))
        unet = te if "unet" not in given else _number(given["unet"])
        if te is None or unet is None:
            raise PromptError(f"{self}: the strengths must be numbers, such as <{self.kind}:{self.name}:0.8>")
        return te, unet

    def __str__(self) -> str:
        return f"<{':'.join([self.kind, *self.args, *(f'{k}={v}' for k, v in self.named.items())])}>"


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
        before, _, after = part.rpartition(":")
        weight = _number(after) if _COMPOSE_WEIGHT.fullmatch(after.lstrip()) else None
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
    bases: list[float] = []  # 1, and -1 for BREAK
    spans: list[tuple[int, int, float]] = []  # (first piece, end, factor), inner ones first
    rounds: list[int] = []  # where brackets not yet closed were opened
    squares: list[int] = []

    def literal(plain: str) -> None:
        parts = _BREAK.split(plain)
        for i, part in enumerate(parts):
            if i > 0:
                part = part.lstrip()
                pieces.append("BREAK")
                bases.append(-1.0)
            pieces.append(part.rstrip() if i < len(parts) - 1 else part)
            bases.append(1.0)

    for mark in _EMPHASIS_MARKS.findall(text):
        first = mark[0]
        if first == "(":
            rounds += [len(pieces)] * len(mark)
        elif first == "[":
            squares += [len(pieces)] * len(mark)
        elif first == ")" or (first == "]"):
            opened, factor = (rounds, 1.1) if first == ")" else (squares, 1 / 1.1)
            for bracket in mark:
                if opened:
                    spans.append((opened.pop(), len(pieces), factor))
                else:
                    literal(bracket)
        elif first == "\\":
            pieces.append(mark[1:])
            bases.append(1.0)
        elif first == ":" and len(mark) > 1 and rounds:
            weight = _number(mark[1:-1])
            if weight is None:  # (a:1.2.3)
                literal(mark[:-1])
            spans.append((rounds.pop(), len(pieces), 1.1 if weight is None else weight))
        else:
            literal(mark)
    spans += [(start, len(pieces), 1.1) for start in rounds]
    spans += [(start, len(pieces), 1 / 1.1) for start in squares]

    weights = [w * base for w, base in zip(_weights(len(pieces), spans), bases, strict=True)]
    runs = groupby(zip(pieces, weights, strict=True), key=lambda piece: piece[1])
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
        if factor in (1.1, 1 / 1.1):
            step = 1 if factor == 1.1 else -1
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


class Chunk(NamedTuple):
    """What a text encoder takes at once."""

    ids: tuple[int, ...]  # content tokens, without START and END; 0 where an embedding's vectors belong
    weights: tuple[float, ...]  # of these
    embeddings: tuple[tuple[int, str], ...]  # (place of its first vector in `ids`, name)
    size: int  # places taken, for counting: all if the text goes on behind this chunk

    def weight_row(self, length: int = CHUNK + 2) -> list[float]:
        """The weights of `length` positions, with START in front, END and padding behind."""
        return [1.0, *self.weights, *[1.0] * (length - 1 - len(self.weights))]


class EmbeddingNames:
    """Names of textual inversion embeddings, to be found in a prompt by their tokens."""

    def __init__(self, encode: Encode, vectors: Mapping[str, int]) -> None:
        """vectors: name -> number of vectors."""
        self._by_first: defaultdict[int, list[tuple[list[int], str, int]]] = defaultdict(list)
        for name, count in vectors.items():
            if ids := encode(name):
                self._by_first[ids[0]].append((ids, name, count))
        for entries in self._by_first.values():
            entries.sort(key=lambda entry: len(entry[0]), reverse=True)

    def at(self, ids: Sequence[int], place: int) -> tuple[str, int, int] | None:
        """The longest name that stands at this place: (name, vectors, tokens of the name)."""
        for name_ids, name, count in self._by_first.get(ids[place], ()):
            if ids[place : place + len(name_ids)] == name_ids:
                return name, count, len(name_ids)
        return None


def chunks(
    pieces: Iterable[tuple[str, float]],
    encode: Encode,
    *,
    length: int = CHUNK,
    embeddings: EmbeddingNames | None = None,
    backtrack: int = BACKTRACK,
) -> list[Chunk]:
    """Cut the pieces that `emphasis` returns into chunks of up to `length` tokens; there is at least one.

    If the chunk that gets full has a comma among its last `backtrack` tokens, what follows the comma moves
    to the next chunk. BREAK ends a chunk. An embedding is never cut in two.
    Raises PromptError if an embedding has more vectors than a chunk has places.
    """
    (comma,) = encode(",")
    done: list[Chunk] = []
    ids: list[int] = []  # of the chunk at work
    weights: list[float] = []
    places: list[tuple[int, str]] = []
    last_comma = -1

    def close(at: int) -> None:
        """End the chunk after `at` tokens; the others begin the next one."""
        nonlocal ids, weights, places, last_comma
        stay = tuple(place for place in places if place[0] < at)
        done.append(Chunk(tuple(ids[:at]), tuple(weights[:at]), stay, length))
        places = [(place - at, name) for place, name in places if place >= at]
        ids, weights, last_comma = ids[at:], weights[at:], -1

    for text, weight in pieces:
        if text == "BREAK" and weight == -1:
            close(len(ids))
            continue
        tokens = encode(text)
        position = 0
        while position < len(tokens):
            token = tokens[position]
            if token == comma:
                last_comma = len(ids)
            elif len(ids) == length and last_comma >= 0 and length - last_comma <= backtrack:
                close(last_comma + 1)
            if len(ids) == length:
                close(length)
            found = embeddings.at(tokens, position) if embeddings else None
            if found is None:
                ids.append(token)
                weights.append(weight)
                position += 1
                continue
            name, count, taken = found
            if count > length:
                raise PromptError(f"embedding {name!r} has {count} vectors; this text encoder takes {length}")
            if len(ids) + count > length:
                close(len(ids))
            places.append((len(ids), name))
            ids += [0] * count
            weights += [weight] * count
            position += taken
    if ids or not done:
        done.append(Chunk(tuple(ids), tuple(weights), tuple(places), len(ids)))
    return done


def _number(text: str) -> float | None:
    """A finite number, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _bounded(weight: float) -> float:
    """Keep a weight finite whatever is multiplied: 0 times infinity would be a picture of NaN."""
    return max(-1e6, min(1e6, weight))
