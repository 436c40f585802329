"""Scorers on other machines: a judge behind an OpenAI-style API, and any scorer that serve.py serves. Q §4.1.

A run of a week meets every fault there is, and none may become a score, or the score of another picture. Requests go to
the least busy endpoint. Each answer is checked, and put into its sample's place. After a fault the request is tried
again, at another endpoint if there is one, and an endpoint that failed rests, twice as long each time.

    no whole answer, or 408, 425, 429, 502, 503, 504    tried again until the batch's deadline: servers are restarted
    400, 413, 415, 422: the request is at fault         not tried again
    anything else that is no score                      tried again, `tries` times in all

The first request that fails for good ends its batch with a `rewards.RewardError`: one line with scorer, prompt,
endpoints and the last cause. Redirects and the environment's proxies are not followed. A key comes from the environment
only, and is hidden in every message. Pictures travel as 8-bit PNG: a far score may differ from a near one by what
a rounding of 1/510 does to it.
"""

import asyncio
import functools
import json
import math
import os
import random
import re
import ssl
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import httpx2
import torch

from data.files import Prompt
from data.pictures import png, to_picture
from rewards import RewardError, Scorer
from scorers import rubrics
from scorers.common import check_scores

KEY_ENV = "OPENAI_API_KEY"
TOP_LOGPROBS = 20  # the most that the API gives; all five score tokens are nearly always among them
PASSING = (408, 425, 429, 502, 503, 504)  # HTTP itself says that these pass
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
    """Why one try gave no score. It `counts` as so many tries. If it `rests`, the endpoint rests `after` s at least."""

    def __init__(self, cause: str, counts: float = 1, rests: bool = True, after: float = 0.0):
        super().__init__(cause)
        self.counts, self.rests, self.after = counts, rests, after


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
    failures: int = 0  # since it last gave a result
    wake: float = -math.inf  # it rests until then


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """The one event loop of all clients. Its thread is a daemon, so a run that ends does not wait for a far judge."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="far scorers", daemon=True).start()
    return loop


class Client:
    """Asks several endpoints many things at once, and puts each answer in its request's place."""

    def __init__(self, name: str, endpoints: Sequence[str], key: str, limits: Limits):
        if isinstance(endpoints, str) or not endpoints or len(set(endpoints)) < len(endpoints):
            raise RewardError(f"scorer {name!r}: give a list of one or more different endpoints")
        if not all(0 < value < math.inf for value in limits):
            raise RewardError(f"scorer {name!r}: limits must be positive and finite, not {limits}")
        self.name, self.limits, self.places = name, limits, asyncio.Semaphore(limits.concurrency)
        self.endpoints = [Endpoint(check_url(url)) for url in endpoints]
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
        deadline = asyncio.get_running_loop().time() + self.limits.deadline
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
            async with asyncio.timeout_at(deadline), self.places:
                body = json.dumps(await asyncio.to_thread(request.body)).encode() if request.body else None
                while tries < self.limits.tries:
                    endpoint = await self._choose(avoid=endpoint)
                    endpoint.busy += 1
                    try:
                        result = await self._try(endpoint.url + request.path, body, request.read)
                        endpoint.failures = 0
                        return result
                    except Fault as fault:
                        self._rest(endpoint, fault)
                        tries, last = tries + fault.counts, self._shown(f"{endpoint.url}: {fault}", EXCERPT)
                    finally:
                        endpoint.busy -= 1
        except TimeoutError:
            last = f"{self.limits.deadline:g} s were not enough; {last}"
        where = ", ".join(e.url for e in self.endpoints)
        raise RewardError(f"scorer {self.name!r}: no score for {request.about} from {where}; last: {last}")

    async def _choose(self, avoid: Endpoint | None) -> Endpoint:
        """The least busy endpoint that does not rest; `avoid`, which has just failed, only if there is no other.

        One that failed gets a single request at a time until it gives a result: a server that hangs holds up only that.
        """
        while True:
            now = time.monotonic()
            if free := [e for e in self.endpoints if e.wake <= now and not (e.failures and e.busy)]:
                return min(free, key=lambda e: (e is avoid, e.busy, CHANCE.random()))
            await asyncio.sleep(0.02)

    def _rest(self, endpoint: Endpoint, fault: Fault) -> None:
        """Send an endpoint to rest. If it rests already, then requests have failed together, and that is one failure.

        rest, 2 rest, 4 rest ... up to longest_rest, less up to half of it by chance, so that clients spread out.
        """
        now = time.monotonic()
        if fault.rests:
            seconds = fault.after
            if endpoint.wake <= now:
                rest = min(self.limits.longest_rest, self.limits.rest * 2.0 ** min(endpoint.failures, 60))
                endpoint.failures, seconds = endpoint.failures + 1, max(seconds, rest * (1 - CHANCE.random() / 2))
                told = self._shown(f"{endpoint.url} rests {seconds:.1f} s: {fault}", 300)
                print(f"scorer {self.name!r}: {told}", file=sys.stderr, flush=True)
            endpoint.wake = max(endpoint.wake, now + seconds)

    async def _try(self, url: str, body: bytes | None, read: Callable[[dict], object]):
        """The result of one request, or a Fault. The time counts from the connection to the last byte, because a server
        that trickles would never be too slow from byte to byte."""
        text = bytearray()
        try:
            exchange = self.http.stream("POST" if body else "GET", url, content=body)
            async with asyncio.timeout(self.limits.timeout), exchange as response:
                async for part in response.aiter_raw():
                    text += part
                    if len(text) > self.limits.max_bytes:
                        raise Fault(f"an answer of more than {self.limits.max_bytes} bytes")
        except TimeoutError:
            raise Fault(f"no whole answer in {self.limits.timeout:.3g} s", counts=0) from None
        except httpx2.HTTPError as fault:
            raise Fault(f"{type(fault).__name__}: {fault}", counts=0) from None
        status, shown = response.status_code, text.decode("utf-8", "replace")
        if status in AT_FAULT:
            raise Fault(f"status {status}: {shown}", counts=math.inf, rests=False)
        if status != 200:
            passes, after = status in PASSING, response.headers.get("Retry-After", "")
            after = float(after) if passes and after.isdecimal() else 0.0
            raise Fault(f"status {status}: {shown}", counts=0 if passes else 1, after=after)
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            raise Fault(f"not JSON: {shown}") from None
        try:
            return read(answer)
        except Fault:
            raise
        except Exception as fault:  # most likely other JSON than the API's
            raise Fault(f"{fault!r} over the answer {shown}", rests=False) from None

    def _shown(self, text: str, length: int) -> str:
        """One printable line, without the key: first hidden, then cut, so that no part of it is left at the cut."""
        text = (self.secret.sub("[key]", text) if self.secret else text)[:length]
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def check_url(url: str) -> str:
    """An endpoint's address such as http://gpu-7:8000/v1, without a slash at its end. RewardError if it is none, which
    does not show it: a user, a query and a fragment are where people put secrets."""
    try:
        parts = httpx2.URL(url)
        fits = parts.scheme in ("http", "https") and parts.host and (parts.port or 1) < 65536
    except httpx2.InvalidURL:
        fits = False
    if not fits or set(url) & set("@?#"):
        raise RewardError("an endpoint is http://HOST:PORT/v1 or https://HOST/v1; a key belongs in the environment")
    return url.rstrip("/")


def read_key(variable: str, required: bool) -> str:
    """The key in an environment variable, "" if it is unset and not required; no message ever shows it."""
    key = os.environ.get(variable, "").strip()
    if required and not key or not re.fullmatch("[!-~]*", key):
        raise RewardError(f"the environment variable {variable} must hold the key, without blanks or accents")
    return key


# --------------------------------------------------------------------------------------------------- the scorers
def judge(
    endpoints: Sequence[str], model: str, rubric: str | rubrics.Rubric, request: dict | None = None,
    key_env: str = KEY_ENV, limits: Limits = LIMITS,
) -> Scorer:  # fmt: skip
    """A vision-language model as a judge, as vLLM and SGLang serve it. Q §3, Eq. 12; F App. A, Fig. 6.

    One POST {endpoint}/chat/completions a picture, with pictures as data URLs. endpoints: such as http://gpu-7:8000/v1;
    model: as the server calls it; rubric: what is asked, a name of `rubrics.RUBRICS`; request: fields of the request
    for servers and models that need others, None for one that is left out. A model that thinks needs
    {"max_tokens": 4096}, some servers {"max_tokens": None, "max_completion_tokens": 4096}. Scores lie in [0.2, 1].
    The key is what the variable `key_env` holds; the default one may be unset, for servers that need none.
    RewardError, one line, for what cannot work.
    """
    asked = rubrics.named(rubric) if isinstance(rubric, str) else rubric
    name, low, high = asked.name, asked.low, 1.0
    client = Client(name, endpoints, read_key(key_env, required=key_env != KEY_ENV), limits)
    options = {"model": model, "temperature": 0, "max_tokens": asked.max_tokens}
    options |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS} if asked.ask in rubrics.SCALES else {}
    options = {field: value for field, value in (options | (request or {})).items() if value is not None}

    def question(prompt: Prompt, *pictures: torch.Tensor) -> Request:
        def read(answer: dict) -> float:
            rating = rubrics.read(asked, *reply_of(asked, answer["choices"][0]))
            return float(check_scores(name, [rating], [prompt.text], low, high, asked.ask == rubrics.PILLAR)[0])

        body = lambda: {**options, "messages": rubrics.messages(asked, prompt.text, pictures)}  # noqa: E731
        return Request("/chat/completions", body, read, f"the prompt {prompt.text!r}")

    def score(images: torch.Tensor, prompts: Sequence[Prompt], sources: Sequence | None = None) -> torch.Tensor:
        rows = zip(prompts, images, sources or [()] * len(prompts), strict=True)
        requests = [question(prompt, *before, image) for prompt, image, before in rows]
        return torch.tensor(client.ask_all(requests), dtype=torch.float32)

    return Scorer(name, score, low, high, silent=asked.ask == rubrics.PILLAR)


def reply_of(rubric: rubrics.Rubric, choice: dict) -> tuple[str, dict[str, float] | None]:
    """(a judge's reply, {token text: log-prob} at its score token) from the API's form; None without such a token.

    The content may be a list of parts, of which the texts count. RewardError if there is none, as when a model was
    still thinking, and for a written answer that was cut off.
    """
    content = choice["message"]["content"]
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part["type"] == "text")
    ended = choice.get("finish_reason") or "stop"
    if not isinstance(content, str) or ended not in (("stop", "length") if rubric.ask in rubrics.SCALES else ("stop",)):
        raise RewardError(f"no whole reply, it ended by {ended!r}: {content!r}")
    tokens = (choice.get("logprobs") or {}).get("content") or []
    index = rubrics.score_token([token["token"] for token in tokens]) if rubric.ask in rubrics.SCALES else None
    if index is None:
        return content, None
    found: dict[str, list[float]] = {}
    for entry in tokens[index]["top_logprobs"]:  # two tokens may have one text, and then both say it
        found.setdefault(entry["token"], []).append(entry["logprob"])
    logprobs = {text: torch.tensor(alike, dtype=torch.float64).logsumexp(0).item() for text, alike in found.items()}
    return content, logprobs


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

    def question(rows: Sequence[tuple]) -> Request:
        prompts, images, sources = zip(*rows, strict=True)

        def body() -> dict:
            asked = [{"text": p.text, "task": p.task, "metadata": p.metadata} for p in prompts]
            shown, *before = ([png(to_picture(picture), level=1) for picture in some] for some in (images, *sources))
            return {"images": shown, "prompts": asked, "sources": before if sources[0] else None}

        def read(answer: dict) -> list[float]:
            if bounds(answer) != (low, high):
                raise Fault(f"another range than at the start, {low, high}")
            if not all(type(score) in (int, float) for score in answer["scores"]):
                raise ValueError("not all of the scores are numbers")
            return check_scores(scorer, answer["scores"], [p.text for p in prompts], low, high).tolist()

        about = f"the prompt {prompts[0].text!r}" + (f" and {len(rows) - 1} more" if len(rows) > 1 else "")
        return Request("/score", body, read, about)

    def score(images: torch.Tensor, prompts: Sequence[Prompt], sources: Sequence | None = None) -> torch.Tensor:
        rows = list(zip(prompts, images, sources or [()] * len(prompts), strict=True))
        answers = client.ask_all([question(rows[first : first + batch]) for first in range(0, len(rows), batch)])
        return torch.tensor([score for answer in answers for score in answer], dtype=torch.float32)

    return Scorer(scorer, score, low, high)
