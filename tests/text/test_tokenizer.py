"""The tokenizer equals open_clip's and, given transformers' cleaning, that of transformers."""

import html
import importlib.util
import json
import random
import subprocess
import sys
import time
import unicodedata
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from ldm.errors import LdmError
from ldm.text.tokenizer import END, START, Tokenizer, clean, words
from tests.golden import golden

CASES = json.loads(golden("prompts/clip_bpe.json").read_text())["cases"]
# What this Python's Unicode tables know (newer tables have more), without the private planes.
ASSIGNED = [
    c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) not in ("Cn", "Co", "Cs")
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@cache
def open_clip_tokenizer() -> ModuleType:
    """open_clip's tokenizer module alone; the package would import torchvision."""
    package = importlib.util.find_spec("open_clip")
    assert package
    assert package.submodule_search_locations
    path = Path(package.submodule_search_locations[0]) / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("case", CASES, ids=lambda case: ascii(case["text"])[:30])
def test_equals_open_clip(tokenizer: Tokenizer, case: dict):
    ids = tokenizer.encode(case["text"])
    assert ids == case["open_clip_encode"]
    if "open_clip_77" in case:
        assert tokenizer.pad(ids, pad_id=0) == case["open_clip_77"]


def test_equals_the_tokenizer_that_stable_diffusion_1_used(tokenizer: Tokenizer):
    different = [case["text"] for case in CASES if "transformers_4_30_slow_ids" in case]
    # Written-out special tokens are tokens there and plain text here, as in open_clip.
    assert different == ["<|endoftext|>", "a<|endoftext|>b"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: ascii(case["text"])[:30])
def test_equals_transformers_once_cleaned_as_there(tokenizer: Tokenizer, case: dict):
    text = unicodedata.normalize("NFC", case["text"])
    text = "".join(c.lower() for c in " ".join(text.split()))  # letter by letter: no final sigma
    ids: list[int] = []
    for i, part in enumerate(text.split("<|endoftext|>")):
        ids += [END] * (i > 0)
        ids += [token for word in words(part) for token in tokenizer.encode_word(word)]
    assert ids == case.get("transformers_ids", case["open_clip_encode"])


def test_words_are_those_of_open_clips_pattern_for_all_of_unicode():
    pattern = open_clip_tokenizer().SimpleTokenizer().pat
    # U+0345 is a mark, but the `regex` module folds its case to a letter; transformers agrees with us.
    lowered = [c.lower() for c in ASSIGNED if not c.isspace() and c != "\u0345"]
    for text in (
        "".join(lowered),
        " ".join(lowered),
        "".join(f"a{c}" for c in lowered),
        "".join(f"1{c}'s" for c in lowered),
    ):
        assert words(text) == pattern.findall(text)


def test_random_texts_equal_open_clip(tokenizer: Tokenizer):
    peer = open_clip_tokenizer().SimpleTokenizer()
    generator = random.Random(0)
    for _ in range(300):
        letters = generator.choice(["abcdeilnorst '", "Aé'½ ²_-!x9\n", ASSIGNED])
        text = "".join(generator.choices(letters, k=generator.randint(1, 60)))
        cleaned = clean(text)
        # A text that is clean stays as it is, so only splitting and merging are compared here.
        assert tokenizer.encode(cleaned) == [
            peer.encoder[piece]
            for word in peer.pat.findall(cleaned)
            for piece in peer.bpe("".join(peer.byte_encoder[byte] for byte in word.encode())).split(" ")
        ]


def test_cleaning_equals_ftfy_for_every_character():
    ftfy = pytest.importorskip("ftfy")
    for char in ASSIGNED:
        if "\x80" <= char <= "\x9f":
            continue  # taken for Windows-1252 by ftfy; we leave out every repair of wrongly decoded text
        original = ftfy.fix_text(f"x{char}y", fix_encoding=False)
        expected = " ".join(html.unescape(html.unescape(original)).split()).lower()
        assert clean(f"x{char}y") == expected, ascii(char)


def test_decoding_gives_the_cleaned_words_back(tokenizer: Tokenizer):
    assert (
        tokenizer.decode(tokenizer.encode("A  Photo of\nan Äpfel, 日本!")) == "a photo of an äpfel , 日本 ! "
    )
    assert tokenizer.decode([START, *tokenizer.encode("x"), END]) == "<|startoftext|>x <|endoftext|>"


def test_padding_wraps_fills_and_cuts(tokenizer: Tokenizer):
    assert tokenizer.pad([5, 6], length=6) == [START, 5, 6, END, END, END]
    assert tokenizer.pad([5, 6], length=6, pad_id=0) == [START, 5, 6, END, 0, 0]
    assert tokenizer.pad(list(range(100))) == [START, *range(75), END]


@pytest.mark.parametrize(
    "text",
    [
        "\ud800 lone surrogate",
        "&#" + "9" * 5000 + ";",
        "&amp;#" + "9" * 5000 + ";",
        "&#xD800;",
        "\x00",
        "".join(ASSIGNED[::7]),
    ],
    ids=["surrogate", "huge reference", "escaped huge reference", "reference to a surrogate", "nul", "all"],
)
def test_any_text_has_tokens_below_start(tokenizer: Tokenizer, text: str):
    assert all(0 <= token < START for token in tokenizer.encode(text))


@pytest.mark.parametrize("unit", ["word ", "a", "ab!?", "½", "&amp;", "&"])
def test_time_is_linear_in_the_length(tokenizer: Tokenizer, unit: str):
    text = unit * (200_000 // len(unit))
    start = time.perf_counter()
    tokenizer.encode(text)
    # 0.6 s at worst on the slowest machine tried; quadratic merging would take minutes.
    assert time.perf_counter() - start < 10


def test_a_missing_vocabulary_is_explained(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LdmError, match="pip install open_clip_torch"):
        Tokenizer()


def test_reading_the_vocabulary_imports_nothing_heavy():
    code = (
        "import sys; from ldm.text.tokenizer import Tokenizer; Tokenizer(); "
        "print(sorted({'torchvision', 'open_clip', 'ftfy', 'regex', 'transformers'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
