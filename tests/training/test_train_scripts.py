"""scripts/train_controlnet.py and train_default_model.py: mistakes, ends and full disks."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.train_controlnet import main as train_controlnet
from scripts.train_default_model import main as train_default_model
from tests.training.icon_set import icon_set

ROOT = Path(__file__).parents[2]
SCRIPTS = {"train_controlnet": train_controlnet, "train_default_model": train_default_model}


@pytest.fixture
def places(tmp_path: Path) -> list[str]:
    """Flags for a few pictures of 64 px, and for where the results go."""
    icon_set(64).save(tmp_path / "icons.safetensors")
    named = {"data": "icons.safetensors", "folder": "run", "out": "out"}
    return [f"--{flag}={tmp_path / name}" for flag, name in named.items()] + ["--device=cpu", "--minutes=0"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_session_that_ends_says_how_to_go_on(
    script: str, places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert SCRIPTS[script](places) == 0
    assert capsys.readouterr().err.endswith("not finished; the same command goes on from here\n")
    assert list((tmp_path / "run").rglob("state.safetensors"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_full_disk_is_one_line_and_leaves_no_half_file(script: str, places: list[str], tmp_path: Path):
    """A limit on the size of files stands for the full disk."""

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    command = [sys.executable, ROOT / "scripts" / f"{script}.py", *places]
    run = subprocess.run(command, cwd=ROOT, preexec_fn=fill, capture_output=True, text=True)
    assert run.returncode == 3
    assert run.stderr.splitlines()[-1] == f"{script}: [Errno 27] File too large"
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_data_of_another_kind_are_named(
    script: str, places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert SCRIPTS[script]([*places, f"--data={tmp_path / 'none'}"]) == 2
    assert "build it with scripts/build_dataset.py" in capsys.readouterr().err
    (tmp_path / "text").write_text("hello")
    assert SCRIPTS[script]([*places, f"--data={tmp_path / 'text'}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "neither a .safetensors file nor a checkpoint" in said
