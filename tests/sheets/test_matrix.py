"""Combinations of the parts of a prompt."""

import pytest

from ldm import Request, RequestError
from ldm.sheets.cells import Cell, Layout
from ldm.sheets.matrix import combinations, matrix
from ldm.styles import Style


def requests(layout: Layout) -> list[Request]:
    assert all(isinstance(cell, Cell) for cell in layout.cells)
    return [cell.request for cell in layout.cells if isinstance(cell, Cell)]


def active(title: tuple) -> list[str]:
    return [label.text for label in title if label.active]


def test_bit_n_of_the_number_selects_part_n():
    assert combinations("a town|at night|in the rain|by Monet") == [
        "a town",
        "a town, at night",
        "a town, in the rain",
        "a town, at night, in the rain",
        "a town, by Monet",
        "a town, at night, by Monet",
        "a town, in the rain, by Monet",
        "a town, at night, in the rain, by Monet",
    ]


@pytest.mark.parametrize(
    ("prompt", "options", "last"),
    [
        ("a cat", {}, "a cat"),
        ("a cat| , black,  |old ,", {}, "a cat,  black, old "),  # white space, then commas, once each
        (" a cat ,|x", {}, " a cat ,, x"),  # the first part stays as it is
        ("a cat|x|y", {"at_start": True}, "x, y, a cat"),
        ("a cat|x|y", {"delimiter": " "}, "a cat x y"),
        ("a cat||y", {}, "a cat, , y"),
        ("|x", {}, ", x"),
    ],
)
def test_parts_are_joined_as_in_the_web_ui(prompt: str, options: dict, last: str):
    assert combinations(prompt, **options)[-1] == last


def test_half_of_the_parts_belong_to_the_columns_and_titles_strike_the_others():
    layout = matrix(Request(prompt="a|b|c|d"))
    assert (len(layout.tops), len(layout.lefts)) == (4, 2)
    made = requests(layout)
    for row, left in enumerate(layout.lefts):
        for column, top in enumerate(layout.tops):
            assert made[row * 4 + column].prompt == ", ".join(["a", *active(top), *active(left)])
    assert [label.text for label in layout.tops[0]] == ["b", "c"]


def test_a_prompt_without_parts_is_one_picture():
    layout = matrix(Request(prompt="a cat"))
    assert [request.prompt for request in requests(layout)] == ["a cat"]
    assert (layout.tops, layout.lefts) == (((),), ((),))


def test_seeds_are_the_same_unless_they_shall_differ():
    base = Request(prompt="a|b|c", seed=7)
    assert [request.seed for request in requests(matrix(base))] == [7, 7, 7, 7]
    assert [request.seed for request in requests(matrix(base, different_seeds=True))] == [7, 8, 9, 10]


def test_the_parts_may_be_those_of_the_negative_prompt():
    made = requests(matrix(Request(prompt="x|y", negative_prompt="a|b"), negative=True))
    assert [(r.prompt, r.negative_prompt) for r in made] == [("x|y", "a"), ("x|y", "a, b")]


def test_styles_belong_to_the_finished_prompt():
    known = {"oil": Style("oil", "oil painting of {prompt}")}
    made = requests(matrix(Request(prompt="a|b"), names=["oil"], known=known))
    assert [r.prompt for r in made] == ["oil painting of a", "oil painting of a, b"]


def test_too_many_parts_are_refused():
    assert len(combinations("a" + "|b" * 13)) == 2**13
    with pytest.raises(RequestError, match="at most 13 parts behind the first, got 14"):
        matrix(Request(prompt="a" + "|b" * 14))
    with pytest.raises(RequestError, match="got 100000"):
        matrix(Request(prompt="a" + "|b" * 100_000))
