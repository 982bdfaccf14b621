"""SECURITY.md names tests and files that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_what_went_wrong_elsewhere_has_the_tests_that_are_named() -> None:
    page = (ROOT / "SECURITY.md").read_text("utf-8")
    rows = [line.split("|")[3] for line in page.splitlines() if line.startswith("| ") and "`tests/" in line]
    assert len(rows) > 10
    for row in rows:
        for part in row.split(";"):
            *names, file = re.findall("`([^`]+)`", part)
            assert names, part
            text = (ROOT / file).read_text("utf-8")
            for name in names:
                assert re.search(rf"\b{re.escape(name)}", text), f"{name} is not in {file}"
