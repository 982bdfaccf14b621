"""Promise 15: texts are read in time proportional to their length, and none is an error but a value."""

import random
import time
from collections.abc import Callable

import pytest

from ldm import LdmError, Request, infotext, interpret, prompt_file
from ldm.sheets import matrix, values, xyz
from ldm.text import editing, prompt
from ldm.text.bert import words as bert_words
from ldm.text.tokenizer import words as clip_words

READERS: dict[str, Callable[[str], object]] = {
    "tags": prompt.tags,
    "comments": prompt.without_comments,
    "composition": prompt.compose,
    "emphasis": prompt.emphasis,
    "editing": lambda text: editing.schedule(text, 20),
    "settings": lambda text: interpret.request(infotext.parse(text)),
    "prompt file": lambda text: prompt_file.read(text, Request()),
    "words of CLIP": clip_words,
    "words of BERT": bert_words,
    "numbers of an axis": values.floats,
    "whole numbers of an axis": values.integers,
    "texts of an axis": values.permutations,
    "name of an axis": xyz.chosen,
    "prompt matrix": matrix.combinations,
}
PIECES = (
    *("(", ")", "((", "[", "]", "[a:", "[a|", "(a:1.1)", "[a:b:0.5]", "[:", "]:", "(]", "[)", ":0.5]", "a|"),
    *("a", " ", "\n", ",", "a: b, ", "\\", "\\(", '"', "'", '"a", ', "#", "# a\n", "{", "1,2-3 ", "1-", "9"),
    *(
        "<lora:",
        "<lora:a:1>",
        "AND ",
        "a AND b ",
        "BREAK ",
        "--steps 3 ",
        "Steps: 20, ",
        "\nSteps: 1, Seed: 2",
    ),
    *("\nNegative prompt: ", 'Template: "\n', "é", "\u4e00", "\U0001f600", "\0", "\ud800", "\x1b[31m"),
)
LENGTH, SECONDS = 40_000, 2.0  # 0.2 s in the slowest case; a quadratic way takes minutes


def read(reader: str, text: str) -> str:
    """Read a text; what an LdmError says, or nothing. Any other error passes through."""
    try:
        READERS[reader](text)
    except LdmError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("reader", READERS)
def test_any_repeated_piece_is_read_in_time(reader: str):
    for piece in PIECES:
        text = piece * (LENGTH // len(piece))
        begin = time.process_time()
        said = read(reader, text)
        assert said.isprintable(), piece
        assert len(said) <= 200, piece
        assert time.process_time() - begin < SECONDS, piece


@pytest.mark.parametrize("reader", READERS)
def test_no_text_raises_another_error(reader: str):
    rng = random.Random(reader)
    for _ in range(500):
        text = "".join(rng.choices(PIECES, k=rng.randrange(1, 20)))
        said = read(reader, text)
        assert said.isprintable(), text
        assert len(said) <= 200, text


def test_a_text_that_is_written_and_read_stays_the_same():
    rng = random.Random(0)
    for _ in range(1000):
        pieces = [piece for piece in PIECES if "\n" not in piece and "Steps" not in piece]
        words, negative = ("".join(rng.choices(pieces, k=rng.randrange(20))).strip() for _ in range(2))
        text = f"{words}\nNegative prompt: {negative}\nSteps: 20, Seed: 1, Model: {infotext.quote(words)}"
        info = infotext.parse(text)
        assert (info.prompt, info.negative_prompt) == (words, negative)
        assert info.fields.get("Model", "") == words
        assert infotext.parse(text) == info
