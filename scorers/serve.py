"""How does one machine score pictures for another?

    python -m scorers.serve --scorer ocr --port 9000                          this machine's own runs
    python -m scorers.serve --scorer geneval --device cuda --port 9000 \\
        --host 0.0.0.0 --token-env REWARD_TOKEN                               a GPU machine, for others (Q §4.1)

Any scorer of `registry.KINDS` over HTTP, with JSON and PNG and the standard library; `remote.served` is the other end.

    GET /health    -> {"name": str, "low": number | null, "high": number | null}        null: no bound
    POST /score    {"images": [base64 PNG], "prompts": [{"text", "task", "metadata"}], "sources": [base64 PNG] | null}
                   -> {"scores": [number], "name", "low", "high"}, a score a picture, in their order
    any failure    -> {"error": one line}: 400 the request is not of this form, 401 no token, 404 405 no such thing,
                   408 too slow, 411 413 415 what a body must be, 429 enough waits already, 500 the scorer failed

PNG because it loses nothing and because JSON and PNG, unlike pickle, cannot run anything where they are read. Whatever
is sent, the server stays up: a body, a picture's sides (before it is unpacked), the requests that wait and the open
connections are bounded. One thread scores, because scorers are not made for several at once, and in the order of
arrival. It listens on this machine only, unless told otherwise. There is no encryption: across networks that others
use, put it behind a tunnel or a TLS proxy.
"""

import argparse
import base64
import hmac
import io
import ipaddress
import json
import math
import re
import signal
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from data.files import TASKS, Prompt
from rewards import RewardError, Scorer, check_scores
from scorers import registry
from scorers.remote import read_key

LARGEST = (
    16  # a request's pictures may have as many pixels as so many of the largest: a PNG of 1 kB may unpack to 10 MB
)
CONNECTIONS = 64  # at once: more are closed unread, so that idle ones cannot use up the threads
RETRY_AFTER = 1  # seconds that a 429 asks for
LINGER = 2.0  # seconds that a closing connection waits for its client to stop sending


class Bounds(NamedTuple):
    """What a request may ask for."""

    body: int = 64 << 20  # bytes
    side: int = 2048  # pixels
    waiting: int = 16  # requests read or waiting, besides the one that is scored; each may hold a body
    seconds: float = 60.0  # to send a request


BOUNDS = Bounds()


class Gone(Exception):
    """The client has hung up: there is nobody to answer."""


class Refusal(Exception):
    """A request that is answered with a 4xx status and the message."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


# ---------------------------------------------------------------------------------------------- reading a request
def parse_request(body: bytes) -> tuple[list[bytes], list[Prompt], list[bytes] | None]:
    """A /score body -> (PNG files, prompts, source PNG files or None), checked but for what the files hold."""
    try:
        asked = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as fault:
        raise Refusal(400, f"the body is not JSON ({fault})") from None
    if not isinstance(asked, dict) or not {"images", "prompts"} <= asked.keys() <= {"images", "prompts", "sources"}:
        raise Refusal(400, "the body must be an object of images, prompts and, for editing, sources")
    images, prompts, sources = asked["images"], asked["prompts"], asked.get("sources")
    lists = {"images": images, "prompts": prompts} | ({} if sources is None else {"sources": sources})
    for field, items in lists.items():
        if not isinstance(items, list) or not items:
            raise Refusal(400, f"{field} must be a list that is not empty")
        if len(items) != len(images):
            raise Refusal(400, f"{len(items)} {field} but {len(images)} images; one each is needed")
    parsed = [_prompt(f"prompts[{i}]", item) for i, item in enumerate(prompts)]
    before = None if sources is None else [_file(f"sources[{i}]", item) for i, item in enumerate(sources)]
    return [_file(f"images[{i}]", item) for i, item in enumerate(images)], parsed, before


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _prompt(where: str, item: object) -> Prompt:
    if not isinstance(item, dict) or item.keys() != {"text", "task", "metadata"}:
        raise Refusal(400, f"{where} must be an object of text, task and metadata")
    if not isinstance(item["text"], str) or not isinstance(item["metadata"], dict) or item["task"] not in TASKS:
        raise Refusal(400, f"{where}: text is a string, metadata an object and task one of {', '.join(TASKS)}")
    return Prompt(item["text"], item["task"], item["metadata"], where)


def _file(where: str, item: object) -> bytes:
    try:
        return base64.b64decode(item, validate=True)
    except (TypeError, ValueError):
        raise Refusal(400, f"{where} is not base64") from None


def open_pictures(field: str, files: Sequence[bytes], side: int, pixels: int) -> list[torch.Tensor]:
    """PNG files -> pictures (3, H, W), float32 in [0, 1], with sides of at most `side` and `pixels` in all.

    Only RGB: other forms have no one obvious reading. Raises Refusal, which names the picture.
    """
    pictures = []
    for where, file in ((f"{field}[{i}]", file) for i, file in enumerate(files)):
        try:
            with Image.open(io.BytesIO(file), formats=["PNG"]) as picture:  # nothing is unpacked yet
                pixels -= picture.width * picture.height
                if max(picture.size) > side or pixels < 0:
                    shown = f"{picture.width} x {picture.height} pixels"
                    raise Refusal(413, f"{where} has {shown}: a side may have {side}, a request {LARGEST} such squares")
                if picture.mode != "RGB":
                    raise Refusal(400, f"{where} is a PNG of mode {picture.mode}; send RGB")
                picture.verify()  # the checksums; this uses the object up
            with Image.open(io.BytesIO(file), formats=["PNG"]) as picture:
                values = torch.from_numpy(np.array(picture))
        except Refusal:
            raise
        except Image.DecompressionBombError:  # Pillow's own bound, of far larger pictures
            raise Refusal(413, f"{where} has too many pixels by far") from None
        except Exception:  # Pillow raises nearly anything over a broken file
            raise Refusal(400, f"{where} is not a whole PNG") from None
        pictures.append(values.permute(2, 0, 1).float() / 255)
    return pictures


# ------------------------------------------------------------------------------------------------------ the server
class Server(ThreadingHTTPServer):
    """The open port, the one thread that scores, and the places for those who wait.

    It listens once it is made (port 0: at any free one, see `server_port`); `serve_forever()` answers, and then
    `shutdown()`, from another thread, and `server_close()` end it, after the answers that are under way. OSError where
    the port cannot be had.
    """

    daemon_threads = False  # so that closing waits for the answers that are under way
    request_queue_size = CONNECTIONS

    def __init__(self, scorer: Scorer, port: int, host: str = "localhost", token: str = "", bounds: Bounds = BOUNDS):
        self.scorer, self.token, self.bounds = scorer, token, bounds
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.places = threading.BoundedSemaphore(bounds.waiting + 1)
        self.connections = threading.BoundedSemaphore(CONNECTIONS)
        self.worker = ThreadPoolExecutor(1, "scoring")
        super().__init__((host, port), Handler)

    def server_bind(self) -> None:
        # http.server looks up this machine's full name here, which can hang for long where there is no name server.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def process_request(self, request: socket.socket, client_address) -> None:
        if self.connections.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.close_request(request)

    def process_request_thread(self, request: socket.socket, client_address) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.connections.release()

    def shutdown_request(self, request: socket.socket) -> None:
        """Close, but not over a body that is still coming: that would reset the line and lose the refusal with it."""
        end = time.monotonic() + LINGER
        with suppress(OSError):
            request.shutdown(socket.SHUT_WR)
            request.settimeout(LINGER)
            while time.monotonic() < end and request.recv(1 << 16):
                pass
        self.close_request(request)

    def handle_error(self, request: socket.socket, client_address) -> None:
        """A connection that broke is the client's affair; anything else is said in one line."""
        if not isinstance(sys.exception(), OSError):
            print(f"reward_server: {sys.exception()!r}", file=sys.stderr, flush=True)

    def about(self) -> dict:
        """The scorer's name and range, null where it is open."""
        bounds = {"low": self.scorer.low, "high": self.scorer.high}
        return {"name": self.scorer.name, **{k: v if math.isfinite(v) else None for k, v in bounds.items()}}

    def score(self, files: Sequence[bytes], prompts: Sequence[Prompt], sources: Sequence[bytes] | None) -> list[float]:
        """What the scorer says, checked; runs on the one thread. Pictures are unpacked here, a request at a time."""
        side, pixels = self.bounds.side, LARGEST * self.bounds.side**2
        images = open_pictures("images", files, side, pixels)
        before = None if sources is None else open_pictures("sources", sources, side, pixels)
        if len({image.shape for image in images}) > 1:
            raise Refusal(400, "the images of a request must have one size; send others apart")
        name, low, high = self.scorer.name, self.scorer.low, self.scorer.high
        with torch.inference_mode():
            scores = self.scorer.score(torch.stack(images), prompts, before)
        return check_scores(name, scores, [p.text for p in prompts], low, high).tolist()

    def server_close(self) -> None:
        super().server_close()  # waits for the open connections
        self.worker.shutdown()


class Handler(BaseHTTPRequestHandler):
    """One connection, one request, one answer."""

    server: Server
    wbufsize = -1  # the answer leaves in one piece
    server_version, sys_version = "minopd", ""

    def setup(self) -> None:
        self.timeout = self.server.bounds.seconds  # of a silent connection
        super().setup()

    def do_GET(self) -> None:
        self._answer({"/health": lambda: self.server.about(), "/score": self._only("POST")})

    def do_POST(self) -> None:
        self._answer({"/score": self._score, "/health": self._only("GET")})

    def _answer(self, pages: dict) -> None:
        """Send what the page gives; a refusal or a failure of the scorer is sent just so."""
        try:
            self._authorize()
            if self.path not in pages:
                raise Refusal(404, "there are GET /health and POST /score")
            status, answer = 200, pages[self.path]()
        except Refusal as fault:
            status, answer = fault.status, {"error": str(fault)}
        except Gone:
            return
        except Exception as fault:  # the scorer is anyone's code, and one bad batch must not end the server
            said = str(fault) if isinstance(fault, RewardError) else f"{type(fault).__name__}: {fault}"
            status, answer = 500, {"error": f"scorer {self.server.scorer.name!r} failed: {' '.join(said.split())}"}
            print(f"reward_server: {answer['error']}", file=sys.stderr, flush=True)
        self._send(status, answer)

    def _authorize(self) -> None:
        given, wanted = self.headers.get("Authorization", ""), f"Bearer {self.server.token}"
        # compare_digest takes the same time wherever the two differ, so that no token is found letter by letter.
        if self.server.token and not hmac.compare_digest(given.encode(), wanted.encode()):
            raise Refusal(401, "this server wants its token in the header Authorization: Bearer TOKEN")

    def _only(self, method: str) -> Callable:
        def refuse() -> None:
            raise Refusal(405, f"{self.path} takes {method}")

        return refuse

    def _score(self) -> dict:
        """A place among those who wait comes before the body: so many bodies, and no more, are in memory."""
        length = self._length()
        if not self.server.places.acquire(blocking=False):
            raise Refusal(429, f"{self.server.bounds.waiting} requests wait already; come back later")
        try:
            asked = parse_request(self._read(length))
            return {
                "scores": self.server.worker.submit(self._score_unless_gone, *asked).result(),
                **self.server.about(),
            }
        finally:
            self.server.places.release()

    def _score_unless_gone(self, *asked) -> list[float]:
        """A client that was tired of waiting asks again; scoring for nobody would make the next one wait as long."""
        self.connection.settimeout(0)
        try:
            if not self.connection.recv(1, socket.MSG_PEEK):
                raise Gone
        except BlockingIOError:  # silent, that is, still there
            pass
        except OSError:
            raise Gone from None
        finally:
            self.connection.settimeout(self.timeout)
        return self.server.score(*asked)

    def _length(self) -> int:
        if self.headers.get_content_type() != "application/json":
            raise Refusal(415, "the body must have the Content-Type application/json")
        given = self.headers.get_all("Content-Length", [])
        if len(given) != 1 or "Transfer-Encoding" in self.headers:
            raise Refusal(411, "the body must come in one piece, its length in one Content-Length")
        if not re.fullmatch("[0-9]{1,15}", given[0]):
            raise Refusal(400, f"the Content-Length {given[0]!r} is no length")
        if int(given[0]) > self.server.bounds.body:
            raise Refusal(413, f"a body of {given[0]} bytes; {self.server.bounds.body} are allowed, send fewer images")
        return int(given[0])

    def _read(self, length: int) -> bytes:
        """The body. The socket's own time-out would let a client send a byte a minute for ever."""
        end, parts = time.monotonic() + self.timeout, []
        while length:
            try:
                parts.append(self.rfile.read1(min(length, 1 << 20)))
            except TimeoutError:
                end = -math.inf
            except OSError:
                raise Gone from None
            if time.monotonic() > end:
                raise Refusal(408, f"the body did not come within {self.timeout:g} s")
            if not parts[-1]:
                raise Gone
            length -= len(parts[-1])
        return b"".join(parts)

    def _send(self, status: int, answer: dict) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 429:
            self.send_header("Retry-After", str(RETRY_AFTER))
        self.end_headers()
        self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses, such as a request line that is none: as JSON too."""
        self.request_version = "HTTP/1.0"  # of a request that is not understood it assumes 0.9, which has no status
        self._send(code, {"error": message or self.responses[code][0]})

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a line a request would bury the failures, which `_answer` tells."""


# ------------------------------------------------------------------------------------------------ the command line
def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0 after SIGTERM or Ctrl-C, or 2 after one line that says what is wrong."""
    parser = _parser()
    try:
        given = parser.parse_args(argv)
        options = dict(_option(text) for text in given.option) | ({"device": given.device} if given.device else {})
        if given.port not in range(65536) or not 0 < given.max_body < math.inf or given.max_side < 1:
            raise ValueError("--port must be from 0 to 65535, --max-body and --max-side above 0")
        bounds = BOUNDS._replace(body=int(given.max_body * 2**20), side=given.max_side)
        token = read_key(given.token_env, required=True) if given.token_env else ""
        from scorers.selftest import self_test  # here, because --help needs no torch

        scorer = registry.make(given.scorer, options)
        self_test(scorer)
        server = Server(scorer, given.port, given.host, token, bounds)
    except (ValueError, OSError) as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGINT):
        # shutdown() waits for the loop that this very thread runs, hence another thread
        signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
    host = f"[{given.host}]" if ":" in given.host else given.host
    print(f"serving {scorer.name} at http://{host}:{server.server_port}", flush=True)
    if not token and not ipaddress.ip_address(server.server_address[0]).is_loopback:
        print("warning: other machines can reach this server and no --token-env is set", file=sys.stderr, flush=True)
    server.serve_forever()
    server.server_close()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("reward_server.py", description="Serve a scorer over HTTP.", allow_abbrev=False)
    parser.add_argument("--scorer", required=True, metavar="KIND", help="one of registry.KINDS, such as ocr or vlm")
    parser.add_argument("--port", required=True, type=int, metavar="N", help="0: any free one")
    parser.add_argument("--host", default="localhost", help="the address to listen at (localhost: this machine only)")
    parser.add_argument("--token-env", metavar="NAME", help="the environment variable with the token that clients need")
    parser.add_argument("--device", help="where the scorer computes, such as cuda")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="for the scorer; repeatable"
    )
    parser.add_argument(
        "--max-body", type=float, default=BOUNDS.body / 2**20, metavar="MB", help="of a request (%(default)g)"
    )
    parser.add_argument("--max-side", type=int, default=BOUNDS.side, metavar="PX", help="of a picture (%(default)s)")
    parser.error = _refuse  # argparse's own would print its usage, too
    return parser


def _option(text: str) -> tuple[str, object]:
    """NAME=VALUE -> (NAME, value), where a value that is JSON is that, and anything else is a string."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"--option {text}: write it as NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _refuse(message: str) -> None:
    raise ValueError(f"{message}; see --help")


if __name__ == "__main__":
    sys.exit(main())
