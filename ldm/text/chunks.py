"""Cut a prompt into chunks of as many tokens as the text encoder takes at once, as the web UI does.

CLIP has 77 positions: START, 75 tokens and END. The encodings of a long prompt's chunks are put in a row.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import compress
from typing import NamedTuple

from ldm.errors import PromptError
from ldm.formats.mapped import printable

CHUNK = 75  # tokens between START and END
BACKTRACK = 20  # how far a chunk is cut back to end in a comma (the web UI's setting)

Encode = Callable[[str], list[int]]
"""Text to tokens without START and END, such as `Tokenizer.encode`."""


class Chunk(NamedTuple):
    """What a text encoder takes at once."""

    ids: tuple[int, ...]  # content tokens, without START and END; 0 where an embedding's vectors belong
    weights: tuple[float, ...]  # of these
    embeddings: tuple[tuple[int, str], ...]  # (place of its first vector in `ids`, name)
    size: int  # places taken, for counting: all if the text goes on behind this chunk

    def weight_row(self, length: int = CHUNK + 2) -> list[float]:
        """The weights of `length` positions, with START in front, END and padding behind."""
        return [1.0, *self.weights, *[1.0] * (length - 1 - len(self.weights))]

    def without(self, weight: float) -> "Chunk":
        """The chunk without its tokens of this weight."""
        kept = [w != weight for w in self.weights]
        moved = tuple((sum(kept[:place]), name) for place, name in self.embeddings if kept[place])
        ids, weights = tuple(compress(self.ids, kept)), tuple(compress(self.weights, kept))
        return Chunk(ids, weights, moved, len(ids))


EMPTY = Chunk((), (), (), 0)


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
                raise PromptError(
                    f"the embedding '{printable(name)}' has {count} vectors; this text encoder takes {length}"
                )
            if len(ids) + count > length:
                close(len(ids))
            places.append((len(ids), name))
            ids += [0] * count
            weights += [weight] * count
            position += taken
    if ids or not done:
        done.append(Chunk(tuple(ids), tuple(weights), tuple(places), len(ids)))
    return done
