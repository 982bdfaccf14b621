"""Names in prompts lead to files in the given folders and nowhere else."""

from pathlib import Path

import pytest
import torch

from ldm.errors import LdmError
from ldm.formats import write_safetensors
from ldm.library import Library, files

TENSOR = {"a": torch.zeros(1)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "loras"
    for name in ("style.safetensors", "people/ann.safetensors", "people/bob.safetensors", "old/bob.pt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(root / name, TENSOR, {"ss_output_name": f"trained {Path(name).stem}"})
    (root / "readme.txt").write_text("no weights")
    (root / ".hidden.safetensors").write_bytes(b"")
    write_safetensors(tmp_path / "outside.safetensors", TENSOR, {"ss_output_name": "outside"})
    return root


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("style", "style.safetensors"),
        ("style.safetensors", "style.safetensors"),
        ("people/ann", "people/ann.safetensors"),
        ("people\\ann", "people/ann.safetensors"),
        ("ann", "people/ann.safetensors"),
        ("old/bob", "old/bob.pt"),
        ("trained ann", "people/ann.safetensors"),
    ],
)
def test_files_are_found_by_path_by_stem_and_by_the_trainers_name(folder: Path, name: str, file: str):
    assert Library(loras=folder).lora(name) == (folder / file).resolve()


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "people/../../outside", "C:\\x", "..", "", "\0", "\\\\host\\x"]
)
def test_no_name_leads_outside(folder: Path, name: str):
    with pytest.raises(LdmError, match="leads outside"):
        Library(loras=folder).lora(name)


def test_links_that_lead_outside_are_not_there(folder: Path):
    (folder / "link.safetensors").symlink_to(folder.parent / "outside.safetensors")
    (folder / "up").symlink_to(folder.parent)
    for name in ("link", "up/outside", "outside"):
        with pytest.raises(LdmError):
            Library(loras=folder).lora(name)
    assert set(files(folder)) == {"style", "people/ann", "people/bob", "old/bob"}


def test_an_unknown_name_is_refused_with_similar_ones(folder: Path):
    with pytest.raises(LdmError, match=r"no LoRA 'anne' in .*; did you mean people/ann\?"):
        Library(loras=folder).lora("anne")
    with pytest.raises(LdmError, match=r"it has old/bob, people/ann, people/bob \.\.\."):
        Library(loras=folder).lora("xyzzy")


def test_a_stem_in_two_folders_must_be_told_apart(folder: Path):
    with pytest.raises(LdmError, match="there are 2 LoRA files 'bob'; write one of old/bob, people/bob"):
        Library(loras=folder).lora("bob")


def test_of_two_endings_safetensors_comes_first(folder: Path):
    write_safetensors(folder / "style.pt", TENSOR)
    assert Library(loras=folder).lora("style").suffix == ".safetensors"


def test_each_kind_has_its_folder(folder: Path):
    library = Library(hypernetworks=folder)
    assert library.hypernetwork("ann").name == "ann.safetensors"
    with pytest.raises(LdmError, match="no folder with LoRA files"):
        library.lora("ann")
    with pytest.raises(LdmError, match="does not exist"):
        Library(embeddings=folder / "nowhere").embedding("ann")
