"""What does a run read? Files are known by their content, not by their path.

config.json keeps an identity of everything that a run reads. A continued run may find the same content anywhere, and
does not go on with other content under the old path.

    small files    all of their bytes
    weights        of each tensor its name, dtype, shape and a sample of its bytes; neither the order in a file nor the
                   number of files counts
    pictures       size, first and last bytes
    scorers        options and weights of --rewards, but for the way to a far one and for what is only watched; a user's
                   own file: all of its bytes

LIMIT: of a tensor of more than 12 KiB three pieces of 4 KiB are read, so that 40 GB take seconds. Training changes all
of them. A change that leaves these pieces as they are is not seen.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

from data.common import DataError, first_line, read_objects
from models.hub import ModelError, locate
from scorers.registry import Asked
from scorers.remote import Limits

PIECE = 4 << 10
WAY_TO_A_SCORER = ("device", "endpoints", "key_env", *Limits._fields)  # options that change no score


def joined(parts: Iterable[str]) -> str:
    """One identity of several, in any order."""
    return hashlib.sha256("\n".join(sorted(parts)).encode(errors="surrogatepass")).hexdigest()[:32]


def file(path: Path) -> str:
    """Of a small file. DataError if it cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as fault:
        raise DataError(f"{path}:0: cannot be read ({fault.strerror})") from fault


@cache
def picture(image: str) -> str:
    """Of a picture, a path or a data URI; a path that is not there is its own identity."""
    path = Path(image)
    if image.startswith("data:") or not os.path.isfile(image):
        return hashlib.sha256(image.encode(errors="surrogatepass")).hexdigest()
    with path.open("rb") as stream:
        return hashlib.sha256(b"".join(_pieces(stream, 0, path.stat().st_size))).hexdigest()


def pictures(entry: object, root: Path) -> Iterator[str]:
    """Of all pictures that an object of a data file names, in fields whose names begin with "image"."""
    for key, value in entry.items() if isinstance(entry, dict) else ():
        if key.startswith("image"):
            for image in value if isinstance(value, list) else [value]:
                yield picture(str(image) if str(image).startswith("data:") else str(root / str(image)))


def data(path: Path) -> str:
    """Of a prompt file or of annotations, with their pictures. DataError as `read_objects`."""
    entries = [] if path.suffix.lower() == ".txt" else read_objects(path)
    return joined([file(path), *(one for _, entry in entries for one in pictures(entry, path.parent))])


def scorers(asked: Asked) -> str:
    """Of what --rewards asks for."""
    found = {
        name: {k: v for k, v in entry.items() if k not in WAY_TO_A_SCORER} for name, entry in asked.scorers.items()
    }
    for entry in found.values():
        where, _, function = entry["kind"].rpartition(":")  # FILE.py:FUNCTION, or a kind
        entry["kind"] = [file(Path(where)) if Path(where).is_file() else where, function]
        if os.path.isdir(os.path.expanduser(str(entry.get("model") or "/dev/null"))):  # a trained judge
            entry["model"] = weights(locate(entry["model"], ()), ("*.json",))
    return joined([json.dumps([found, asked.weights], sort_keys=True)])


def weights(where: Path, patterns: Sequence[str]) -> str:
    """Of the files in a folder that match `patterns`, and if none of them has weights, of all that do; or of one file.

    ModelError if a file cannot be read.
    """
    named = {p for pattern in patterns for p in where.glob(pattern)}
    if not any(p.suffix == ".safetensors" for p in named):
        named |= {*where.rglob("*.safetensors")}
    parts = []
    for path in sorted({p for p in named if p.is_file()} if where.is_dir() else [where]):
        inside = path.parent.relative_to(where).as_posix() if where.is_dir() else "."
        try:
            if path.suffix == ".safetensors":
                parts += (f"{inside} {tensor}" for tensor in _tensors(path))
            elif not path.name.endswith(".index.json"):
                parts.append(f"{inside} {path.name} {file(path)}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as fault:
            raise ModelError(f"{path}: not a readable safetensors file ({first_line(fault)})") from fault
    return joined(parts)


def _tensors(path: Path) -> Iterator[str]:
    """A line for each tensor of a safetensors file, and one for what the file says of itself."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > size:
            raise ValueError("its header is cut")
        for name, entry in json.loads(stream.read(length)).items():
            if name == "__metadata__":
                yield json.dumps(entry, sort_keys=True)
                continue
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            sample = hashlib.sha256(b"".join(_pieces(stream, begin, end))).hexdigest()
            yield f"{name} {entry['dtype']} {entry['shape']} {sample}"


def _pieces(stream, begin: int, end: int) -> Iterator[bytes]:
    """The first, the middle and the last bytes between two places; everything if it is little."""
    yield str(end - begin).encode()
    for start in (begin, max(begin, (begin + end - PIECE) // 2), max(begin, end - PIECE)):
        stream.seek(start)
        yield stream.read(min(PIECE, end - start))
