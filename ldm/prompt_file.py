"""Prompts from a file, as the web UI's script of that name reads them: each line is a prompt, or options.

    a red apple
    --prompt a green pear --negative_prompt "blurry" --steps 30 --sampler_name "DPM++ 2M Karras"

What a line does not say comes from the request it starts from. Reading takes time in proportion to the text.
"""

import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ldm import samplers, styles
from ldm.errors import LdmError, RequestError
from ldm.formats.mapped import printable
from ldm.request import Request
from ldm.styles import Style

MAX_BATCHES = 100_000  # of one file


def _boolean(text: str) -> bool:
    return text == "true"


TAGS: Mapping[str, Callable[[str], Any]] = MappingProxyType(
    {
        **dict.fromkeys(("sd_model", "outpath_samples", "outpath_grids", "prompt_for_display"), str),
        **dict.fromkeys(("prompt", "negative_prompt", "styles", "sampler_name"), str),
        **dict.fromkeys(("seed", "subseed", "seed_resize_from_w", "seed_resize_from_h"), int),
        **dict.fromkeys(("sampler_index", "batch_size", "n_iter", "steps", "width", "height"), int),
        **dict.fromkeys(("subseed_strength", "cfg_scale"), float),
        **dict.fromkeys(("restore_faces", "tiling", "do_not_save_samples", "do_not_save_grid"), _boolean),
    }
)
"""The options of a line and how their values are read."""

LEFT_OUT: Mapping[str, str] = MappingProxyType(
    {
        "sd_model": "all lines are drawn by one model; name it on the command line",
        "outpath_samples": "where pictures go is said on the command line",
        "outpath_grids": "where pictures go is said on the command line",
        "prompt_for_display": "it changes what the web UI shows and not the picture",
        "sampler_index": "its numbers differ between versions; write --sampler_name",
        "restore_faces": "there is no restoration of faces",
        "do_not_save_samples": "what is saved is said on the command line",
        "do_not_save_grid": "what is saved is said on the command line",
    }
)
"""Options that are understood and have no place here, and why."""


def read(
    text: str,
    base: Request,
    *,
    n_iter: int = 1,
    iterate: bool = True,
    known: Mapping[str, Style] = MappingProxyType({}),
    names: Iterable[str] = (),
) -> tuple[list[Request], list[str]]:
    """The requests of a text, batch by batch, and a line for each thing in it that was not followed.

    base: what lines leave open. Where both have a prompt, or a negative prompt, the line's comes first.
    n_iter: batches of a line that does not say how many; each continues the seeds of the one before.
    iterate: let each line continue the seeds of the one before, also where variations keep the seed of their
        line; False: all begin with the same seed.
    known, names: the styles there are, and those of lines that name none.

    A line of options that cannot be read is a prompt as it stands, and noted. Raises RequestError with the
    number of the line for a value that makes no sense, or if there is no line at all.
    """
    requests: list[Request] = []
    notes: list[str] = []
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    for place, (number, line) in enumerate(lines):
        settings: dict[str, Any] = {"prompt": line}
        seed = base.seed + place * base.batch_size * n_iter if iterate else base.seed
        try:
            try:
                settings = _options(line) if line.startswith("--") else settings
            except ValueError as error:
                notes.append(printable(f"line {number} is taken as a prompt, not as options: {error}", 200))
            notes += [
                f"line {number}: --{name} is left out: {why}"
                for name, why in LEFT_OUT.items()
                if settings.get(name) not in (None, False)
            ]
            first = _request(settings, base, seed)
            first = styles.apply(first, known, _style_names(settings, known, names))
            batches = settings.get("n_iter", n_iter)
            if batches < 1:
                raise RequestError(f"n_iter must be at least 1, got {batches}")
            if len(requests) + batches > MAX_BATCHES:
                raise RequestError(f"a file makes at most {MAX_BATCHES} batches; part it")
            requests.append(first)
            requests += [first.later(i * first.batch_size) for i in range(1, batches)]
        except LdmError as error:
            raise RequestError(printable(f"line {number}: {error}", 200)) from None
    if not requests:
        raise RequestError("there are no prompts in the file")
    return requests, notes


def _options(line: str) -> dict[str, Any]:
    """The options of a line and their values. Raises ValueError with the reason if it has another form."""
    words = split(line)
    settings: dict[str, Any] = {}
    position = 0
    while position < len(words):
        option, tag = words[position], words[position][2:]
        if not option.startswith("--") or tag not in TAGS:
            raise ValueError(f"there is no option {option!r}")
        position += 1
        if position == len(words):
            raise ValueError(f"{option} has no value")
        value = words[position]
        position += 1
        if tag in ("prompt", "negative_prompt"):
            end = position
            while end < len(words) and not words[end].startswith("--"):
                end += 1
            value = " ".join([value, *words[position:end]])
            position = end
        try:
            settings[tag] = TAGS[tag](value)
        except ValueError:
            raise ValueError(f"{option} needs a number, got {value!r}") from None
    return settings


# A run of plain letters, an escaped one, '...', "..." with its own escapes, or white space.
_PIECE = re.compile(
    r"""([^ \t\r\n'"\\]+)|\\([\s\S])|'([^']*)'|"([^"\\]*(?:\\[\s\S][^"\\]*)*)"|([ \t\r\n]+)"""
)
_ESCAPED = re.compile(r'\\(["\\])')


def split(line: str) -> list[str]:
    """A line as words, by the rules of a shell: the result of `shlex.split`, whose time is quadratic.

    Raises ValueError if a quotation is not closed.
    """
    words: list[str] = []
    pieces: list[str] = []  # of the word at hand
    position = 0
    while position < len(line):
        match = _PIECE.match(line, position)
        if match is None:
            raise ValueError("a quotation is not closed" if line[position] != "\\" else "it ends in \\")
        position = match.end()
        plain, escaped, single, double, space = match.groups()
        if double is not None:
            pieces.append(_ESCAPED.sub(r"\1", double))
        elif space is None:
            pieces.append(next(text for text in (plain, escaped, single) if text is not None))
        if pieces and (space is not None or position == len(line)):
            words.append("".join(pieces))
            pieces = []
    return words


def _request(settings: Mapping[str, Any], base: Request, seed: int) -> Request:
    """The request for the first batch of a line. Raises RequestError or SamplerError."""
    same = ("steps", "cfg_scale", "width", "height", "batch_size", "tiling")
    new: dict[str, Any] = {"seed": seed} | {name: settings[name] for name in same if name in settings}
    for name in ("prompt", "negative_prompt"):
        new[name] = " ".join(part for part in (settings.get(name), getattr(base, name)) if part)
    for tag, name in (("seed", "seed"), ("subseed", "variation_seed")):
        if tag in settings:
            new[name] = secrets.randbelow(2**32) if settings[tag] == -1 else settings[tag]
    if "subseed_strength" in settings:
        new["variation_strength"] = settings["subseed_strength"]
    resize = settings.get("seed_resize_from_w", 0), settings.get("seed_resize_from_h", 0)
    if min(resize) > 0:
        new["seed_resize_from"] = resize
    if "sampler_name" in settings:
        new |= samplers.settings(settings["sampler_name"])
    return replace(base, **new)


def _style_names(settings: Mapping[str, Any], known: Mapping[str, Style], names: Iterable[str]) -> list[str]:
    """The styles of a line: one name, or several with commas between them."""
    if "styles" not in settings:
        return list(names)
    text = settings["styles"]
    return [text] if text in known else [name.strip() for name in text.split(",") if name.strip()]
