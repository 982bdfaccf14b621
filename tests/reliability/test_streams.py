"""What a program says is worth less than what it makes: lost streams cost no picture."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
WORK = """
import sys
sys.path.insert(0, sys.argv[1])
import flags

def main():
    for i in range(2000):
        print("a path on stdout, é \\u4e00 \\udcff", i)
        print("progress on stderr", file=sys.stderr)
    open(sys.argv[2], "w").write("the picture")
    return 0

flags.start(main)
"""


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("| head -1", 0),
        ("2>&1 | head -1", 0),
        (">&-", 0),
        ("2>&-", 0),
        ("<&- >&- 2>&-", 0),
        ("> list", 0),
        (">/dev/full", 3),
        ("2>/dev/full", 0),
    ],
)
def test_a_stream_that_goes_away_ends_nothing(ending: str, code: int, tmp_path: Path):
    line = f'PYTHONIOENCODING=ascii "$0" -c "$1" "$2" made {ending}; exit ${{PIPESTATUS[0]}}'
    command = ["bash", "-c", line, sys.executable, WORK, str(SCRIPTS)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60)
    assert ended.returncode == code, ended.stderr[-500:]
    assert (tmp_path / "made").read_text() == "the picture"
    assert b"Traceback" not in ended.stderr
    assert b"Exception ignored" not in ended.stderr
    if code:
        assert ended.stderr.endswith(b"not all that was to be told could be written to stdout\n")
