"""Reading texts that somebody wrote: prompts, styles, lists of words."""

import os

from ldm.errors import RequestError
from ldm.formats.mapped import printable, reason

MAX_TEXT = 1 << 24  # bytes


def read_utf8(path: str | os.PathLike[str]) -> str:
    """A text that somebody wrote: UTF-8, with or without a byte order mark, of at most MAX_TEXT bytes.

    Raises RequestError, which names the file, if it cannot be read or is something else.
    """
    shown = printable(os.path.basename(path) or os.fspath(path))
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_TEXT + 1)  # it may be without end, such as /dev/zero
        if len(raw) > MAX_TEXT:
            raise RequestError(f"{shown} is larger than {MAX_TEXT >> 20} MB; it is not read as a text")
        return raw.decode("utf-8-sig")
    except OSError as error:
        raise RequestError(f"cannot read {shown}: {reason(error)}") from None
    except UnicodeDecodeError:
        raise RequestError(f"cannot read {shown}: it is no text in UTF-8") from None
