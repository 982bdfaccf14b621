"""The packages that the training pictures come from: their terms, fetching, reading.

Nothing is taken from a stored pack. Each source is a package at a pinned version with a licence that allows
training and shipping a model; share-alike sets, proprietary sets and logo sets are left out on purpose.
"""

from __future__ import annotations

import json
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.errors import LdmError
from ldm.training.names import GROUPS, Name, Names, code, described, plain, slug, wanted


@dataclass(frozen=True)
class Source:
    """One package of drawings (or of names), and the terms under which it is used."""

    package: str  # npm name (openclipart: Debian name)
    version: str
    style: str  # as captions say it; "" for a package of names
    family: str
    licence: str  # SPDX
    attribution: str
    url: str

    @property
    def pinned(self) -> str:
        return f"{self.package}@{self.version}"

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
# Optional: fetched with apt, on Debian and its children.
CLIP_ART = Source("openclipart-svg", "1:0.18+dfsg-19", "clip art", "clip art",
                  "public domain", "Open Clip Art Library", "https://openclipart.org")  # fmt: skip
NAMES = Source("emojibase-data", "17.0.0", "", "", "MIT (annotations: Unicode-3.0)",
               "Miles Johnson; Unicode, Inc.", "https://github.com/milesj/emojibase")  # fmt: skip
KEYWORDS = Source("emojilib", "4.0.3", "", "", "MIT", "Mu-An Chiou", "https://github.com/muan/emojilib")


# Ends of the keys of one person in five colours of skin; the neutral one is enough.
_SKIN_TONE = re.compile(r"skin-tone|-(medium-)?(light|dark)$|-medium$")

# Keys of company and product logos; a model should not learn trademarks.
_LOGOS = {
    "android-os", "bbc", "debian", "dribbble", "google", "icons8-cup", "ipad", "iphone", "kindle", "linux",
    "nook", "phone-android", "reddit", "steam", "stumbleupon", "vlc", "wikipedia",
}  # fmt: skip


def fetch(source: Source, cache: Path) -> Path:
    """The package's tarball, downloaded with npm unless it lies in `cache`. Raises LdmError if npm fails."""
    file = cache / f"{source.file}.tgz"
    if file.exists():
        return file
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:  # a broken download never looks like a whole one
        command = ["npm", "pack", "--silent", source.pinned, "--pack-destination", folder]
        try:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            raise LdmError(f"npm could not fetch {source.pinned}: {error}") from error
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
    if not key or key in _LOGOS or _SKIN_TONE.search(key):
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
