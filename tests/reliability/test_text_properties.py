"""Promise 15 on any Unicode: no text is an error but an LdmError in one line, and what is written reads back.

The suite draws the same few texts each time. A hundred thousand others for each test:

    LDM_EXAMPLES=100000 python -m pytest tests/reliability/test_text_properties.py -n 2
"""

import csv
import io
import os
import shlex
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ldm import LdmError, Request, compat, edit, infotext, interpret, prompt_file, soft_inpainting, spacings
from ldm.samplers import SAMPLERS
from ldm.sheets import axes, values
from ldm.text import editing, prompt
from tests.reliability.test_texts import PIECES, READERS, read
from tests.tiny_families import tiny

THOROUGH = int(os.environ.get("LDM_EXAMPLES", 0))
some = settings(
    max_examples=THOROUGH or 60, derandomize=not THOROUGH, database=None, deadline=None, print_blob=False
)
few = settings(some, max_examples=THOROUGH or 25)

ANY = st.characters(exclude_categories=())  # of Unicode, lone surrogates included
TEXTS = st.one_of(
    st.text(ANY, max_size=200),
    st.lists(st.one_of(st.sampled_from(PIECES), st.text(ANY, max_size=4)), max_size=40).map("".join),
)


@pytest.mark.parametrize("reader", READERS)
@given(text=TEXTS)
@few
def test_a_reader_raises_nothing_but_one_line(reader: str, text: str):
    said = read(reader, text)
    assert said.isprintable()
    assert len(said) <= 200


@given(name=st.sampled_from([*axes.AXES]), text=TEXTS)
@some
def test_an_axis_raises_nothing_but_one_line(name: str, text: str):
    said = ""
    try:
        axes.AXES[name].read(text)
    except LdmError as error:
        said = str(error)
    assert said.isprintable()
    assert len(said) <= 200


def numbers(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_subnormal=False)


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), strategy)


SIDES = st.integers(1, 2048).map(lambda n: 8 * n)
EDITS = st.builds(
    edit.Edit,
    strength=numbers(0.01, 1),
    resize=st.sampled_from(["resize", "crop", "fill", "latent"]),
    noise_multiplier=numbers(0.5, 1.5),
    color_correction=st.booleans(),
    mask_blur=st.integers(0, 64),
    mask_invert=st.booleans(),
    only_masked=st.booleans(),
    padding=st.integers(0, 256),
    masked_content=st.sampled_from(["fill", "original", "latent noise", "latent nothing"]),
    soft=maybe(st.builds(soft_inpainting.Soft, schedule_bias=numbers(0, 8), preservation=numbers(0, 8))),
)
PASSES = st.builds(
    edit.Hires,
    scale=numbers(1, 4),
    steps=maybe(st.integers(1, 150)),
    strength=numbers(0, 1),
    prompt=maybe(TEXTS.filter(bool)),  # an empty one is that of the first pass, as None is
    negative_prompt=maybe(TEXTS.filter(bool)),
    cfg_scale=maybe(numbers(0, 30)),
    token_merging=maybe(numbers(0, 1)),
)


OPTIONS = ("eta", "s_churn", "s_tmin", "s_tmax", "s_noise", "order")


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """Any request as it is written into a picture: nothing that decides it is None."""
    sampler = draw(st.sampled_from(sorted(SAMPLERS)))
    options = {  # those that are the usual ones are not written
        name: draw(
            (numbers(0, 1) if name != "order" else st.integers(1, 4)).filter(lambda x, d=default: x != d)
        )
        for name, default in SAMPLERS[sampler].options.items()
        if name in OPTIONS and draw(st.booleans())
    }
    return Request(
        prompt=draw(TEXTS),
        negative_prompt=draw(TEXTS),
        seed=draw(st.integers(0, 2**64 - 1)),
        width=draw(SIDES),
        height=draw(SIDES),
        steps=draw(st.integers(1, 10_000)),
        cfg_scale=draw(numbers(0, 1000)),
        cfg_rescale=draw(numbers(0, 1)),
        sampler=sampler,
        schedule=draw(st.sampled_from(sorted(spacings.SPACINGS))),
        tiling=draw(st.booleans()),
        rho=draw(maybe(numbers(0.1, 100))),
        variation_strength=draw(numbers(0.001, 1)),
        variation_seed=draw(st.integers(0, 2**64 - 1)),
        seed_resize_from=draw(maybe(st.tuples(SIDES, SIDES))),
        ensd=draw(st.integers(-(2**64), 2**64).filter(lambda n: abs(n) < 2**64)),
        guidance_low=draw(numbers(0, 100)),
        guidance_skip=draw(numbers(0, 1)),
        reuse=draw(st.integers(1, 100)),
        token_merging=draw(numbers(0, 1)),
        token_merging_downsample=draw(st.sampled_from([1, 2, 4, 8])),
        compat=draw(st.sampled_from([*compat.PROFILES.values()])),
        **draw(
            st.one_of(
                st.just({}),
                EDITS.map(lambda found: {"edit": found}),
                PASSES.map(lambda found: {"hires": found}),
            )
        ),
        **options,
    )


@given(request=requests())
@some
def test_a_request_that_is_written_reads_back_equal(request: Request):
    text = infotext.infotext(request, tiny("sd1"))
    again, notes = interpret.request(infotext.parse(text))
    assert notes == []
    assert again == request


@given(texts=st.lists(TEXTS, min_size=3, max_size=6))
@some
def test_quoted_values_read_back_equal(texts: list[str]):
    line = ", ".join(f"Field {i}: {infotext.quote(text)}" for i, text in enumerate(texts))
    found = infotext.parse(f"a cat\n{line}").fields
    assert [found.get(f"Field {i}", "") for i in range(len(texts))] == texts


def escaped(text: str) -> str:
    for mark in "\\()[]":
        text = text.replace(mark, "\\" + mark)
    return text


WEIGHTS = st.integers(-300, 300).map(lambda n: n / 100)
PIECES_OF_TEXT = st.text(ANY, min_size=1, max_size=20).filter(lambda text: "BREAK" not in text)


@given(pieces=st.lists(st.tuples(PIECES_OF_TEXT, WEIGHTS), min_size=1, max_size=8))
@some
def test_weighted_pieces_read_back_equal(pieces: list[tuple[str, float]]):
    assume(all(a[1] != b[1] for a, b in pairwise(pieces)))  # else they are joined
    text = "".join(f"({escaped(piece)}:{weight:.2f})" for piece, weight in pieces)
    assert prompt.emphasis(text) == pieces


@given(parts=st.lists(st.tuples(st.text(ANY, max_size=20), WEIGHTS), min_size=1, max_size=8))
@some
def test_prompts_that_guide_together_read_back_equal(parts: list[tuple[str, float]]):
    parts = [(text.rstrip(), weight) for text, weight in parts]
    assume(not any("AND" in text for text, _ in parts))
    text = " AND".join(f"{text} :{weight:.2f}" for text, weight in parts)
    assume(all(not text[:1].isalnum() and text[:1] != "_" for text, _ in parts[1:]))
    assert prompt.compose(text) == parts


WORDS = st.text("abc ,é\u4e00\U0001f600", max_size=6)
PROMPTS: st.SearchStrategy[Any] = st.recursive(
    WORDS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner, st.integers(1, 99)),
        st.lists(inner, min_size=2, max_size=4).map(lambda options: {"options": options}),
    ),
    max_leaves=12,
)


def written(tree: Any) -> str:
    """A prompt with editing from its tree: texts, sequences, edits (a, b, step), alternations."""
    match tree:
        case str():
            return tree
        case list():
            return "".join(map(written, tree))
        case (before, after, step):
            return f"[{written(before)}:{written(after)}:{step}]"
        case _:
            return f"[{'|'.join(map(written, tree['options']))}]"


def at(tree: Any, step: int) -> str:
    """The text of a step, counted from 1."""
    match tree:
        case str():
            return tree
        case list():
            return "".join(at(part, step) for part in tree)
        case (before, after, last):
            return at(before if step <= last else after, step)
        case _:
            return at(tree["options"][(step - 1) % len(tree["options"])], step)


@given(tree=PROMPTS, steps=st.integers(1, 40))
@some
def test_prompt_editing_means_what_its_tree_means(tree: Any, steps: int):
    found = editing.schedule(written(tree), steps)
    for step in range(1, steps + 1):
        segment = next(i for i, end in enumerate(found.ends) if step <= end)
        assert found.text(segment) == at(tree, step)


@given(text=TEXTS)
@some
def test_words_of_a_line_are_those_of_a_shell(text: str):
    wanted: Any = "an error"
    with suppress(ValueError):
        wanted = shlex.split(text)
    found: Any = "an error"
    with suppress(ValueError):
        found = prompt_file.split(text)
    assert found == wanted


@given(
    words=TEXTS,
    negative=TEXTS,
    seed=st.integers(0, 2**63),
    cfg=numbers(0, 100),
    width=SIDES,
    steps=st.integers(1, 10_000),
)
@some
def test_a_line_of_options_reads_back_equal(
    words: str, negative: str, seed: int, cfg: float, width: int, steps: int
):
    assume(all(len((text + ".").splitlines()) == 1 for text in (words, negative)))
    wanted = Request(
        prompt=words, negative_prompt=negative, seed=seed, cfg_scale=cfg, width=width, steps=steps
    )
    line = (
        f"--prompt {shlex.quote(words)} --negative_prompt {shlex.quote(negative)} --seed {seed} "
        f"--cfg_scale {cfg!r} --width {width} --steps {steps}"
    )
    assert prompt_file.read(line, Request()) == ([wanted], [])


@given(texts=st.lists(st.text(ANY, min_size=1, max_size=20).map(str.strip), max_size=8))
@some
def test_values_of_an_axis_read_back_equal(texts: list[str]):
    assume(all(text and len((text + ".").splitlines()) == 1 for text in texts))
    file = io.StringIO()
    csv.writer(file).writerow(texts)
    assert values.texts(file.getvalue().removesuffix("\r\n")) == texts


@given(whole=st.lists(st.integers(-(10**30), 10**30)), decimal=st.lists(numbers(-1e300, 1e300)))
@some
def test_numbers_of_an_axis_read_back_equal(whole: list[int], decimal: list[float]):
    assert values.integers(", ".join(map(str, whole))) == whole
    assert values.floats(", ".join(map(repr, decimal))) == decimal


@given(request=requests())
@few
def test_the_place_in_a_batch_reads_back_equal(request: Request):
    assume(request.seed < 2**63 and request.variation_seed < 2**63)
    whole = replace(request, batch_size=4)
    info = infotext.parse(infotext.infotext(whole, tiny("sd1"), place=2))
    single, _ = interpret.request(info)
    assert interpret.batch(info, single) == (whole, 2)
