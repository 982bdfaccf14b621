"""What the README and the pages in docs/ say is true of the code."""

import re
import runpy
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from ldm.building import DROPPED
from ldm.checkpoint import DEFAULT_MODEL
from ldm.families import FAMILIES, Concat
from ldm.request import Request
from ldm.samplers import SAMPLERS, Sampler
from ldm.spacings import SPACINGS
from ldm.training.default_model import SCOPES

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")


def table(page: str, first: str) -> Iterator[dict[str, str]]:
    """The rows of the table whose first heading is `first`, as heading -> cell."""
    lines = iter(page.splitlines())
    headings = next(_cells(line) for line in lines if line.startswith(f"| {first} |"))
    next(lines)
    for line in lines:
        if not line.startswith("|"):
            return
        yield dict(zip(headings, _cells(line), strict=True))


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def names(cell: str) -> list[str]:
    return [name.strip() for name in cell.split(",") if name.strip()]


def requestable(sampler: Sampler) -> list[str]:
    """The options of a sampler that a request and the command line can set."""
    return [name for name in sampler.options if name in Request.__dataclass_fields__]


def test_the_table_of_samplers_is_the_registry():
    rows = {row["sampler"]: row for row in table(README, "sampler")}
    assert list(rows) == list(SAMPLERS)
    for name, sampler in SAMPLERS.items():
        row = rows[name]
        assert row["evaluations per step"] == str(sampler.evaluations)
        assert row["default schedule"] == sampler.spacing
        assert names(row["options"]) == requestable(sampler), name
        assert row["source"]


def test_every_schedule_is_named():
    [sentence] = re.findall(r"^Schedules \(.*?\): (.*?)\.", README, re.DOTALL | re.MULTILINE)
    assert names(sentence.replace("\n", " ")) == list(SPACINGS)


def test_the_table_of_families_is_the_registry():
    rows = {row["family"]: row["draws from words alone"] for row in table(README, "family")}
    assert sorted(rows) == sorted(family.title for family in FAMILIES)
    for family in FAMILIES:
        alone = family.concat in (None, Concat.INPAINT)
        needed = "yes" if family.concat is None or alone else f"needs {family.concat.value}: "
        assert rows[family.title].startswith(needed)


def test_the_facts_of_every_family_are_stated():
    page = (ROOT / "docs/checkpoints.md").read_text(encoding="utf-8")
    rows = {row["family"]: row for row in table(page, "family")}
    assert list(rows) == [family.name for family in FAMILIES]
    for family in FAMILIES:
        row = rows[family.name]
        assert row["input channels"] == str(family.in_channels)
        assert row["context widths"] == (", ".join(map(str, family.context_dims)) or "-")
        assert row["predicts"] == (family.prediction.value if family.prediction else "eps or v")
        assert row["latent scale"] == str(family.scale)
        assert row["size"] == f"{family.size}" + (f" (v: {family.size_v})" if family.size_v else "")
        assert row["steps, sampler, guidance"] == f"{family.steps}, {family.sampler}, {family.cfg_scale:g}"


def test_what_is_dropped_is_listed_with_its_reason():
    page = (ROOT / "docs/checkpoints.md").read_text(encoding="utf-8")
    assert tuple(re.findall(r"^- `([^`]+)`: (.*)$", page, re.MULTILINE)) == DROPPED


def test_the_recipe_of_the_embedded_model_is_stated():
    page = (ROOT / "docs/embedded-model.md").read_text(encoding="utf-8")
    rows = {row["setting"]: row for row in table(page, "setting")}
    for name, scope in SCOPES.items():
        stated = {setting: row[name] for setting, row in rows.items()}
        assert stated["autoencoder: batch, steps"] == f"{scope.vae_batch}, {scope.vae_loop.steps:,}"
        assert stated["autoencoder: learning rate"] == f"{scope.vae_loop.lr:g}"
        assert stated["autoencoder: average"] == f"{scope.vae_loop.ema_decay:g}"
        assert stated["text and UNet: batch, steps"] == f"{scope.batch:,}, {scope.loop.steps:,}"
        assert stated["text and UNet: samples"] == f"{scope.batch * scope.loop.steps:,}"
        assert stated["text and UNet: learning rate"] == f"{scope.loop.lr:g}"
        assert stated["text and UNet: average"] == f"{scope.loop.ema_decay:g}"
        assert stated["UNet: width, levels"] == f"{scope.unet.model_channels}, {scope.unet.channel_mult}"
        assert stated["text encoder: width, layers"] == f"{scope.text.width}, {scope.text.layers}"


@pytest.mark.skipif(not DEFAULT_MODEL.exists(), reason="needs the embedded model")
def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    [example] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(example, {})
    assert (tmp_path / "apple.png").exists()


def test_the_example_for_students_arrives_at_the_data(capsys: pytest.CaptureFixture[str]):
    page = (ROOT / "docs/samplers.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(example, {})
    [stated] = re.findall(r"a mean of (\S+) and a\s+deviation of (\S+):", page)
    assert capsys.readouterr().out.rstrip().endswith("mean {}  deviation {}".format(*stated))


@cache
def flags_of(script: str) -> set[str]:
    """The flags that `python scripts/NAME.py --help` lists, and their spelling with _."""
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr(sys, "argv", [script, "--help"])
        patch.setattr(sys.stdout, "write", lines.append)
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    flags = set(re.findall(r"--[a-zA-Z][\w-]*", "".join(lines)))
    return flags | {"--" + flag[2:].replace("-", "_") for flag in flags}


def commands() -> list[tuple[str, str]]:
    """(page, command) for every line in the pages that runs a script."""
    lines = ((page, line) for page in PAGES for line in page.read_text(encoding="utf-8").splitlines())
    return [
        (page.name, line) for page, line in lines if "scripts/" in line and ".py " in line and "--" in line
    ]


@pytest.mark.parametrize(("page", "command"), commands())
def test_the_flags_of_every_command_exist(page: str, command: str):
    [script] = re.findall(r"scripts/\w+\.py", command)
    used = re.findall(r"(?<=\s)--[a-zA-Z][\w-]*", command.partition(script)[2].partition("#")[0])
    assert set(used) <= flags_of(script)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page: Path):
    text = re.sub("```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)  # code has no links
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" in target or (target.endswith("sheet.png") and not DEFAULT_MODEL.exists()):
            continue
        assert (page.parent / target).exists(), target
