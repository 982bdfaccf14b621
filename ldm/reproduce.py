"""Make a picture again from the settings it carries, and tell in what two pictures differ.

The same request on the same machine gives the same pixels. What a picture does not carry are the files it was
made with: they are recognised by the hashes in its text, whatever their names are today.
"""

import logging
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from ldm import interpret, lora
from ldm.checkpoint import DEFAULT_MODEL, load
from ldm.errors import CheckpointError, LdmError
from ldm.families import ClipPart
from ldm.files import sha256
from ldm.formats.mapped import printable
from ldm.images import read_text
from ldm.infotext import Infotext, parse
from ldm.inputs import NO_INPUTS, Inputs
from ldm.library import Library, files
from ldm.models import Models
from ldm.pipeline import described, picture, sample
from ldm.planning import plan
from ldm.request import Request
from ldm.text.prompt import tags

Source = str | os.PathLike[str] | Image.Image | Infotext
"""A picture, its file, or the text of its settings. Of two strings, the one with fields in it is a text."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Replay:
    """All that is needed to make a picture again."""

    models: Models
    request: Request  # of the whole batch that the picture is from
    place: int  # of the picture in that batch
    notes: tuple[str, ...]  # what will be different, one line each
    inputs: Inputs = NO_INPUTS

    def draw(self) -> Image.Image:
        """Draw the picture, with the rest of its batch; only this one is decoded."""
        last = deque(sample(self.models, self.request, self.inputs), maxlen=1).pop()
        run = plan(self.models, self.request, self.inputs)
        return picture(self.models, run, self.place, last.x[self.place])


def replay(
    source: Source,
    models: Models | None = None,
    folders: Sequence[str | os.PathLike[str]] = (),
    *,
    inputs: Inputs = NO_INPUTS,
    device: torch.device | str = "cpu",
) -> Image.Image:
    """Make a picture again. What cannot be as it was is logged as a warning, one line for each field.

    models: what to draw with; None: the checkpoint that the picture names is looked for in the folders (and
        in this package: the embedded model).
    folders: where checkpoints, VAE, LoRA files, hypernetworks and embeddings lie, also in folders below.
    inputs: the pictures that the run was given, where there were any; the text has only their fingerprints.
    device: for the checkpoint that is loaded.

    Raises LdmError if the picture holds no settings, or if the checkpoint is not found.
    """
    found = prepare(source, models, folders, inputs=inputs, device=device)
    for note in found.notes:
        logger.warning(note)
    return found.draw()


def prepare(
    source: Source,
    models: Models | None = None,
    folders: Sequence[str | os.PathLike[str]] = (),
    *,
    inputs: Inputs = NO_INPUTS,
    device: torch.device | str = "cpu",
    change: Callable[[Request], Request] = lambda request: request,
) -> Replay:
    """Find out how to make a picture again, without drawing it. Arguments and errors as for `replay`.

    change: makes of the request in the picture, alone and not in its batch, the one to draw instead.
    """
    info = settings(source)
    if not info.fields:
        raise LdmError("the text of this picture holds a prompt, but no settings")
    request, notes = interpret.request(info)
    places = [Path(folder) for folder in folders]
    for place in places:
        if not place.is_dir():
            raise LdmError(f"there is no folder {printable(str(place), 150)}")
    if models is None:
        models = _checkpoint(info, places, device, notes)
    skips = [part.skip for part in models.family.parts if isinstance(part, ClipPart)]
    if not info.ours and skips != [
        1
    ]:  # the web UI writes its clip skip into all pictures, and uses it for SD1
        request = replace(request, clip_skip=None)
    wanted = change(request)
    as_it_was = info.ours and wanted == request
    request, library = _networks(info, wanted, models.library, places, notes)
    if library != models.library:
        models = replace(models, library=library)
    request, place = interpret.batch(info, request) if info.ours else (request, 0)
    if request.edit is not None and inputs.picture is None:
        raise LdmError("this picture was drawn from another one; give that, too (inputs=, or img2img.py)")
    run = plan(models, request, inputs)
    notes += _differences(info, parse(described(models, run, place)), files_only=not as_it_was)
    return Replay(models, request, place, tuple(printable(note, 200) for note in notes), inputs)


def settings(source: Source) -> Infotext:
    """The settings of a picture or a text, taken apart. Raises LdmError if a picture holds none."""
    if isinstance(source, Infotext):
        return source
    if isinstance(source, str) and ("\n" in source or "Steps: " in source):
        return parse(source)
    return parse(read_text(source))


def diff(a: Source | Request, b: Source | Request) -> list[tuple[str, object, object]]:
    """The settings in which two pictures, texts or requests differ: (field, in a, in b), None if missing.

    Two texts are compared field by field as they are written; with a request, both are compared as requests.
    """
    if isinstance(a, Request) or isinstance(b, Request):
        left, right = (
            _flat(x if isinstance(x, Request) else interpret.request(settings(x))[0]) for x in (a, b)
        )
    else:
        left, right = (
            {"Prompt": info.prompt, "Negative prompt": info.negative_prompt, **info.fields}
            for info in (settings(a), settings(b))
        )
    names = dict.fromkeys([*left, *right])
    return [(n, left.get(n), right.get(n)) for n in names if left.get(n) != right.get(n)]


def _flat(request: Request) -> dict[str, object]:
    """Field names and values, those of `compat` as "compat.noise"."""
    flat = {field.name: getattr(request, field.name) for field in fields(request)}
    compat = flat.pop("compat")
    return flat | {f"compat.{field.name}": getattr(compat, field.name) for field in fields(compat)}


def _differences(info: Infotext, again: Infotext, *, files_only: bool) -> list[str]:
    """What our text of the new picture will say otherwise.

    files_only: of other programs' pictures, and where a change was asked for, only the files are compared.
    """
    names = ("Model hash", "VAE hash") if files_only else dict.fromkeys([*info.fields, *again.fields])
    return [
        f"{name}: the picture was made with {old or 'nothing'}, this is {new or 'nothing'}"
        for name in names
        if (old := info.fields.get(name)) != (new := again.fields.get(name)) and (old or info.ours)
    ]


def _checkpoint(
    info: Infotext, folders: Sequence[Path], device: torch.device | str, notes: list[str]
) -> Models:
    """Load the files that the picture names. Raises LdmError if the checkpoint is not there."""
    name, digest = info.fields.get("Model", ""), info.fields.get("Model hash", "").lower()
    if not name and not digest:
        raise LdmError("the picture does not tell its checkpoint; load it and give it as models")
    embedded = [DEFAULT_MODEL] if DEFAULT_MODEL.exists() else []
    path = _find(name, digest, [*embedded, *_files(folders)], _is_checkpoint)
    if path is None:
        shown = printable(f"'{name}' ({digest or 'without hash'})", 100)
        where = "not in the given folders" if folders else "needed; give the folder where it lies, or models"
        raise LdmError(f"the checkpoint {shown} is {where}")
    if not digest:
        notes.append(f"Model: '{name}' has no hash in the picture; taken by its name")

    vae = None
    if "VAE" in info.fields or "VAE hash" in info.fields:
        vae_name, vae_digest = info.fields.get("VAE", ""), info.fields.get("VAE hash", "").lower()
        vae = _find(Path(vae_name).stem, vae_digest, _files(folders), _is_whole)
        if vae is None and not info.ours:  # of our pictures, the comparison of the texts says it
            notes.append(f"VAE: '{vae_name}' was not found; the one in the checkpoint takes its place")
    precision = info.fields.get("Precision", "float32" if info.ours else "")
    models = load(
        path,
        device=device,
        dtype=getattr(torch, precision) if precision in ("float32", "float16", "bfloat16") else None,
        vae=vae,
        prediction=interpret.prediction(info),
        ema=info.fields.get("EMA") == "True",
    )
    usual = models.family.prediction
    if info.ours and usual and "Prediction" not in info.fields:  # whatever the file says of itself
        models = replace(models, denoiser=replace(models.denoiser, prediction=usual))
    return models


@dataclass(frozen=True)
class _Found(Library):
    """A library that knows the files of one picture by their names in its prompt, wherever they lie."""

    paths: dict[tuple[str, str], Path] = field(default_factory=dict)

    def lora(self, name: str) -> Path:
        return self.paths.get(("lora", name)) or super().lora(name)

    def hypernetwork(self, name: str) -> Path:
        return self.paths.get(("hypernet", name)) or super().hypernetwork(name)


def _networks(
    info: Infotext, request: Request, library: Library, folders: Sequence[Path], notes: list[str]
) -> tuple[Request, Library]:
    """Find the files that the prompt names; a tag whose file is not there is taken out of the prompt."""
    paths: dict[tuple[str, str], Path] = {}
    known = _files(folders)
    for tag in tags(request.prompt)[1]:
        kind = "hypernet" if tag.kind == "hypernet" else "lora"
        look_up = library.hypernetwork if kind == "hypernet" else library.lora
        stem = tag.name.rsplit("/", 1)[-1]
        hashes = info.hashes("Hypernet hashes" if kind == "hypernet" else "Lora hashes")
        digest = (hashes.get(tag.name) or hashes.get(stem) or "").lower()
        own: list[Path] = []
        with suppress(LdmError):
            own = [look_up(tag.name)]
        same = _is_whole if kind == "hypernet" else _is_lora
        path = _find(stem, digest, [*own, *known], same) if digest else None
        path = path or next(iter(own), None) or _find(stem, "", known, same)
        if path is not None:
            paths[kind, tag.name] = path
            if digest and not same(path, digest, int) and not info.ours:
                notes.append(f"{tag.kind}: '{tag.name}' is another file than the picture's")
        else:
            notes.append(f"{tag.kind}: '{tag.name}' was not found; the picture is made without it")
            pattern = rf"<{re.escape(tag.kind)}:{re.escape(tag.name)}(:[^>]*)?>"
            request = replace(request, prompt=re.sub(pattern, "", request.prompt))

    embeddings = library.embeddings
    for name, digest in info.hashes("TI hashes").items():
        if embeddings is not None and name in files(embeddings):
            continue
        path = _find(name, digest.lower(), known, _is_whole) or _find(name, "", known, _is_whole)
        if path is not None:
            embeddings = path.parent
        else:
            notes.append(f"TI hashes: the embedding '{name}' was not found; its name is a plain word")
    if not paths and embeddings == library.embeddings:
        return request, library
    return request, _Found(**(vars(library) | {"embeddings": embeddings, "paths": paths}))


def _files(folders: Iterable[Path]) -> list[Path]:
    return [path for folder in folders for path in files(folder).values()]


Same = Callable[[Path, str, Callable[[int], object]], bool]
"""(file, hash in the picture, progress in bytes) -> whether it is that file."""


def _find(name: str, digest: str, candidates: Sequence[Path], same: Same) -> Path | None:
    """The file with this hash, those of the same name being looked at first; without a hash, by the name."""
    named = [path for path in candidates if path.stem == name]
    if not digest:
        return named[0] if named else None
    ordered = list(dict.fromkeys([*named, *candidates]))
    total = sum(path.stat().st_size for path in ordered)
    with tqdm(
        total=total, unit="B", unit_scale=True, desc=f"looking for {name}", leave=False, delay=1, disable=None
    ) as bar:
        return next((path for path in ordered if same(path, digest, bar.update)), None)


def _is_checkpoint(path: Path, digest: str, progress: Callable[[int], object]) -> bool:
    """By ten digits of the hash of the whole file or, as until 2022, by eight of one of its parts."""
    if len(digest) == 8:
        return sha256(path, start=0x100000, size=0x10000, progress=progress).startswith(digest)
    return _is_whole(path, digest, progress)


def _is_whole(path: Path, digest: str, progress: Callable[[int], object]) -> bool:
    return len(digest) >= 8 and sha256(path, progress=progress).startswith(digest)


def _is_lora(path: Path, digest: str, progress: Callable[[int], object]) -> bool:
    """By the hash of its weights or, as some sites have it, of the whole file."""
    with suppress(CheckpointError):
        if len(digest) >= 8 and lora.short_hash(path).startswith(digest[:12]):
            return True
    return _is_whole(path, digest, progress)
