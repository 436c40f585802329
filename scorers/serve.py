"""A server for one scorer: pictures and prompts come in over HTTP, scores go out. Q §4.1.

    python -m scorers.serve --scorer ocr --port 9000                          this machine's own runs
    python -m scorers.serve --scorer geneval --device cuda --port 9000 \\
        --host 0.0.0.0 --key-env REWARD_TOKEN                                 a GPU machine, for others

`remote.served` is the other end. It needs the extra `serve` (FastAPI, uvicorn).

    GET /health    -> {"name": str, "low": number | null, "high": number | null}        null: no bound
    POST /score    {"images": [base64 PNG], "prompts": [{"text", "task", "metadata"}], "sources": [[base64 PNG]] | null}
                   -> {"scores": [number], "name", "low", "high"}, a score a picture, in their order
    any failure    -> {"detail": one line}: 400 the request is not of this form, 401 no token, 404 405 no such thing,
                   408 too slow, 413 too long, 415 not JSON, 429 enough requests wait already, 500 the scorer failed

PNG because it loses nothing and because JSON and PNG, unlike pickle, cannot run anything when they are read. Whatever
is sent, the server stays up: the token is checked before a body is read, and the bytes of a body, its values, its
pictures' sides (before they are unpacked), the requests that wait and the time in which a body must come are bounded.
One thread scores, in the order of arrival, because scorers are not made for several at once. The server listens on this
machine only, unless told otherwise. There is no encryption: across networks that others use, put it behind a TLS proxy.
"""

import argparse
import asyncio
import base64
import hmac
import io
import ipaddress
import json
import math
import signal
import socket
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from data.files import TASKS, Prompt
from rewards import RewardError, Scorer
from scorers import registry
from scorers.common import check_scores
from scorers.remote import read_key
from scorers.selftest import self_test

try:
    import uvicorn
    from fastapi import Depends, FastAPI, HTTPException, Request
    from starlette.requests import ClientDisconnect
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}; a served scorer needs the extra 'serve': pip install -e '.[serve]'")


class Bounds(NamedTuple):
    """What a request may ask for."""

    body: int = 64 << 20  # bytes
    values: int = 100_000  # JSON values, which need up to 100 times the memory of their bytes
    side: int = 2048  # pixels
    squares: int = 16  # pixels of all pictures, in squares of this side: a PNG of 1 kB may unpack to 10 MB
    waiting: int = 16  # requests read or waiting, besides the one that is scored; each may hold a body
    seconds: float = 60.0  # to send a body


BOUNDS = Bounds()


# ---------------------------------------------------------------------------------------------- reading a request
def read_request(body: bytes, bounds: Bounds) -> tuple[torch.Tensor, list[Prompt], list[tuple] | None]:
    """A /score body -> images (B, 3, H, W), B prompts, the sources of B edits or None. HTTPException 400 if it is
    anything else."""
    try:
        if sum(map(body.count, (b",", b":", b"[", b"{"))) > bounds.values:  # none of them is in base64
            raise ValueError(f"more than {bounds.values} values")
        asked = json.loads(body)
        images, prompts, sources = asked["images"], asked["prompts"], asked.get("sources")
        if not 0 < len(images) == len(prompts) == len(images if sources is None else sources) or len(asked) > 3:
            raise ValueError("images, prompts and, for editing, sources must be lists of one length, 1 at least")
        parsed = [Prompt(p["text"], p["task"], p["metadata"], f"prompts[{i}]") for i, p in enumerate(prompts)]
        for p in parsed:
            if not (isinstance(p.text, str) and p.task in TASKS and isinstance(p.metadata, dict)):
                raise ValueError(f"{p.source}: text is a string, metadata an object, task one of {', '.join(TASKS)}")
        before = None
        if sources is not None:
            if not all(isinstance(some, list) and some for some in sources):
                raise ValueError("sources must be a list of one picture or more for each image")
            opened = iter(open_pictures("sources", [file for some in sources for file in some], bounds))
            before = [tuple(next(opened) for _ in some) for some in sources]
        return torch.stack(open_pictures("images", images, bounds)), parsed, before
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as fault:
        raise HTTPException(400, f"not a request that can be scored: {fault!r}") from None


def open_pictures(field: str, files: Sequence[str], bounds: Bounds) -> list[torch.Tensor]:
    """base64 PNG files -> pictures (3, H, W), float32 in [0, 1]. Only RGB: other forms have no one obvious reading.

    ValueError for what is no whole PNG, and for too many pixels before any of them is unpacked.
    """
    pixels, pictures = bounds.squares * bounds.side**2, []
    for i, text in enumerate(files):
        try:
            file = base64.b64decode(text, validate=True)
            with Image.open(io.BytesIO(file), formats=["PNG"]) as header:  # nothing is unpacked yet
                size, mode = header.size, header.mode
                header.verify()  # the checksums; this uses the object up
            pixels -= size[0] * size[1]
            if max(size) > bounds.side or pixels < 0 or mode != "RGB":
                raise ValueError(f"{size} {mode}, but {bounds.squares} RGB squares of side {bounds.side} are allowed")
            with Image.open(io.BytesIO(file), formats=["PNG"]) as picture:
                pictures.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255)
        except Exception as fault:  # Pillow raises nearly anything over a broken file
            raise ValueError(f"{field}[{i}] is no PNG that is taken here: {fault}") from None
    return pictures


# ------------------------------------------------------------------------------------------------------ the server
def app(scorer: Scorer, token: str = "", bounds: Bounds = BOUNDS) -> FastAPI:
    """The web application: GET /health and POST /score, as the header of this file describes them."""
    low, high = (bound if math.isfinite(bound) else None for bound in (scorer.low, scorer.high))
    about = {"name": scorer.name, "low": low, "high": high}
    places, turn, worker = asyncio.Semaphore(bounds.waiting + 1), asyncio.Lock(), ThreadPoolExecutor(1, "scoring")

    async def authorize(request: Request) -> None:
        given, wanted = request.headers.get("authorization", ""), f"Bearer {token}"
        # compare_digest takes the same time wherever the two differ, so that no token is found letter by letter.
        if token and not hmac.compare_digest(given.encode(), wanted.encode()):
            raise HTTPException(401, "this server wants its token in the header Authorization: Bearer TOKEN")

    web = FastAPI(openapi_url=None, dependencies=[Depends(authorize)])

    @web.get("/health")
    async def health() -> dict:
        return about

    @web.post("/score")
    async def score(request: Request) -> dict:
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            raise HTTPException(415, "the body must have the Content-Type application/json")
        if places.locked():  # a place comes before the body: so many bodies, and no more, are in memory
            raise HTTPException(429, f"{bounds.waiting} requests wait already", {"Retry-After": "1"})
        async with places:
            body = bytearray()
            try:
                async with asyncio.timeout(bounds.seconds):
                    async for part in request.stream():
                        body += part
                        if len(body) > bounds.body:
                            raise HTTPException(413, f"a body may have {bounds.body} bytes; send fewer images")
            except (TimeoutError, ClientDisconnect):
                late = f"the body did not come in {bounds.seconds:g} s"
                raise HTTPException(408, late, {"Connection": "close"}) from None
            async with turn:
                if await request.is_disconnected():  # it was tired of waiting, and will ask again
                    raise HTTPException(499, "the client has gone")
                scores = await asyncio.get_running_loop().run_in_executor(worker, ask, bytes(body))
        return {"scores": scores, **about}

    def ask(body: bytes) -> list[float]:
        """What the scorer says, checked; on the one thread, so that one request is unpacked at a time."""
        images, prompts, sources = read_request(body, bounds)
        try:
            with torch.inference_mode():
                scores = scorer.score(images, prompts, sources)
            return check_scores(scorer.name, scores, [p.text for p in prompts], scorer.low, scorer.high).tolist()
        except Exception as fault:  # the scorer is anyone's code, and one bad batch must not end the server
            cause = str(fault) if isinstance(fault, RewardError) else f"{type(fault).__name__}: {fault}"
            said = f"scorer {scorer.name!r} failed: {' '.join(cause.split())}"
            print(f"serve: {said}", file=sys.stderr, flush=True)
            raise HTTPException(500, said) from None

    return web


def server(web: FastAPI) -> uvicorn.Server:
    """uvicorn for one application; `run(sockets=[...])` answers until `should_exit`, or a signal in the main thread."""
    return uvicorn.Server(
        uvicorn.Config(web, http="h11", ws="none", lifespan="off", log_level="error", access_log=False)
    )


# ------------------------------------------------------------------------------------------------ the command line
def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0 after SIGTERM or Ctrl-C, or 2 after one line that says what is wrong."""
    parser = argparse.ArgumentParser("serve", usage=argparse.SUPPRESS, description=__doc__.splitlines()[0])
    parser.add_argument("--scorer", required=True, metavar="KIND", help="such as ocr, or FILE.py:FUNCTION")
    parser.add_argument("--port", required=True, type=int, metavar="N", help="0: any free one")
    parser.add_argument("--host", default="localhost", help="the address to listen at (localhost: this machine only)")
    parser.add_argument("--key-env", metavar="NAME", help="the environment variable with the token that clients need")
    parser.add_argument("--device", help="where the scorer computes, such as cuda")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the kind; repeatable")
    given = parser.parse_args(argv)
    listener = socket.socket(socket.AF_INET6 if ":" in given.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        options = dict(_option(text) for text in given.option) | ({"device": given.device} if given.device else {})
        token = read_key(given.key_env, required=True) if given.key_env else ""
        listener.bind((given.host, given.port))  # before the scorer is loaded, which may take minutes
        scorer = registry.make(given.scorer, options)
        if ":" not in given.scorer:  # a user's own function may have any name
            self_test(scorer)
    except (ValueError, OverflowError, OSError) as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    listener.listen()
    running = server(app(scorer, token))
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn ends at either, and then raises it once more
        signal.signal(number, lambda *_: setattr(running, "should_exit", True))
    address, port = listener.getsockname()[:2]
    print(f"serving {scorer.name} at http://{f'[{address}]' if ':' in address else address}:{port}", flush=True)
    if not token and not ipaddress.ip_address(address).is_loopback:
        print("warning: other machines can reach this server, and no --key-env is set", file=sys.stderr, flush=True)
    running.run(sockets=[listener])
    return 0


def _option(text: str) -> tuple[str, object]:
    """NAME=VALUE -> (NAME, value). A value that is JSON is that, and anything else is a string."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"--option {text}: write it as NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


if __name__ == "__main__":
    sys.exit(main())
