"""Sheets of pictures with titles: rows and columns of a plot, or pictures of a folder with their names."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from ldm.errors import RequestError
from ldm.formats.mapped import printable
from ldm.images import MAX_PIXELS

WHITE, BLACK, GREY = (255, 255, 255), (0, 0, 0), (153, 153, 153)  # those of the web UI's sheets
SMALLEST, LARGEST = 9, 48  # pixels, sizes of letters
_PADDING = 3  # pixels around a title
_MAX_LETTERS = 400  # of a title; longer ones are cut


@dataclass(frozen=True)
class Label:
    """One line of a title, or a paragraph if it is long."""

    text: str
    active: bool = True  # False: grey and struck through


Title = tuple[Label, ...]


def sheet(
    pictures: Sequence[Image.Image],
    columns: int,
    *,
    tops: Sequence[Title] = (),
    lefts: Sequence[Title] = (),
    captions: Sequence[Title] = (),
    margin: int = 0,
) -> Image.Image:
    """Pictures row by row on white, with titles of columns, of rows and below each picture.

    Each picture is in the middle of a place as large as the largest one. Titles wrap at words, become smaller
    and at last are cut, so that they fit: over a column they are as wide as it is, beside a row as high as
    it is and at most three quarters of its pictures wide. margin: pixels between pictures.

    Raises RequestError if the sheet would be larger than `images.MAX_PIXELS`.
    """
    rows = math.ceil(len(pictures) / columns)
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    check_size(columns * width, rows * height)
    letters = min(max((width + height) // 25, SMALLEST + 2), LARGEST)  # the web UI's size
    above = [_fitted(title, width, 2 * height, letters) for title in tops]
    beside = [_fitted(title, 3 * width // 4, height, letters) for title in lefts]
    below = [_fitted(title, width, height, letters) for title in captions]
    left = max((text.width for text in beside), default=0)
    top = max((text.height for text in above), default=0)
    caption = max((text.height for text in below), default=0)

    size = (
        left + columns * width + (columns - 1) * margin,
        top + rows * (height + caption) + (rows - 1) * margin,
    )
    check_size(*size)
    page = Image.new("RGB", size, WHITE)
    for column, text in enumerate(above):
        page.paste(text.drawn(width, top), (left + column * (width + margin), 0))
    for row, text in enumerate(beside):
        page.paste(text.drawn(left, height), (0, top + row * (height + caption + margin)))
    for i, picture in enumerate(pictures):
        x = left + i % columns * (width + margin)
        y = top + i // columns * (height + caption + margin)
        page.paste(picture, (x + (width - picture.width) // 2, y + (height - picture.height) // 2))
        if captions:
            page.paste(below[i].drawn(width, caption), (x, y + height))
    return page


def notice(text: str, width: int, height: int) -> Image.Image:
    """A picture with a text in its middle, in place of one that could not be drawn."""
    letters = min(max((width + height) // 40, SMALLEST), LARGEST)
    return _fitted((Label(text),), width, height, letters).drawn(width, height, background=(230, 230, 230))


def check_size(width: int, height: int) -> None:
    """Raise RequestError if a sheet of this size would be too large to be read again."""
    if width * height > MAX_PIXELS:
        raise RequestError(
            f"the sheet would have {width}x{height} pixels, which is more than {MAX_PIXELS // 1_000_000} "
            "million; take fewer pictures, or smaller ones on the sheet (--cell 256)"
        )


def shrunk(picture: Image.Image, side: int | None) -> Image.Image:
    """The picture with no side longer than `side` pixels; as it is if it is smaller, or for None."""
    if side is None or max(picture.size) <= side:
        return picture
    share = side / max(picture.size)
    size = max(round(picture.width * share), 1), max(round(picture.height * share), 1)
    return picture.resize(size, Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class _Text:
    """A title that is broken into lines."""

    lines: Sequence[Label]
    font: ImageFont.FreeTypeFont

    @property
    def line_height(self) -> int:
        return sum(self.font.getmetrics()) + 1

    @property
    def width(self) -> int:
        longest = max((self.font.getlength(line.text) for line in self.lines), default=0)
        return math.ceil(longest) + 2 * _PADDING if self.lines else 0

    @property
    def height(self) -> int:
        return len(self.lines) * self.line_height + 2 * _PADDING if self.lines else 0

    def drawn(self, width: int, height: int, background: tuple[int, int, int] = WHITE) -> Image.Image:
        """In the middle of a box, nothing outside."""
        box = Image.new("RGB", (width, height), background)
        draw = ImageDraw.Draw(box)
        y = (height - self.height) // 2 + _PADDING
        for line in self.lines:
            length = self.font.getlength(line.text)
            x = (width - length) // 2
            draw.text((x, y), line.text, BLACK if line.active else GREY, self.font)
            if not line.active:
                middle = y + self.line_height // 2
                draw.line((x, middle, x + length, middle), GREY, max(self.line_height // 12, 1))
            y += self.line_height
        return box


def _fitted(title: Title, width: int, height: int, letters: int) -> _Text:
    """A title that fits into a box of (width, height) pixels. letters: their size in pixels, if it can be.

    Smaller letters come before broken words, and those before words that are left out.
    """
    labels = [Label(printable(" ".join(label.text.split()), _MAX_LETTERS), label.active) for label in title]
    for size in range(max(letters, SMALLEST), SMALLEST - 1, -1):
        text = _broken(labels, _wrapped, _font(size), width)
        if text.width <= width and text.height <= height:
            return text
    text = _broken(labels, _cut, _font(SMALLEST), width)
    room = max((height - 2 * _PADDING) // text.line_height, 1)
    if len(text.lines) <= room:
        return text
    last = text.lines[room - 1]
    ended = Label(_ended(last.text, text.font, width - 2 * _PADDING), last.active)
    return _Text([*text.lines[: room - 1], ended], text.font)


Break = Callable[[str, ImageFont.FreeTypeFont, int], list[str]]
"""(text, font, pixels) -> lines."""


def _broken(labels: Sequence[Label], into: Break, font: ImageFont.FreeTypeFont, width: int) -> _Text:
    inner = width - 2 * _PADDING
    return _Text(
        [Label(line, label.active) for label in labels for line in into(label.text, font, inner)], font
    )


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)  # Aileron, inside Pillow; without FreeType there would be one size
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of whole words, each as long as fits."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _cut(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The same, with words broken that are too long for a line."""
    lines: list[str] = []
    for line in _wrapped(text, font, width):
        lines.append("")
        for letter in line:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def _ended(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text with "..." behind it, shortened to fit."""
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
