"""Where the training pictures come from: fetch icon packages by name, read and render their drawings.

Nothing is taken from a stored pack. Each source is a package at a pinned version with a licence that allows
training and shipping a model; share-alike sets, proprietary sets and logo sets are left out on purpose.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
import torch
from PIL import Image
from tqdm import tqdm

from ldm.errors import LdmError
from ldm.training.icons import Icon, IconSet
from ldm.training.names import GROUPS, Name, Names, code, described, plain, slug, wanted

_OVERSIZE = 4  # drawings are rendered this much larger, then reduced
_FILL = 0.94  # of the picture's side is taken by the drawing's longer side
_SPECK = 8  # alpha up to this does not count as drawn when margins are cut


@dataclass(frozen=True)
class Source:
    """One package of drawings (or of names), and the terms under which it is used."""

    package: str  # npm name
    version: str
    style: str  # as captions say it; "" for a package of names
    family: str
    licence: str  # SPDX
    attribution: str
    url: str

    @property
    def file(self) -> str:
        """What npm calls the tarball, without its ending."""
        return f"{self.package.lstrip('@').replace('/', '-')}-{self.version}"


_FLUENT = ("fluent", "MIT", "Microsoft Corporation", "https://github.com/microsoft/fluentui-emoji")
_NOTO = ("Apache-2.0", "Google Inc.", "https://github.com/googlefonts/noto-emoji")

SOURCES: tuple[Source, ...] = (
    Source("@iconify-json/fluent-emoji-flat", "1.2.6", "fluent flat", *_FLUENT),
    Source("@iconify-json/noto", "1.2.9", "noto", "noto", *_NOTO),
    Source("@iconify-json/twemoji", "1.2.5", "twemoji", "twemoji",
           "CC-BY-4.0", "Twitter, Inc. and other contributors", "https://github.com/jdecked/twemoji"),
    Source("@iconify-json/emojione", "1.2.3", "emojione", "emojione",
           "CC-BY-4.0", "EmojiOne (version 2)", "https://github.com/EmojiTwo/emojitwo"),
    Source("@iconify-json/fluent-emoji", "1.2.7", "fluent", *_FLUENT),
    Source("@lobehub/fluent-emoji-3d", "1.1.0", "fluent 3d", *_FLUENT),
    Source("@iconify-json/noto-v1", "1.2.5", "noto blob", "noto blob", *_NOTO),
    Source("@iconify-json/fxemoji", "1.2.2", "firefox", "firefox",
           "Apache-2.0", "Mozilla Foundation", "https://github.com/mozilla/fxemoji"),
    Source("@iconify-json/streamline-emojis", "1.2.4", "streamline", "streamline",
           "CC-BY-4.0", "Streamline", "https://github.com/webalys-hq/streamline-vectors"),
    Source("@iconify-json/flat-color-icons", "1.2.3", "flat color", "flat color",
           "MIT", "Icons8", "https://github.com/icons8/flat-color-icons"),
    Source("@iconify-json/circle-flags", "1.2.11", "circle", "circle",
           "MIT", "HatScripts", "https://github.com/HatScripts/circle-flags"),
)  # fmt: skip
NAMES = Source("emojibase-data", "17.0.0", "", "", "MIT (annotations: Unicode-3.0)",
               "Miles Johnson; Unicode, Inc.", "https://github.com/milesj/emojibase")  # fmt: skip
KEYWORDS = Source("emojilib", "4.0.3", "", "", "MIT", "Mu-An Chiou", "https://github.com/muan/emojilib")

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

# Ends of the keys of one person in five colours of skin; the neutral one is enough.
_SKIN_TONE = re.compile(r"skin-tone|-(medium-)?(light|dark)$|-medium$")


# --- fetching -----------------------------------------------------------------------------------------------


def fetch(source: Source, cache: Path) -> Path:
    """The package's tarball, downloaded with npm unless it lies in `cache`. Raises LdmError if npm fails."""
    file = cache / f"{source.file}.tgz"
    if file.exists():
        return file
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:  # a broken download never looks like a whole one
        command = [
            "npm",
            "pack",
            "--silent",
            f"{source.package}@{source.version}",
            "--pack-destination",
            folder,
        ]
        try:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            raise LdmError(f"npm could not fetch {source.package}@{source.version}: {error}") from error
        (Path(folder) / file.name).rename(file)
    return file


def _json(file: Path, name: str, default: Any = None) -> Any:
    with tarfile.open(file) as tar:
        try:
            member = tar.extractfile(f"package/{name}")
        except KeyError:
            return default
        assert member is not None, f"{name} in {file.name} is a folder"
        return json.load(member)


def load_names(cache: Path) -> Names:
    data, keywords = fetch(NAMES, cache), fetch(KEYWORDS, cache)
    return Names(
        _json(data, "en/data.json"),
        _json(data, "meta/groups.json")["groups"],
        _json(data, "meta/unicode-names.json"),
        _json(keywords, "dist/emoji-en-US.json"),
    )


# --- drawings -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawing:
    """One picture before rendering."""

    source: Source
    key: str  # its file name in the cache of rendered pictures
    name: Name
    data: bytes  # SVG or WebP


def drawings(source: Source, names: Names, cache: Path) -> Iterator[Drawing]:
    """All wanted drawings of one package, in a fixed order, each only once."""
    file = fetch(source, cache)
    if source.package == "@lobehub/fluent-emoji-3d":
        yield from _webp_drawings(source, names, file)
    else:
        yield from _iconify_drawings(source, names, file)


def _webp_drawings(source: Source, names: Names, file: Path) -> Iterator[Drawing]:
    with tarfile.open(file) as tar:
        for member in sorted(tar.getnames()):
            name = names.by_code.get(code(Path(member).stem))
            if member.endswith(".webp") and name:
                data = tar.extractfile(member)
                assert data is not None
                yield Drawing(source, Path(member).stem, name, data.read())


def _iconify_drawings(source: Source, names: Names, file: Path) -> Iterator[Drawing]:
    """Iconify packs are one icons.json: `icons` (SVG bodies) and `aliases` (further spellings of a key)."""
    pack = _json(file, "icons.json")
    categories = _json(file, "metadata.json", {}).get("categories", {})
    groups = {key: GROUPS.get(slug(label)) for label, keys in categories.items() for key in keys}
    codes = {key: code(hexcode) for hexcode, key in _json(file, "chars.json", {}).items()}
    spellings: dict[str, list[str]] = {}
    for alias, target in pack.get("aliases", {}).items():
        if set(target) == {"parent"}:  # a mirrored copy adds nothing
            spellings.setdefault(target["parent"], []).append(alias)

    for key, icon in sorted(pack["icons"].items()):
        if icon.get("hidden"):
            continue
        known = (names.by_slug.get(spelling) for spelling in [key, *spellings.get(key, [])])
        name = names.by_code.get(codes.get(key, "")) or next(filter(None, known), None)
        name = name or _name_from_key(source, key, groups.get(key), names)
        if name:
            yield Drawing(source, key, name, _svg(pack, icon))


def _name_from_key(source: Source, key: str, group: str | None, names: Names) -> Name | None:
    """A name for a drawing that is no emoji of today's list, made of its key; None for what is not wanted."""
    match source.style:
        case "circle":  # two-letter country codes, which the flags' code points spell out
            return names.by_code.get("-".join(f"{0x1F1E6 + ord(letter) - ord('a'):x}" for letter in key))
        case "firefox":
            key = names.split(key) or ""
        case "streamline":
            key = re.sub(r"-\d+$", "", key)  # several drawings of one thing are numbered
    if not key or _SKIN_TONE.search(key):
        return None
    if name := names.by_slug.get(key):
        return name
    subject = plain(key.replace("-", " "))
    return described(subject, group or "objects") if wanted(subject) else None


def _svg(pack: dict, icon: dict) -> bytes:
    """A whole SVG document from the pack's body and view box."""
    default = {"left": 0, "top": 0, "width": 16, "height": 16}  # Iconify's own
    left, top, width, height = (icon.get(k, pack.get(k, default[k])) for k in default)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    ).encode()


# --- rendering ----------------------------------------------------------------------------------------------


def render(data: bytes, size: int) -> Image.Image:
    """Draw an SVG or decode a WebP: RGBA, size x size, the drawing centred and filling 94 % of the picture.

    Sets leave different margins; the same scale for all makes shapes, not margins, what there is to learn.
    Raises ValueError for a drawing that cannot be drawn or is empty.
    """
    if data.startswith(b"RIFF"):
        image = Image.open(io.BytesIO(data))
    else:
        # dpi: its default, 0, gives every drawing measured in mm or pt no size at all.
        svg = resvg_py.svg_to_bytes(svg_string=data.decode(), width=_OVERSIZE * size, dpi=96)
        image = Image.open(io.BytesIO(bytes(svg)))
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
    return Image.open(file)


# --- the data set -------------------------------------------------------------------------------------------


def everyday() -> set[str]:
    """The names of the small scope: things one can draw with four pencils, and every prompt of the sheet."""
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


def build(scope: Scope, size: int, cache: Path) -> IconSet:
    """Fetch, read, render and split everything of one scope. The same bytes every time."""
    names = load_names(cache)
    sources = [source for source in SOURCES if scope.styles is None or source.style in scope.styles]
    subjects = everyday() if scope.everyday else None
    chosen = [
        drawing
        for source in tqdm(sources, desc="read", file=sys.stderr)
        for drawing in drawings(source, names, cache)
        if subjects is None or drawing.name.subject in subjects
    ]
    pictures, icons = [], []
    for drawing in tqdm(chosen, desc=f"render at {size}", file=sys.stderr):
        try:
            pictures.append(np.asarray(rendered(drawing, size, cache)))
        except ValueError as error:
            print(f"left out {drawing.source.style} {drawing.key}: {error}", file=sys.stderr)
            continue
        icons.append(_icon(drawing))
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()  # (N, 4, S, S)
    used = [f"{source.package}@{source.version}" for source in (*sources, NAMES, KEYWORDS)]
    return IconSet(images, split(icons, scope.families), {"scope": scope.name, "sources": ", ".join(used)})


def _icon(drawing: Drawing) -> Icon:
    name, source = drawing.name, drawing.source
    return Icon(
        subject=name.subject, short=name.short, tags=name.tags, keywords=name.keywords,
        style=source.style, family=source.family, group=name.group,
        weight=WEIGHTS[name.group], flip=name.group not in ("flags", "symbols"),
    )  # fmt: skip


def notice(scope: Scope) -> str:
    """Plain text to ship beside weights trained on the scope: whose drawings, under which licence."""
    sources = [source for source in SOURCES if scope.styles is None or source.style in scope.styles]
    entries = [
        f"{source.package} {source.version}\n"
        f"  by {source.attribution} ({source.url})\n"
        f"  licence {source.licence}"
        for source in (*sources, NAMES, KEYWORDS)
    ]
    return _NOTICE + "\n" + "\n\n".join(entries) + "\n"


_NOTICE = """The embedded model of ldm was trained on these drawings, named by the last two entries.
The drawings were rendered to small pictures, their margins cut, some mirrored, on coloured backgrounds.
The weights contain none of them; this notice gives the credit that their licences ask for.
CC-BY-4.0: https://creativecommons.org/licenses/by/4.0/
"""
