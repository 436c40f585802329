"""A real server on this machine: what goes in comes out right, and nothing that is sent brings it down."""

import base64
import io
import json
import math
import os
import signal
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from types import SimpleNamespace

import httpx2
import pytest
import torch
from PIL import Image

from data.files import Prompt
from rewards import RewardError, Scorer
from scorers import registry, remote, serve
from scorers.serve import BOUNDS
from tests.helpers.far import FAST, Served

SMALL = BOUNDS._replace(body=20_000, values=1000, side=32, seconds=5.0)
PROMPT = {"text": "a dog", "task": "quality", "metadata": {}}


def red(images, prompts, sources):
    """A score that is the picture's own first value."""
    return images[:, 0, 0, 0]


@pytest.fixture
def run():
    """run(score, ...): a server, which is stopped when the test ends."""
    with ExitStack() as stack:

        def start(score=red, low=0.0, high=1.0, bounds=SMALL, token=""):
            return stack.enter_context(Served(Scorer("red", score, low, high), token, bounds))

        yield start


def ask(server, body=None, path="/score", method="POST", **headers):
    """(status, JSON, headers) of one request; body: bytes as they are, or an object to be sent as JSON."""
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
    url = f"http://localhost:{server.port}{path}"
    answer = httpx2.request(method, url, content=content, headers=headers, trust_env=False, timeout=20)
    return answer.status_code, answer.json(), answer.headers


def picture(width=4, height=3, mode="RGB", kind="PNG"):
    stream = io.BytesIO()
    Image.new(mode, (width, height), (51, 51, 51) if mode == "RGB" else 0).save(stream, kind)
    return stream.getvalue()


def question(*files, **fields):
    images = [base64.b64encode(file).decode() for file in files or (picture(),)]
    return {"images": images, "prompts": [PROMPT] * len(images), "sources": None} | fields


def is_up(server):
    status, answer, _ = ask(server, question())
    return status == 200 and answer["scores"] == pytest.approx([51 / 255])


# -------------------------------------------------------------------------------------------------- what it is for
def test_a_served_scorer_says_what_the_same_scorer_says_here_to_the_last_bit(run):
    rng, seen = torch.Generator().manual_seed(0), []

    def look(images, prompts, sources):
        seen.append((prompts, sources))
        return images[:, 2, 5, 3] / 3 + torch.stack([s[-1][1, -1, 2] for s in sources])

    images = torch.randint(0, 256, (7, 3, 12, 9), generator=rng).float() / 255
    drawn = [torch.randint(0, 256, (3, 2 + i, 6), generator=rng).float() / 255 for i in range(7)]
    sources = [(one, *drawn[: i % 3]) for i, one in enumerate(drawn)]
    prompts = [Prompt(f"an \u00e4 {i}", "edit", {"image": "a.png", "include": [{"count": i}]}, "f:1") for i in range(7)]
    server = run(look, -math.inf, 9.0)
    scorer = remote.served([server.url], "red", batch=3, limits=FAST._replace(concurrency=1))
    assert ask(server, path="/health", method="GET")[:2] == (200, {"name": "red", "low": None, "high": 9.0})
    assert (scorer.name, scorer.low, scorer.high) == ("red", -math.inf, 9.0)
    assert torch.equal(scorer.score(images, prompts, sources), look(images, prompts, sources))
    assert [p[:3] for some, _ in seen[:3] for p in some] == [p[:3] for p in prompts]
    received = [row for _, some in seen[:3] for row in some]
    assert list(map(len, received)) == list(map(len, sources))
    assert all(map(torch.equal, sum(received, ()), sum(sources, ())))


# ------------------------------------------------------------------------------------- what is sent in error or malice
def crafted(*headers, data=b"\0"):
    """A PNG with these (width, height) headers and next to nothing in it."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0)) for w, h in headers]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def broken(file, at=-14):  # a byte of the pixels' checksum
    return file[:at] + bytes([file[at] ^ 255]) + file[at + 1 :]


BAD = {
    "no JSON": b"{",
    "pickle": b"\x80\x04\x95",
    "deep JSON": b"[" * 15_000,
    "a long number": b'{"images": ' + b"9" * 9000 + b"}",
    "many values": b'{"images": [' + b"0," * 2000 + b"0]}",
    "a list": [],
    "no prompts": {"images": []},
    "an unknown field": question(source=[]),
    "no images": question(images=[], prompts=[]),
    "two prompts": question(prompts=[PROMPT] * 2),
    "two sources": question(sources=[[base64.b64encode(picture()).decode()]] * 2),
    "a source of none": question(sources=[[]]),
    "a source of text": question(sources=[base64.b64encode(picture()).decode()]),
    "a prompt of text": question(prompts=["a dog"]),
    "an unknown task": question(prompts=[PROMPT | {"task": "x"}]),
    "metadata of list": question(prompts=[PROMPT | {"metadata": []}]),
    "no base64": question(images=["@@@"]),
    "JPEG": question(picture(kind="JPEG")),
    "half a PNG": question(picture()[:-15]),
    "a PNG of wrong checksum": question(broken(picture())),
    "transparent": question(picture(mode="RGBA")),
    "too wide": question(picture(33, 1)),
    "too many pixels": question(*[picture(32, 32)] * 17),
    "a bomb behind": question(crafted((4, 3), (60_000, 60_000))),
    "a bomb among the sources": question(sources=[[base64.b64encode(crafted((9000, 9000))).decode()]]),
    "two sizes": question(picture(4, 3), picture(3, 4)),
}


@pytest.fixture(scope="module")
def one():
    with Served(Scorer("red", red, 0.0, 1.0), bounds=SMALL) as server:
        yield server


@pytest.mark.parametrize("name", BAD)
def test_what_is_malformed_is_refused_in_one_line_and_the_server_stays_up(one, name):
    status, answer, _ = ask(one, BAD[name])
    assert status == 400 and answer["detail"].isprintable() and len(answer["detail"]) < 500
    assert is_up(one)


def test_a_body_beyond_the_bound_is_refused_and_one_at_the_bounds_is_taken(one):
    assert [ask(one, b" " * size)[0] for size in (20_001, 5_000_000)] == [413, 413]
    body = json.dumps(question()).encode()
    assert ask(one, body + b" " * (SMALL.body - len(body)))[0] == 200
    assert ask(one, question(*[picture(32, 32)] * 16))[0] == 200


def test_no_value_is_built_and_no_pixel_unpacked_beyond_the_bounds(monkeypatch):
    monkeypatch.setattr(json, "loads", lambda _: pytest.fail("built"))
    with pytest.raises(serve.HTTPException):
        serve.read_request(BAD["many values"], SMALL)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("unpacked"))
    with pytest.raises(ValueError, match="images"):
        serve.open_pictures("images", [base64.b64encode(crafted((9000, 9000)))], SMALL)


HEAD = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9000\r\n\r\n"


def test_what_is_no_http_or_of_another_form_and_clients_that_hang_up_do_no_harm(one, capfd):
    for asked, status in (({"path": "/docs", "method": "GET"}, 404), ({"method": "GET"}, 405),
                          ({"path": "/health"}, 405), ({"Content_Type": "text/plain"}, 415)):  # fmt: skip
        got, answer, _ = ask(one, **asked)
        assert got == status and list(answer) == ["detail"]
    for noise in (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"GET\r\n\r\n", b"A" * 70_000):
        with socket.create_connection(("localhost", one.port), timeout=5) as sock:
            sock.sendall(noise)
            assert sock.recv(4096).startswith(b"HTTP/1.1 400")
    for length in (0, 10, len(HEAD), len(HEAD) + 500):
        with socket.create_connection(("localhost", one.port)) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
            sock.sendall((HEAD + b" " * 500)[:length])
    assert is_up(one) and capfd.readouterr().err == ""


def test_a_body_that_trickles_is_refused_and_its_connection_closed(run):
    server, begin = run(bounds=SMALL._replace(seconds=0.3)), time.monotonic()
    with socket.create_connection(("localhost", server.port), timeout=5) as sock:
        sock.sendall(HEAD)
        sock.setblocking(False)
        while time.monotonic() - begin < 3:
            time.sleep(0.02)
            with suppress(BlockingIOError):
                if (answer := sock.recv(4096)).startswith(b"HTTP/1.1 408"):
                    break
            sock.sendall(b" ")
        sock.setblocking(True)
        assert answer and sock.recv(4096) == b"" and 0.2 < time.monotonic() - begin < 2
    assert is_up(server)


# ------------------------------------------------------------------------------------------------------- the token
def test_without_the_token_nothing_is_told(run):
    server = run(token="s3cr3t")
    for given in (None, "s3cr3t", "Bearer s3cr3", "Bearer \u00e4"):
        headers = {"Authorization": given.encode()} if given else {}
        for path, method, body in (("/health", "GET", None), ("/score", "POST", question())):
            status, answer, _ = ask(server, body, path, method, **headers)
            assert status == 401 and "s3cr3t" not in answer["detail"]
    assert ask(server, question(), Authorization="Bearer s3cr3t")[0] == 200
    with socket.create_connection(("localhost", server.port)) as sock:
        sock.sendall(HEAD)
        assert sock.recv(4096).startswith(b"HTTP/1.1 401"), "before the body is there"


# ------------------------------------------------------------------------------------------------ scorers that fail
FAILURES = {
    "its own": (lambda *_: _raise(RewardError("no target\ntext")), "scorer 'red' failed: no target text"),
    "the end": (lambda *_: _raise(StopIteration()), "scorer 'red' failed: StopIteration"),
    "out of range": (lambda *_: [1.5], "1.5 is outside [0.0, 1.0], for the prompt 'a dog'"),
    "nothing": (lambda *_: None, "scorer 'red'"),
}


def _raise(fault):
    raise fault


@pytest.mark.parametrize("name", FAILURES)
def test_a_scorer_that_fails_is_a_500_that_names_it_and_the_server_stays_up(run, name, capfd):
    fail, cause = FAILURES[name]
    calls = []
    server = run(lambda *batch: calls.append(1) or (fail(*batch) if len(calls) == 1 else red(*batch)))
    status, answer, _ = ask(server, question())
    assert status == 500 and cause in answer["detail"] and answer["detail"].isprintable()
    assert capfd.readouterr().err == f"serve: {answer['detail']}\n"
    assert is_up(server)


# ------------------------------------------------------------------------------------------------- one at a time
class Slow:
    """A scorer that waits until it is let go, and notes how many do so at once, and on which threads."""

    def __init__(self):
        self.go, self.calls, self.busy, self.busiest, self.threads = threading.Event(), 0, 0, 0, set()

    def __call__(self, images, prompts, sources):
        self.calls, self.busy = self.calls + 1, self.busy + 1
        self.busiest = max(self.busiest, self.busy)
        self.threads.add(threading.get_ident())
        assert self.go.wait(20)
        time.sleep(0.01)
        self.busy -= 1
        return red(images, prompts, sources)


def until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def test_one_batch_is_scored_at_a_time_and_those_beyond_the_queue_are_told_to_come_back(run):
    slow = Slow()
    server = run(slow, bounds=SMALL._replace(waiting=2))
    with ThreadPoolExecutor(12) as clients:
        answers = [clients.submit(ask, server, question()) for _ in range(12)]
        until(lambda: sum(answer.done() for answer in answers) == 9)
        assert ask(server, path="/health", method="GET")[0] == 200, "health is not kept waiting"
        slow.go.set()
    told = [answer.result() for answer in answers]
    assert sorted(status for status, _, _ in told) == [200] * 3 + [429] * 9
    assert all(headers["Retry-After"] == "1" for status, _, headers in told if status == 429)
    assert slow.calls == 3 and slow.busiest == 1 and len(slow.threads) == 1
    images = (torch.arange(1, 9).float() / 255)[:, None, None, None].expand(8, 3, 2, 2)
    scorer = remote.served([server.url], "red", batch=1, limits=FAST._replace(concurrency=5))
    scores = scorer.score(images, [Prompt("p", "quality", {}, "f:1")] * 8)
    assert torch.equal(scores, images[:, 0, 0, 0]), "a client of the project comes back by itself"


def test_nothing_is_scored_for_a_client_that_has_gone(run):
    slow = Slow()
    server = run(slow)
    with ThreadPoolExecutor(1) as client:
        first = client.submit(ask, server, question())
        until(lambda: slow.busy == 1)
        impatient = remote.served([server.url], "red", limits=FAST._replace(timeout=0.1, deadline=0.1))
        with pytest.raises(RewardError, match="0.1 s were not enough"):
            impatient.score(torch.ones(1, 3, 2, 2), [Prompt("p", "quality", {}, "f:1")])
        slow.go.set()
    assert is_up(server) and first.result()[0] == 200
    assert slow.calls == 2, "the first and the last"


# -------------------------------------------------------------------------------------------- starting and stopping
@pytest.fixture
def kinds(monkeypatch):
    """Stands in for the real scorers, whose models are not what is tested here: a kind `red` with some options."""
    made = SimpleNamespace(asked=[], score=red, fault=None)

    def make(kind, options):
        made.asked.append((kind, options))
        return Scorer("red", lambda *batch: made.score(*batch), 0.0, 1.0) if kind == "red" else real(kind, options)

    def self_test(scorer):
        if made.fault:
            raise RewardError(made.fault)

    real = registry.make
    monkeypatch.setattr(registry, "make", make)
    monkeypatch.setattr(serve, "self_test", self_test)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield made
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_the_answers_that_are_under_way(kinds, capsys, number):
    kinds.score = Slow()
    with socket.create_server(("localhost", 0)) as free:
        server = SimpleNamespace(port=free.getsockname()[1])

    def play():
        def is_there():
            try:
                return ask(server, path="/health", method="GET")[0] == 200
            except httpx2.TransportError:
                return False

        until(is_there)
        with ThreadPoolExecutor(1) as client, socket.create_connection(("localhost", server.port)):
            answer = client.submit(ask, server, question())
            until(lambda: kinds.score.busy == 1)
            os.kill(os.getpid(), number)
            time.sleep(0.3)
            kinds.score.go.set()
        return answer.result()

    with ThreadPoolExecutor(1) as player:
        answer = player.submit(play)
        assert serve.main(["--scorer", "red", "--port", str(server.port)]) == 0
        assert answer.result()[:1] == (200,) and answer.result()[1]["scores"] == pytest.approx([51 / 255])
    assert capsys.readouterr() == (f"serving red at http://127.0.0.1:{server.port}\n", "")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("localhost", server.port))


def test_the_flags_reach_scorer_and_server(kinds, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(serve, "app", lambda scorer, token: made.append((scorer.name, token)))
    monkeypatch.setattr(serve, "server", lambda web: SimpleNamespace(run=lambda sockets: sockets[0].close()))
    monkeypatch.setenv("REWARD_TOKEN", "s3cr3t")
    options = ["--option", "strict=true", "--option", "model=a=b", "--option", "batch=3"]
    flags = "--scorer red --port 0 --host 0.0.0.0"
    assert serve.main([*f"{flags} --key-env REWARD_TOKEN --device cuda".split(), *options]) == 0
    assert kinds.asked == [("red", {"strict": True, "model": "a=b", "batch": 3, "device": "cuda"})]
    assert made == [("red", "s3cr3t")] and capsys.readouterr().err == ""
    assert serve.main(flags.split()) == 0 and kinds.asked[-1] == ("red", {})
    assert "warning: other machines can reach this server" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "cause"), [
    ("--scorer rde --port 0", "'rde'"), ("--scorer red", "--port"),
    ("--scorer red --port 70000", "port must be 0-65535"), ("--scorer red --port {used}", "in use"),
    ("--scorer red --port 0 --key-env NO_SUCH", "variable NO_SUCH"),
    ("--scorer red --port 0 --option strict", "--option strict"),
    ("--scorer red --port 0 --host no.such.host.invalid", "not known"),
    ("--scorer red --port 0 --device cpu", "failed its self-test"),
])  # fmt: skip
def test_what_cannot_work_is_one_line_and_exit_code_2(kinds, capsys, one, flags, cause):
    kinds.fault = "scorer 'red' failed its self-test"
    try:
        code = serve.main(flags.format(used=one.port).split())
    except SystemExit as end:  # argparse ends so
        code = end.code
    err = capsys.readouterr().err
    assert code == 2 and "error: " in err and cause in err and err.count("\n") == 1, err
