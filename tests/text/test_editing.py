"""Prompt editing equals the web UI's, step by step, and any text is a prompt."""

import json
import random

import pytest

from ldm.text.editing import schedule
from tests.golden import golden

CASES = json.loads(golden("prompts/a1111_parser.json").read_text())["schedule"]


def texts(prompt: str, steps: int, **options) -> list[str]:
    """The text of each step."""
    plan = schedule(prompt, steps, **options)
    return [plan.text(plan.at(step)) for step in range(steps)]


@pytest.mark.parametrize(
    "case",
    CASES,
    ids=lambda case: ascii(f"{case['prompt'][:30]} {case['steps']} {case['hires_steps'] or ''}"),
)
def test_schedules_equal_the_web_ui(case: dict):
    second = case["hires_steps"]
    plan = schedule(
        case["prompt"],
        second or case["steps"],
        hires_after=case["steps"] if second else None,
        old=case["use_old_scheduling"],
    )
    assert list(plan.segments()) == [(end, text) for end, text in case["schedule"]]


def test_the_segment_is_that_of_the_step_at_hand():
    assert texts("[a:b:3]", 5) == ["a", "a", "a", "b", "b"]
    assert texts("[a:b:0.5]", 5) == ["a", "a", "b", "b", "b"]
    assert texts("[a|b|]", 5) == ["a", "b", "", "a", "b"]
    assert texts("[a:b:0]", 2) == ["b", "b"]
    assert texts("[a:b:9]", 2) == ["a", "a"]
    assert texts("[a|b]", 1) == ["a"]


def test_the_web_ui_switches_one_step_later():
    plan = schedule("[a:b:2]", 4)
    assert [plan.text(plan.at(step, late=True)) for step in range(6)] == ["a", "a", "a", "b", "b", "b"]
    plan = schedule("[a|b]", 4)
    assert [plan.text(plan.at(step, late=True)) for step in range(5)] == ["a", "a", "b", "a", "b"]


def test_steps_beyond_the_last_have_the_last_text():
    plan = schedule("[a:b:2]", 4)
    assert plan.text(plan.at(100)) == "b"


def test_one_prompt_describes_both_passes():
    prompt = "[a:b:0.5] [c:d:1.5] [e:f:6] [g:h:12]"
    assert texts(prompt, 8) == 4 * ["a c e g"] + 2 * ["b c e g"] + 2 * ["b c f g"]
    assert texts(prompt, 6, hires_after=8) == 3 * ["b c f g"] + ["b d f g"] + 2 * ["b d f h"]


def test_the_old_rule_counts_the_steps_of_the_first_pass():
    assert schedule("[a:b:1.5]", 5, hires_after=8, old=True).ends == (1, 8)
    assert schedule("[a:b:.5]", 5, hires_after=8, old=True).ends == (4, 8)


@pytest.mark.parametrize(
    "prompt",
    [
        "[a:b]",
        "[a:b:x]",
        "[a:b:0.5",
        "a:b:0.5]",
        "[a:b:c:0.5]",
        "[a:b:0\\.5]",
        "[a (b:c:0.5]",
        "[a b) c:0.5]",
        "[[a:b] c:d:0.5]",
        "[a|b:0.5]",
        "[a:b:(0.5)]",
        "[a|b",
        "(a|b)",
        "a | b [c:d:0.5]",  # one bar too many makes all of it text, as in the web UI
        "[c:d:0.5] \\",
    ],
)
def test_what_is_malformed_is_text(prompt: str):
    assert list(schedule(prompt, 4).segments()) == [(4, prompt)]


@pytest.mark.parametrize(
    ("prompt", "first", "last"),
    [
        ("((a][:b:c [d:3]", "((a][:b:c ", "((a][:b:c d"),  # text brackets around an edit
        (":) [a:b:3] (c", ":) a (c", ":) b (c"),
        ("[[[b]]:3]", "", "[[b]]"),
        ("[a\\]\\:b:c:3]", "a\\]\\:b", "c"),
        ("[a\nb:c:\t +3e0 ]", "a\nb", "c"),
    ],
)
def test_edits_among_other_brackets(prompt: str, first: str, last: str):
    plan = schedule(prompt, 4)
    assert (plan.text(0), plan.text(len(plan.ends) - 1)) == (first, last)


def test_deep_nesting_is_read_without_recursion():
    deep = 4_000
    assert texts("[" * deep + "a" + ":1]" * deep, 2) == ["", "a"]
    assert texts("[a:" * deep + "b" + ":1]" * deep, 2) == ["a", "b"]
    assert texts("[|" * deep + "a" + "]" * deep, 2) == ["", "a"]
    assert texts("[" * 100_000 + "a:b:1]", 2) == 2 * ["[" * 100_000 + "a:b:1]"]  # beyond any meaning: text


def test_segments_cover_the_steps_whatever_is_written():
    rng = random.Random(0)
    marks = [*"[[]]()::||\\ab \n", "0.5", "3", "[a:b:0.5]", "[a|b]", "-1", "1e400", ".", "[c::1.5]"]
    for _ in range(2_000):
        steps, before = rng.randrange(1, 9), rng.choice([None, 5])
        prompt = "".join(rng.choices(marks, k=rng.randrange(15)))
        plan = schedule(prompt, steps, hires_after=before, old=rng.random() < 0.2 and before is None)
        assert list(plan.ends) == sorted(set(plan.ends))
        assert plan.ends[0] >= 1
        assert plan.ends[-1] == steps
        covered = [plan.at(step) for step in range(steps)]
        assert sorted(set(covered)) == list(range(len(plan.ends)))
        assert covered == sorted(covered)
