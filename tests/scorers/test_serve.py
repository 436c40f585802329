"""A real server on this machine: what goes in comes out right, and nothing that is sent brings it down."""

import base64
import http.client
import io
import ipaddress
import json
import math
import os
import signal
import socket
import struct
import threading
import time
import zlib
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from data.files import Prompt
from rewards import RewardError, Scorer
from scorers import registry, remote, selftest
from scorers import serve as reward_server
from scorers.ocr import score_jpeg
from scorers.remote import Limits
from scorers.serve import BOUNDS, Server

FAST = Limits(timeout=10.0, deadline=20.0, tries=2, rest=0.01, longest_rest=0.05, concurrency=4)
SMALL = BOUNDS._replace(body=20_000, side=32, seconds=5.0)


def jpeg(images, prompts, sources):
    return score_jpeg(images, prompts)


def red(images, prompts, sources):
    """A score that is the picture's own first value."""
    return images[:, 0, 0, 0]


@pytest.fixture
def run():
    """Start servers; they are stopped when the test ends."""
    started = []

    def start(score=red, name="red", low=0.0, high=1.0, bounds=SMALL, **options):
        server = Server(Scorer(name, score, low, high), 0, bounds=bounds, **options)
        server.url = f"http://localhost:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        started.append((server, thread))
        return server

    yield start
    for server, thread in started:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(server, body, path="/score", method="POST", **headers):
    """(status, JSON, headers) of one request; body: bytes as they are, or an object to be sent as JSON."""
    connection = http.client.HTTPConnection("localhost", server.server_port, timeout=20)
    try:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        given = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
        connection.request(method, path, data, given)
        answer = connection.getresponse()
        assert answer.headers["Content-Type"] == "application/json"
        return answer.status, json.loads(answer.read()), answer.headers
    finally:
        connection.close()


def picture(width=4, height=3, mode="RGB", color=51):
    stream = io.BytesIO()
    Image.new(mode, (width, height), color if mode != "RGB" else (color,) * 3).save(stream, "PNG")
    return stream.getvalue()


def b64(data):
    return base64.b64encode(data).decode()


PROMPT = {"text": "a dog", "task": "quality", "metadata": {}}


def question(*files, **fields):
    files = files or (picture(),)
    return {"images": [b64(file) for file in files], "prompts": [PROMPT] * len(files), "sources": None} | fields


def is_up(server):
    status, answer, _ = ask(server, question())
    return status == 200 and answer["scores"] == pytest.approx([51 / 255])


# -------------------------------------------------------------------------------------------------- what it is for
def test_a_served_scorer_says_what_the_same_scorer_says_here(run):
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (7, 3, 12, 9), generator=rng).float() / 255
    prompts = [Prompt(f"p{i}", "quality", {}, "f:1") for i in range(7)]
    server = run(jpeg, "jpeg", -math.inf, 1.0)
    scorer = remote.served([server.url], "jpeg", batch=3, limits=FAST)
    assert (scorer.name, scorer.low, scorer.high) == ("jpeg", -math.inf, 1.0)
    assert torch.equal(scorer.score(images, prompts, None), torch.tensor(jpeg(images, prompts, None)))


def test_scores_keep_all_their_bits(run):
    exact = torch.rand(5, generator=torch.Generator().manual_seed(1)) / 3
    _, answer, _ = ask(run(lambda *_: exact), question(*[picture()] * 5))
    assert torch.equal(torch.tensor(answer["scores"]), exact)
    assert {k: answer[k] for k in ("name", "low", "high")} == {"name": "red", "low": 0.0, "high": 1.0}


def test_prompts_metadata_and_sources_reach_the_scorer(run):
    seen = []

    def look(images, prompts, sources):
        seen.append((images.shape, images.dtype, prompts, [tuple(s.shape) for s in sources], sources[0].max().item()))
        return [0.5] * len(prompts)

    prompts = [Prompt("an \u00e4 edit", "edit", {"image": "a.png", "include": [{"count": 2}]}, "f:1")] * 2
    scorer = remote.served([run(look).url], "red", limits=FAST)
    sources = [torch.full((3, 2, 6), 0.2), torch.zeros(3, 8, 1)]
    assert scorer.score(torch.zeros(2, 3, 4, 5), prompts, sources).tolist() == [0.5, 0.5]
    ((shape, dtype, got, source_shapes, top),) = seen
    assert (shape, dtype) == ((2, 3, 4, 5), torch.float32) and [g[:3] for g in got] == [p[:3] for p in prompts]
    assert source_shapes == [(3, 2, 6), (3, 8, 1)] and top == pytest.approx(0.2)


def test_health_tells_name_and_range_with_null_for_an_open_end(run):
    assert ask(run(low=-1.0, high=math.inf), None, "/health", "GET")[:2] == (
        200,
        {"name": "red", "low": -1.0, "high": None},
    )


def test_it_listens_on_this_machine_only_unless_told_otherwise(run):
    assert ipaddress.ip_address(run().server_address[0]).is_loopback


# ------------------------------------------------------------------------------------- what is sent in error or malice
def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def crafted(*headers, data=b"\0"):
    """A PNG with these (width, height) headers and next to nothing in it."""
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0)) for w, h in headers]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def broken(file, at=-14):  # a byte of the pixels' checksum
    return file[:at] + bytes([file[at] ^ 255]) + file[at + 1 :]


def stream(image_format):
    out = io.BytesIO()
    Image.new("RGB", (4, 3)).save(out, image_format)
    return out.getvalue()


BAD = {
    "no JSON": (b"{", 400, "the body is not JSON"),
    "no UTF-8": (b'{"images": "\xff"}', 400, "the body is not JSON"),
    "nothing": (b"", 400, "the body is not JSON"),
    "pickle": (b"\x80\x04\x95", 400, "the body is not JSON"),
    "deep JSON": (b"[" * 15_000, 400, "the body is not JSON"),
    "NaN": (b'{"images": NaN, "prompts": []}', 400, "NaN is no JSON"),
    "a long number": (b'{"images": ' + b"9" * 9000 + b"}", 400, "the body is not JSON"),
    "a list": ([], 400, "must be an object of images, prompts"),
    "no prompts": ({"images": []}, 400, "must be an object of images, prompts"),
    "an unknown field": (question(model="x"), 400, "must be an object of images, prompts"),
    "no images": (question(images=[], prompts=[]), 400, "images must be a list that is not empty"),
    "images that are none": (question(images="x"), 400, "images must be a list that is not empty"),
    "two prompts": (question(prompts=[PROMPT] * 2), 400, "2 prompts but 1 images"),
    "two sources": (question(sources=[b64(picture())] * 2), 400, "2 sources but 1 images"),
    "sources of none": (question(sources=[]), 400, "sources must be a list that is not empty"),
    "a prompt of text": (question(prompts=["a dog"]), 400, "prompts[0] must be an object of text, task and metadata"),
    "a prompt without task": (question(prompts=[{"text": "", "metadata": {}}]), 400, "prompts[0] must be an object"),
    "an unknown task": (question(prompts=[PROMPT | {"task": "x"}]), 400, "prompts[0]: text is a string"),
    "a task of lists": (question(prompts=[PROMPT | {"task": [1]}]), 400, "prompts[0]: text is a string"),
    "a text of number": (question(prompts=[PROMPT | {"text": 1}]), 400, "prompts[0]: text is a string"),
    "metadata of list": (question(prompts=[PROMPT | {"metadata": []}]), 400, "prompts[0]: text is a string"),
    "no base64": (question(images=["@@@"]), 400, "images[0] is not base64"),
    "an image of number": (question(images=[5]), 400, "images[0] is not base64"),
    "no PNG": (question(b"hello"), 400, "images[0] is not a whole PNG"),
    "an empty image": (question(b""), 400, "images[0] is not a whole PNG"),
    "JPEG": (question(stream("JPEG")), 400, "images[0] is not a whole PNG"),
    "TIFF": (question(stream("TIFF")), 400, "images[0] is not a whole PNG"),
    "half a PNG": (question(picture()[:-15]), 400, "images[0] is not a whole PNG"),
    "a PNG of wrong checksum": (question(broken(picture())), 400, "images[0] is not a whole PNG"),
    "too few pixels": (question(crafted((4, 3))), 400, "images[0] is not a whole PNG"),
    "no pixels": (question(crafted((0, 3))), 400, "images[0] is not a whole PNG"),
    "grey": (question(picture(mode="L")), 400, "images[0] is a PNG of mode L; send RGB"),
    "transparent": (question(picture(mode="RGBA", color=(0, 0, 0, 0))), 400, "of mode RGBA; send RGB"),
    "palette": (question(picture(mode="P")), 400, "of mode P; send RGB"),
    "too wide": (question(picture(33, 1)), 413, "images[0] has 33 x 1 pixels"),
    "too high": (question(picture(1, 33)), 413, "images[0] has 1 x 33 pixels"),
    "too many pixels": (question(*[picture(32, 32)] * 17), 413, "images[16] has 32 x 32 pixels"),
    "a bomb": (question(crafted((60_000, 60_000))), 413, "images[0] "),
    "a bomb behind": (question(crafted((4, 3), (60_000, 60_000))), 413, "images[0] "),
    "a bomb among the sources": (question(sources=[b64(crafted((9000, 9000)))]), 413, "sources[0] has 9000 x 9000"),
    "two sizes": (question(picture(4, 3), picture(3, 4)), 400, "the images of a request must have one size"),
    "a large body": (b" " * 20_001, 413, "a body of 20001 bytes; 20000 are allowed"),
    "a huge body": (b" " * 5_000_000, 413, "a body of 5000000 bytes; 20000 are allowed"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_malformed_is_refused_in_one_line_and_the_server_stays_up(run, name):
    body, status, cause = BAD[name]
    server = run()
    got, answer, _ = ask(server, body)
    assert got == status and list(answer) == ["error"] and cause in answer["error"] and "\n" not in answer["error"]
    assert is_up(server)


def test_a_picture_at_the_bounds_is_taken(run):
    server = run()
    assert ask(server, question(*[picture(32, 32)] * 16))[0] == 200
    body = json.dumps(question()).encode()
    assert ask(server, body + b" " * (SMALL.body - len(body)))[0] == 200


def test_a_bomb_is_refused_before_it_is_unpacked(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("unpacked"))
    with pytest.raises(reward_server.Refusal, match="images"):
        reward_server.open_pictures("images", [crafted((9000, 9000))], 32, 10**6)


HEADERS = {
    "no such page": ({"path": "/"}, 404, "there are GET /health and POST /score"),
    "another page": ({"path": "/score/../score"}, 404, "there are"),
    "GET for POST": ({"method": "GET", "body": None}, 405, "/score takes POST"),
    "POST for GET": ({"path": "/health"}, 405, "/health takes GET"),
    "form data": ({"Content_Type": "text/plain"}, 415, "application/json"),
    "length of letters": ({"Content_Length": "ten"}, 400, "the Content-Length 'ten' is no length"),
    "negative length": ({"Content_Length": "-1"}, 400, "the Content-Length '-1' is no length"),
    "length with a blank": ({"Content_Length": "1_0"}, 400, "is no length"),
    "chunks": ({"Transfer_Encoding": "chunked", "Content_Length": "2"}, 411, "in one piece"),
    "another method": ({"method": "PUT"}, 501, "Unsupported method"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_requests_of_another_form_are_refused_in_json(run, name):
    options, status, cause = HEADERS[name]
    server = run()
    got, answer, _ = ask(server, options.get("body", b"{}"), **{k: v for k, v in options.items() if k != "body"})
    assert got == status and cause in answer["error"]
    assert is_up(server)


def raw(server, data, wait=5.0):
    """All that comes back on a connection that sends just these bytes."""
    with socket.create_connection(("localhost", server.server_port), timeout=wait) as sock:
        sock.sendall(data)
        return b"".join(iter(lambda: sock.recv(4096), b""))


def test_what_is_no_http_is_refused_in_json_too(run):
    server = run()
    for noise in (
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /health HTTP/9\r\n\r\n",
        b"A" * 70_000,
    ):
        answer = raw(server, noise)
        assert answer.startswith(b"HTTP/1.0 ") and b'{"error": ' in answer, noise[:20]
    assert raw(server, b"POST /score HTTP/1.0\r\nContent-Type: application/json\r\n\r\n{}").startswith(b"HTTP/1.0 411")
    twice = (
        b"POST /score HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: 2\r\nContent-Length: 9\r\n\r\n{}"
    )
    assert raw(server, twice).startswith(b"HTTP/1.0 411")
    assert is_up(server)


def test_a_body_that_trickles_is_given_up_after_its_time_and_a_silent_connection_too(run):
    server = run(bounds=SMALL._replace(seconds=0.3))
    head = b"POST /score HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: 9000\r\n\r\n"
    for pause in (0.05, 1.0):  # each byte in time, and none
        with socket.create_connection(("localhost", server.server_port), timeout=5) as sock:
            sock.sendall(head)
            sock.settimeout(pause)
            start, answer = time.monotonic(), b""
            while not answer.endswith(b"}"):
                try:
                    answer += sock.recv(4096)
                except TimeoutError:
                    sock.sendall(b" ")
            assert b"408" in answer and b"did not come within 0.3 s" in answer
            assert 0.2 < time.monotonic() - start < 3
    assert raw(server, b"") == b"", "closed"
    assert is_up(server)


def test_a_client_that_hangs_up_in_the_middle_does_no_harm(run, capsys):
    server = run()
    for length in (0, 10, 200):
        data = f"POST /score HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: 9000\r\n\r\n{' ' * 500}"
        with socket.create_connection(("localhost", server.server_port)) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
            sock.sendall(data[:length].encode())
    assert is_up(server) and capsys.readouterr().err == ""


def test_more_connections_than_allowed_are_closed_and_places_come_back(run, monkeypatch):
    monkeypatch.setattr(reward_server, "CONNECTIONS", 3)
    server = run()
    idle = [socket.create_connection(("localhost", server.server_port)) for _ in range(3)]
    time.sleep(0.1)
    start = time.monotonic()
    assert raw(server, b"") == b"" and time.monotonic() - start < 0.2, "closed at once"
    for sock in idle:
        sock.close()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            assert is_up(server)
            break
        except (ConnectionError, http.client.HTTPException):
            time.sleep(0.02)
    else:
        pytest.fail("no place came back")


# ------------------------------------------------------------------------------------------------------- the token
def test_without_the_token_nothing_is_told(run):
    server = run(token="s3cr3t")
    for given in (
        {},
        {"Authorization": "s3cr3t"},
        {"Authorization": "Bearer s3cr3"},
        {"Authorization": "Bearer \u00e4"},
    ):
        for path, method, body in (("/health", "GET", None), ("/score", "POST", question()), ("/x", "GET", None)):
            status, answer, _ = ask(server, body, path, method, **given)
            assert status == 401 and "Bearer TOKEN" in answer["error"] and "s3cr3t" not in answer["error"]
    assert ask(server, question(), Authorization="Bearer s3cr3t")[0] == 200


def test_the_token_is_compared_in_constant_time(run, monkeypatch):
    compared = []
    monkeypatch.setattr(reward_server.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or True)
    assert ask(run(token="right"), question(), Authorization="Bearer wrong")[0] == 200
    assert compared == [(b"Bearer wrong", b"Bearer right")]


def test_both_ends_agree_on_the_token(run, monkeypatch):
    server = run(token="s3cr3t")
    monkeypatch.setenv("REWARD_TOKEN", "s3cr3t")
    scorer = remote.served([server.url], "red", key_env="REWARD_TOKEN", limits=FAST)
    assert scorer.score(torch.ones(1, 3, 2, 2), [Prompt("p", "quality", {}, "f:1")], None).tolist() == [1.0]
    monkeypatch.setenv("REWARD_TOKEN", "other")
    with pytest.raises(RewardError, match="status 401: .*wants its token"):
        remote.served([server.url], "red", key_env="REWARD_TOKEN", limits=FAST)


# ------------------------------------------------------------------------------------------------ scorers that fail
FAILURES = {
    "an exception": (lambda *_: 1 / 0, "scorer 'red' failed: ZeroDivisionError: division by zero"),
    "a network's": (lambda *_: [][ConnectionResetError()], "scorer 'red' failed: TypeError"),
    "a scorer's own": (lambda *_: _raise(RewardError("no target\ntext")), "scorer 'red' failed: no target text"),
    "a reset": (lambda *_: _raise(ConnectionResetError("far")), "scorer 'red' failed: ConnectionResetError: far"),
    "NaN": (lambda *_: torch.tensor([math.nan]), "nan is not finite, for the prompt 'a dog'"),
    "out of range": (lambda *_: [1.5], "1.5 is outside [0.0, 1.0], for the prompt 'a dog'"),
    "wrong count": (lambda *_: [0.1, 0.2], "1 prompts but scores of shape (2,)"),
    "a column": (lambda *_: torch.zeros(1, 1), "1 prompts but scores of shape (1, 1)"),
    "nothing": (lambda *_: None, "scorer 'red'"),
}


def _raise(fault):
    raise fault


@pytest.mark.parametrize("name", FAILURES)
def test_a_scorer_that_fails_is_a_500_that_names_it_and_the_server_stays_up(run, name, capsys):
    fail, cause = FAILURES[name]
    calls = []
    server = run(lambda *batch: calls.append(1) or (fail(*batch) if len(calls) == 1 else red(*batch)))
    status, answer, _ = ask(server, question())
    assert status == 500 and cause in answer["error"] and "\n" not in answer["error"]
    assert cause in capsys.readouterr().err
    assert is_up(server)


def test_the_far_scorers_failure_is_the_runs_own_message(run):
    server = run(lambda *_: _raise(RewardError("scorer 'red': the engine is not installed")))
    scorer = remote.served([server.url], "red", limits=FAST)
    with pytest.raises(RewardError, match="for the prompt 'p' from .*status 500: .*the engine is not installed"):
        scorer.score(torch.ones(1, 3, 2, 2), [Prompt("p", "quality", {}, "f:1")], None)


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
    slow, answers = Slow(), []
    server = run(slow, bounds=SMALL._replace(waiting=2))
    clients = [threading.Thread(target=lambda: answers.append(ask(server, question()))) for _ in range(3)]
    for client in clients:
        client.start()
    until(lambda: slow.busy == 1 and server.places._value == 0)
    status, answer, headers = ask(server, question())
    assert status == 429 and "2 requests wait already" in answer["error"] and int(headers["Retry-After"]) >= 1
    assert ask(server, None, "/health", "GET")[0] == 200, "health is not kept waiting"
    slow.go.set()
    for client in clients:
        client.join()
    assert [status for status, _, _ in answers] == [200] * 3
    assert slow.busiest == 1 and len(slow.threads) == 1
    assert ask(server, question())[0] == 200


def test_a_client_sees_nothing_of_a_full_queue(run):
    slow = Slow()
    slow.go.set()
    server = run(slow, bounds=SMALL._replace(waiting=1))
    images = (torch.arange(1, 16).float() / 255)[:, None, None, None].expand(15, 3, 2, 2)
    scorer = remote.served([server.url], "red", batch=1, limits=FAST._replace(concurrency=6))
    # a 429 asks for RETRY_AFTER seconds, which is long for a test
    real, reward_server.RETRY_AFTER = reward_server.RETRY_AFTER, 0
    try:
        scores = scorer.score(images, [Prompt(f"p{i}", "quality", {}, "f:1") for i in range(15)], None)
    finally:
        reward_server.RETRY_AFTER = real
    assert torch.equal(scores, images[:, 0, 0, 0]) and slow.calls == 15


def test_nothing_is_scored_for_a_client_that_has_gone(run):
    slow, answers = Slow(), []
    server = run(slow)
    first = threading.Thread(target=lambda: answers.append(ask(server, question())))
    first.start()
    until(lambda: slow.busy == 1)
    impatient = remote.served([server.url], "red", limits=FAST._replace(timeout=0.1, deadline=0.1))
    with pytest.raises(RewardError, match="no whole answer"):
        impatient.score(torch.ones(1, 3, 2, 2), [Prompt("p", "quality", {}, "f:1")], None)
    slow.go.set()
    first.join()
    assert is_up(server) and answers[0][0] == 200
    assert slow.calls == 2, "the first and the last"


# -------------------------------------------------------------------------------------------- starting and stopping
@pytest.fixture
def kinds(monkeypatch):
    """Stands in for the real scorers, whose models are not what is tested here: a kind `red` with one option."""
    made = SimpleNamespace(asked=[], tested=[], score=red, fault=None)

    def make(kind, options):
        if kind != "red":
            return real(kind, options)
        made.asked.append((kind, options))
        return Scorer("red", lambda *batch: made.score(*batch), 0.0, 1.0)

    def self_test(scorer):
        made.tested.append(scorer.name)
        if made.fault:
            raise RewardError(made.fault)

    real = registry.make
    monkeypatch.setattr(registry, "make", make)
    monkeypatch.setattr(selftest, "self_test", self_test)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield made
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def free_port():
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        return sock.getsockname()[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_the_answers_that_are_under_way(kinds, free_port, capsys, number):
    kinds.score, answers = Slow(), []
    server = SimpleNamespace(server_port=free_port)

    def play():
        def answers_health():
            try:
                return ask(server, None, "/health", "GET")[0] == 200
            except OSError:
                return False

        until(answers_health)
        client = threading.Thread(target=lambda: answers.append(ask(server, question())))
        client.start()
        until(lambda: kinds.score.busy == 1)
        os.kill(os.getpid(), number)
        time.sleep(0.1)
        kinds.score.go.set()
        client.join()

    player = threading.Thread(target=play)
    player.start()
    assert reward_server.main(["--scorer", "red", "--port", str(free_port)]) == 0
    player.join()
    assert [(status, answer["scores"]) for status, answer, _ in answers] == [(200, pytest.approx([51 / 255]))]
    assert kinds.tested == ["red"], "its self-test came first"
    out = capsys.readouterr()
    assert out.out == f"serving red at http://localhost:{free_port}\n" and out.err == ""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("localhost", free_port))


def test_the_flags_reach_scorer_and_server(kinds, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(Server, "serve_forever", lambda self: made.append(self))
    monkeypatch.setenv("REWARD_TOKEN", "s3cr3t")
    flags = "--scorer red --port 0 --host 0.0.0.0 --token-env REWARD_TOKEN --device cuda --max-body 0.5 --max-side 100"
    options = ["--option", "strict=true", "--option", "model=a=b", "--option", "batch=3"]
    assert reward_server.main([*flags.split(), *options]) == 0
    assert kinds.asked == [("red", {"strict": True, "model": "a=b", "batch": 3, "device": "cuda"})]
    (server,) = made
    assert server.server_address[0] == "0.0.0.0" and server.token == "s3cr3t"
    assert (server.bounds.body, server.bounds.side) == (2**19, 100)
    assert capsys.readouterr().err == ""
    assert reward_server.main("--scorer red --port 0 --host 0.0.0.0".split()) == 0
    assert "warning: other machines can reach this server" in capsys.readouterr().err
    assert kinds.asked[-1] == ("red", {}) and made[1].bounds == BOUNDS
    assert reward_server.main("--scorer red --port 0 --host ::1".split()) == 0 if socket.has_ipv6 else True


@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        ("--scorer rde --port 0", "scorer 'rde': no kind 'rde'; choose from geneval"),
        ("--scorer red", "--port; see --help"),
        ("--scorer red --port ten", "invalid int value: 'ten'; see --help"),
        ("--scorer red --port 70000", "--port must be from 0 to 65535"),
        ("--scorer red --port 0 --max-side 0", "--max-side above 0"),
        ("--scorer red --port 0 --max-body nan", "--max-body and"),
        ("--scorer red --port 0 --token-env NO_SUCH", "NO_SUCH is not set"),
        ("--scorer red --port 0 --option strict", "--option strict: write it as NAME=VALUE"),
        ("--scorer red --port 0 --sclae 2", "unrecognized arguments: --sclae 2; see --help"),
        ("--scorer red --port 0 --host no.such.host.invalid", ""),
    ],
)
def test_what_cannot_work_is_one_line_and_exit_code_2(kinds, capsys, flags, cause):
    assert reward_server.main(flags.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and cause in err and err.count("\n") == 1, err


def test_a_port_in_use_and_a_failing_self_test_are_one_line_and_exit_code_2(kinds, run, capsys):
    assert reward_server.main(["--scorer", "red", "--port", str(run().server_port)]) == 2
    assert "in use" in capsys.readouterr().err
    kinds.fault = "scorer 'red' failed its self-test"
    assert reward_server.main("--scorer red --port 0".split()) == 2
    assert capsys.readouterr().err == "error: scorer 'red' failed its self-test\n"
