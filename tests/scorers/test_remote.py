"""Real servers on this machine with planted faults: nothing may be lost, and no score may go to another picture."""

import base64
import io
import json
import math
import random
import re
import socket
import struct
import threading
import time
from contextlib import suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image

from data.files import Prompt
from rewards import RewardError
from scorers import remote
from scorers import rubrics as judges
from scorers.remote import Clock, Limits

FAST = Limits(timeout=5.0, deadline=20.0, tries=3, rest=0.01, longest_rest=0.05, concurrency=4)
HEALTH = {"name": "far", "low": 0, "high": 1}


# ------------------------------------------------------------------------------------------- a server with faults
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(200, json.dumps(self.server.health))

    def do_POST(self):
        far, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with far.lock:
            number = len(far.requests)
            far.requests.append((self.path, dict(self.headers), body))
            far.busy += 1
            far.busiest = max(far.busiest, far.busy)
        try:
            fault = far.plan(number, body)
            if fault is None:
                self.reply(200, json.dumps(far.answer(body)))
            else:
                fault(self, body)
        finally:
            with far.lock:
                far.busy -= 1

    def reply(self, status, text, kind="application/json", **headers):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(text)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(text.encode())

    def handle_one_request(self):
        with suppress(OSError):  # clients hang up: that is what is tested
            super().handle_one_request()

    def log_message(self, *_):
        pass


class Far(ThreadingHTTPServer):
    """plan(number of the request, body) -> the fault that answers it, or None: `answer(body)` does."""

    request_queue_size = 64

    def __init__(self, plan=lambda number, body: None, port=0):
        self.plan, self.health, self.answer = plan, HEALTH, levels
        self.lock, self.over, self.requests, self.busy, self.busiest = threading.Lock(), threading.Event(), [], 0, 0
        super().__init__(("localhost", port), Handler)
        self.url = f"http://localhost:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def shutdown_request(self, request):
        request.close()  # without the polite end that would hide a reset

    def handle_error(self, *_):
        pass

    def stop(self):
        self.over.set()
        self.shutdown()
        self.server_close()


def levels(body):
    """A scorer whose score is the picture's own grey level: a score that goes astray is seen."""
    pictures = [Image.open(io.BytesIO(base64.b64decode(item))) for item in body["images"]]
    return {"scores": [picture.getpixel((0, 0))[0] / 255 for picture in pictures], **HEALTH}


@pytest.fixture
def far():
    """Make servers; they are stopped when the test ends."""
    made = []

    def make(*args, **options):
        made.append(Far(*args, **options))
        return made[-1]

    yield make
    for server in made:
        with suppress(OSError):
            server.stop()


def batch(count, height=3, width=5):
    """(B, 3, H, W) pictures of the grey levels 1/255, 2/255, ... and their prompts."""
    grey = torch.arange(1, count + 1).float() / 255
    return grey[:, None, None, None].expand(count, 3, height, width), [prompt(f"p{i}") for i in range(count)]


def prompt(text, **metadata):
    return Prompt(text, "quality", metadata, f"f:{text}")


def own_levels(count):
    return (torch.arange(1, count + 1).double() / 255).float()


class Fake:
    """A clock that only waiting moves, and chance that is always `share`."""

    def __init__(self, share=0.0):
        self.time, self.waits, self.clock = 1000.0, [], Clock(lambda: self.time, self.wait, lambda: share)

    def wait(self, condition, seconds):
        self.waits.append(round(seconds, 6))
        self.time += seconds


# ------------------------------------------------------------------------------------------------- planted faults
def reset(handler, body):
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def hang(handler, body):
    handler.server.over.wait(5)


def trickle(handler, body):
    """A byte now and then: no single wait is long, and the answer never ends."""
    handler.send_response(200)
    handler.end_headers()
    while not handler.server.over.wait(0.02):
        handler.wfile.write(b" ")


def trickle_headers(handler, body):
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n")
    while not handler.server.over.wait(0.02):
        handler.wfile.write(b"X-A: 1\r\n")


def cut_off(handler, body):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"scores": [0.5')


def says(status, text, kind="application/json", **headers):
    return lambda handler, body: handler.reply(status, text, kind, **headers)


def instead(**fields):
    """The right answer, but for some fields."""
    return lambda handler, body: handler.reply(200, json.dumps({**handler.server.answer(body), **fields}))


def drop_one(handler, body):
    answer = handler.server.answer(body)
    handler.reply(200, json.dumps({**answer, "scores": answer["scores"][1:]}))


# What the server does, and what the error says where it never does anything else. "Away" is tried until the deadline.
AWAY = {
    "reset": (reset, "reset|RemoteDisconnected"),
    "hang": (hang, r"no whole answer in 0\.\d+ s"),
    "trickle": (trickle, r"no whole answer in 0\.\d+ s"),
    "trickle in the headers": (trickle_headers, r"no whole answer in 0\.\d+ s"),
    "cut off": (cut_off, "the answer was cut off"),
    "429": (says(429, "busy"), "status 429: busy"),
    "502": (says(502, "gateway"), "status 502: gateway"),
    "503": (says(503, "loading"), "status 503: loading"),
}
WRONG = {
    "500": (says(500, '{"error": "cuda"}'), 'status 500: {"error": "cuda"}'),
    "404": (says(404, "no such model"), "status 404: no such model"),
    "401": (says(401, "who?"), "status 401: who?"),
    "redirect": (says(302, "", Location="http://localhost:1/"), "status 302: redirects are not followed"),
    "truncated JSON": (says(200, '{"scores": [0.5'), r'not JSON: {"scores": \[0\.5'),
    "HTML": (says(200, "<html>Sign in\n</html>", "text/html"), "not JSON: <html>Sign in </html>"),
    "nothing": (says(200, ""), "not JSON"),
    "a list": (says(200, "[0.5]"), r"not a JSON object: \[0\.5\]"),
    "deep JSON": (says(200, "[" * 15_000), r"not JSON: \[\[\["),
    "not UTF-8": (lambda h, body: h.reply(200, "ok", "text/plain", X="y") or h.wfile.write(b"\xff"), "not JSON"),
    "oversized": (says(200, " " * 20_001), "an answer of more than 20000 bytes"),
    "another scorer": (instead(name="ocr"), "it serves the scorer 'ocr', not 'far'"),
    "another range": (instead(high=5), r"another range, 0 to 5, than at the start, 0\.0 to 1\.0"),
    "wrong count": (drop_one, r"prompts but scores of shape \(\d+,\)"),
    "NaN": (lambda h, body: h.reply(200, json.dumps({**HEALTH, "scores": [math.nan] * len(body["images"])})), "nan"),
    "out of range": (lambda h, b: h.reply(200, json.dumps({**HEALTH, "scores": [1.5] * len(b["images"])})), "1.5 is"),
    "strings": (instead(scores=["0.5"]), r"not all of the scores are numbers: \['0.5'\]"),
    "null": (instead(scores=[None, None]), r"not all of the scores are numbers: \[None, None\]"),
    "no scores": (says(200, json.dumps(HEALTH)), "KeyError.*over the answer"),
    "scores of no list": (instead(scores=7), "TypeError.*over the answer"),
}
SMALL, SLOW = FAST._replace(max_bytes=20_000), ("hang", "trickle", "trickle in the headers")


@pytest.mark.parametrize("name", [*AWAY, *WRONG])
def test_no_fault_that_passes_loses_or_moves_a_score(far, name):
    fault = (AWAY | WRONG)[name][0]
    server = far(lambda number, body: fault if number in (0, 1, 4) else None)
    images, prompts = batch(7)
    limits = SMALL._replace(timeout=0.2 if name in SLOW else 5.0, tries=4)  # all three may meet one request
    scorer = remote.served([server.url], "far", batch=2, limits=limits)
    assert torch.equal(scorer.score(images, prompts, None), own_levels(7))
    assert len(server.requests) == 4 + 3, "four requests, of which three had to be repeated"


@pytest.mark.parametrize("name", [*AWAY, *WRONG])
def test_a_fault_that_lasts_is_one_line_with_scorer_endpoint_prompt_and_cause(far, name):
    fault, cause = (AWAY | WRONG)[name]
    server = far(lambda number, body: fault)
    limits = SMALL._replace(deadline=5.0, rest=2.0, longest_rest=2.0, timeout=0.1 if name in SLOW else 5.0)
    scorer = remote.served([server.url], "far", limits=limits, clock=Fake().clock)
    images, prompts = batch(2)
    with pytest.raises(RewardError) as error:
        scorer.score(images, prompts, None)
    message = str(error.value)
    start = f"scorer 'far': no score for the prompt 'p0' and 1 more from {server.url}; last: "
    assert message.startswith(start) and re.search(cause, message), message
    assert "\n" not in message and len(message) < 3000
    if name in WRONG:
        assert len(server.requests) == limits.tries
    else:
        assert "5 s were not enough; http://" in message and len(server.requests) == 3, "at 0, 2 and 4 s"


@pytest.mark.parametrize("status", [400, 413, 415, 422])
def test_a_request_that_is_at_fault_itself_is_not_repeated(far, status):
    server = far(lambda number, body: says(status, '{"error": "images[0] is not a PNG"}'))
    scorer = remote.served([server.url], "far", limits=FAST)
    with pytest.raises(RewardError, match=rf"status {status}: .*images\[0\] is not a PNG"):
        scorer.score(*batch(1), None)
    assert len(server.requests) == 1


def test_a_refused_connection_is_tried_again_until_the_deadline(far, capsys):
    server, fake = far(), Fake()
    scorer = remote.served([server.url], "far", limits=FAST._replace(deadline=0.3), clock=fake.clock)
    server.stop()
    with pytest.raises(RewardError, match="0.3 s were not enough; .*ConnectionRefusedError"):
        scorer.score(*batch(1), None)
    assert fake.waits == [0.01, 0.02, 0.04, 0.05, 0.05, 0.05, 0.05]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 8, "each rest, and the one that would have outlasted the deadline"
    assert all(line.startswith(f"scorer 'far': {server.url} rests 0.") and "Refused" in line for line in told)


def test_a_try_that_the_deadline_cut_short_does_not_hide_what_was_wrong_before(far):
    server = far(lambda number, body: hang if number else says(503, "loading"))
    scorer = remote.served([server.url], "far", limits=FAST._replace(deadline=0.3))
    with pytest.raises(RewardError, match="0.3 s were not enough; .*status 503: loading"):
        scorer.score(*batch(1), None)
    assert len(server.requests) == 2


# --------------------------------------------------------------------------------------------- many, on many servers
def test_every_score_reaches_its_picture_whatever_the_order_of_the_answers(far):
    delays = [0.004 * i for i in range(24)]
    random.Random(0).shuffle(delays)
    finished = []

    def wait(number, body):
        (asked,) = body["prompts"]
        time.sleep(delays[int(asked["text"][1:])])
        finished.append(asked["text"])

    servers = [far(wait), far(wait), far(wait)]
    images, prompts = batch(24)
    scorer = remote.served([s.url for s in servers], "far", batch=1, limits=FAST._replace(concurrency=8))
    assert torch.equal(scorer.score(images, prompts, None), own_levels(24))
    assert sorted(finished) == sorted(p.text for p in prompts) and finished != [p.text for p in prompts]
    assert all(len(s.requests) >= 4 for s in servers), "each has its turns"


def test_no_more_requests_are_in_flight_than_allowed(far):
    server = far(lambda number, body: time.sleep(0.03))
    scorer = remote.served([server.url], "far", batch=1, limits=FAST._replace(concurrency=3))
    calls = [threading.Thread(target=scorer.score, args=(*batch(6), None)) for _ in range(2)]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    assert len(server.requests) == 12 and server.busiest == 3


def test_an_endpoint_that_dies_in_the_middle_is_done_without(far):
    first, second = far(), far()
    first.plan = lambda number, body: reset if number == 2 else None
    scorer = remote.served([first.url, second.url], "far", batch=1, limits=FAST._replace(rest=30.0, longest_rest=30.0))
    assert torch.equal(scorer.score(*batch(20), None), own_levels(20))
    assert len(first.requests) + len(second.requests) == 21 and 3 <= len(first.requests) <= 6
    assert torch.equal(scorer.score(*batch(5), None), own_levels(5))
    assert len(second.requests) > 19, "still resting"


def test_a_server_may_be_restarted_in_the_middle(far):
    again = []

    def die(number, body):
        if number == 3:
            threading.Thread(target=restart).start()
        return reset if number >= 3 else None

    def restart():
        first.stop()
        time.sleep(0.15)
        again.append(far(port=first.server_port))

    first = far(die)
    scorer = remote.served([first.url], "far", batch=1, limits=FAST)
    assert torch.equal(scorer.score(*batch(9), None), own_levels(9))
    assert len(again[0].requests) == 6


def test_a_rested_endpoint_is_tried_by_one_request_alone(far):
    """Without the trial every waiting request would rush to it, and hang there until its time is over."""
    arrivals = []

    def note(number, body):
        arrivals.append(time.monotonic())
        return hang

    good = far(lambda number, body: time.sleep(0.02))
    limits = FAST._replace(timeout=0.2, concurrency=6, rest=0.001, longest_rest=0.001)
    scorer = remote.served([good.url, far(note).url], "far", batch=1, limits=limits)
    assert torch.equal(scorer.score(*batch(90), None), own_levels(90))
    trials = [time for time in arrivals if time > arrivals[0] + 0.15]
    assert 1 <= len(arrivals) - len(trials) <= 3, "half of the first six"
    assert len(trials) >= 2 and all(b - a > 0.15 for a, b in zip(trials, trials[1:])), "then one at a time"


def test_a_failing_batch_ends_at_once_and_leaves_the_scorer_usable(far):
    bad = {"on": True}
    server = far(lambda number, body: says(400, "no") if bad["on"] and number == 5 else time.sleep(0.02))
    scorer = remote.served([server.url], "far", batch=1, limits=FAST._replace(concurrency=2))
    with pytest.raises(RewardError, match="status 400"):
        scorer.score(*batch(50), None)
    assert len(server.requests) < 12, "what had not begun is dropped"
    bad["on"] = False
    assert torch.equal(scorer.score(*batch(4), None), own_levels(4))


def test_a_failed_batch_leaves_no_request_waiting_behind_it(far):
    """p0 rests for 20 s with its endpoint when p1, which is at fault itself, ends the batch."""

    def plan(number, body):
        until(lambda: far_away.endpoints[0].busy == 2 or far_away.endpoints[0].failures)
        if body["text"] == "p0":
            return says(503, "", Retry_After="20")
        until(lambda: far_away.endpoints[0].failures)
        return says(400, "no")

    far_away = remote.Client("far", [far(plan).url], "", FAST._replace(deadline=30.0), remote.CLOCK)
    requests = [remote.Request("/score", lambda i=i: {"text": f"p{i}"}, dict, f"p{i}") for i in (0, 1)]
    with pytest.raises(RewardError, match="no score for p1 .*status 400"):
        far_away.ask_all(requests)
    start = time.monotonic()
    far_away.pool.shutdown(wait=True)
    assert time.monotonic() - start < 5


def until(condition):
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)


def test_of_several_failures_the_first_pictures_is_told(far):
    def refuse(number, body):
        time.sleep(0.0 if body["prompts"][0]["text"] == "p1" else 0.1)
        return says(400, "no") if body["prompts"][0]["text"] in ("p0", "p1") else None

    scorer = remote.served([far(refuse).url], "far", batch=1, limits=FAST)
    with pytest.raises(RewardError, match="the prompt 'p1'"):
        scorer.score(*batch(2), None)


def test_a_scorer_starts_when_the_first_of_its_endpoints_is_up(far):
    gone = far()
    gone.stop()
    server = far()
    scorer = remote.served([gone.url, server.url], "far", limits=FAST)
    assert (scorer.name, scorer.low, scorer.high) == ("far", 0.0, 1.0)
    server.health = HEALTH | {"low": None, "high": None}
    assert remote.served([server.url], "far", limits=FAST)[2:] == (-math.inf, math.inf)


def test_a_mixed_up_port_is_an_error_at_the_start(far):
    with pytest.raises(RewardError, match="no score for a start from .*it serves the scorer 'far', not 'ocr'"):
        remote.served([far().url], "ocr", limits=FAST)


def test_a_hanging_look_up_of_a_name_does_not_hold_the_run_beyond_the_deadline(far, monkeypatch):
    scorer = remote.served([far().url], "far", limits=FAST._replace(deadline=0.1))
    over = threading.Event()
    monkeypatch.setattr(remote, "exchange", lambda *_: over.wait(10))
    start = time.monotonic()
    with pytest.raises(RewardError, match="'p0'.*the deadline has passed"):
        scorer.score(*batch(1), None)
    over.set()
    assert time.monotonic() - start < 5


# ------------------------------------------------------------------------------------------------- rests and clocks
@pytest.mark.parametrize(("share", "part"), [(0.0, 1.0), (1.0, 0.5), (0.5, 0.75)])
def test_rests_double_up_to_the_longest_less_a_part_by_chance(far, share, part):
    fake, server = Fake(share), far(lambda number, body: says(503, "loading"))
    scorer = remote.served(
        [server.url], "far", limits=Limits(rest=2.0, longest_rest=10.0, deadline=40.0), clock=fake.clock
    )
    with pytest.raises(RewardError, match="40 s were not enough; .*status 503: loading"):
        scorer.score(*batch(1), None)
    expected = [part * rest for rest in (2, 4, 8, 10, 10, 10, 10, 10, 10, 10)]
    assert fake.waits == expected[: len(fake.waits)] and len(fake.waits) >= 4
    assert sum(expected[: len(fake.waits) + 1]) > 40 >= sum(fake.waits), "no rest that would outlast the deadline"
    assert len(server.requests) == len(fake.waits) + 1


def test_retry_after_is_honoured_and_shorter_than_the_rest_it_does_not_count(far):
    for after, waits in (("7", [7]), ("0", [1]), ("soon", [1]), (formatdate(time.time() + 3600, usegmt=True), [3600])):
        fake, fault = Fake(), says(429, "", Retry_After=after)
        server = far(lambda number, body, fault=fault: None if number else fault)
        scorer = remote.served([server.url], "far", limits=Limits(deadline=9000.0), clock=fake.clock)
        assert torch.equal(scorer.score(*batch(1), None), own_levels(1))
        assert fake.waits == pytest.approx(waits, abs=5 if waits[0] > 9 else 0)


def test_retry_after_in_seconds_or_as_a_date():
    assert remote.retry_after("12", 0.0) == 12 and remote.retry_after(" 3 ", 0.0) == 3
    assert remote.retry_after("Thu, 01 Jan 1970 00:01:40 GMT", 70.0) == 30
    assert remote.retry_after("Thu, 01 Jan 1970 00:01:40 GMT", 170.0) == 0, "a date that has passed"
    for odd in ("", "-5", "1e9", "nan", "9" * 40, "Thu, 99 Jan"):
        assert remote.retry_after(odd, 0.0) == 0


def test_a_wait_that_would_outlast_the_deadline_is_not_begun(far):
    fake, server = Fake(), far(lambda number, body: says(429, "", Retry_After="100"))
    scorer = remote.served([server.url], "far", limits=Limits(deadline=90.0), clock=fake.clock)
    with pytest.raises(RewardError, match="90 s were not enough"):
        scorer.score(*batch(1), None)
    assert fake.waits == [] and len(server.requests) == 1


def client(*urls, fake, **limits):
    return remote.Client("far", urls, "", Limits(**limits), fake.clock)


def test_requests_that_fail_together_are_one_failure():
    fake = Fake()
    far_away = client("http://a", fake=fake)
    taken = [far_away._take(2000.0, threading.Event(), None) for _ in range(5)]
    assert [probe for _, probe in taken] == [False] * 5
    for endpoint, probe in taken:
        far_away._give_back(endpoint, probe, remote.Fault("down"))
    (endpoint,) = far_away.endpoints
    assert (endpoint.failures, endpoint.wake, endpoint.busy) == (1, 1001.0, 0)


def test_an_answer_from_before_the_failure_does_not_end_the_rest_but_one_after_it_does():
    fake = Fake()
    far_away = client("http://a", fake=fake)
    (early, _), (broken, _) = (far_away._take(2000.0, threading.Event(), None) for _ in range(2))
    far_away._give_back(broken, False, remote.Fault("down"))
    far_away._give_back(early, False, None)
    assert early.failures == 1 and early.wake == 1001.0
    endpoint, probe = far_away._take(2000.0, threading.Event(), None)
    assert probe and fake.waits == [1.0]
    far_away._give_back(endpoint, probe, None)
    assert endpoint.failures == 0 and not far_away._take(2000.0, threading.Event(), None)[1]


def test_a_request_goes_elsewhere_after_a_failure_and_to_the_least_busy():
    far_away = client("http://a", "http://b", "http://c", fake=Fake())
    a, b, c = far_away.endpoints
    take = lambda avoid=None: far_away._take(2000.0, threading.Event(), avoid)[0]  # noqa: E731
    assert [take(), take(), take()] == [a, b, c]
    far_away._give_back(b, False, None)
    assert take() is b, "the others are busy"
    far_away._give_back(c, False, None)
    assert take(avoid=c) is a


def test_a_week_of_failures_does_not_overflow_the_rest():
    assert client("http://a", fake=Fake(), longest_rest=60.0)._rest(100_000) == 60.0


def test_jitter_leaves_the_global_random_state_alone():
    before = random.getstate()
    assert len({remote.CLOCK.chance() for _ in range(5)}) == 5
    assert random.getstate() == before


# ------------------------------------------------------------------------------------------------------- the secrets
def test_the_key_is_sent_and_never_shown(far, monkeypatch, capsys):
    monkeypatch.setenv("REWARD_TOKEN", " s3cr3t-key\n")
    wrong = [says(401, "unknown key s3cr3t-key"), instead(scores=["s3cr3t-key"])]
    server = far(lambda number, body: wrong[number % 2])
    scorer = remote.served([server.url], "far", key_env="REWARD_TOKEN", limits=FAST._replace(tries=4))
    with pytest.raises(RewardError, match=r"\[key\]") as error:
        scorer.score(*batch(1), None)
    assert [headers["Authorization"] for _, headers, _ in server.requests] == ["Bearer s3cr3t-key"] * 4
    shown = str(error.value) + capsys.readouterr().err + "".join(map(str, chain(error.value)))
    assert "s3cr3t" not in shown and "unknown key [key]" in shown


def chain(fault):
    """What a traceback would print besides."""
    while fault := fault.__cause__ or (None if fault.__suppress_context__ else fault.__context__):
        yield repr(fault)


def test_without_a_key_there_is_no_authorization(far, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-someone-else")
    server = far()
    remote.served([server.url], "far", limits=FAST).score(*batch(1), None)
    assert "Authorization" not in server.requests[0][1], "a reward server is not OpenAI"


def test_a_key_that_is_missing_or_malformed_is_named_by_its_variable(monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(RewardError, match="MY_KEY is not set"):
        remote.judge(["http://localhost:1/v1"], "vlm", "aesthetic", key_env="MY_KEY")
    for odd in ("two words", "line\nbreak", "sch\u00f6n"):
        monkeypatch.setenv("MY_KEY", odd)
        with pytest.raises(RewardError, match="MY_KEY holds blanks") as error:
            remote.read_key("MY_KEY", required=True)
        assert odd not in str(error.value)


@pytest.mark.parametrize("url", ["http://user:pw@host/v1", "https://key@host", "http://host/v1?key=pw", "http://h/#pw"])
def test_an_address_with_a_secret_in_it_is_refused_and_not_shown(url):
    with pytest.raises(RewardError, match="keys belong into the environment") as error:
        remote.parse_endpoint(url)
    assert "pw" not in str(error.value) and "key@" not in str(error.value)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://h:99999", "http://h:x", "http://[", 
                                 "http://h/a b", "file:///etc", "http://h\u0130" + "x" * 99])  # fmt: skip
def test_an_address_that_is_none_is_refused_in_one_line(url):
    with pytest.raises(RewardError, match="write it as http://HOST:PORT/v1") as error:
        remote.parse_endpoint(url)
    assert "\n" not in str(error.value)


def test_good_addresses_are_taken_apart():
    endpoint = remote.parse_endpoint("https://gpu-7.lab:8443/v1/")
    assert (endpoint.host, endpoint.port, endpoint.path) == ("gpu-7.lab", 8443, "/v1")
    assert endpoint.tls.check_hostname and remote.parse_endpoint("http://[::1]:80").tls is None


@pytest.mark.parametrize("endpoints", [[], "http://localhost:1", ["http://a", "http://a"]])
def test_a_scorer_wants_a_list_of_different_endpoints(endpoints):
    with pytest.raises(RewardError, match="scorer 'far': give a list of one or more different endpoints"):
        remote.served(endpoints, "far")


@pytest.mark.parametrize("field", Limits._fields)
def test_limits_are_positive_and_finite(field):
    for value in (0, -1, math.nan, math.inf):
        with pytest.raises(RewardError, match=f"scorer 'far': the limit {field} is {value}"):
            remote.served(["http://localhost:1"], "far", limits=FAST._replace(**{field: value}))


def test_proxies_of_the_environment_are_not_used(far, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://localhost:1")
    monkeypatch.delenv("no_proxy", raising=False)
    scorer = remote.served([far().url], "far", limits=FAST._replace(deadline=1.0))
    assert torch.equal(scorer.score(*batch(1), None), own_levels(1))


def test_a_redirect_is_not_followed(far):
    elsewhere = far()
    server = far(lambda number, body: says(307, "", Location=elsewhere.url + "/score"))
    scorer = remote.served([server.url], "far", limits=FAST)
    with pytest.raises(RewardError, match="redirects are not followed"):
        scorer.score(*batch(1), None)
    assert elsewhere.requests == []


def test_what_servers_say_cannot_steer_a_terminal(far):
    scorer = remote.served([far(lambda n, b: says(404, "\x1b[2J gone\r\n\x07")).url], "far", limits=FAST)
    with pytest.raises(RewardError, match=r"status 404: \[2J gone$"):
        scorer.score(*batch(1), None)


# ------------------------------------------------------------------------------------------------- what is asked
def test_prompts_metadata_and_sources_travel_with_their_pictures(far):
    server = far()
    images, _ = batch(3)
    sources = [torch.full((3, 2, 7), 0.2), torch.full((3, 4, 1), 0.4), torch.full((3, 1, 1), 0.6)]
    prompts = [prompt("a", tag="x"), prompt("b \u00e4 \u2028", include=[{"class": "dog", "count": 2}]), prompt("c")]
    remote.served([server.url], "far", batch=2, limits=FAST._replace(concurrency=1)).score(images, prompts, sources)
    asked = [p for _, _, body in server.requests for p in body["prompts"]]
    assert asked == [{"text": p.text, "task": p.task, "metadata": p.metadata} for p in prompts]
    sent = [Image.open(io.BytesIO(base64.b64decode(s))) for _, _, body in server.requests for s in body["sources"]]
    assert [(s.size, s.getpixel((0, 0))[0]) for s in sent] == [((7, 2), 51), ((1, 4), 102), ((1, 1), 153)]
    assert [len(body["images"]) for _, _, body in server.requests] == [2, 1]


def test_a_picture_of_8_bits_travels_without_loss():
    image = torch.randint(0, 256, (3, 6, 9), generator=torch.Generator().manual_seed(0)).float() / 255
    with Image.open(io.BytesIO(remote.png(image))) as picture:
        assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (9, 6))
        back = torch.tensor(list(picture.tobytes())).reshape(6, 9, 3).permute(2, 0, 1) / 255
    assert torch.equal(back, image)
    assert remote.png(torch.tensor([0.4, 0.6]).expand(3, 1, 2) / 255) == remote.png(
        torch.tensor([0.0, 1.0]).expand(3, 1, 2) / 255
    ), "rounded, not cut"


@pytest.mark.parametrize("value", [math.nan, -0.5, 1.5, math.inf])
def test_a_picture_that_is_none_is_refused_before_it_is_sent(far, value):
    server = far()
    scorer = remote.served([server.url], "far", limits=FAST)
    images, prompts = batch(3)
    images = images.clone()
    images[2, 1, 0, 0] = value
    with pytest.raises(RewardError, match="scorer 'far': an image .* for the prompt 'p2'"):
        scorer.score(images, prompts, None)
    with pytest.raises(RewardError, match="for the prompt 'p2'"):
        scorer.score(torch.zeros(3, 3, 2, 2), prompts, list(images))
    with pytest.raises(RewardError, match=r"of shape \(1, 2, 2\) is not \(3, H, W\)"):
        scorer.score(torch.zeros(3, 1, 2, 2), prompts, None)
    assert server.requests == []


def test_counts_that_do_not_match_are_refused(far):
    scorer = remote.served([far().url], "far", limits=FAST)
    images, prompts = batch(3)
    with pytest.raises(RewardError, match="scorer 'far': 2 images, 3 prompts"):
        scorer.score(images[:2], prompts, None)
    with pytest.raises(RewardError, match="3 images, 3 prompts, 1 sources"):
        scorer.score(images, prompts, [images[0]])
    assert scorer.score(images[:0], [], None).shape == (0,)


# ------------------------------------------------------------------------------------------------------- the judge
def chat(token="4", likely=(("4", -0.5), ("5", -1.5)), content=None):
    """A chat completion whose score token has these log-probs."""
    entries = [{"token": text, "logprob": lp, "bytes": None} for text, lp in likely]
    logprobs = {"content": [{"token": token, "logprob": -0.5, "top_logprobs": entries}]}
    choice = {"message": {"role": "assistant", "content": content or token}, "logprobs": logprobs}
    return {"choices": [choice | {"finish_reason": "stop"}]}


def looks(body):
    """A judge that rates a picture by its grey level, 1 to 5."""
    (url,) = [part["image_url"]["url"] for part in body["messages"][1]["content"] if part["type"] == "image_url"]
    picture = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    level = str(picture.getpixel((0, 0))[0])
    return chat(level, [(level, 0.0)])


def judge(server, rubric="aesthetic", **options):
    server.answer = options.pop("answer", looks)
    return remote.judge([server.url + "/v1"], "vlm-7b", rubric, limits=FAST, **options)


def test_a_judge_rates_each_picture_and_each_rating_finds_its_picture(far):
    server = far(lambda number, body: time.sleep(random.Random(number).random() / 30))
    scorer = judge(server)
    assert scorer[2:] == (0.2, 1.0) and scorer.name == "aesthetic"
    images = torch.tensor([3, 1, 5, 2, 4, 4, 1]).float()[:, None, None, None].expand(7, 3, 2, 2) / 255
    ratings = scorer.score(images, batch(7)[1], None)
    assert ratings.dtype == torch.float32
    assert ratings.tolist() == pytest.approx([0.6, 0.2, 1.0, 0.4, 0.8, 0.8, 0.2])


def test_a_judges_score_is_the_expectation_over_its_score_token(far):
    likely = [("4", math.log(0.5)), ("2", math.log(0.2)), (" 5", math.log(0.1)), ("The", math.log(0.1))]
    scorer = judge(far(), answer=lambda body: chat("4", likely))
    expected = (4 * 0.5 + 2 * 0.2 + 5 * 0.1) / 0.8 / 5
    assert scorer.score(*batch(1), None).item() == pytest.approx(expected)


def test_the_question_is_an_openai_chat_completion(far, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    server = far()
    images, _ = batch(1)
    judge(server, name="looks").score(images, [prompt("a dog")], None)
    ((path, headers, body),) = server.requests
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer sk-1"
    assert headers["Content-Type"] == "application/json"
    assert body.pop("messages") == judges.messages(judges.named("aesthetic"), "a dog", [images[0]])
    assert body == {"model": "vlm-7b", "temperature": 0, "max_tokens": 1, "logprobs": True, "top_logprobs": 20}


def test_a_written_rating_is_read_without_log_probs(far):
    monkey = "<Thought>fine</Thought><QualityScore>3</QualityScore><InstructionScore>5</InstructionScore>"
    text = monkey + "<OverallScore>4</OverallScore>"
    server = far()
    scorer = judge(server, "judge", answer=lambda body: {"choices": [{"message": {"content": text}}]}, name="fig6")
    assert scorer.name == "fig6" and scorer.score(*batch(2), None).tolist() == pytest.approx([0.8, 0.8])
    assert "logprobs" not in server.requests[0][2] and server.requests[0][2]["max_tokens"] > 500


def test_an_edit_is_judged_with_its_source_first(far):
    seen = []

    def answer(body):
        urls = [part["image_url"]["url"] for part in body["messages"][1]["content"] if part["type"] == "image_url"]
        pictures = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
        seen.append([picture.getpixel((0, 0))[0] for picture in pictures])
        return chat()

    images, prompts = batch(1)
    judge(far(), "editing", answer=answer).score(images, prompts, [torch.full((3, 2, 2), 0.2)])
    judge(far(), "aesthetic", answer=answer).score(images, prompts, [torch.full((3, 2, 2), 0.2)])
    assert seen == [[51, 1], [1]], "a rubric about the picture alone is not shown the source"
    with pytest.raises(RewardError, match="rubric 'editing' is about source and picture: 1 given"):
        judge(far(), "editing").score(images, prompts, None)


def test_the_log_probs_are_those_of_the_score_token():
    def token(text, *likely):
        return {"token": text, "top_logprobs": [{"token": t, "logprob": lp} for t, lp in likely]}

    thought = judges.named("alignment", thought=True)
    reply = [token("3", ("3", -0.1)), token(" dogs"), token(". Score:"), token(" 4", (" 4", -0.2), (" 5", -2.0))]
    assert remote.score_logprobs(thought, {"content": reply}) == {" 4": -0.2, " 5": -2.0}
    assert remote.score_logprobs(judges.named("alignment"), {"content": reply}) == {"3": -0.1}
    assert remote.score_logprobs(thought, {"content": reply[:2]}) is None
    for nothing in (None, {}, {"content": None}, {"content": []}):
        assert remote.score_logprobs(thought, nothing) is None
    assert remote.score_logprobs(judges.named("judge"), {"content": reply}) is None, "it asks for no score token"


def test_two_tokens_of_one_text_add_up():
    twice = {"content": [{"token": "4", "top_logprobs": [{"token": "4", "logprob": math.log(p)} for p in (0.3, 0.2)]}]}
    found = remote.score_logprobs(judges.named("alignment"), twice)
    assert found == {"4": pytest.approx(math.log(0.5))}


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (lambda body: chat("Nice", [("Nice", 0.0)], "Nice\npicture!"), "Nice picture!"),
        (lambda body: {"choices": []}, "IndexError.*over the answer"),
        (lambda body: {"error": "no"}, "KeyError.*over the answer"),
        (lambda body: {"choices": [{"message": {"content": None}}]}, "over the answer"),
        (lambda body: {"choices": [{"message": "4"}]}, "TypeError.*over the answer"),
        (lambda body: chat("4", [("4", math.nan)]), "no expectation"),
    ],
)
def test_a_reply_that_is_no_rating_is_asked_for_again_and_then_an_error(far, answer, cause):
    server = far()
    scorer = judge(server, answer=lambda body: looks(body) if len(server.requests) in (1, 3) else answer(body))
    images = torch.full((2, 3, 2, 2), 4 / 255)
    one = judge(server, answer=server.answer)
    assert one.score(images[:1], batch(1)[1], None).item() == pytest.approx(0.8)  # request 1
    assert scorer.score(images[:1], batch(1)[1], None).item() == pytest.approx(0.8)  # requests 2 and 3
    with pytest.raises(RewardError, match=f"scorer 'aesthetic': no score for the prompt 'p0' from .*{cause}") as error:
        scorer.score(images[:1], batch(1)[1], None)
    assert "\n" not in str(error.value) and len(server.requests) == 3 + FAST.tries


def test_a_rubric_of_ones_own_and_an_unknown_one(far):
    server = far()
    own = judges.named("aesthetic")._replace(name="own", user="Rate {prompt} from 1 to 5.")
    scorer = judge(server, own)
    scorer.score(torch.full((1, 3, 2, 2), 4 / 255), [prompt("a dog")], None)
    assert scorer.name == "own" and "Rate a dog from 1 to 5." in json.dumps(server.requests[0][2])
    with pytest.raises(RewardError, match="unknown rubric 'beauty'"):
        remote.judge([server.url], "vlm", "beauty")
