"""The folders with LoRA files, embeddings, hypernetworks and upscalers that are called by name.

A name comes from a prompt, or from settings in a picture, so from anyone: it leads to files in its folder and
nowhere else.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from ldm import formats
from ldm.errors import CheckpointError, LdmError
from ldm.files import inside
from ldm.formats.mapped import printable

# Of two files that differ in this alone, the first counts.
ENDINGS = (".safetensors", ".pt", ".ckpt", ".bin", ".pth")


@dataclass(frozen=True)
class Library:
    """Folders to look names up in; None: there are none of the kind.

    Each method takes the name of a file without its ending, with its subfolders ("people/ann") or, if there
    is only one such file, without ("ann"). It returns the file's path, and raises LdmError for a name that
    is unknown (telling those that are similar), not unique, or leads out of the folder.
    """

    loras: Path | None = None
    embeddings: Path | None = None
    hypernetworks: Path | None = None
    upscalers: Path | None = None

    def lora(self, name: str) -> Path:
        """Also found by the name that its trainer wrote into it, as in the web UI ("ss_output_name")."""
        return _find(self.loras, name, "LoRA", _trained_as)

    def embedding(self, name: str) -> Path:
        return _find(self.embeddings, name, "embedding")

    def hypernetwork(self, name: str) -> Path:
        return _find(self.hypernetworks, name, "hypernetwork")

    def upscaler(self, name: str) -> Path:
        return _find(self.upscalers, name, "upscaler")


NO_LIBRARY = Library()


def files(folder: Path) -> dict[str, Path]:
    """The weight files below `folder`, by their names in it without ending: "people/ann".

    Links that lead out of the folder, and hidden files and folders, are left out.
    """
    found: dict[str, tuple[int, Path]] = {}
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = Path(place, name)
            ending = path.suffix.lower()
            if name.startswith(".") or ending not in ENDINGS:
                continue
            try:
                real = inside(folder, path.relative_to(folder).as_posix())
            except LdmError:
                continue
            key = path.relative_to(folder).with_suffix("").as_posix()
            rank = ENDINGS.index(ending)
            if key not in found or rank < found[key][0]:
                found[key] = (rank, real)
    return {name: path for name, (_, path) in sorted(found.items())}


def _find(
    folder: Path | None, name: str, what: str, alias: Callable[[Path], str | None] | None = None
) -> Path:
    shown = printable(name)
    if folder is None:
        raise LdmError(f"'{shown}' is asked for, but no folder with {what} files is given")
    if not folder.is_dir():
        raise LdmError(f"the folder {folder} with {what} files does not exist")
    inside(folder, name)
    known = files(folder)
    wanted = name.replace("\\", "/")
    plain = wanted.rsplit(".", 1)[0] if wanted.lower().endswith(ENDINGS) else wanted
    for key in (wanted, plain):
        if key in known:
            return known[key]
    found = [key for key in known if key.rsplit("/", 1)[-1] in (wanted, plain)]
    if not found and alias is not None:
        found = [key for key, path in known.items() if alias(path) == name]
    if len(found) > 1:
        raise LdmError(f"there are {len(found)} {what} files '{shown}'; write one of {_listed(found)}")
    if not found:
        stems = {key.rsplit("/", 1)[-1]: key for key in known}
        near = [stems[stem] for stem in get_close_matches(plain.rsplit("/", 1)[-1], stems, cutoff=0.5)]
        hint = f"did you mean {_listed(near)}?" if near else f"it has {_listed(list(known)) or 'none'}"
        raise LdmError(f"there is no {what} '{shown}' in {folder}; {hint}")
    return known[found[0]]


def _listed(names: list[str]) -> str:
    return ", ".join(printable(name) for name in names[:3]) + (" ..." if len(names) > 3 else "")


def _trained_as(path: Path) -> str | None:
    """The name that kohya's trainer gave the file. None: no such file, or a damaged one."""
    try:
        return formats.read(path).metadata.get("ss_output_name")
    except CheckpointError:
        return None
