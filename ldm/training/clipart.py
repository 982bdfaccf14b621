"""Open Clip Art from its Debian package: drawings by many hands, of which the well-named ones are used."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from ldm.errors import LdmError
from ldm.training.names import Name, Names, plain
from ldm.training.sources import CLIP_ART, Drawing

_RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"

# Stars and arrows by the thousand, colour gradients, desktop themes full of logos, signs, flags, maps.
_SKIPPED = (
    "shapes", "special", "unsorted", "computer/icons", "signs_and_symbols", "geography",
    "recreation/games/cards",
)  # fmt: skip

_MOST = 8  # a title on more files than this is the name of a collection


def fetch(cache: Path) -> Path:
    """The folder of the package's drawings, fetched with apt unless it lies in `cache`.

    Raises LdmError where apt or dpkg are missing or do not know this version.
    """
    target = cache / "openclipart"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            wanted = f"{CLIP_ART.package}={CLIP_ART.version}"
            try:
                subprocess.run(
                    ["apt-get", "download", "-qq", wanted], cwd=folder, check=True, capture_output=True
                )
                (package,) = Path(folder).glob("*.deb")
                subprocess.run(["dpkg", "-x", package.name, "unpacked"], cwd=folder, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise LdmError(f"apt-get could not fetch {wanted}: {error}") from error
            (Path(folder) / "unpacked").rename(target)
    return target / "usr/share/openclipart/svg"


def drawings(names: Names, cache: Path) -> Iterator[Drawing]:
    """Drawings in the public domain by their own word, with a title that says what they show."""
    root = fetch(cache)
    titled: list[tuple[Path, str]] = []
    for path in sorted(root.rglob("*.svg")):
        if not path.is_symlink() and not path.relative_to(root).as_posix().startswith(_SKIPPED):
            title = public_domain_title(path.read_bytes())
            if title:
                titled.append((path, title))
    count = Counter(title for _, title in titled)
    for path, title in titled:
        if count[title] <= _MOST and names.knows(title):
            key = "-".join(path.relative_to(root).with_suffix("").parts)
            yield Drawing(CLIP_ART, key, Name(title, "clip art"), path.read_bytes())


def public_domain_title(svg: bytes) -> str | None:
    """The title in the drawing's metadata, as a caption says it: "Big truck 2" -> "big truck".

    None if the metadata do not dedicate it to the public domain, or the title is no short run of words.
    """
    try:
        work = next((e for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("}Work")), None)
    except ElementTree.ParseError:
        return None
    if work is None:
        return None
    fields = {element.tag.rpartition("}")[2]: element for element in work}
    licence, title = fields.get("license"), fields.get("title")
    if (
        licence is None
        or title is None
        or not licence.get(f"{_RDF}resource", "").lower().endswith("publicdomain")
    ):
        return None
    text = re.sub(r"\s*\d+$", "", plain(re.sub(r"[-_]", " ", title.text or "")))
    return text if re.fullmatch(r"[a-z']{3,}( [a-z']+){0,3}", text) else None
