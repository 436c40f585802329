"""How does a far scorer answer reliably?

Q §4.1 keeps its reward models behind remote API services. Two kinds of them are `rewards.Scorer`s here:

    judge    a vision-language model behind an OpenAI-style API (what vLLM and SGLang serve)    Q §3, F Fig. 6
             POST {endpoint}/chat/completions, pictures as data URLs; `rubrics.py` words and reads it
    served   any scorer of this project on another machine                                      `reward_server.py`
             POST {endpoint}/score, pictures as base64 PNG; GET {endpoint}/health says what is served there

A week's run meets every fault there is, and none may become a score or a score of another picture. Samples are
asked about in any order, but each answer goes back into its sample's place, and is checked before that. Endpoints take
turns. One that fails is rested, twice as long each time, and then tried by one request alone, while the others work on:

    what came back                                           the endpoint rests   the request is tried again
    nothing: refused, reset, cut off, too slow; 408, 425,    yes, as long as      until the batch's deadline: servers
      429, 502, 503, 504                                     Retry-After says     are restarted, and then load weights
    no answer: 401, 404, 500, a redirect, HTML, half a       yes                  `tries` times
      JSON, a body too long, another scorer
    no score: unreadable, wrong count, NaN, out of range     no                   `tries` times, elsewhere if possible
    400, 413, 415, 422: the request is at fault              no                   never

What fails for good is a `rewards.RewardError`: one line with scorer, prompt, endpoints and the last cause.

What is never done: following a redirect, asking through a proxy (http.client knows none), reading more than
`max_bytes`, taking a key from anywhere but the environment, or showing it. Pictures travel as 8-bit PNG, so a far
score may differ from a near one by what a rounding of 1/510 does to it.
"""

import base64
import email.utils
import http.client
import io
import itertools
import json
import math
import os
import random
import re
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple
from urllib.parse import urlsplit

import torch

from data.files import Prompt
from data.pictures import to_picture
from rewards import HIGHEST_RATING, LOWEST_RATING, RewardError, Scorer, check_scores
from scorers import rubrics as judges

KEY_ENV = "OPENAI_API_KEY"
TOP_LOGPROBS = 20  # the most that the API gives; all five score tokens are nearly always among them
AWAY = (408, 425, 429, 502, 503, 504)  # of these, HTTP itself says that they pass
AT_FAULT = (400, 413, 415, 422)  # the same request would get the same answer anywhere
EXCERPT = 2000  # characters of a cause in a message: a judge's whole reply, not a whole web page


class Limits(NamedTuple):
    """What a scorer may take: seconds, tries, requests in flight and bytes."""

    timeout: float = 120.0  # one request, from the connection to the last byte
    deadline: float = 900.0  # a whole batch with all its tries and rests: a server may restart meanwhile
    tries: int = 6  # answers that are no score, of one request; with the rests below that takes half a minute
    rest: float = 1.0  # an endpoint that failed is left alone so long, doubled each time ...
    longest_rest: float = 60.0  # ... up to this
    concurrency: int = 16  # requests in flight, over all endpoints and batches
    max_bytes: int = 4 << 20  # of an answer


class Clock(NamedTuple):
    """Time and chance, which tests replace."""

    now: Callable[[], float] = time.monotonic
    wait: Callable = threading.Condition.wait  # (condition, seconds)
    chance: Callable[[], float] = random.Random().random  # in [0, 1); its own, so that no run's seed is touched


LIMITS, CLOCK = Limits(), Clock()


class Fault(Exception):
    """Why one try gave no score, and what follows from it; see the table above."""

    def __init__(self, cause: str, rests: bool = True, counts: bool = True, final: bool = False, after: float = 0.0):
        printable = "".join(c if c.isprintable() else " " for c in cause[:EXCERPT])  # it comes from anywhere
        super().__init__(" ".join(printable.split()))
        self.rests, self.counts, self.final, self.after = rests, counts, final, after


class Request(NamedTuple):
    """One question: `body` makes the JSON (None: a GET), `read` makes the result or raises, `about` names a prompt."""

    path: str
    body: Callable[[], dict] | None
    read: Callable[[dict], object]
    about: str


@dataclass
class Endpoint:
    """One server and how it has been doing; changed under the client's lock only."""

    url: str
    tls: ssl.SSLContext | None  # None: plain HTTP
    host: str
    port: int | None
    path: str
    busy: int = 0  # requests in flight
    turn: int = 0  # when it was last asked
    failures: int = 0  # since it last answered
    wake: float = -math.inf  # it rests until then
    probing: bool = False  # after a rest one request tries it, so that the others are not held up by it again


# ---------------------------------------------------------------------------------------------- one HTTP exchange
def exchange(endpoint: Endpoint, request: Request, body: bytes | None, key: str, timeout: float, max_bytes: int):
    """One request on a connection of its own -> (status, headers, body); a `Fault` where no whole answer came.

    A kept connection would be stale after a restart, just when it matters. A socket's own time-out counts from byte to
    byte, so a server that trickles would never be too slow: a timer cuts the connection when the time is over.
    """
    kind = partial(http.client.HTTPSConnection, context=endpoint.tls) if endpoint.tls else http.client.HTTPConnection
    connection, start, late = kind(endpoint.host, endpoint.port, timeout=timeout), time.monotonic(), threading.Event()
    headers = {"Accept": "application/json", "User-Agent": "minopd"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    headers |= {"Content-Type": "application/json"} if body else {}
    timer = None
    try:
        connection.connect()
        timer = threading.Timer(timeout - (time.monotonic() - start), _cut, [connection.sock, late])
        timer.daemon = True
        timer.start()
        with suppress(BrokenPipeError, ConnectionResetError):  # refused before all was sent: the reason may be there
            connection.request("POST" if body else "GET", endpoint.path + request.path, body, headers)
        answer = connection.getresponse()
        received = answer.read(max_bytes + 1)
        if len(received) > max_bytes:
            raise Fault(f"an answer of more than {max_bytes} bytes")
        if late.is_set() or answer.length:  # http.client does not tell an end from a cut
            raise ConnectionError("the answer was cut off")
        return answer.status, answer.headers, received
    except (OSError, http.client.HTTPException) as fault:
        if late.is_set() or isinstance(fault, TimeoutError):
            raise Fault(f"no whole answer in {timeout:.3g} s", counts=False) from None
        # A name or a certificate that is wrong now will hardly be right before the deadline.
        lasting = isinstance(fault, (socket.gaierror, ssl.SSLCertVerificationError))
        raise Fault(f"{type(fault).__name__}: {fault}", counts=lasting) from None
    finally:
        if timer:
            timer.cancel()
        connection.close()


def _cut(sock: socket.socket, late: threading.Event) -> None:
    late.set()
    with suppress(OSError):  # it may have ended in this very moment
        sock.shutdown(socket.SHUT_RDWR)


def open_answer(status: int, headers: Mapping[str, str], body: bytes) -> dict:
    """The JSON object of an answer, or the `Fault` that its status, or whatever came instead of JSON, stands for."""
    shown = body.decode("utf-8", "replace")
    if status in AWAY:
        after = retry_after(headers.get("Retry-After", ""), time.time())
        raise Fault(f"status {status}: {shown}", counts=False, after=after)
    if status in AT_FAULT:
        raise Fault(f"status {status}: {shown}", rests=False, final=True)
    if 300 <= status < 400:
        raise Fault(f"status {status}: redirects are not followed; give the address where it leads")
    if status != 200:
        raise Fault(f"status {status}: {shown}")
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        raise Fault(f"not JSON: {shown}") from None
    if not isinstance(answer, dict):
        raise Fault(f"not a JSON object: {shown}")
    return answer


def retry_after(value: str, now: float) -> float:
    """Seconds that a Retry-After header asks for, at least 0: a number or a date, `now` in seconds since 1970."""
    if re.fullmatch("[0-9]{1,9}", value.strip()):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now)
    except (TypeError, ValueError, OverflowError):
        return 0.0  # absent or unreadable: the usual rest


# ------------------------------------------------------------------------------------------- many, on many servers
def parse_endpoint(url: str) -> Endpoint:
    """An address such as http://gpu-7:8000/v1, checked; RewardError, one line, where requests could not work."""
    if set(url) & set("@?#"):  # and the address is not shown: these are where people put secrets
        raise RewardError("an endpoint's address has a user, a query or a fragment; keys belong into the environment")
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").encode("idna").decode(), parts.port
    except ValueError as fault:  # of the port, a bracket or the name
        raise RewardError(f"endpoint {url!r}: {fault}; write it as http://HOST:PORT/v1") from None
    if parts.scheme not in ("http", "https") or not re.fullmatch("[!-~]+", host + parts.path) or not host:
        raise RewardError(f"endpoint {url!r}: write it as http://HOST:PORT/v1 or https://HOST/v1")
    tls = ssl.create_default_context() if parts.scheme == "https" else None
    return Endpoint(url, tls, host, port, parts.path.rstrip("/"))


def read_key(variable: str, required: bool) -> str:
    """The key in an environment variable, "" where it is unset and not required; no message ever shows it."""
    key = os.environ.get(variable, "").strip()
    if required and not key:
        raise RewardError(f"the environment variable {variable} is not set; put the API key into it")
    if not re.fullmatch("[!-~]*", key):
        raise RewardError(f"the environment variable {variable} holds blanks or letters that no API key has")
    return key


class Client:
    """Asks several endpoints many things at once, and gives every answer to the one who asked."""

    def __init__(self, name: str, endpoints: Sequence[str], key: str, limits: Limits, clock: Clock):
        if isinstance(endpoints, str) or not endpoints or len(set(endpoints)) < len(endpoints):
            raise RewardError(f"scorer {name!r}: give a list of one or more different endpoints, not {endpoints!r}")
        for field, value in limits._asdict().items():
            if not 0 < value < math.inf:
                raise RewardError(f"scorer {name!r}: the limit {field} is {value}; it must be positive and finite")
        self.name, self.key, self.limits, self.clock = name, key, limits, clock
        self.endpoints = [parse_endpoint(url) for url in endpoints]
        self.changed, self.turns = threading.Condition(), itertools.count(1)
        self.pool = ThreadPoolExecutor(limits.concurrency, f"scorer-{name}")

    def ask_all(self, requests: Sequence[Request]) -> list:
        """The results in the order of the requests; RewardError of the first that fails for good, which ends all."""
        deadline, stop = self.clock.now() + self.limits.deadline, threading.Event()
        futures = [self.pool.submit(self._ask, request, deadline, stop) for request in requests]
        try:
            # The requests keep to the deadline by themselves, but not where the system's look-up of a name hangs.
            wait(futures, self.limits.deadline + 1, FIRST_EXCEPTION)
            for future in futures:
                if future.done():
                    future.result()
            for request, future in zip(requests, futures, strict=True):
                if not future.done():
                    raise self._failure(request, "the deadline has passed")
            return [future.result() for future in futures]
        finally:
            stop.set()
            for future in futures:
                future.cancel()
            with self.changed:
                self.changed.notify_all()

    def _ask(self, request: Request, deadline: float, stop: threading.Event):
        """One result, after as many tries as it takes; RewardError where they are used up."""
        body = json.dumps(request.body()).encode() if request.body else None
        tries, endpoint, last = 0, None, ""
        while True:
            endpoint, probe = self._take(deadline, stop, endpoint)
            if endpoint is None:
                why = last or "every endpoint is resting"
                raise self._failure(request, f"{self.limits.deadline:g} s were not enough; {why}")
            result, fault = self._try(endpoint, request, body, deadline)
            self._give_back(endpoint, probe, fault)
            if fault is None:
                return result
            tries += fault.counts
            if fault.counts or not last or self.clock.now() < deadline:  # a try that the deadline cut short says little
                last = self._hide(f"{endpoint.url}: {fault}")
            if fault.final or tries >= self.limits.tries:
                raise self._failure(request, last)

    def _try(self, endpoint: Endpoint, request: Request, body: bytes | None, deadline: float):
        """(result, None) or (None, fault)."""
        timeout = max(min(self.limits.timeout, deadline - self.clock.now()), 0.001)
        answer = None
        try:
            answer = open_answer(*exchange(endpoint, request, body, self.key, timeout, self.limits.max_bytes))
            return request.read(answer), None
        except Fault as fault:
            return None, fault
        except RewardError as fault:
            return None, Fault(str(fault), rests=False)
        except Exception as fault:  # most likely other JSON than the API's; whatever it is, the endpoint goes back
            return None, Fault(f"{fault!r} over the answer {json.dumps(answer)}", rests=False)

    def _take(self, deadline: float, stop: threading.Event, avoid: Endpoint | None):
        """(endpoint to ask, whether it is on trial), or (None, False) where none wakes up before the deadline.

        The least busy of those awake, in turns; `avoid`, which has just failed this request, only for want of another.
        """
        with self.changed:
            while True:
                now = self.clock.now()
                free = [e for e in self.endpoints if e.wake <= now and not e.probing]
                if now >= deadline or stop.is_set():
                    return None, False
                if free:
                    endpoint = min(free, key=lambda e: (e is avoid, e.busy, e.turn))
                    endpoint.busy, endpoint.turn = endpoint.busy + 1, next(self.turns)
                    endpoint.probing = endpoint.failures > 0
                    return endpoint, endpoint.probing
                tried = any(e.probing for e in self.endpoints)  # its answer may come any moment, and wakes us
                next_up = min((e.wake for e in self.endpoints if e.wake > now), default=deadline)
                if next_up > deadline and not tried:
                    return None, False
                self.clock.wait(self.changed, min(next_up, deadline) - now)

    def _give_back(self, endpoint: Endpoint, probe: bool, fault: Fault | None) -> None:
        """Note how it went, and let those who wait for an endpoint look again."""
        with self.changed:
            now = self.clock.now()
            endpoint.busy -= 1
            endpoint.probing = endpoint.probing and not probe
            awake = endpoint.wake <= now
            if fault is None or not fault.rests:
                if awake:  # else an answer from before it failed: no news
                    endpoint.failures = 0
            else:
                if awake:  # else it rests already: requests that fail together are one failure
                    endpoint.failures += 1
                    endpoint.wake = now + self._rest(endpoint.failures)
                endpoint.wake = max(endpoint.wake, now + fault.after)
                if awake:
                    told = self._hide(f"{endpoint.url} rests {endpoint.wake - now:.1f} s: {fault}")
                    print(f"scorer {self.name!r}: {told[:300]}", file=sys.stderr, flush=True)
            self.changed.notify_all()

    def _rest(self, failures: int) -> float:
        """rest, 2 rest, 4 rest ... up to longest_rest, less up to half of it by chance, so that clients spread out."""
        whole = min(self.limits.longest_rest, self.limits.rest * 2.0 ** min(failures - 1, 60))
        return whole * (1 - self.clock.chance() / 2)

    def _failure(self, request: Request, cause: str) -> RewardError:
        shown = ", ".join(e.url for e in self.endpoints)
        return RewardError(f"scorer {self.name!r}: no score for {request.about} from {shown}; last: {cause}")

    def _hide(self, text: str) -> str:
        """Without the key: some servers repeat it in what they answer."""
        return text.replace(self.key, "[key]") if self.key else text


# --------------------------------------------------------------------------------------------------- the scorers
def judge(
    endpoints: Sequence[str],
    model: str,
    rubric: str | judges.Rubric,
    name: str = "",
    thought: bool = False,
    key_env: str = KEY_ENV,
    limits: Limits = LIMITS,
    clock: Clock = CLOCK,
) -> Scorer:
    """A vision-language model as a judge, over the OpenAI-style chat API. Q §3, Eq. 12; F App. A, Fig. 6.

    endpoints: such as http://gpu-7:8000/v1; model: as the server calls it; rubric: what is asked, and by `thought`
    whether reasoning comes first, as in `rubrics.named`; name: the rubric's own, unless given. Scores lie in [0.2, 1].
    One request a picture. The key is what the variable `key_env` holds; the default one may be unset, for servers that
    need none. RewardError, one line, for what cannot work.
    """
    asked = judges.named(rubric, thought) if isinstance(rubric, str) else rubric
    name, low, high = name or asked.name, LOWEST_RATING / HIGHEST_RATING, 1.0
    client = Client(name, endpoints, read_key(key_env, required=key_env != KEY_ENV), limits, clock)

    def body(prompt: Prompt, pictures: Sequence[torch.Tensor]) -> dict:
        question = {"model": model, "messages": judges.messages(asked, prompt.text, pictures)}
        question |= {"temperature": 0, "max_tokens": asked.max_tokens}
        return question | ({"logprobs": True, "top_logprobs": TOP_LOGPROBS} if asked.ask in judges.SCALES else {})

    def read(prompt: Prompt, answer: dict) -> float:
        choice = answer["choices"][0]
        rating = judges.read(asked, choice["message"]["content"], score_logprobs(asked, choice.get("logprobs")))
        return float(check_scores(name, [rating], [prompt.text], low, high)[0])

    def score(images: torch.Tensor, prompts: Sequence[Prompt], sources: Sequence | None = None) -> torch.Tensor:
        _check_batch(name, images, prompts, sources)
        requests = []
        for b, prompt in enumerate(prompts):
            make = partial(body, prompt, [images[b]] if sources is None else [sources[b], images[b]])
            requests.append(Request("/chat/completions", make, partial(read, prompt), f"the prompt {prompt.text!r}"))
        return torch.tensor(client.ask_all(requests), dtype=torch.float32)

    return Scorer(name, score, low, high)


def score_logprobs(rubric: judges.Rubric, logprobs: dict | None) -> dict[str, float] | None:
    """{token text: log-prob} at the score token of a reply, from the API's form; None where there is no such token."""
    tokens = (logprobs or {}).get("content") or []
    index = judges.score_token(rubric, [token["token"] for token in tokens]) if rubric.ask in judges.SCALES else None
    if index is None:
        return None
    found: dict[str, list[float]] = {}
    for entry in tokens[index]["top_logprobs"]:  # two tokens may have one text, and then both say it
        found.setdefault(entry["token"], []).append(entry["logprob"])
    return {text: torch.tensor(alike, dtype=torch.float64).logsumexp(0).item() for text, alike in found.items()}


def served(
    endpoints: Sequence[str],
    scorer: str,
    batch: int = 8,
    key_env: str = "",
    limits: Limits = LIMITS,
    clock: Clock = CLOCK,
) -> Scorer:
    """A scorer behind `reward_server.py`, with the name and range that the server tells. Q §4.1.

    endpoints: such as http://gpu-7:9000; all must serve the scorer of that name, so that a mixed-up port is an
    error and not another reward; batch: pictures a request; key_env: the variable that holds the servers' token,
    "" for none. Waits for the first of them to be up, at most the deadline. RewardError, one line, if it cannot work.
    """
    name = scorer
    client = Client(name, endpoints, read_key(key_env, True) if key_env else "", limits, clock)
    low, high = client.ask_all([Request("/health", None, partial(_read_health, name), "a start")])[0]

    def body(images: torch.Tensor, prompts: Sequence[Prompt], sources: Sequence | None) -> dict:
        asked = [{"text": p.text, "task": p.task, "metadata": p.metadata} for p in prompts]
        before = None if sources is None else [_base64(source) for source in sources]
        return {"images": [_base64(image) for image in images], "prompts": asked, "sources": before}

    def read(prompts: Sequence[Prompt], answer: dict) -> list[float]:
        if _read_health(name, answer) != (low, high):
            raise Fault(f"another range, {answer['low']} to {answer['high']}, than at the start, {low} to {high}")
        if not all(type(score) in (int, float) for score in answer["scores"]):
            raise RewardError(f"not all of the scores are numbers: {answer['scores']}")
        return check_scores(name, answer["scores"], [p.text for p in prompts], low, high).tolist()

    def score(images: torch.Tensor, prompts: Sequence[Prompt], sources: Sequence | None = None) -> torch.Tensor:
        _check_batch(name, images, prompts, sources)
        requests = []
        for first in range(0, len(prompts), batch):
            rows = slice(first, first + batch)
            some, before = prompts[rows], None if sources is None else sources[rows]
            about = f"the prompt {some[0].text!r}" + (f" and {len(some) - 1} more" if len(some) > 1 else "")
            requests.append(Request("/score", partial(body, images[rows], some, before), partial(read, some), about))
        return torch.tensor([s for part in client.ask_all(requests) for s in part], dtype=torch.float32)

    return Scorer(name, score, low, high)


def _read_health(name: str, answer: dict) -> tuple[float, float]:
    """The served scorer's range; JSON has no infinity, so an open end is null."""
    if answer["name"] != name:
        raise Fault(f"it serves the scorer {answer['name']!r}, not {name!r}")
    low, high = answer["low"], answer["high"]
    return -math.inf if low is None else float(low), math.inf if high is None else float(high)


def _check_batch(name: str, images: torch.Tensor, prompts: Sequence[Prompt], sources: Sequence | None) -> None:
    """RewardError unless there is one picture, and one source if any, a prompt, all with pixels in [0, 1]."""
    before = [] if sources is None else sources
    if len(images) != len(prompts) or (sources is not None and len(before) != len(prompts)):
        raise RewardError(f"scorer {name!r}: {len(images)} images, {len(prompts)} prompts, {len(before)} sources")
    for image, prompt in zip((*images, *before), (*prompts, *prompts), strict=False):
        if image.ndim != 3 or image.shape[0] != 3 or not bool(((image >= -1e-3) & (image <= 1 + 1e-3)).all()):
            form = f"of shape {tuple(image.shape)} is not (3, H, W) with values from 0 to 1"
            raise RewardError(f"scorer {name!r}: an image {form}, for the prompt {prompt.text!r}")


def png(image: torch.Tensor) -> bytes:
    """(3, H, W) in [0, 1] -> an 8-bit PNG, lightly packed: a rollout makes thousands, and they travel no further."""
    stream = io.BytesIO()
    to_picture(image).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def _base64(image: torch.Tensor) -> str:
    return base64.b64encode(png(image)).decode()
