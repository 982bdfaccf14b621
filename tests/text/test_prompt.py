"""The prompt language equals the web UI's, and takes any text in linear time."""

import gc
import json
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ldm.compat import Emphasis
from ldm.errors import PromptError
from ldm.text.chunks import EmbeddingNames, chunks
from ldm.text.editing import schedule
from ldm.text.prompt import LIMIT, MARKS, Tag, compose, emphasis, tags, without_comments
from ldm.text.tokenizer import Tokenizer
from tests.golden import golden

WEB_UI = json.loads(golden("prompts/a1111_parser.json").read_text())
FORGE = json.loads(golden("prompts/forge_emphasis_modes.json").read_text())["cases"]
CHUNKING = json.loads(golden("prompts/chunking.json").read_text())

NASTY = (
    "((a [b:c:0.5] (d:1.2)) [e|f|] \\(g\\) BREAK <lora:x:0.8> h AND i :0.3, [[j:k:3]:l:.5]"
    " :) m] n) (o:1.2.3) \\",
    "[(a:1.2):(b:0.8):0.5][c::4](d [e) f] (BREAK:-1) (g:1e3) <a:b:c=d> <:> [|] [:] () [] (:1.2) [::0.5]|",
    "日本語 (猫:1.3) \ud800 \x00 \u202e AND:1 ANDAND BREAKBREAK \n\t(é:٣) # x <lora:\n:1> {a|b} \\[ \\",
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.mark.parametrize("case", WEB_UI["attention"], ids=lambda case: ascii(case["prompt"]))
def test_emphasis_equals_the_web_ui(case: dict):
    if "error" in case["parsed"]:  # "(a:1.2.3)" is an exception there and text here
        assert emphasis(case["prompt"]) == [("a:1.2.3", 1.1)]
    else:
        assert emphasis(case["prompt"]) == [(text, weight) for text, weight in case["parsed"]]


@pytest.mark.parametrize("case", FORGE, ids=lambda case: ascii(case["prompt"] + case["emphasis"]))
def test_modes_read_the_text_as_forge_does(case: dict):
    modes: dict[str, Emphasis] = {"None": "none", "Ignore": "ignore", "No norm": "no norm"}
    mode = modes[case["emphasis"]]
    assert emphasis(case["prompt"], mode) == [(text, weight) for text, weight in case["parsed"]]


@pytest.mark.parametrize("case", WEB_UI["and"], ids=lambda case: case["prompt"])
def test_and_equals_the_web_ui(case: dict):
    assert compose(case["prompt"]) == [(part["text"], part["weight"]) for part in case["parts"]]


def test_the_page_on_prompts_tells_the_truth_about_weights():
    page = (Path(__file__).parents[2] / "docs/prompts.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(.*?)` \| (`.*` [\d.]+) \|$", page, re.MULTILINE)
    assert len(rows) == 10
    for prompt, reading in rows:
        pieces = [(text, float(weight)) for text, weight in re.findall(r"`(.*?)` ([\d.]+)", reading)]
        # The page rounds to four digits.
        assert [(text, round(weight, 4)) for text, weight in emphasis(prompt)] == pieces


def test_a_bare_number_is_a_prompt_not_a_weight():
    assert compose("11 AND -2. ") == [("11", 1.0), (" -2.", 1.0)]


@pytest.mark.parametrize("case", CHUNKING["cases"], ids=range(len(CHUNKING["cases"])))
def test_chunks_equal_the_web_ui(tokenizer: Tokenizer, case: dict):
    cut = chunks(emphasis(case["prompt"]), tokenizer.encode)
    assert [tokenizer.pad(list(chunk.ids)) for chunk in cut] == [c["tokens"] for c in case["chunks"]]
    assert [chunk.weight_row() for chunk in cut] == [c["multipliers"] for c in case["chunks"]]
    assert sum(chunk.size for chunk in cut) == case["token_count"]


@pytest.mark.parametrize("case", CHUNKING["textual_inversion_cases"], ids=lambda case: case["prompt"][:30])
def test_embeddings_stand_where_the_web_ui_puts_them(tokenizer: Tokenizer, case: dict):
    names = EmbeddingNames(tokenizer.encode, {e["name"]: e["vectors"] for e in CHUNKING["embeddings"]})
    cut = chunks(emphasis(case["prompt"]), tokenizer.encode, embeddings=names)
    assert [tokenizer.pad(list(chunk.ids)) for chunk in cut] == [c["tokens"] for c in case["chunks"]]
    assert [chunk.weight_row() for chunk in cut] == [c["multipliers"] for c in case["chunks"]]
    assert [[list(place) for place in chunk.embeddings] for chunk in cut] == [
        c["fixes"] for c in case["chunks"]
    ]
    assert sum(chunk.size for chunk in cut) == case["token_count"]


def test_the_longest_name_of_an_embedding_wins(tokenizer: Tokenizer):
    names = EmbeddingNames(tokenizer.encode, {"big": 2, "big style": 3, "style": 1})
    (chunk,) = chunks(emphasis("Big Style, big (style:2)"), tokenizer.encode, embeddings=names)
    assert chunk.embeddings == ((0, "big style"), (4, "big"), (6, "style"))
    assert chunk.weights == (1, 1, 1, 1, 1, 1, 2)


def test_an_embedding_moves_along_with_the_words_behind_a_comma(tokenizer: Tokenizer):
    names = EmbeddingNames(tokenizer.encode, {"myemb": 4})
    first, second = chunks(
        emphasis("a, b myemb c d"), tokenizer.encode, length=8, embeddings=names, backtrack=7
    )
    assert tokenizer.decode(first.ids) == "a , "
    assert second.embeddings == ((1, "myemb"),)
    assert second.ids == (321, 0, 0, 0, 0, 322, 323)


def test_an_embedding_larger_than_a_chunk_is_refused(tokenizer: Tokenizer):
    names = EmbeddingNames(tokenizer.encode, {"myemb": 23})
    with pytest.raises(PromptError, match=r"'myemb' has 23 vectors; this text encoder takes 22"):
        chunks(emphasis("a myemb"), tokenizer.encode, length=22, embeddings=names)


def test_chunks_keep_every_token_in_order(tokenizer: Tokenizer):
    rng = random.Random(0)
    for _ in range(60):
        words = [rng.choice(["cat", "a (dog:1.3)", ",", "[sky]", "extraordinarily"]) for _ in range(60)]
        pieces = emphasis(" ".join(words))
        length = rng.choice([1, 7, 22, 75])
        cut = chunks(pieces, tokenizer.encode, length=length)
        assert all(len(chunk.ids) <= length for chunk in cut)
        assert [token for chunk in cut for token in chunk.ids] == [
            token for text, _ in pieces for token in tokenizer.encode(text)
        ]


def test_a_break_within_brackets_is_a_word(tokenizer: Tokenizer):
    """A quirk of the web UI, which its pictures depend on."""
    (chunk,) = chunks(emphasis("(a BREAK b:1.3)"), tokenizer.encode)
    assert tokenizer.decode(chunk.ids) == "a break b "
    assert chunk.weights == (1.3, -1.3, 1.3)


def test_escaped_text_comes_back_unchanged():
    for text in (*NASTY, "a (b:1.2) [c] \\ d"):
        text = text.replace("BREAK", "break")
        escaped = re.sub(r"[\\()\[\]]", r"\\\g<0>", text)
        assert emphasis(escaped) == [(text, 1.0)]


def test_weights_stay_finite_however_deep_the_brackets():
    assert emphasis("(" * 10_000 + "a" + ")" * 10_000) == [("a", pytest.approx(1.1**100))]
    assert emphasis("[" * 20_000 + "a") == [("a", pytest.approx(1.1**-100))]
    assert emphasis("[" * 100_000 + "a") == [("[" * 100_000 + "a", 1.0)]  # beyond any meaning: text
    assert emphasis("(" * 99 + "a" + ":1000)" * 99) == [("a", 1e6)]
    assert emphasis("(a:" + "9" * 400 + ")") == [("a:" + "9" * 400, 1.1)]  # infinity is no weight


def test_tags_are_taken_out_with_positional_and_named_arguments():
    text, found = tags("a cat <lora:my style:0.8>, <lora:b:te=0.5:unet=1> <hypernet:c> <lyco:d:1:0.25>")
    assert text == "a cat ,   "
    assert [(tag.kind, tag.name, tag.multipliers()) for tag in found] == [
        ("lora", "my style", (0.8, 0.8)),
        ("lora", "b", (0.5, 1.0)),
        ("hypernet", "c", (1.0, 1.0)),
        ("lyco", "d", (1.0, 0.25)),
    ]
    assert found[1] == Tag("lora", ("b",), {"te": "0.5", "unet": "1"})


@pytest.mark.parametrize("text", ["a < b > c", "<lora:>", "<:a>", "<lora:a", "lora:a>", "< lora:a>", ">:<"])
def test_what_is_no_tag_stays_text(text: str):
    assert tags(text) == (text, [])


@pytest.mark.parametrize(
    "tag", ["<lora:a:b>", "<lora:a:1:x>", "<lora:a:te=>", "<lora:a:dyn=4>", "<lora:a:nan>"]
)
def test_a_tag_with_senseless_strengths_is_refused_when_used(tag: str):
    _, (found,) = tags(tag)
    with pytest.raises(PromptError, match=re.escape(tag)):
        found.multipliers()


def test_comments_go_away():
    assert without_comments("a cat # not a dog\n# nothing\n\nb") == "a cat \n\nb"


def everything(text: str, tokenizer: Tokenizer) -> None:
    """All of the language, in the order in which a pipeline uses it."""
    text, found = tags(without_comments(text))
    assert all(tag.kind for tag in found)
    for prompt, _ in compose(text):
        for _, segment in schedule(prompt, 3).segments():
            chunks(emphasis(segment), tokenizer.encode, length=22)


def test_every_part_of_a_nasty_text_is_a_prompt(tokenizer: Tokenizer):
    for text in NASTY:
        for i in range(len(text)):
            everything(text[:i], tokenizer)
            everything(text[i:], tokenizer)


def test_every_mixture_of_marks_is_a_prompt(tokenizer: Tokenizer):
    rng = random.Random(0)
    marks = [*"()[]:|\\<>#, \n\0é", "0.5", ":1.2)", "a", " AND ", " BREAK ", "<lora:", "\ud800", "1e400"]
    for _ in range(1_000):
        everything("".join(rng.choices(marks, k=rng.randrange(20))), tokenizer)


MEGABYTE = 1 << 20
ADVERSARIES = (
    *"([)]:<|\\ 1\na",
    *("()", ")(", "([", "(a", "(a:1.1", ":1)", "[a:b:0.5]", "[a|b]", "[a:", "[[a:b:1]:", "(cat:1.2), "),
    *("[:", ":1]", "<a:", "<a:b>", "AND ", " BREAK", "a :", ": ", "ANDy", "(a:", "\\(", "[a|", "(:"),
)


@pytest.fixture
def frozen() -> Iterator[None]:
    """The collector of garbage leaves alone what other tests hold: its walks over that are not measured."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("frozen")
@pytest.mark.parametrize("unit", ADVERSARIES, ids=ascii)
def test_a_megabyte_takes_a_moment(unit: str):
    """The promise is 0.1 s on an idle machine; three times as much CPU time allows for a busy one.

    Once the megabyte is full of the marks, and once it has as many as are read at all.
    """
    most = (LIMIT // max(1, sum(map(unit.count, MARKS)))) * len(unit)
    for size in {MEGABYTE, min(MEGABYTE, most)}:
        text = (unit * (size // len(unit))).ljust(MEGABYTE, "x")
        start = time.process_time()
        for prompt, _ in compose(tags(without_comments(text))[0])[:10]:
            schedule(prompt, 20)
            emphasis(prompt)
        assert time.process_time() - start < 0.3


@pytest.mark.usefixtures("frozen")
def test_numbers_of_a_megabyte_take_a_moment():
    start = time.process_time()
    emphasis("(a:" + "1" * MEGABYTE + ")")
    compose("a:" + "1" * MEGABYTE)
    schedule("[a:b:" + "1" * MEGABYTE + "]", 20)
    assert time.process_time() - start < 0.3
