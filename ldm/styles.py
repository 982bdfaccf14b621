"""The web UI's styles.csv: named pieces of prompts to add to one's own.

name,prompt,negative_prompt
film,"{prompt}, film grain, 35mm","digital, render"
sharp,"sharp focus, detailed",blurry
"""

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from io import StringIO
from os import PathLike
from pathlib import Path

from ldm.errors import RequestError
from ldm.formats.mapped import printable, reason
from ldm.request import Request
from ldm.text_file import read_utf8


@dataclass(frozen=True)
class Style:
    """Where the prompt goes is marked {prompt}; without a mark, the style is put behind it."""

    name: str
    prompt: str
    negative_prompt: str = ""


def read(path: str | PathLike[str]) -> dict[str, Style]:
    """Read a styles file, also the first form with the columns "name" and "text". Later lines win.

    Rows without a name, or whose name begins with "#", are left out.
    Raises RequestError if the file is not one of these.
    """
    path = Path(path)
    styles: dict[str, Style] = {}
    try:
        rows = csv.DictReader(StringIO(read_utf8(path), newline=""), skipinitialspace=True, strict=True)
        columns = rows.fieldnames or []
        prompt = "prompt" if "prompt" in columns else "text"
        if "name" not in columns or prompt not in columns:
            raise RequestError(
                f"{path.name}: the first line must be name,prompt,negative_prompt; "
                f"got '{printable(','.join(columns))}'"
            )
        for row in rows:
            name = row["name"] or ""
            if name and not name.startswith("#"):
                styles[name] = Style(name, row[prompt] or "", row.get("negative_prompt") or "")
    except csv.Error as error:
        raise RequestError(f"{path.name}: not a readable styles file: {reason(error)}") from None
    return styles


def merged(prompt: str, style: str) -> str:
    """A prompt with the prompt of a style."""
    if "{prompt}" in style:
        return style.replace("{prompt}", prompt)
    return ", ".join(part for part in (prompt.strip(), style.strip()) if part)


def apply(request: Request, styles: Mapping[str, Style], names: Iterable[str]) -> Request:
    """The request with the named styles in its prompt and negative prompt, one after the other.

    Raises RequestError if there is no such style.
    """
    for name in names:
        style = styles.get(name)
        if style is None:
            known = printable(", ".join(styles) or "none", 100)
            raise RequestError(f"no style '{printable(name)}' in the styles file; it has: {known}")
        request = replace(
            request,
            prompt=merged(request.prompt, style.prompt),
            negative_prompt=merged(request.negative_prompt, style.negative_prompt),
        )
    return request
