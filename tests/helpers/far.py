"""A far scorer on this machine that fails as it is told to.

The right score of a picture is written in its own colors, so that a score that is lost, wrong or of another picture is
seen.
"""

import base64
import gzip
import io
import json
import math
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from PIL import Image

from data.files import Prompt
from rewards import Scorer
from scorers import remote, serve

ABOUT = {"name": "far", "low": 0, "high": 1}


class Far(ThreadingHTTPServer):
    """A server, as a context. plan(number of the request, its body) is the fault that answers it; None: `answer` does.

    url; requests: (path, headers, body) of each POST.
    """

    request_queue_size = 64

    def __init__(self, plan: Callable = lambda number, body: None, port: int = 0):
        self.plan, self.about, self.answer, self.requests = plan, ABOUT, own_scores, []
        self.lock, self.over = threading.Lock(), threading.Event()
        super().__init__(("localhost", port), _Handler)
        self.url = f"http://localhost:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def shutdown_request(self, request: socket.socket) -> None:
        request.close()  # without the polite end that would hide a reset

    def handle_error(self, *_) -> None:
        """Clients hang up: that is what is tried."""

    def __exit__(self, *_) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.reply(json.dumps(self.server.about))

    def do_POST(self) -> None:
        far, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with far.lock:
            number = len(far.requests)
            far.requests.append((self.path, dict(self.headers), body))
        fault = far.plan(number, body)
        if fault is None:
            self.reply(json.dumps(far.answer(body)))
        else:
            fault(self, body)

    def reply(self, text: str | bytes, status: int = 200, **headers: str) -> None:
        data = text if isinstance(text, bytes) else text.encode()
        self.send_response(status)
        for name, value in {"Content_Type": "application/json", "Content_Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def handle_one_request(self) -> None:
        with suppress(OSError):
            super().handle_one_request()

    def log_message(self, *_) -> None:
        """Nothing."""


class Served:
    """The project's own server in a thread, as a context."""

    def __init__(self, scorer: Scorer, token: str = "", bounds: serve.Bounds = serve.BOUNDS, port: int = 0):
        listener = socket.create_server(("localhost", port))
        self.port = listener.getsockname()[1]
        self.url = f"http://localhost:{self.port}"
        self.server = serve.server(serve.app(scorer, token, bounds))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self.thread.start()

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_) -> None:
        self.server.should_exit = True
        self.thread.join()


def pictures(count: int) -> tuple[torch.Tensor, list[Prompt]]:
    """(B, 3, 2, 3) pictures of the scores 1/65535, 2/65535, ..., and a prompt for each."""
    number = torch.arange(1, count + 1)
    colors = torch.stack([number % 256, number // 256, torch.zeros(count)], dim=1) / 255
    return colors[:, :, None, None].expand(count, 3, 2, 3), [Prompt(f"p{i}", "quality", {}, "") for i in range(count)]


def own_scores(body: dict) -> dict:
    """The scorer: the number that is written in the colors of a picture."""
    colors = [Image.open(io.BytesIO(base64.b64decode(item))).getpixel((0, 0)) for item in body["images"]]
    return {"scores": [(red + 256 * green) / 65535 for red, green, _ in colors], **ABOUT}


# ------------------------------------------------------------------------------------------------------ the faults
def says(text: str | bytes, status: int = 200, **headers: str) -> Callable:
    return lambda handler, body: handler.reply(text, status, **headers)


def but(**fields: object) -> Callable:
    """The right answer, but for some fields, which may be functions of the scores."""

    def fault(handler: _Handler, body: dict) -> None:
        answer = handler.server.answer(body)
        changed = {key: value(answer["scores"]) if callable(value) else value for key, value in fields.items()}
        handler.reply(json.dumps({**answer, **changed}))

    return fault


def reset(handler: _Handler, body: dict) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def hang(handler: _Handler, body: dict) -> None:
    handler.server.over.wait(5)


def endless(start: bytes, part: bytes, pause: float) -> Callable:
    """An answer that never ends. No single wait is long."""

    def fault(handler: _Handler, body: dict) -> None:
        handler.wfile.write(b"HTTP/1.0 200 OK\r\n" + start)
        while not handler.server.over.wait(pause):
            handler.wfile.write(part)

    return fault


PASSING = {  # the request is tried again until its deadline
    "reset": reset,
    "hang": hang,
    "trickle": endless(b"\r\n", b" ", 0.02),
    "trickle in the headers": endless(b"", b"X-A: 1\r\n", 0.02),
    "cut off": says('{"scores": [0.5', Content_Length="1000"),
    "429": says("busy", 429, Retry_After="0"),
    "503": says("loading", 503),
}
WRONG = {  # the request is tried again so many times
    "500": says('{"detail": "cuda"}', 500),
    "401": says("who?", 401),
    "redirect": says("", 302, Location="http://localhost:1/"),
    "HTML": says("<html>Sign in\n</html>", Content_Type="text/html"),
    "a list": says("[0.5]"),
    "deep JSON": says("[" * 15_000),
    "not UTF-8": says(b"\xff\xfe"),
    "compressed": says(gzip.compress(b" " * 10**7), Content_Encoding="gzip"),
    "without an end": endless(b"\r\n", b" " * 10_000, 0.0),
    "another scorer": but(name="ocr"),
    "another range": but(high=5),
    "one score less": but(scores=lambda scores: scores[1:]),
    "one score more": but(scores=lambda scores: [*scores, 0.5]),
    "NaN": but(scores=lambda scores: [math.nan for _ in scores]),
    "infinite": but(scores=lambda scores: [10**400 for _ in scores]),
    "out of range": but(scores=lambda scores: [1.5 for _ in scores]),
    "strings": but(scores=lambda scores: [str(score) for score in scores]),
    "truth values": but(scores=lambda scores: [True for _ in scores]),
    "null": but(scores=lambda scores: [None for _ in scores]),
    "no scores": says(json.dumps(ABOUT)),
}
FAULTS = PASSING | WRONG
FAST = remote.Limits(timeout=5, deadline=20, tries=3, rest=0.01, longest_rest=0.05, concurrency=4, max_bytes=65536)
