"""Scorers on other machines: a judge behind an OpenAI-style API, and any scorer that serve.py serves. Q §4.1.

A run of a week meets every fault there is, and none may become a score, or the score of another picture. Endpoints are
asked in turns, and each answer is checked and put into its sample's place. An endpoint that failed rests, twice as long
each time, and then one request alone tries it again.

    what came back                                           the endpoint rests   the request is tried again
    nothing: refused, reset, cut off, too slow; 408, 425,    yes, as long as      until the batch's deadline: servers
      429, 502, 503, 504                                     Retry-After says     are restarted, and then load weights
    no answer: 401, 404, 500, a redirect, HTML, half a       yes                  `tries` times
      JSON, a body too long, another scorer
    no score: unreadable, wrong count, NaN, out of range     no                   `tries` times, elsewhere if possible
    400, 413, 415, 422: the request is at fault              no                   never

The first request that fails for good ends its batch with a `rewards.RewardError`: one line with scorer, prompt,
endpoints and the last cause. Redirects and the environment's proxies are not followed. A key comes from the environment
only, and is hidden in every message. Pictures travel as 8-bit PNG: a far score may differ from a near one by what
a rounding of 1/510 does to it.
"""

import asyncio
import email.utils
import functools
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
from dataclasses import dataclass
from typing import NamedTuple

import httpx2
import torch

from data.files import Prompt
from data.pictures import png, to_picture
from rewards import HIGHEST_RATING, LOWEST_RATING, RewardError, Scorer, check_scores
from scorers import rubrics

KEY_ENV = "OPENAI_API_KEY"
TOP_LOGPROBS = 20  # the most that the API gives; all five score tokens are nearly always among them
AWAY = (408, 425, 429, 502, 503, 504)  # HTTP itself says that these pass
AT_FAULT = (400, 413, 415, 422)  # the same request would get the same answer anywhere
EXCERPT = 2000  # characters of a cause in a message: a judge's whole reply, not a whole web page
CHANCE = random.Random()  # its own, so that no run's seed is touched


class Limits(NamedTuple):
    """What a scorer may take: seconds, tries, requests in flight and bytes."""

    timeout: float = 120.0  # one request, from the connection to the last byte
    deadline: float = 900.0  # a whole batch with all its tries and rests: a server may restart meanwhile
    tries: int = 6  # answers that are no score, of one request; with the rests below that takes half a minute
    rest: float = 1.0  # an endpoint that failed rests so long, doubled each time ...
    longest_rest: float = 60.0  # ... up to this
    concurrency: int = 16  # requests in flight, over all endpoints and batches
    max_bytes: int = 4 << 20  # of an answer


LIMITS = Limits()


class Fault(Exception):
    """Why one try gave no score. It rests the endpoint, for `after` seconds at least, and counts as so many tries."""

    def __init__(self, cause: str, rests: bool = True, counts: float = 1, after: float = 0.0):
        super().__init__(cause)
        self.rests, self.counts, self.after = rests, counts, after


class Request(NamedTuple):
    """One question: `body` makes the JSON (None: a GET), `read` makes the result or raises, `about` names a prompt."""

    path: str
    body: Callable[[], dict] | None
    read: Callable[[dict], object]
    about: str


@dataclass
class Endpoint:
    """One server and how it has been doing."""

    url: str
    busy: int = 0  # requests in flight
    turn: int = 0  # when it was last asked
    failures: int = 0  # since it last answered
    failed: float = -math.inf  # when it last failed
    wake: float = -math.inf  # it rests until then
    on_trial: bool = False  # after a rest one request tries it, so that the others do not wait for it again


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """The one event loop of all clients. Its thread is a daemon: a run that ends does not wait for a far judge."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="far scorers", daemon=True).start()
    return loop


class Client:
    """Asks several endpoints many things at once, and gives every answer to the one who asked."""

    def __init__(self, name: str, endpoints: Sequence[str], key: str, limits: Limits):
        if isinstance(endpoints, str) or not endpoints or len(set(endpoints)) < len(endpoints):
            raise RewardError(f"scorer {name!r}: give a list of one or more different endpoints, not {endpoints!r}")
        if not all(0 < value < math.inf for value in limits):
            raise RewardError(f"scorer {name!r}: limits must be positive and finite, not {limits}")
        self.name, self.limits = name, limits
        self.endpoints = [Endpoint(check_url(url)) for url in endpoints]
        self.turns, self.places = itertools.count(1), asyncio.Semaphore(limits.concurrency)
        # A server may repeat the key in what it answers, and JSON may put backslashes between its characters.
        self.secret = re.compile(r"\\*".join(map(re.escape, key))) if key else None
        # No connection is kept: it would be stale after a restart, just when it matters. An answer comes as it is, not
        # compressed, so that its bytes can be bounded.
        headers = {"Accept-Encoding": "identity", "Connection": "close", "Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        unkept = httpx2.Limits(max_keepalive_connections=0)
        tls = ssl.create_default_context()
        self.http = httpx2.AsyncClient(headers=headers, verify=tls, trust_env=False, timeout=None, limits=unkept)

    def ask_all(self, requests: Sequence[Request]) -> list:
        """The results in the order of the requests; RewardError of the first that fails for good, which ends all."""
        batch = asyncio.run_coroutine_threadsafe(self._ask_all(requests), _loop())
        try:
            return batch.result()
        finally:
            batch.cancel()  # after an interrupt nothing goes on behind it

    async def _ask_all(self, requests: Sequence[Request]) -> list:
        deadline = time.monotonic() + self.limits.deadline
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._ask(request, deadline)) for request in requests]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _ask(self, request: Request, deadline: float):
        """One result, after as many tries as it takes; RewardError if they are used up or the time is over."""
        tries, endpoint, last = 0, None, "no endpoint was free"
        try:
            async with asyncio.timeout(deadline - time.monotonic()), self.places:
                body = json.dumps(await asyncio.to_thread(request.body)).encode() if request.body else None
                while tries < self.limits.tries:
                    endpoint = await self._take(deadline, endpoint)
                    result, fault = await self._try(endpoint, request, body)
                    if fault is None:
                        return result
                    tries, last = tries + fault.counts, self._shown(f"{endpoint.url}: {fault}", EXCERPT)
        except TimeoutError:
            last = f"{self.limits.deadline:g} s were not enough; {last}"
        where = ", ".join(e.url for e in self.endpoints)
        raise RewardError(f"scorer {self.name!r}: no score for {request.about} from {where}; last: {last}")

    async def _take(self, deadline: float, avoid: Endpoint | None) -> Endpoint:
        """The least busy of the endpoints that are awake, in turns; TimeoutError if all rest beyond the deadline.

        `avoid`, which has just failed this request, is taken only if there is no other.
        """
        while not (free := [e for e in self.endpoints if e.wake <= time.monotonic() and not e.on_trial]):
            if min(e.wake for e in self.endpoints) > deadline:
                raise TimeoutError
            await asyncio.sleep(0.02)
        endpoint = min(free, key=lambda e: (e is avoid, e.busy, e.turn))
        endpoint.busy, endpoint.turn = endpoint.busy + 1, next(self.turns)
        endpoint.on_trial = endpoint.failures > 0
        return endpoint

    async def _try(self, endpoint: Endpoint, request: Request, body: bytes | None):
        """(result, None) or (None, fault) of an endpoint that was taken, which is given back with a rest if it failed.

        What was asked before the last failure is no news: requests that fail together are one failure.
        """
        began, trial = time.monotonic(), endpoint.on_trial
        text, result, fault = b"", None, None
        try:
            status, headers, text = await self._exchange(endpoint.url + request.path, body)
            result = request.read(open_answer(status, headers, text))
        except Fault as found:
            fault = found
        except RewardError as found:
            fault = Fault(str(found), rests=False)
        except Exception as found:  # most likely other JSON than the API's
            fault = Fault(f"{found!r} over the answer {text.decode('utf-8', 'replace')}", rests=False)
        finally:
            endpoint.busy -= 1
            endpoint.on_trial = endpoint.on_trial and not trial
        now, news = time.monotonic(), began >= endpoint.failed
        if fault is not None and fault.rests:
            endpoint.wake = max(endpoint.wake, now + fault.after)
            if news:
                endpoint.failures, endpoint.failed = endpoint.failures + 1, now
                endpoint.wake = max(endpoint.wake, now + rest(self.limits, endpoint.failures))
                told = self._shown(f"{endpoint.url} rests {endpoint.wake - now:.1f} s: {fault}", 300)
                print(f"scorer {self.name!r}: {told}", file=sys.stderr, flush=True)
        elif news:
            endpoint.failures = 0
        return result, fault

    async def _exchange(self, url: str, body: bytes | None) -> tuple[int, Mapping[str, str], bytes]:
        """(status, headers, body) of a whole answer, or a Fault. The time counts from the connection to the last byte,
        because a server that trickles would never be too slow from byte to byte."""
        received = bytearray()
        try:
            exchange = self.http.stream("POST" if body else "GET", url, content=body)
            async with asyncio.timeout(self.limits.timeout), exchange as response:
                async for part in response.aiter_raw():
                    received += part
                    if len(received) > self.limits.max_bytes:
                        raise Fault(f"an answer of more than {self.limits.max_bytes} bytes")
        except TimeoutError:
            raise Fault(f"no whole answer in {self.limits.timeout:.3g} s", counts=0) from None
        except httpx2.HTTPError as fault:
            while below := fault.__cause__ or fault.__context__ or next(iter(getattr(fault, "exceptions", ())), None):
                fault = below  # what began the chain: the library's own says that all connection attempts failed
            # A name or a certificate that is wrong now will hardly be right before the deadline.
            lasting = isinstance(fault, (socket.gaierror, ssl.SSLCertVerificationError))
            raise Fault(f"{type(fault).__name__}: {fault}", counts=float(lasting)) from None
        return response.status_code, response.headers, bytes(received)

    def _shown(self, text: str, length: int) -> str:
        """One printable line, without the key: first hidden, then cut, so that no part of it is left at the cut."""
        text = (self.secret.sub("[key]", text) if self.secret else text)[:length]
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def rest(limits: Limits, failures: int) -> float:
    """rest, 2 rest, 4 rest ... up to longest_rest, less up to half of it by chance, so that clients spread out."""
    return min(limits.longest_rest, limits.rest * 2.0 ** min(failures - 1, 60)) * (1 - CHANCE.random() / 2)


def open_answer(status: int, headers: Mapping[str, str], body: bytes) -> dict:
    """The JSON object of an answer, or the Fault that its status, or what came instead of JSON, stands for."""
    shown = body.decode("utf-8", "replace")
    if status != 200:
        after = retry_after(headers.get("Retry-After", ""), time.time()) if status in AWAY else 0.0
        counts = 0 if status in AWAY else math.inf if status in AT_FAULT else 1
        raise Fault(f"status {status}: {shown}", rests=status not in AT_FAULT, counts=counts, after=after)
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
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


def check_url(url: str) -> str:
    """An endpoint's address such as http://gpu-7:8000/v1, without a slash at its end; RewardError if it is none."""
    if set(url) & set("@?#"):  # these are where people put secrets, so the address is not shown
        raise RewardError("an endpoint's address has a user, a query or a fragment; keys belong into the environment")
    try:
        parts = httpx2.URL(url)
        if parts.scheme in ("http", "https") and parts.host and (parts.port or 1) in range(65536):
            return url.rstrip("/")
    except httpx2.InvalidURL:
        pass
    raise RewardError(f"endpoint {url!r}: write it as http://HOST:PORT/v1 or https://HOST/v1")


def read_key(variable: str, required: bool) -> str:
    """The key in an environment variable, "" if it is unset and not required; no message ever shows it."""
    key = os.environ.get(variable, "").strip()
    if required and not key:
        raise RewardError(f"the environment variable {variable} is not set; put the API key into it")
    if not re.fullmatch("[!-~]*", key):
        raise RewardError(f"the environment variable {variable} holds blanks or letters that no API key has")
    return key


# --------------------------------------------------------------------------------------------------- the scorers
def judge(
    endpoints: Sequence[str],
    model: str,
    rubric: str | rubrics.Rubric,
    thought: bool = False,
    key_env: str = KEY_ENV,
    limits: Limits = LIMITS,
) -> Scorer:
    """A vision-language model as a judge, as vLLM and SGLang serve it. Q §3, Eq. 12; F App. A, Fig. 6.

    One POST {endpoint}/chat/completions a picture, with pictures as data URLs. endpoints: such as http://gpu-7:8000/v1;
    model: as the server calls it; rubric: what is asked, and by `thought` whether reasoning comes first, as in
    `rubrics.named`. Scores lie in [0.2, 1]. The key is what the variable `key_env` holds; the default one may be unset,
    for servers that need none. RewardError, one line, for what cannot work.
    """
    asked = rubrics.named(rubric, thought) if isinstance(rubric, str) else rubric
    name, low, high = asked.name, LOWEST_RATING / HIGHEST_RATING, 1.0
    client = Client(name, endpoints, read_key(key_env, required=key_env != KEY_ENV), limits)
    options = {"model": model, "temperature": 0, "max_tokens": asked.max_tokens}
    options |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS} if asked.ask in rubrics.SCALES else {}

    def request(prompt: Prompt, *pictures: torch.Tensor) -> Request:
        def read(answer: dict) -> float:
            choice = answer["choices"][0]
            rating = rubrics.read(asked, choice["message"]["content"], score_logprobs(asked, choice.get("logprobs")))
            return float(check_scores(name, [rating], [prompt.text], low, high)[0])

        body = lambda: {"messages": rubrics.messages(asked, prompt.text, pictures), **options}  # noqa: E731
        return Request("/chat/completions", body, read, f"the prompt {prompt.text!r}")

    def score(images: torch.Tensor, prompts: Sequence[Prompt], sources: Sequence | None = None) -> torch.Tensor:
        shown = [images] if sources is None else [sources, images]
        requests = [request(prompt, *pictures) for prompt, *pictures in zip(prompts, *shown, strict=True)]
        return torch.tensor(client.ask_all(requests), dtype=torch.float32)

    return Scorer(name, score, low, high)


def score_logprobs(rubric: rubrics.Rubric, logprobs: dict | None) -> dict[str, float] | None:
    """{token text: log-prob} at the score token of a reply, from the API's form; None if there is no such token."""
    tokens = (logprobs or {}).get("content") or []
    index = rubrics.score_token(rubric, [token["token"] for token in tokens]) if rubric.ask in rubrics.SCALES else None
    if index is None:
        return None
    found: dict[str, list[float]] = {}
    for entry in tokens[index]["top_logprobs"]:  # two tokens may have one text, and then both say it
        found.setdefault(entry["token"], []).append(entry["logprob"])
    return {text: torch.tensor(alike, dtype=torch.float64).logsumexp(0).item() for text, alike in found.items()}


def served(endpoints: Sequence[str], scorer: str, batch: int = 8, key_env: str = "", limits: Limits = LIMITS) -> Scorer:
    """A scorer behind serve.py, with the name and range that the server tells. Q §4.1.

    endpoints: such as http://gpu-7:9000; all must serve `scorer`, so that a mixed-up port is an error and not another
    reward; batch: pictures a request; key_env: the variable that holds the servers' token, "" for none. Waits for the
    first of them to be up, at most the deadline. RewardError, one line, for what cannot work.
    """
    client = Client(scorer, endpoints, read_key(key_env, True) if key_env else "", limits)

    def bounds(answer: dict) -> tuple[float, float]:
        """The served scorer's range; JSON has no infinity, so an open end is null."""
        if answer["name"] != scorer:
            raise Fault(f"it serves the scorer {answer['name']!r}, not {scorer!r}")
        low, high = answer["low"], answer["high"]
        return -math.inf if low is None else float(low), math.inf if high is None else float(high)

    low, high = client.ask_all([Request("/health", None, bounds, "a start")])[0]

    def request(rows: Sequence[tuple]) -> Request:
        prompts, images, *sources = zip(*rows, strict=True)

        def body() -> dict:
            asked = [{"text": p.text, "task": p.task, "metadata": p.metadata} for p in prompts]
            shown, *before = ([png(to_picture(picture), level=1) for picture in some] for some in (images, *sources))
            return {"images": shown, "prompts": asked, "sources": before[0] if before else None}

        def read(answer: dict) -> list[float]:
            if bounds(answer) != (low, high):
                raise Fault(f"another range, {bounds(answer)}, than at the start, {low, high}")
            if not all(type(score) in (int, float) for score in answer["scores"]):
                raise RewardError(f"not all of the scores are numbers: {answer['scores']}")
            return check_scores(scorer, answer["scores"], [p.text for p in prompts], low, high).tolist()

        about = f"the prompt {prompts[0].text!r}" + (f" and {len(rows) - 1} more" if len(rows) > 1 else "")
        return Request("/score", body, read, about)

    def score(images: torch.Tensor, prompts: Sequence[Prompt], sources: Sequence | None = None) -> torch.Tensor:
        rows = list(zip(prompts, images, *([] if sources is None else [sources]), strict=True))
        answers = client.ask_all([request(rows[first : first + batch]) for first in range(0, len(rows), batch)])
        return torch.tensor([score for answer in answers for score in answer], dtype=torch.float32)

    return Scorer(scorer, score, low, high)
