"""What every folder may import: files that are written whole, and text and JSON that users bring."""

import contextlib
import json
import math
import os
import re
from pathlib import Path


class DataError(ValueError):
    """A file that cannot be used. The message is one line, `path:line: what is wrong`; line 0 is the whole file."""


def write_atomic(file: Path, text: str) -> None:
    """Write a text file such that a reader, a kill or a full disk at any moment leaves the old file or the new one.

    It is on the disk when this returns. OSError as the system gives it.
    """
    hidden = file.with_name("." + file.name)
    try:
        hidden.write_text(text)
        sync(hidden)
        hidden.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            hidden.unlink(missing_ok=True)
        raise
    sync(file.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the list of names of a folder, is on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def one_line(fault: BaseException, most: int = 1000) -> str:
    """An exception's message as one line that any terminal shows: control characters are escaped, and it has an end."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(fault))
    return text if len(text) <= most else f"{text[:most]} ..."


def first_line(fault: BaseException) -> str:
    """The first line of an exception's message that is not blank; its type's name if there is none."""
    return next((line.strip() for line in str(fault).splitlines() if line.strip()), type(fault).__name__)


def read_text(file: Path) -> str:
    """A UTF-8 file, with or without a byte-order mark; lines may end as on any system, and end in a newline here.

    DataError for what cannot be read, is no regular file (a pipe would be waited for) or not UTF-8.
    """
    try:
        if os.path.exists(file) and not os.path.isfile(file):
            raise OSError(0, "no regular file")
        raw = file.read_bytes()
    except (OSError, ValueError) as fault:  # a ValueError is of a path that no system has
        raise DataError(f"{file}:0: cannot be read ({getattr(fault, 'strerror', None) or fault})") from None
    lines = raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    try:
        return lines.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        line = lines[: fault.start].count(b"\n") + 1
        raise DataError(f"{file}:{line}: not UTF-8; save the file as UTF-8") from None


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is no finite number")
    return value


_DECODER = json.JSONDecoder(parse_float=_number, parse_constant=_number)


def read_json(file: Path) -> object:
    """The JSON value that a file holds. DataError as `read_text`, and for what is no JSON or cannot be read as such."""
    return _parsed(file, read_text(file), 1)


def read_objects(file: Path) -> list[tuple[str, object]]:
    """("file:line", value) of all JSON values of a file: one a line, or one array of them. DataError as `read_json`."""
    text = read_text(file)
    if not text.lstrip().startswith("["):
        return [(f"{file}:{n}", _parsed(file, line, n)) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    blank = re.compile(r"[\s,]*")
    found, place, line = [], text.index("[") + 1, 1 + text.count("\n", 0, text.index("["))
    while (start := blank.match(text, place).end()) < len(text) and text[start] != "]":
        line += text.count("\n", place, start)
        value, place = _parsed(file, text, line, start)
        found.append((f"{file}:{line}", value))
        line += text.count("\n", start, place)
    if text[start:].strip() != "]":
        raise DataError(f"{file}:{line + text.count(chr(10), place, start)}: the array does not end with the file")
    return found


def _parsed(file: Path, text: str, line: int, start: int | None = None):
    """The JSON value that a text is; or the one that begins at `start`, in this line of the file, and where it ends."""
    try:
        found = _DECODER.decode(text) if start is None else _DECODER.raw_decode(text, start)
        json.dumps(found, ensure_ascii=False).encode()  # half a character, "\ud800", fits into no file
        return found
    except json.JSONDecodeError as fault:
        cause = f"{fault.msg}, column {fault.colno}"
    except (RecursionError, ValueError) as fault:  # nested too deeply, or a number of more digits than Python takes
        cause = first_line(fault)
    raise DataError(f"{file}:{line}: no JSON ({cause})")
