"""The byte-pair tokenizer of CLIP: text to numbers between 0 and 49405.

A text is cleaned, lower-cased and split into words; each word becomes UTF-8 bytes, and neighbouring pieces
are merged in the order in which the merges were learned. Every byte is itself a token, so nothing is unknown.

Radford et al. 2021, arXiv:2103.00020, section 2.4; the merge algorithm is Sennrich et al. 2016,
arXiv:1508.07909. The vocabulary is the file that open_clip_torch ships.

Published tokenizers differ in how they clean a text. We follow the original CLIP (and open_clip), with which
Stable Diffusion was trained: HTML entities are resolved, control characters dropped, typographic quotes,
ligatures and full-width letters made plain, accents composed. Two things are left out: the repair of wrongly
decoded text ("cafÃ©"), and special tokens written out in a prompt, which are plain text here.
transformers 5 does none of the cleaning except composing accents.
"""

import gzip
import heapq
import html
import importlib.util
import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from itertools import islice
from pathlib import Path

from ldm.errors import LdmError

START = 49406
END = 49407
CONTEXT_LENGTH = 77  # positions every CLIP text model was trained with, START and END included
_MERGES = START - 2 * 256  # the vocabulary: 256 bytes, the same at the end of a word, the merges, START, END

# What the original makes plain with ftfy (6.3), as one table.
_CONTROL = [
    *range(0x09),
    0x0B,
    *range(0x0E, 0x20),
    0x7F,
    *range(0x206A, 0x2070),
    0xFEFF,
    *range(0xFFF9, 0xFFFD),
]
_WIDE = map(chr, [0x3000, *range(0xFF01, 0xFFF0)])
_LIGATURES = "ĲĳǄǅǆǇǈǉǊǋǌǱǲǳﬀﬁﬂﬃﬄﬆ"
_PLAIN = str.maketrans(
    {char: unicodedata.normalize("NFKC", char) for char in [*_WIDE, *_LIGATURES]}
    | dict.fromkeys("\u2018\u2019\u201a\u201b\u02bc", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f", '"')
    | dict.fromkeys(map(chr, _CONTROL))
    | {"ŉ": "'n", "ﬅ": "ſt"}
)

# Python refuses to read numbers of thousands of digits; no character has more than seven.
_ABSURD_REFERENCE = re.compile(r"&#[0-9]{20,};?")

# CLIP's pattern says \p{L}+ for runs of letters and \p{N} for single numerals. In `re`, \w is letters,
# numerals and the underscore, and \d decimal digits only; `words` sets the other numerals apart beforehand.
_WORD = re.compile(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\W\d_]+|\d|(?:[^\w\s]|_)+")


def clean(text: str) -> str:
    """Resolve entities, make typography plain, squeeze white space, lower the case. Never fails."""
    for _ in range(2):  # twice, as "&amp;lt;" is common in captions from the web
        text = html.unescape(_ABSURD_REFERENCE.sub("\N{REPLACEMENT CHARACTER}", text))
    # Lone halves of surrogate pairs are legal in a str but have no UTF-8.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    text = unicodedata.normalize("NFC", text.translate(_PLAIN))
    return " ".join(text.split()).lower()


def words(text: str) -> list[str]:
    """Split a cleaned text into runs of letters, runs of signs, single numerals and "'s"-like endings."""
    numerals = "".join(char for char in set(text) if unicodedata.category(char) in ("Nl", "No"))  # ½ Ⅷ ①
    if numerals:
        text = re.sub(f"([{numerals}])", r" \1 ", text)
    return _WORD.findall(text)


def merge(ids: list[int], merges: dict[tuple[int, int], int]) -> list[int]:
    """Apply the merges to a word's pieces, earliest learned first, then leftmost first.

    merges: pair of ids -> id of the two together; ids grow in the order of learning.
    A heap of candidate pairs over a linked list: O(n log n), so a word of a million letters is no trap.
    """
    following = [*range(1, len(ids)), -1]
    preceding = [*range(-1, len(ids) - 1)]
    pieces: list[int | None] = [*ids]
    heap: list[tuple[int, int, int, int]] = []

    def consider(left: int, right: int) -> None:
        a, b = pieces[left], pieces[right]
        if a is not None and b is not None and (merged := merges.get((a, b))) is not None:
            heapq.heappush(heap, (merged, left, a, b))

    for left in range(len(ids) - 1):
        consider(left, left + 1)
    while heap:
        merged, left, a, b = heapq.heappop(heap)
        right = following[left]
        if pieces[left] != a or right < 0 or pieces[right] != b:
            continue  # one of the two went into another merge meanwhile
        pieces[left], pieces[right] = merged, None
        following[left] = after = following[right]
        if after >= 0:
            preceding[after] = left
            consider(left, after)
        if preceding[left] >= 0:
            consider(preceding[left], left)
    return [piece for piece in pieces if piece is not None]


class Tokenizer:
    """CLIP's vocabulary of 49,408 tokens. Reading it takes about 0.1 s, so keep the instance."""

    def __init__(self) -> None:
        # The file writes a byte as its Latin-1 character where that is visible, else as one from 256 on.
        visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        order = visible + [byte for byte in range(256) if byte not in visible]
        chars = [chr(byte) for byte in visible] + [chr(256 + i) for i in range(256 - len(visible))]
        index = {name: i for i, name in enumerate([*chars, *(char + "</w>" for char in chars)])}
        self._id_of_byte = {byte: i for i, byte in enumerate(order)}
        self._pieces = [bytes([byte]) for byte in order] + [bytes([byte]) + b" " for byte in order]
        self._merges: dict[tuple[int, int], int] = {}
        for merged, (first, second) in enumerate(_read_merges(), start=len(index)):
            a, b = index[first], index[second]
            index[first + second] = merged
            self._merges[a, b] = merged
            self._pieces.append(self._pieces[a] + self._pieces[b])
        self._pieces += [b"<|startoftext|>", b"<|endoftext|>"]
        self.encode_word = lru_cache(maxsize=1 << 16)(self._merge_word)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text of any length, without START and END."""
        return [token for word in words(clean(text)) for token in self.encode_word(word)]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the cleaned text again, a space after each word; a cut character becomes U+FFFD."""
        return b"".join(self._pieces[token] for token in ids).decode("utf-8", "replace")

    def pad(self, ids: list[int], length: int = CONTEXT_LENGTH, pad_id: int = END) -> list[int]:
        """Wrap in START and END and fill up to exactly `length`; what does not fit is cut off.

        pad_id: END for CLIP-L, as Stable Diffusion 1 was trained; 0 for open_clip's models.
        """
        row = [START, *ids[: length - 2], END]
        return row + [pad_id] * (length - len(row))

    def _merge_word(self, word: str) -> tuple[int, ...]:
        ids = [self._id_of_byte[byte] for byte in word.encode()]
        ids[-1] += 256  # the same byte, at the end of a word
        return tuple(merge(ids, self._merges))


def _read_merges() -> Iterable[list[str]]:
    """Yield the 48,894 pairs of the vocabulary file, without importing open_clip, which is slow."""
    spec = importlib.util.find_spec("open_clip")
    folders = spec.submodule_search_locations if spec else None
    path = Path(folders[0] if folders else "open_clip") / "bpe_simple_vocab_16e6.txt.gz"
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            yield from (line.split() for line in islice(lines, 1, 1 + _MERGES))
    except (OSError, EOFError) as error:
        raise LdmError(
            f"CLIP's vocabulary cannot be read ({error}); install it with: pip install open_clip_torch"
        ) from None
