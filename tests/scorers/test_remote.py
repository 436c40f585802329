"""Real servers on this machine with planted faults: nothing may be lost, and no score may go to another picture."""

import asyncio
import base64
import io
import itertools
import json
import math
import random
import threading
import time
from collections import Counter
from contextlib import ExitStack

import pytest
import torch
from PIL import Image

from rewards import RewardError
from scorers import remote, rubrics
from tests.helpers.far import ABOUT, FAST, FAULTS, PASSING, WRONG, Far, hang, pictures, reset, says


@pytest.fixture
def far():
    """far(plan): a server, which is stopped when the test ends."""
    with ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(Far(*args, **options))


def served(*servers, batch=1, limits=FAST, **options):
    return remote.served([server.url for server in servers], "far", batch, limits=limits, **options)


def own(count):
    return (torch.arange(1, count + 1).double() / 65535).float()


# ------------------------------------------------------------------------------------------------------ the faults
def test_all_of_600_scores_survive_47_bad_answers_in_100(far, capfd):
    chance, lock, names, answers = random.Random(6), threading.Lock(), itertools.cycle(FAULTS), Counter()

    def plan(number, body):
        with lock:
            name = next(names) if chance.random() < 0.47 else "right"
            answers[name] += 1
        return FAULTS.get(name)

    limits = FAST._replace(timeout=0.3, deadline=120, tries=40, rest=0.005, longest_rest=0.02, concurrency=8)
    scores = served(far(plan), far(plan), far(plan), batch=2, limits=limits).score(*pictures(600))
    right, bad, total = int((scores == own(600)).sum()), answers.total() - answers["right"], answers.total()
    with capfd.disabled():
        print(f"\n{right} of 600 scores right, {bad} of {total} answers bad")
    assert right == 600 and set(answers) == {*FAULTS, "right"} and bad / total == pytest.approx(0.47, abs=0.03)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_lasts_is_one_line_with_scorer_endpoint_and_prompt(far, name):
    server = far(lambda number, body: FAULTS[name])
    limits = FAST._replace(deadline=0.4, timeout=0.1) if name in PASSING else FAST
    with pytest.raises(RewardError) as error:
        served(server, batch=2, limits=limits).score(*pictures(2))
    message = str(error.value)
    assert message.startswith(f"scorer 'far': no score for the prompt 'p0' and 1 more from {server.url}; last: ")
    assert message.isprintable() and len(message) < 2200
    assert ("0.4 s were not enough; http://" in message) == (name in PASSING)
    assert len(server.requests) == FAST.tries if name in WRONG else len(server.requests) > 1


@pytest.mark.parametrize("status", [400, 413, 415, 422])
def test_a_request_that_is_at_fault_itself_is_not_repeated(far, status):
    server = far(lambda number, body: says('{"error": "images[0] is not a PNG"}', status))
    with pytest.raises(RewardError, match=rf"status {status}: .*images\[0\] is not a PNG"):
        served(server).score(*pictures(1))
    assert len(server.requests) == 1


def test_an_endpoint_that_refuses_rests_twice_as_long_each_time_until_the_deadline(capsys):
    with Far() as server:
        scorer = served(server, limits=FAST._replace(rest=0.02, longest_rest=9.0, deadline=1.0))
    with pytest.raises(RewardError, match="1 s were not enough; .*ConnectError"):
        scorer.score(*pictures(1))
    told = capsys.readouterr().err.splitlines()
    assert all(line.startswith(f"scorer 'far': {server.url} rests ") for line in told)
    assert 4 <= len(told) <= 7, "0.02 (1 + 2 + 4 + ...) s, less up to half of it by chance"


def test_a_redirect_is_not_followed_and_proxies_of_the_environment_are_not_used(far, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://localhost:1")
    monkeypatch.delenv("no_proxy", raising=False)
    elsewhere = far()
    server = far(lambda number, body: says("", 307, Location=elsewhere.url + "/score"))
    with pytest.raises(RewardError, match="status 307"):
        served(server).score(*pictures(1))
    assert len(server.requests) == FAST.tries and elsewhere.requests == []


# --------------------------------------------------------------------------------------------- many, on many servers
def test_no_more_requests_are_in_flight_than_allowed_over_all_batches_and_inside_of_an_event_loop(far):
    busy = []

    def count(number, body):
        busy.append(busy[-1] + 1 if busy else 1)
        time.sleep(0.03)
        busy.append(busy[-1] - 1)

    scorer = served(far(count), limits=FAST._replace(concurrency=3))

    async def notebook():
        scorer.score(*pictures(6))

    calls = [threading.Thread(target=asyncio.run, args=(notebook(),)) for _ in range(2)]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    assert len(busy) == 24 and max(busy) == 3


def test_a_server_may_be_restarted_in_the_middle(far):
    again = []

    def die(number, body):
        if number == 3:
            threading.Thread(target=restart).start()
        return reset if number >= 3 else None

    def restart():
        first.__exit__()
        time.sleep(0.15)
        again.append(far(port=first.server_port))

    first = Far(die)
    assert torch.equal(served(first).score(*pictures(9)), own(9))
    assert len(again[0].requests) == 6


def test_an_endpoint_that_hangs_gets_one_request_at_a_time_after_its_first_failure(far):
    arrivals = []
    good, bad = far(lambda *_: time.sleep(0.02)), far(lambda *_: arrivals.append(time.monotonic()) or hang)
    limits = FAST._replace(timeout=0.2, concurrency=6, rest=0.001, longest_rest=0.001)
    assert torch.equal(served(good, bad, limits=limits).score(*pictures(200)), own(200))
    later = [time for time in arrivals if time > arrivals[0] + 0.15]
    assert len(later) >= 2 and all(b - a > 0.1 for a, b in zip(later, later[1:]))


def test_the_first_failure_for_good_ends_its_batch_at_once_and_leaves_the_scorer_usable(far):
    server = far(lambda number, body: says("no", 400) if number == 5 else time.sleep(0.02))
    scorer = served(server, limits=FAST._replace(concurrency=2))
    with pytest.raises(RewardError, match="status 400"):
        scorer.score(*pictures(50))
    assert len(server.requests) < 12, "what had not begun is dropped"
    assert torch.equal(scorer.score(*pictures(4)), own(4))
    assert scorer.score(torch.zeros(0, 3, 2, 2), []).shape == (0,)


def test_a_scorer_starts_when_the_first_of_its_endpoints_is_up_and_is_the_one_that_was_asked_for(far):
    with Far() as gone:
        pass
    server = far()
    assert served(gone, server)[2:4] == (0.0, 1.0)
    server.about = ABOUT | {"low": None, "high": None}
    assert served(server)[2:4] == (-math.inf, math.inf)
    with pytest.raises(RewardError, match="no score for a start from .*it serves the scorer 'far', not 'ocr'"):
        remote.served([server.url], "ocr", limits=FAST)


@pytest.mark.parametrize(("value", "seconds"), [("1", 1.0), ("-5", 0.0), ("nan", 0.0), ("Thu, 99 Jan", 0.0)])
def test_an_endpoint_rests_for_the_seconds_that_retry_after_gives(far, value, seconds):
    server = far(lambda number, body: None if number else says("", 429, Retry_After=value))
    start = time.monotonic()
    assert torch.equal(served(server).score(*pictures(3)), own(3))
    assert seconds <= time.monotonic() - start < seconds + 0.9


# ------------------------------------------------------------------------------------------------------ the secrets
@pytest.mark.parametrize("key", ["s3cr3t-key", 'zq/"\\9'])
def test_the_key_is_sent_and_never_shown_not_even_in_part(far, monkeypatch, capsys, key):
    monkeypatch.setenv("REWARD_TOKEN", f" {key}\n")
    wrong = [says(f"unknown key {key}", 401), says(key * 999, 403), says(json.dumps({"x": [key]}).replace("/", r"\/")),
             says(json.dumps(ABOUT | {"scores": [key]}))]  # fmt: skip
    server = far(lambda number, body: wrong[number])
    for tries in range(1, 5):
        scorer = served(server, key_env="REWARD_TOKEN", limits=FAST._replace(tries=tries))
        server.requests.clear()
        with pytest.raises(RewardError, match=r"\[key\]") as error:
            scorer.score(*pictures(1))
        assert [headers["Authorization"] for _, headers, _ in server.requests] == [f"Bearer {key}"] * tries
        shown = str(error.value) + capsys.readouterr().err + "".join(map(repr, chain(error.value)))
        assert key[:2] not in shown


def chain(fault):
    """What a debugger would show besides."""
    while fault := fault.__cause__ or fault.__context__:
        yield fault


URLS = ("", "localhost:8000", "ftp://host", "http://", "http://h:99999", "http://h:x", "http://h\n/",
        "http://u:pw@host", "https://pw@host", "http://host/v1?key=pw", "http://h/#pw")  # fmt: skip
CANNOT = [
    *({"endpoints": bad} for bad in ([], "http://a", ["http://a", "http://a"], *([url] for url in URLS))),
    *({"limits": FAST._replace(**bad)} for bad in ({"tries": 0}, {"rest": -1}, {"deadline": math.nan},
    {"timeout": math.inf})),
    *({"key": key} for key in (None, "pw of two words", "pw\nline break", "pw sch\u00f6n")),
]  # fmt: skip


@pytest.mark.parametrize("given", CANNOT, ids=str)
def test_what_cannot_work_is_refused_at_once_and_no_secret_is_shown(monkeypatch, given):
    monkeypatch.setenv("MY_KEY", given.pop("key", "k") or "")
    with pytest.raises(RewardError) as error:
        remote.served(**{"endpoints": ["http://localhost:1"], "scorer": "far", "key_env": "MY_KEY", **given})
    assert str(error.value).isprintable() and "pw" not in str(error.value)


# --------------------------------------------------------------------------------------------------- what is asked
def pixels(png):
    """base64 PNG -> (3, H, W) in [0, 1]."""
    with Image.open(io.BytesIO(base64.b64decode(png))) as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        return torch.tensor(list(picture.tobytes())).reshape(*picture.size[::-1], 3).permute(2, 0, 1) / 255


def test_a_picture_that_is_none_and_counts_that_differ_are_errors_and_nothing_is_sent(far):
    server, (images, prompts) = far(), pictures(3)
    broken = images.clone()
    broken[1, 1, 0, 0] = math.nan
    for batch in ((broken, prompts), (images, prompts, [(b,) for b in broken]), (images[:2], prompts)):
        with pytest.raises(ValueError):
            served(server, batch=3).score(*batch)
    assert server.requests == []


# ------------------------------------------------------------------------------------------------------- the judge
def chat(token="4", likely=(("4", -0.5), ("5", -1.5)), content=None):
    """A chat completion whose score token has these log-probs."""
    entries = [{"token": text, "logprob": lp, "bytes": None} for text, lp in likely]
    logprobs = {"content": [{"token": token, "logprob": -0.5, "top_logprobs": entries}]}
    choice = {"message": {"role": "assistant", "content": content or token}, "logprobs": logprobs}
    return {"choices": [choice | {"finish_reason": "stop"}]}


def shown(body):
    """The red of each picture in a question, 0 to 255."""
    urls = [part["image_url"]["url"] for part in body["messages"][1]["content"] if part["type"] == "image_url"]
    return [round(pixels(url.removeprefix("data:image/png;base64,"))[0, 0, 0].item() * 255) for url in urls]


def looks(body):
    """A judge that rates a picture by its red, 1 to 5."""
    level = str(shown(body)[-1])
    return chat(level, [(level, 0.0)])


def judge(server, rubric="aesthetic", answer=looks, **more):
    server.answer = answer
    return remote.judge([server.url + "/v1"], "vlm-7b", rubric, limits=FAST, **more)


def test_a_judge_rates_each_picture_and_each_rating_finds_its_picture(far):
    scorer = judge(far(lambda number, body: time.sleep(random.Random(number).random() / 30)))
    assert scorer[2:4] == (0.2, 1.0) and scorer.name == "aesthetic"
    images = torch.tensor([3, 1, 5, 2, 4, 4, 1]).float()[:, None, None, None].expand(7, 3, 2, 2) / 255
    assert scorer.score(images, pictures(7)[1]).tolist() == pytest.approx([0.6, 0.2, 1.0, 0.4, 0.8, 0.8, 0.2])


def test_the_question_is_an_openai_chat_completion(far, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    server, (images, prompts) = far(), pictures(1)
    judge(server).score(images, prompts)
    ((path, headers, body),) = server.requests
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer sk-1"
    assert headers["Content-Type"] == "application/json"
    assert body.pop("messages") == rubrics.messages(rubrics.named("aesthetic"), "p0", [images[0]])
    assert body == {"model": "vlm-7b", "temperature": 0, "max_tokens": 1, "logprobs": True, "top_logprobs": 20}
    others = {"temperature": None, "max_tokens": None, "max_completion_tokens": 99, "top_logprobs": 5, "messages": []}
    form = "".join(
        f"<{part}Score>{n}</{part}Score>" for part, n in (("Quality", 1), ("Instruction", 5), ("Overall", 4))
    )
    written = {"choices": [{"message": {"content": form}, "finish_reason": "stop"}]}
    for rubric, sent in (("aesthetic", {"logprobs": True}), ("judge", {})):
        scorer = judge(server, rubric, looks if sent else lambda _: written, request=others)
        assert scorer.score(images, prompts).item() == pytest.approx(0.2 if sent else 0.8)
        body = server.requests[-1][2]
        assert len(body.pop("messages")) == 2, "what is asked cannot be replaced"
        assert body == {"model": "vlm-7b", "max_completion_tokens": 99, "top_logprobs": 5, **sent}


def test_an_edit_is_judged_with_its_sources_first(far):
    server, (images, prompts) = far(), pictures(1)
    sources = [(torch.full((3, 2, 2), 0.2), torch.full((3, 2, 4), 0.6))]
    for rubric in ("editing", "aesthetic"):
        judge(server, rubric, lambda body: chat()).score(images, prompts, sources)
    asked = [shown(body) for _, _, body in server.requests]
    assert asked == [[51, 153, 1], [1]], "a rubric may be about the picture alone"
    with pytest.raises(RewardError, match="rubric 'editing' .*: 1 given"):
        judge(server, "editing").score(images, prompts)


@pytest.mark.parametrize(
    "answer", [chat("Nice", [("Nice", 0.0)], "Nice\npicture!"), {"choices": []}, chat("4", [("4", 1.0)])]
)
def test_a_reply_that_is_no_rating_is_asked_for_again_and_then_an_error(far, answer):
    server = far()
    scorer = judge(server, answer=lambda body: looks(body) if len(server.requests) == 2 else answer)
    images, prompts = torch.full((1, 3, 2, 2), 4 / 255), pictures(1)[1]
    assert scorer.score(images, prompts).item() == pytest.approx(0.8)  # requests 1 and 2
    with pytest.raises(RewardError, match="scorer 'aesthetic': no score for the prompt 'p0' from ") as error:
        scorer.score(images, prompts)
    assert str(error.value).isprintable() and len(server.requests) == 2 + FAST.tries
