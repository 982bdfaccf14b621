"""From packages to a data set: which drawings, rendered how, weighted how, which kept for testing."""

from __future__ import annotations

import io
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import resvg_py
import torch
from PIL import Image
from tqdm import tqdm

from ldm.errors import LdmError
from ldm.training import clipart
from ldm.training.icons import Icon, IconSet
from ldm.training.names import Names, plain
from ldm.training.sources import CLIP_ART, KEYWORDS, NAMES, SOURCES, Drawing, drawings, load_names

_RENDERED = 256  # drawings are rendered at least at this size, and at twice the picture's, then reduced
_FILL = 0.94  # of the picture's side is taken by the drawing's longer side
_SPECK = 8  # alpha up to this does not count as drawn when margins are cut

# How often a group is drawn, relative to the everyday ones: what people ask for first.
WEIGHTS = {
    "smileys": 1.0, "animals": 1.0, "food": 1.0, "travel": 1.0, "activities": 1.0, "objects": 1.0,
    "people": 0.5, "clip art": 0.5, "symbols": 0.3, "flags": 0.3,
}  # fmt: skip


@dataclass(frozen=True)
class Scope:
    """How much of the artwork is used."""

    name: str
    styles: tuple[str, ...] | None = None  # None: all
    everyday: bool = False  # only the names in everyday.txt
    families: int = 5  # a thing drawn by at least this many is a candidate for the hold-out
    size: int = 128  # usual side of a picture, pixels


SCOPES = {
    "small": Scope("small", ("fluent flat", "noto", "twemoji", "emojione"), True, families=4, size=64),
    "full": Scope("full"),
}


def render(data: bytes, size: int) -> Image.Image:
    """Draw an SVG or decode a WebP: RGBA, size x size, the drawing centred and filling 94 % of the picture.

    Sets leave different margins; the same scale for all makes shapes, not margins, what there is to learn.
    Raises ValueError for a drawing that cannot be drawn or is empty.
    """
    if data.startswith(b"RIFF"):
        image = Image.open(io.BytesIO(data), formats=["WEBP"])
    else:
        # dpi: its default, 0, gives drawings in mm or pt no size. Fonts would differ between machines.
        width = max(_RENDERED, 2 * size)
        svg = resvg_py.svg_to_bytes(svg_string=data.decode(), width=width, dpi=96, skip_system_fonts=True)
        image = Image.open(io.BytesIO(bytes(svg)), formats=["PNG"])
    image = image.convert("RGBA")
    box = image.getchannel("A").point([255 * (alpha > _SPECK) for alpha in range(256)]).getbbox()
    if box is None:
        raise ValueError("an empty drawing")
    image = image.crop(box)
    scale = _FILL * size / max(image.size)
    fitted = image.resize([max(1, round(scale * side)) for side in image.size], Image.Resampling.HAMMING)
    canvas = Image.new("RGBA", (size, size))
    canvas.paste(fitted, ((size - fitted.width) // 2, (size - fitted.height) // 2))
    return canvas


def rendered(drawing: Drawing, size: int, cache: Path) -> Image.Image:
    """`render`, kept as a file: a build that was stopped goes on where it was."""
    file = cache / "rendered" / str(size) / drawing.source.file / f"{drawing.key}.png"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        render(drawing.data, size).save(part, "png", compress_level=1)
        part.rename(file)
    return Image.open(file, formats=["PNG"])


def everyday() -> set[str]:
    """The names of the small scope: common things, drawn by all four sets, with every prompt of the sheet."""
    text = (Path(__file__).parent / "everyday.txt").read_text(encoding="utf-8")
    return {plain(name) for line in text.split("\n") for name in line.split(",") if name.strip()}


def split(icons: Sequence[Icon], families: int) -> list[Icon]:
    """Hold out one family of about every third thing that at least `families` families have drawn.

    The choice hangs on the name alone, so it stays the same when drawings come or go.
    """
    drawn_by: dict[str, set[str]] = {}
    for icon in icons:
        if icon.group != "clip art":
            drawn_by.setdefault(icon.subject, set()).add(icon.family)
    held: set[tuple[str, str]] = set()
    for subject, drew in drawn_by.items():
        number = zlib.crc32(subject.encode())
        if len(drew) >= families and number % 3 == 0:
            held.add((subject, sorted(drew)[number // 3 % len(drew)]))
    return [replace(icon, holdout=(icon.subject, icon.family) in held) for icon in icons]


def chosen(scope: Scope, names: Names, cache: Path) -> Iterator[Drawing]:
    """The scope's drawings, source by source. Without apt there is no clip art; stderr says so."""
    subjects = everyday() if scope.everyday else None
    for source in SOURCES:
        if scope.styles is None or source.style in scope.styles:
            for drawing in drawings(source, names, cache):
                if subjects is None or drawing.name.subject in subjects:
                    yield drawing
    if scope.styles is None:
        try:
            yield from clipart.drawings(names, cache)
        except LdmError as error:
            print(f"clip art is left out: {error}", file=sys.stderr)


def build(scope: Scope, size: int, cache: Path) -> IconSet:
    """Fetch, read, render and split everything of one scope. The same bytes every time."""
    found = list(tqdm(chosen(scope, load_names(cache), cache), desc="read", file=sys.stderr))
    images = torch.empty(len(found), 4, size, size, dtype=torch.uint8)
    icons: list[Icon] = []
    sources = {}
    for drawing in tqdm(found, desc=f"render at {size}", file=sys.stderr):
        try:
            picture = np.array(rendered(drawing, size, cache))  # (S, S, 4)
        except ValueError as error:
            print(f"left out {drawing.source.style} {drawing.key}: {error}", file=sys.stderr)
            continue
        images[len(icons)] = torch.from_numpy(picture).permute(2, 0, 1)
        icons.append(_icon(drawing))
        sources[drawing.source.pinned] = drawing.source
    facts = {"scope": scope.name, "sources": ", ".join([*sources, NAMES.pinned, KEYWORDS.pinned])}
    return IconSet(images[: len(icons)], split(icons, scope.families), facts)


def _icon(drawing: Drawing) -> Icon:
    name, source = drawing.name, drawing.source
    return Icon(
        subject=name.subject, short=name.short, tags=name.tags, keywords=name.keywords,
        style=source.style, family=source.family, group=name.group,
        weight=WEIGHTS[name.group], flip=name.group not in ("flags", "symbols"),
    )  # fmt: skip


def notice(facts: dict[str, str]) -> str:
    """Plain text to ship beside weights: whose drawings they were trained on, under which licence.

    facts: those of the `IconSet`, or a checkpoint's copy of them.
    """
    used = facts["sources"].split(", ")
    entries = [
        f"{source.package} {source.version}\n"
        f"  by {source.attribution} ({source.url})\n"
        f"  licence: {source.licence}\n"
        for source in (*SOURCES, CLIP_ART, NAMES, KEYWORDS)
        if source.pinned in used
    ]
    return "\n".join([_NOTICE, *entries])


_NOTICE = """\
The embedded model of ldm was trained on these drawings, named by emojibase-data and emojilib.
They were rendered to small pictures, their margins cut, some mirrored, and laid on plain colours.
The model may draw pictures close to them, so this notice gives the credit that their licences ask for.
CC-BY-4.0 is at https://creativecommons.org/licenses/by/4.0/,
Apache-2.0 at https://www.apache.org/licenses/LICENSE-2.0.
"""
