"""The web UI's styles.csv is read as it writes it, and styles go into a request as there."""

from pathlib import Path

import pytest

from ldm import styles
from ldm.errors import RequestError
from ldm.request import Request
from ldm.styles import Style


def written(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "styles.csv"
    path.write_bytes(text.encode(encoding))
    return path


def test_reads_quotes_newlines_and_the_byte_order_mark(tmp_path: Path):
    text = (
        "name,prompt,negative_prompt\r\n"
        'film,"{prompt}, film grain,\n35mm ""wide""","digital, render"\r\n'
        "\r\n"
        "# a comment,x,y\r\n"
        'spaced, "sharp, focus", blurry\r\n'
        "short,only a prompt\r\n"
        "日本,墨絵,\r\n"
        "short,later lines win,\r\n"
    )
    assert styles.read(written(tmp_path, text, "utf-8-sig")) == {
        "film": Style("film", '{prompt}, film grain,\n35mm "wide"', "digital, render"),
        "spaced": Style("spaced", "sharp, focus", "blurry"),
        "short": Style("short", "later lines win", ""),
        "日本": Style("日本", "墨絵", ""),
    }


def test_reads_the_first_form_of_the_file(tmp_path: Path):
    path = written(tmp_path, "name,text\nfilm,film grain\n")
    assert styles.read(path) == {"film": Style("film", "film grain")}


def test_styles_are_put_behind_or_around_the_prompt_in_their_order():
    known = {
        "film": Style("film", "photo of {prompt}, film", "render"),
        "sharp": Style("sharp", " sharp focus ", ""),
        "no": Style("no", "", "{prompt}, ugly"),
    }
    request = Request(prompt="a cat ", negative_prompt="dog", seed=3)
    assert styles.apply(request, known, ["sharp", "film", "no"]) == Request(
        prompt="photo of a cat, sharp focus, film", negative_prompt="dog, render, ugly", seed=3
    )
    assert styles.apply(Request(), known, ["sharp"]).prompt == "sharp focus"
    assert styles.apply(request, known, []) == request


def test_an_unknown_style_is_named_with_those_that_exist():
    with pytest.raises(RequestError, match=r"no style 'filn' in the styles file; it has: film"):
        styles.apply(Request(), {"film": Style("film", "")}, ["filn"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the first line must be name,prompt,negative_prompt"),
        (b"a,b,c\n1,2,3\n", "got 'a,b,c'"),
        (b"\xff\xfe\x00", "it is no text in UTF-8"),
        (b'name,prompt\na,"open', "not a readable styles file"),
        (b'name,prompt\na,"x"y\n', "not a readable styles file"),
        (b"name,prompt\na," + b"x" * 200_000, "not a readable styles file"),
        (b"\x1b[31m,prompt\n", r"got '\?\[31m,prompt'"),
    ],
)
def test_what_is_no_styles_file_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "styles.csv"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=message) as error:
        styles.read(path)
    assert len(str(error.value)) <= 200
    assert str(error.value).isprintable()


def test_a_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(RequestError, match=r"cannot read none\.csv: No such file"):
        styles.read(tmp_path / "none.csv")
