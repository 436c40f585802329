"""Two small functions that every folder may import."""

from pathlib import Path


def write_atomic(file: Path, text: str) -> None:
    """Write a text file such that a reader, or a kill at any moment, leaves the old file or the new one."""
    hidden = file.with_name("." + file.name)
    hidden.write_text(text)
    hidden.replace(file)


def first_line(fault: BaseException) -> str:
    """The first line of an exception's message that is not blank; its type's name if there is none."""
    return next((line.strip() for line in str(fault).splitlines() if line.strip()), type(fault).__name__)
