"""Prompts from a file: the web UI's lines of options."""

import random
import shlex
import time

import pytest

from ldm import Request, RequestError
from ldm.prompt_file import LEFT_OUT, TAGS, read, split
from ldm.styles import Style

BASE = Request(seed=42, steps=20, negative_prompt="blurry")


def line(text: str, base: Request = BASE) -> Request:
    requests, notes = read(text, base)
    assert notes == []
    assert len(requests) == 1
    return requests[0]


def prompts(text: str) -> list[str]:
    return [request.prompt for request in read(text, Request())[0]]


def test_a_plain_file_has_a_prompt_in_each_line():
    requests, notes = read("a cat\n\n   a dög -- sitting  \r\n", BASE)
    assert [request.prompt for request in requests] == ["a cat", "a dög -- sitting"]
    assert [request.seed for request in requests] == [42, 43]
    assert notes == []


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("--prompt cat", {"prompt": "cat"}),
        ("--prompt a red cat", {"prompt": "a red cat"}),
        ('--prompt "a  red cat" on a mat', {"prompt": "a  red cat on a mat"}),
        ("--prompt a 'red cat'--x", {"prompt": "a red cat--x"}),
        ('--prompt ""', {"prompt": ""}),
        ("--prompt", None),
        ("--steps 7", {"steps": 7, "prompt": ""}),
        ("--prompt a cat --steps 7 --cfg_scale 4.5", {"prompt": "a cat", "steps": 7, "cfg_scale": 4.5}),
        (
            "--negative_prompt a bad one --prompt cat",
            {"negative_prompt": "a bad one blurry", "prompt": "cat"},
        ),
        ("--width 512 --height 640", {"width": 512, "height": 640}),
        ("--seed 7 --subseed 8 --subseed_strength 0.2", {"seed": 7, "variation_seed": 8}),
        ("--seed_resize_from_w 512 --seed_resize_from_h 320", {"seed_resize_from": (512, 320)}),
        ("--seed_resize_from_w 512", {"seed_resize_from": None}),
        ("--seed_resize_from_w -1 --seed_resize_from_h -1", {"seed_resize_from": None}),
        ("--sampler_name 'DPM++ 2M Karras'", {"sampler": "DPM++ 2M", "schedule": "karras"}),
        ("--sampler_name 'euler A'", {"sampler": "Euler a", "schedule": None}),
        ("--sampler_name euler_ancestral", {"sampler": "Euler a", "schedule": None}),
        ("--batch_size 3", {"batch_size": 3}),
        ("--tiling true", {"tiling": True}),
        ("--tiling True", {"tiling": False}),
        ("--tiling 1", {"tiling": False}),
        # What cannot be read is a prompt as it stands.
        ("--steps seven", None),
        ("--steps 7.5", None),
        ("--prompt it's", None),
        ('--prompt "cat', None),
        ("--prompt cat\\", None),
        ("--frobnicate 3", None),
        ("--prompt cat --steps", None),
        ("--steps 7 8", None),
        ("--", None),
        ("-- a cat", None),
    ],
)
def test_lines_of_options(text: str, fields: dict[str, object] | None):
    if fields is not None:
        made = line(text)
        assert {name: getattr(made, name) for name in fields} == fields
        return
    (request,), (note,) = read(text, BASE)
    assert request.prompt == text
    assert note.startswith("line 1 is taken as a prompt, not as options: ")


def test_the_schedule_of_the_base_stays_unless_the_name_of_the_sampler_says_one():
    base = Request(sampler="DPM++ 2M", schedule="exponential")
    assert line("--sampler_name Euler", base).schedule == "exponential"
    assert line("--sampler_name 'Euler Karras'", base).schedule == "karras"
    assert line("--steps 3", base).sampler == "DPM++ 2M"


def test_batches_and_lines_continue_the_seeds():
    base = Request(seed=10, batch_size=2)
    text = "a\n--prompt b --n_iter 3\n--prompt c --seed 5 --batch_size 4\nd"
    requests, _ = read(text, base, n_iter=2)
    assert [(r.prompt, r.seed) for r in requests] == [
        *(("a", 10), ("a", 12)),
        *(("b", 14), ("b", 16), ("b", 18)),
        *(("c", 5), ("c", 9)),
        *(("d", 22), ("d", 24)),
    ]
    same, _ = read(text, base, iterate=False)
    assert [(r.prompt, r.seed) for r in same] == [
        *(("a", 10), ("b", 10), ("b", 12), ("b", 14), ("c", 5), ("d", 10))
    ]


def test_variations_keep_the_seed_of_their_line():
    base = Request(seed=10, batch_size=2, variation_seed=7, variation_strength=0.2)
    requests, _ = read("a\nb\n--prompt c --subseed_strength 0", base, n_iter=2)
    assert [(r.prompt, r.seed, r.variation_seed) for r in requests] == [
        *(("a", 10, 7), ("a", 10, 9)),
        *(("b", 14, 7), ("b", 14, 9)),
        *(("c", 18, 7), ("c", 20, 7)),
    ]


def test_minus_one_is_another_seed_each_time():
    requests, _ = read("--seed -1 --subseed -1\n" * 2, Request())
    assert len({r.seed for r in requests} | {r.variation_seed for r in requests}) == 4


def test_prompts_join_those_of_the_base():
    base = Request(prompt="oil painting")
    assert [r.prompt for r in read("cat\n--prompt a dog\n--steps 3", base)[0]] == [
        "cat oil painting",
        "a dog oil painting",
        "oil painting",
    ]


def test_styles_of_a_line_take_the_place_of_the_others():
    known = {name: Style(name, f"{{prompt}} in {name}", "grey") for name in ("oil", "ink", "red, blue")}
    text = (
        "cat\n--prompt cat --styles ink\n--prompt cat --styles 'ink, oil'\n--prompt cat --styles 'red, blue'"
    )
    requests, _ = read(text, Request(), known=known, names=["oil"])
    assert [r.prompt for r in requests] == [
        "cat in oil",
        "cat in ink",
        "cat in ink in oil",
        "cat in red, blue",
    ]
    with pytest.raises(RequestError, match="line 2: no style 'none'"):
        read("cat\n--styles none", Request(), known=known)


@pytest.mark.parametrize("tag", LEFT_OUT)
def test_options_without_a_place_here_are_noted(tag: str):
    value = "true" if TAGS[tag]("3") is False else "3"
    requests, notes = read(f"cat\n--{tag} {value} --prompt dog", Request())
    assert [request.prompt for request in requests] == ["cat", "dog"]
    assert notes == [f"line 2: --{tag} is left out: {LEFT_OUT[tag]}"]


def test_asking_for_nothing_is_not_noted():
    assert line("--restore_faces false --do_not_save_grid false --steps 3").steps == 3


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("cat\n--steps 0", "line 2: steps must be 1 to 10000, got 0"),
        ("\n\n--cfg_scale nan", "line 3: cfg_scale must be a finite number"),
        ("--sampler_name Eular", "line 1: unknown sampler 'Eular'; did you mean Euler"),
        ("--seed -2", "line 1: seed must be"),
        ("--n_iter 0", "line 1: n_iter must be at least 1, got 0"),
        ("--n_iter 1000000000000", "line 1: a file makes at most 100000 batches"),
        ("--width 4", "line 1: width must be"),
        ("", "there are no prompts in the file"),
        (" \n\n", "there are no prompts in the file"),
    ],
)
def test_a_value_without_sense_is_told_with_its_line(text: str, complaint: str):
    with pytest.raises(RequestError) as error:
        read(text, Request())
    assert complaint in str(error.value)
    assert len(str(error.value)) <= 200


def test_seeds_that_would_overflow_are_told_with_their_line():
    with pytest.raises(RequestError, match="line 2: seed must be"):
        read("a\nb", Request(seed=2**64 - 1))


def random_lines(count: int) -> list[str]:
    rng = random.Random(0)
    letters = [*"ab'\"\\ \t-", "--prompt ", "--steps ", "é", "\u2028"]
    return ["".join(rng.choices(letters, k=rng.randrange(20))) for _ in range(count)]


def test_words_are_those_of_shlex():
    def words(function, text: str) -> list[str] | None:
        try:
            return function(text)
        except ValueError:
            return None

    for text in random_lines(3000):
        assert words(split, text) == words(shlex.split, text), text


def test_no_text_is_an_error_but_a_value():
    for text in random_lines(3000):
        if text.strip():
            assert read(text, Request())[0]


@pytest.mark.parametrize("text", ['"', "'", "\\a", "a", " ", '"a" ', "''", '\\"', "--steps 3 ", "'a"])
def test_reading_takes_time_in_proportion_to_the_text(text: str):
    start = time.perf_counter()
    read("--prompt " + text * (300_000 // len(text)), Request())
    assert time.perf_counter() - start < 2  # 0.1 s here; quadratic ways take minutes
