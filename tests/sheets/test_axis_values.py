"""Values of an axis: the web UI's syntax."""

import random
import time
from contextlib import suppress

import pytest

from ldm import RequestError
from ldm.sheets.values import MAX_VALUES, floats, integers, permutations, texts


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a, b,c", ["a", "b", "c"]),
        ("a", ["a"]),
        ('"a, b", c', ["a, b", "c"]),
        ('"a ""b""", c', ['a "b"', "c"]),
        ('a "b, c"', ['a "b', 'c"']),  # quotes in the middle of a value are plain letters
        ("a,, b,", ["a", "", "b", ""]),
        (" a b ,  c ", ["a b", "c"]),
        ("a\nb, c", ["a", "b", "c"]),
        ("", []),
        ("it's, 5'", ["it's", "5'"]),
    ],
)
def test_lists_are_csv(text: str, values: list[str]):
    assert texts(text) == values


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1, 2, 5", [1, 2, 5]),
        ("1-5", [1, 2, 3, 4, 5]),
        ("1 - 5", [1, 2, 3, 4, 5]),
        ("1-5 (+2)", [1, 3, 5]),
        ("1-5(+3)", [1, 4]),
        ("1-5 (3)", [1, 4]),  # the web UI needs the sign
        ("10-5 (-3)", [10, 7]),
        ("10-1 (-3)", [10, 7, 4, 1]),
        ("1-10 [5]", [1, 3, 5, 7, 10]),
        ("1-10[5]", [1, 3, 5, 7, 10]),
        ("10-1 [4]", [10, 7, 4, 1]),
        ("3-9 [1]", [3]),
        ("-3-3 [2]", [-3, 3]),
        ("-2-1", [-2, -1, 0, 1]),
        ("-4--2", [-4, -3, -2]),
        ("1--1(-1)", [1, 0, -1]),
        ("-1", [-1]),
        ("- 1", [-1]),
        ("-\t1", [-1]),
        ("+7", [7]),
        ("5-5", [5]),
        ("1-3, 10, 20-30 (+10)", [1, 2, 3, 10, 20, 30]),
        ("1,, 2, ", [1, 2]),
        ("", []),
        ("18446744073709551615", [2**64 - 1]),
        ("18446744073709551613-18446744073709551615[2]", [2**64 - 3, 2**64 - 1]),
    ],
)
def test_whole_numbers(text: str, values: list[int]):
    assert integers(text) == values


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1, 2.5", [1.0, 2.5]),
        ("1-3", [1.0, 2.0, 3.0]),
        ("1-3 (+0.5)", [1.0, 1.5, 2.0, 2.5, 3.0]),
        ("0.0-1.0 [6]", [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        ("0-1[5]", [0.0, 0.25, 0.5, 0.75, 1.0]),
        ("0-1 (+0.1)", [i / 10 for i in range(11)]),
        ("0-1 (+0.3)", [0.0, 0.3, 0.6, 0.9]),
        ("1-0 (-0.25)", [1.0, 0.75, 0.5, 0.25, 0.0]),
        ("0-0.5", [0.0]),
        ("-0.5", [-0.5]),
        ("-1.5--0.5", [-1.5, -0.5]),
        ("1e-3", [0.001]),
        (".5, 1.", [0.5, 1.0]),
        ("7", [7.0]),
    ],
)
def test_numbers(text: str, values: list[float]):
    assert floats(text) == values


@pytest.mark.parametrize(
    ("read", "text", "complaint"),
    [
        (integers, "1.5", "'1.5' is neither a whole number nor a range"),
        (integers, "1.5-3", "'1.5-3' is neither"),
        (integers, "a-b", "'a-b' is neither"),
        (integers, "1 2", "'1 2' is neither"),
        (integers, "1-5 [+2]", "is neither"),
        (integers, "1-5 (+0.5)", "is neither"),
        (integers, "5-1", "'5-1' does not reach its end; 5-1(-1) counts down"),
        (integers, "1-5(-1)", "does not reach its end"),
        (integers, "1-5(+0)", "does not reach its end"),
        (integers, "1-1000000000000", "there are 1000000000000 values; an axis has at most 1000"),
        (integers, "1-2[5000]", "there are 5000 values"),
        (integers, "1" * 101, "is too long for a number"),
        (integers, "²", "is neither"),
        (floats, "a", "'a' is neither a number nor a range"),
        (floats, "1-2-3", "is neither"),
        (floats, "nan", "finite"),
        (floats, "1e999", "finite"),
        (floats, "0-1(+0.0001)", "there are 10001 values"),
        (texts, "," * MAX_VALUES, "there are 1001 values"),
        (texts, "a" * 200_000, "no list of values"),
        (permutations, "a,b,c,d,e,f,g", "7 texts have too many orders"),
    ],
)
def test_a_value_that_cannot_be_read_is_one_sentence(read, text: str, complaint: str):
    with pytest.raises(RequestError) as error:
        read(text)
    assert complaint in str(error.value)
    assert len(str(error.value)) <= 200


def test_permutations_begin_with_the_given_order():
    assert permutations("a, b, c") == [
        *(("a", "b", "c"), ("a", "c", "b"), ("b", "a", "c")),
        *(("b", "c", "a"), ("c", "a", "b"), ("c", "b", "a")),
    ]
    assert len(permutations("a,b,c,d,e,f")) == 720


def test_nothing_else_is_raised_and_time_is_in_proportion():
    rng = random.Random(0)
    for _ in range(5000):
        text = "".join(rng.choices('019.-+()[]e, "\n\0é', k=rng.randrange(15)))
        for read in (texts, integers, floats):
            with suppress(RequestError):
                read(text)
    start = time.perf_counter()
    for text in ("1" * 100_000, " " * 100_000 + "x", "1-" * 50_000, '"' * 100_001, "1" + " " * 99 + "x"):
        for read in (texts, integers, floats):
            with suppress(RequestError):
                read(text)
    assert time.perf_counter() - start < 1
