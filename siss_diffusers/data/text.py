"""Text files as editors write them: with a byte order mark, in UTF-16, with the line ends of any system."""

import codecs
import os
from pathlib import Path


# The marks of UTF-32 begin with those of UTF-16, so they come first.
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
MARK = "\ufeff"
END_OF_DOS = "\x1a"  # Ctrl-Z, after the last line of old files


def decode_text(content: bytes) -> str:
    """Decode a text by its byte order mark, which is removed; a text without one is UTF-8.

    Raises:
        ValueError: for any other encoding.
    """
    mark, encoding = next((pair for pair in MARKS if content.startswith(pair[0])), (b"", "utf-8"))
    try:
        text = content[len(mark) :].decode(encoding)
    except UnicodeDecodeError:
        raise ValueError(f"it is not valid {encoding.upper()}; save it as UTF-8")
    if "\0" in text:  # UTF-16 without a mark is valid UTF-8 with a NUL after each letter
        raise ValueError("it holds NUL characters; save it as UTF-8")
    return text


def read_text(path: str | os.PathLike) -> str:
    """Read a text file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is in another encoding than UTF-8, or UTF-16 and UTF-32 with a mark.
    """
    return decode_text(Path(path).read_bytes())


def split_lines(text: str) -> list[str]:
    """Split a text at LF, CRLF and CR. Unlike `str.splitlines`, which also splits at U+2028, vertical tabs and others:
    these stand inside of captions."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def read_prompt_lines(path: str | os.PathLike) -> list[str]:
    """Read a file with a prompt on each line. White space around a prompt and empty lines are left out.

    Raises:
        OSError, ValueError: as `read_text`.
    """
    lines = (line.strip().strip(MARK + END_OF_DOS).strip() for line in split_lines(read_text(path)))
    return [line for line in lines if line]
