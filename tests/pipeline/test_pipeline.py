"""Oracles for runs whose rewards come from afar, as a user starts them: every curve against the pictures themselves,
servers that die and come back, answers in any order and at any speed, alarms, and prompts that are worth their samples.

The servers are real, on this machine; only what they think of a picture is made up. A judge's rating here is the
picture's brightness, so that a score that goes to another picture is seen.
"""

import base64
import io
import json
import math
import os
import random
import re
import signal
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from harness import curation, rollout, teach
from harness.run import Run
from rewards import Scorer
from scorers import panel as scoring
from scorers import serve as reward_server
from scorers.ocr import score_jpeg
from tests.conftest import TASKS, metrics, same, stored
from tiny import drawings as tiny

FAST = {"timeout": 5.0, "deadline": 20.0, "tries": 2, "rest": 0.01, "longest_rest": 0.05}
TEXT = ["--stage", "grpo", "--task", "text"]
NOT_WARM = ["--warmup", "0", "--lr", "0.01"]  # the first update already moves the policy


# ------------------------------------------------------------------------------------------------- servers to ask
class Judge(BaseHTTPRequestHandler):
    """One picture over the OpenAI-style API, or several as `reward_server` takes them (scorer "far", 0 to 1)."""

    def do_GET(self):
        self.reply({"name": "far", "low": 0, "high": 1})

    def do_POST(self):
        judges, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "messages" in body:
            picture, text = body["messages"][1]["content"]
            value = brightness(base64.b64decode(picture["image_url"]["url"].partition(",")[2]))
            said = judges.rate(value)
            top = [{"token": token, "logprob": logprob} for token, logprob in said.items()]
            word = max(said, key=said.get)
            tokens = {"content": [{"token": word, "logprob": said[word], "top_logprobs": top}]}
            answer = {"choices": [{"message": {"role": "assistant", "content": word}, "logprobs": tokens}]}
            asked = [(text["text"], value)]
        else:
            values = [brightness(base64.b64decode(item)) for item in body["images"]]
            answer = {"name": "far", "low": 0, "high": 1, "scores": [judges.far(value) for value in values]}
            asked = [(p["text"], value) for p, value in zip(body["prompts"], values, strict=True)]
        judges.before(asked)
        with judges.lock:
            judges.asked += asked
        self.reply(answer)

    def reply(self, answer):
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle_one_request(self):
        with suppress(OSError):  # clients may hang up
            super().handle_one_request()

    def log_message(self, *_):
        pass


class Judges(ThreadingHTTPServer):
    """asked: (prompt or question, brightness) in the order of the answers; `before` may hold an answer back."""

    request_queue_size = 64

    def __init__(self):
        self.lock, self.over, self.asked = threading.Lock(), threading.Event(), []
        self.rate, self.far, self.before = five_or_one, float, lambda asked: None
        super().__init__(("localhost", 0), Judge)
        self.url = f"http://localhost:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, *_):
        pass

    def stop(self):
        self.over.set()
        self.shutdown()
        self.server_close()


class Served(reward_server.Server):
    """The project's own server, in a thread, with any scorer behind it; asked: the prompts of each request."""

    def __init__(self, score, name="jpeg", port=0):
        self.asked, self.alive = [], True

        def recorded(images, prompts, sources):
            self.asked.append([p.text for p in prompts])
            return score(images, prompts)

        super().__init__(Scorer(name, recorded, -math.inf, 1.0), port)
        self.url = f"http://localhost:{self.server_port}"
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def stop(self):
        if self.alive:
            self.alive = False
            self.shutdown()
            self.server_close()


@pytest.fixture
def servers():
    """servers(CLASS, ...): a server that is stopped when the test ends."""
    made = []

    def start(kind, *args, **options):
        made.append(kind(*args, **options))
        return made[-1]

    yield start
    for server in made:
        server.stop()


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def five_or_one(value):
    """A judge's log-probs: "5" with probability `value`, else "1"."""
    return {"5": math.log(value), "1": math.log(1 - value), "?": -9.0}


def brightness(png):
    """Mean of all pixels of a PNG, in (0, 1)."""
    return float(np.clip(np.asarray(Image.open(io.BytesIO(png)), np.float64).mean() / 255, 0.01, 0.99))


def brightness_of(images):
    """The same of (B, 3, H, W) in [0, 1], after the 8 bits of a PNG."""
    return ((images * 255).round().double().mean((1, 2, 3)) / 255).clamp(0.01, 0.99).numpy()


def judge(server, **more):
    """The entry of a judge; its rating is 1 + 4 brightness, its score a fifth of that."""
    return {"kind": "judge", "rubric": "alignment", "model": "m", "endpoints": [f"{server.url}/v1"], **FAST, **more}


def served(*all_of_them, name="jpeg", **more):
    return {"kind": "served", "scorer": name, "endpoints": [s.url for s in all_of_them], **FAST, **more}


def rewards_file(folder, weights, **parts):
    """--rewards FILE; weights: {category: {name: weight}}, or {name: weight} for all prompts."""
    weights = weights if isinstance(next(iter(weights.values())), dict) else {"default": weights}
    file = folder / "rewards.json"
    file.write_text(json.dumps({"weights": weights, **parts}))
    return ["--rewards", str(file)]


def last_line(capsys):
    """The last line of what a user reads."""
    return re.split(r"[\r\n]+", capsys.readouterr().err.strip())[-1]


def after(monkeypatch, step, act):
    """Do something once a step (counted from 1) is logged, before it is counted as done."""
    real = Run.log

    def log(run, *found):
        means = real(run, *found)
        if run.step + 1 == step:
            act()
        return means

    monkeypatch.setattr(Run, "log", log)


def interrupt():
    raise KeyboardInterrupt


# --------------------------------------------------------------------------------- near, served and judging at once
NEAR = {"world": ("quality", tiny.quality), "sd35": ("jpeg", score_jpeg)}


@pytest.mark.parametrize("base", NEAR)
def test_near_served_and_judging_scorers_are_mixed_by_category_and_each_has_its_curve(
    base, request, tmp_path, servers, spy, capsys
):
    kind, look = NEAR[base]
    far, judges = servers(Served, lambda images, prompts: score_jpeg(images, prompts)), servers(Judges)
    weights = {"counting": {"near": 0.5, "far": 0.25, "vlm": 2.0}, "default": {"near": 1.0, "far": -0.5}}
    scorers = {"near": {"kind": kind}, "far": served(far, batch=4), "vlm": judge(judges)}
    run, drawn = request.getfixturevalue("go" if base == "world" else "real"), spy(teach, "roll_out")
    flags = ["--stage", "grpo", "--task", "composition", "--updates", "3", "--steps", "3", "--eval-prompts", "0"]
    folder = run("mixed", *flags, *rewards_file(tmp_path, weights, scorers=scorers))
    tested = capsys.readouterr().err.count("reward jpeg: gave a known picture its known score")
    assert tested == [kind, "jpeg"].count("jpeg"), "far scorers are tested before the start, too"
    counted, questions = [], []
    for step, line in enumerate(metrics(folder)):
        calls = drawn[3 * step : 3 * step + 3]
        prompts = [row.prompt for call in calls for row in call.args[1]]
        images = torch.cat([call.result[1] for call in calls])
        says = {"near": np.array([float(v) for v in (look(images) if base == "world" else look(images, prompts))])}
        says |= {"far": np.array(score_jpeg(images, prompts)), "vlm": (1 + 4 * brightness_of(images)) / 5}
        counts = np.array([p.metadata["tag"] == "counting" for p in prompts])
        total = np.where(counts, 0.5 * says["near"] + 0.25 * says["far"] + 2 * says["vlm"], says["near"])
        total = np.where(counts, total, total - 0.5 * says["far"])
        expected = {"reward": total.mean(), "group_std": total.reshape(3, 2).std(1).mean(), "lost": 0.0}
        expected |= {"reward/near": says["near"].mean(), "reward/far": says["far"].mean()}
        expected |= {"reward/vlm": says["vlm"][counts].mean()} if counts.any() else {}
        found = {key: value for key, value in line.items() if key in ("reward", "group_std", "lost") or "/" in key}
        assert found == pytest.approx(expected, rel=2e-4, abs=1e-6)
        counted.append(int(counts.sum()))
        pairs = zip(prompts, brightness_of(images), counts, strict=True)
        questions += [(p.text, float(value)) for p, value, counts_ in pairs if counts_]
    assert 0 < sum(counted) < 18, "both categories came up"
    asked = sorted((text, value) for text, value in judges.asked)
    assert len(asked) == len(questions)
    assert np.allclose(sorted(v for _, v in questions), sorted(v for _, v in asked))
    for text, value in questions:
        near = min(asked, key=lambda pair: abs(pair[1] - value))
        assert text in near[0], "each picture is asked about with its own prompt"
    events = EventAccumulator(str(folder), {"histograms": 0}).Reload()
    assert {"reward", "reward/near", "reward/far", "reward/vlm"} <= set(events.Tags()["scalars"])
    assert set(events.Tags()["histograms"]) == {"rewards/near", "rewards/far", "rewards/vlm"}
    sizes = {name: [e.histogram_value.num for e in events.Histograms(f"rewards/{name}")] for name in scorers}
    assert sizes == {"near": [6] * 3, "far": [6] * 3, "vlm": [n for n in counted if n]}


def test_a_teachers_own_rewards_are_no_obstacle_to_its_evaluation_on_all_tasks(real, tmp_path, capsys):
    flags = rewards_file(tmp_path, {"text": {"jpeg": 1.0}})
    folder = real("teacher", *TEXT, *flags)
    assert "teacher: text jpeg 0." in capsys.readouterr().out
    table = (folder / "report.md").read_text()
    assert "text jpeg" in table and "quality jpeg" not in table, "drawn for every task, scored where weights are"
    assert all((folder / f"samples/final-{task}.png").exists() for task in TASKS) or table.count("![") == 0


def test_distillation_loads_no_scorer(go, real, monkeypatch):
    monkeypatch.setattr(scoring, "build", lambda *_: pytest.fail("a scorer was built"))
    go("tiny", "--stage", "opd", "--eval-prompts", "2")
    real("sd35", "--stage", "opd")


# ---------------------------------------------------------------------------------------------- servers that die
def test_an_endpoint_that_dies_in_the_middle_of_a_batch_changes_no_reward(go, tmp_path, servers, capsys):
    first, second = servers(Served, score_jpeg), servers(Served, score_jpeg)
    flags = [*TEXT, "--steps", "3", *NOT_WARM]
    whole = go("whole", *flags, *rewards_file(tmp_path, {"far": 1}, scorers={"far": served(first, second, batch=1)}))
    assert len(first.asked) > 3 and len(second.asked) > 3, "both were asked"

    def dies(images, prompts):
        if len(mortal.asked) > 5:
            threading.Thread(target=mortal.stop).start()
            raise RuntimeError("out of memory")
        return score_jpeg(images, prompts)

    mortal = servers(Served, dies)
    flags += rewards_file(tmp_path, {"far": 1}, scorers={"far": served(mortal, second, batch=1)})
    half = go("half", *flags)
    assert not mortal.alive and len(mortal.asked) >= 6
    assert f"scorer 'jpeg': {mortal.url} rests" in capsys.readouterr().err, "the user is told"
    assert metrics(half) == metrics(whole) and same(stored(half), stored(whole))


def test_a_run_whose_servers_are_all_gone_is_saved_and_goes_on_when_they_are_back(
    go, tmp_path, servers, monkeypatch, capsys
):
    pair = [servers(Served, score_jpeg) for _ in range(2)]
    flags = [*TEXT, "--steps", "4", "--save-every", "9", *NOT_WARM]
    flags += rewards_file(tmp_path, {"far": 1}, scorers={"far": served(*pair, deadline=1.5)})
    whole = go("whole", *flags)
    with monkeypatch.context() as patch:
        after(patch, 2, lambda: [server.stop() for server in pair])
        cut = go("cut", *flags, code=2)
    line = last_line(capsys)
    assert re.match(r"error: scorer 'far': .*no score for the prompt 'a sign .*; last: .*refused", line), line
    assert all(server.url in line for server in pair)
    assert [p.name for p in (cut / "checkpoints").iterdir()] == ["step-000002"], "the last whole step"
    assert not (cut / "report.md").exists()
    for server in pair:
        servers(Served, score_jpeg, port=server.server_port)
    go("cut", *flags)
    assert "cut: continues from" in capsys.readouterr().err
    assert same(stored(cut), stored(whole)) and metrics(cut) == metrics(whole) and len(metrics(whole)) == 4


def test_dropping_loses_the_group_of_the_prompt_that_cannot_be_scored_and_nothing_else(
    go, tmp_path, servers, spy, capsys
):
    taught, victims = spy(teach, "update_policy"), []

    def picky(images, prompts):
        if any(p.text in victims for p in prompts):
            raise RuntimeError("no such picture")
        return score_jpeg(images, prompts)

    far = servers(Served, picky)
    flags = [*rewards_file(tmp_path, {"quality": 1, "far": 1}, scorers={"far": served(far)}), "--advantage-std", "none"]
    whole = go("whole", *TEXT, *flags)
    victims.append(far.asked[-1][2])  # the second group of three
    half = go("half", *TEXT, "--on-reward-failure", "drop", *flags)
    all_of_it, what_is_left = (call.args[2] for call in taught)
    assert all_of_it.shape == (3, 2) and (all_of_it != 0).all()
    assert torch.equal(what_is_left[[0, 2]], all_of_it[[0, 2]]), "advantages are about one's own group"
    assert (what_is_left[1] == 0).all()
    (kept,), (full,) = metrics(half), metrics(whole)
    assert (full["lost"], kept["lost"]) == (0.0, pytest.approx(1 / 3, rel=1e-4))
    assert kept["reward"] != full["reward"] and math.isfinite(kept["reward"])
    capsys.readouterr()
    stopped = go("stopped", *TEXT, *flags, code=2)
    assert re.match(r"error: scorer 'far': .*prompt '.*' .*failed: RuntimeError: no such picture", last_line(capsys))
    assert metrics_of(stopped) == []


def metrics_of(folder):
    return metrics(folder) if (folder / "metrics.jsonl").exists() else []


# What a scorer answers -> (how it is told to, what the message says). None of it may reach the weights.
NO_SCORES = {
    "near, out of range": (lambda j, m: m.setitem(tiny.SCORERS, "quality", lambda i, p: [1.5] * len(i)), "1.5 is out"),
    "served, nan": (lambda j, m: setattr(j, "far", lambda value: math.nan), r"nan is not finite"),
    "served, out of range": (lambda j, m: setattr(j, "far", lambda value: -0.5), r"-0\.5 is outside \[0\.0, 1\.0\]"),
    "judge, nan": (lambda j, m: setattr(j, "rate", lambda value: {"5": math.nan, "1": -1.0}), "no expectation"),
    "judge, out of range": (lambda j, m: setattr(j, "rate", lambda value: {"7": -0.1}), "none of 1, 2, 3, 4, 5"),
}


@pytest.mark.parametrize("what", NO_SCORES)
def test_what_is_no_score_ends_the_run_and_names_scorer_and_prompt(
    go, tmp_path, servers, monkeypatch, updates, capsys, what
):
    judges, (strike, said) = servers(Judges), NO_SCORES[what]
    strike(judges, monkeypatch)
    kind = what.split(",")[0]
    scorers = {"near": {"kind": "quality"}, "served": served(judges, name="far"), "judge": judge(judges)}
    folder = go("run", *TEXT, *rewards_file(tmp_path, {kind: 1}, scorers={kind: scorers[kind]}), code=2)
    line = last_line(capsys)
    assert re.match(rf"error: scorer '{kind}': .*prompt 'a sign that says \"[A-Z]+\"'", line), "the recipe's name"
    assert re.search(said, line) and "\n" not in line
    assert not updates and stored(folder)["step"] == 0 and metrics_of(folder) == []


# ------------------------------------------------------------------------------------ drawing while others score
@pytest.fixture
def shuffled(servers):
    """A judge that answers each picture after a delay of its own, up to 20 ms."""
    server = servers(Judges)
    chance = random.Random(0)
    server.before = lambda asked: time.sleep(0.02 * chance.random())
    return server


def identities(call):
    """What the judge says of the pictures that one update was made of, from their own last states."""
    run, parts, advantages = call.args
    images = torch.cat([run.model.decode(part["path"][-1].x_next) for part in parts])
    return torch.from_numpy((1 + 4 * brightness_of(images)) / 5).reshape(advantages.shape), advantages


@pytest.mark.parametrize("overlap", ["--no-overlap", "--overlap"])
def test_every_score_goes_to_its_own_picture_whatever_the_order_of_the_answers(go, tmp_path, shuffled, spy, overlap):
    taught, drawn = spy(teach, "update_policy"), spy(teach, "roll_out")
    flags = [*TEXT, overlap, "--steps", "4", "--save-every", "9", "--updates", "3", "--advantage-std", "none"]
    folder = go("run", *flags, *NOT_WARM, *rewards_file(tmp_path, {"vlm": 1}, scorers={"vlm": judge(shuffled)}))
    assert len(taught) == 4 * 3
    for call in taught:
        scores, advantages = identities(call)
        assert scores.unique().numel() == scores.numel(), "a picture is known by its score"
        assert torch.allclose(advantages.double(), scores - scores.mean(1, keepdim=True), rtol=0, atol=1e-6)
    answered = [value for _, value in shuffled.asked]
    in_order = torch.cat([call.result[1] for call in drawn])
    assert sorted(answered) == pytest.approx(sorted(brightness_of(in_order)), abs=1e-9)
    assert answered != pytest.approx(list(brightness_of(in_order)), abs=1e-9), "the answers came in another order"
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3, 4]


def test_what_is_learnt_does_not_depend_on_how_long_a_judge_thinks(go, tmp_path, shuffled):
    flags = [*TEXT, "--overlap", "--steps", "4", "--save-every", "9", "--updates", "3", *NOT_WARM]
    flags += rewards_file(tmp_path, {"vlm": 1}, scorers={"vlm": judge(shuffled)})
    slow = go("slow", *flags)
    shuffled.before = lambda asked: None
    quick = go("quick", *flags)
    assert same(stored(quick), stored(slow)) and metrics(quick) == metrics(slow)
    waited_for = go("waited-for", *flags, "--no-overlap")
    assert not same(stored(waited_for), stored(quick)), "but on whether it is waited for"


def test_the_next_batch_is_drawn_while_the_judge_thinks_of_this_one(go, tmp_path, servers, monkeypatch):
    judges, begun, waits, real = servers(Judges), threading.Semaphore(0), [], teach.roll_out

    def roll_out(*args):
        begun.release()
        return real(*args)

    def before(asked):  # no answer about a batch before the one after it is being drawn
        if not waits:
            waits.append(begun.acquire(timeout=5) and begun.acquire(timeout=5))

    monkeypatch.setattr(teach, "roll_out", roll_out)
    judges.before = before
    flags = [*TEXT, "--overlap", "--steps", "2", "--save-every", "9"]
    go("run", *flags, *rewards_file(tmp_path, {"vlm": 1}, scorers={"vlm": judge(judges, concurrency=1)}))
    assert waits == [True]


def test_the_first_ratio_is_one_unless_the_batch_was_drawn_by_the_policy_before(go, spy):
    rows = spy(rollout, "rows_of")
    flags = [*TEXT, "--rewards", "quality=1", "--steps", "5", "--save-every", "2", *NOT_WARM]
    at_once = [line["ratio_std"] for line in metrics(go("at-once", *flags))]
    assert at_once == [0.0] * 5, "drawn, scored and learnt from, one after the other"
    ahead = [line["ratio_std"] for line in metrics(go("ahead", *flags, "--overlap"))]
    assert [value > 0 for value in ahead] == [False, True, False, True, False], "and not right after a checkpoint"
    drawn = [call.result for call in rows]
    assert drawn[:5] == drawn[5:] and len(drawn) == 10, "the same prompts and noise, step by step"
    assert len({row.seed for step in drawn[:5] for row in step}) == 5 * 6


def test_an_overlapped_run_that_is_interrupted_ends_with_the_bits_of_one_that_was_not(go, monkeypatch):
    flags = [*TEXT, "--overlap", "--rewards", "quality=1", "--steps", "5", "--save-every", "2", *NOT_WARM]
    whole = go("whole", *flags)
    for step in (1, 2, 3, 4):
        with monkeypatch.context() as patch:
            after(patch, step, interrupt)
            cut = go(f"cut{step}", *flags, code=130)
        go(f"cut{step}", *flags)
        assert same(stored(cut), stored(whole)) and metrics(cut) == metrics(whole), step


def test_an_overlapped_run_that_was_stopped_between_checkpoints_goes_on_with_its_own_policy(go, monkeypatch):
    """What was drawn ahead is gone, so that the bits are others; the step itself is as good as any first one."""
    flags = [*TEXT, "--overlap", "--rewards", "quality=1", "--steps", "5", "--save-every", "9", *NOT_WARM]
    with monkeypatch.context() as patch:
        after(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        cut = go("cut", *flags)
    assert stored(cut)["step"] == 3
    go("cut", *flags)
    assert [line["ratio_std"] > 0 for line in metrics(cut)] == [False, True, True, False, True]


@pytest.mark.parametrize("overlap", ["--no-overlap", "--overlap"])
def test_a_run_that_is_told_to_stop_does_not_wait_for_a_judge(go, tmp_path, servers, capsys, overlap):
    judges, whole_step = servers(Judges), 6 * 2
    flags = [*TEXT, overlap, "--steps", "3", "--save-every", "1", *NOT_WARM]  # at each step, so that --overlap rests
    flags += rewards_file(tmp_path, {"vlm": 1}, scorers={"vlm": judge(judges)})
    whole = go("whole", *flags)
    judges.asked.clear()

    def before(asked):
        if len(judges.asked) >= whole_step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
            judges.over.wait(5)

    judges.before = before
    began = time.monotonic()
    cut = go("cut", *flags)
    assert time.monotonic() - began < 4, "the judge has not answered yet"
    assert "cut: stopped by SIGTERM" in capsys.readouterr().err and stored(cut)["step"] == 1
    judges.before = lambda asked: None
    go("cut", *flags)
    assert same(stored(cut), stored(whole)) and metrics(cut) == metrics(whole)


# ------------------------------------------------------------------------------------------------- reward hacking
@pytest.fixture
def hacked(monkeypatch):
    """Whenever it is asked, the reward has risen by 0.1, and the one that may be watched has fallen by 0.1."""

    def says(start, slope):
        steps = count(1)

        def score(images, prompts):
            level = start + slope * next(steps)
            return [level + 0.01 * float(image.mean()) for image in images]

        return score

    monkeypatch.setitem(tiny.SCORERS, "quality", says(0.0, 0.1))
    monkeypatch.setitem(tiny.SCORERS, "preference", says(0.9, -0.1))


def test_a_watched_reward_that_falls_while_the_trained_one_rises_has_a_column_and_one_warning(
    go, tmp_path, hacked, monkeypatch, capsys
):
    monkeypatch.setattr(scoring.is_hacked, "__defaults__", (2, 0.1))  # windows of two steps, where a run's are of 20
    folder = go("run", *TEXT, "--steps", "6", *rewards_file(tmp_path, {"quality": 1}, watch=["preference"]))
    lines = metrics(folder)
    assert [round(line["reward"], 1) for line in lines] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert [round(line["reward/preference"], 1) for line in lines] == [0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
    # Means over two steps: 0.75 at first, 0.55 after four, the first that an alarm may compare.
    said = re.findall(r"warning: step (\d): the reward rises while preference falls", capsys.readouterr().err)
    assert said == ["4"], "once"


# ------------------------------------------------------------------------------------------------------- curation
CURATE = ["--stage", "curate", "--train-prompts", "12", "--rewards", "quality=1", "--group-size", "3"]


def texts(folder):
    """Every file of a curation, by its name: what it holds."""
    files = [folder / "curation.md", *sorted((folder / "prompts").rglob("*.*"))]
    return {str(file.relative_to(folder)): file.read_text() for file in files}


def threshold(folder):
    """A value that half of the ranges exceed."""
    middle = sorted(ranges(folder).values())[17:19]
    return str(sum(middle) / 2)


def ranges(folder):
    """{(task, text): range} of 36 prompts, as they were written down."""
    lines = filter(None, (folder / "ranges/rank-0.jsonl").read_text().splitlines())
    entries = map(json.loads, lines)
    return {(entry["task"], entry["text"]): max(entry["scores"]) - min(entry["scores"]) for entry in entries}


def test_a_curation_that_is_interrupted_asks_no_prompt_twice_and_ends_with_the_same_files(go, spy, monkeypatch, capsys):
    asked = spy(scoring.Panel, "ask")

    def groups():
        found = [(p.task, p.text) for call in asked for p in call.args[2][::3]]
        asked.clear()
        return found

    whole = go("whole", *CURATE)
    everything = groups()
    assert len(set(everything)) == len(everything) == 36
    flags, real = [*CURATE, "--threshold", threshold(whole)], curation.Ranges.add
    go("whole", *flags)
    assert groups() == [], "another threshold needs no new pictures"

    def interrupted_after(parts):
        left = iter(range(parts - 1))

        def add(known, *found):
            real(known, *found)
            if next(left, None) is None:
                raise KeyboardInterrupt

        return add

    for stop in (1, 4, 7):
        with monkeypatch.context() as patch:
            patch.setattr(curation.Ranges, "add", interrupted_after(stop))
            cut = go(f"cut{stop}", *flags, code=130)
        before = groups()
        assert len(before) == 3 * stop and not (cut / "curation.md").exists()
        go(f"cut{stop}", *flags)
        assert before + groups() == everything
        assert texts(cut) == texts(whole)
    assert set(texts(whole)) == {
        "curation.md",
        *(f"prompts/{task}/train_metadata.jsonl" for task in ("composition", "quality")),
        "prompts/text/train.txt",
    }
    assert "18 of 36 prompts kept" in capsys.readouterr().out


def test_what_a_curation_keeps_is_what_the_next_run_trains_on(go, spy):
    folder = go("kept", *CURATE)
    folder = go("kept", *CURATE, "--threshold", threshold(folder))
    kept = {key for key, value in ranges(folder).items() if value > float(threshold(folder))}
    rows = spy(rollout, "rows_of")
    mine = ["--prompts", *(f"{task}={folder / 'prompts' / task}" for task in TASKS)]
    go("next", "--stage", "grpo", "--task", "mix", "--steps", "5", "--prompts-per-step", "3", *mine)
    trained = {(row.prompt.task, row.prompt.text) for call in rows for row in call.result}
    assert trained <= kept and {task for task, _ in trained} == set(TASKS)
    tags = {row.prompt.metadata.get("tag") for call in rows for row in call.result if row.prompt.task == "composition"}
    assert tags & set(tiny.TAG_MIX), "with the checklists that composition is scored by"
    assert len(kept) == 18 and {task for task, _ in kept} == set(TASKS)


def test_a_prompt_that_is_given_twice_is_asked_about_once(go, tmp_path, spy):
    asked, file = spy(scoring.Panel, "ask"), tmp_path / "words.txt"
    lines = [f'a sign that says "{word}"' for word in ("CAT", "HAT", "CAT", "HEN")]
    file.write_text("".join(line + "\n" for line in lines))
    folder = go("run", *CURATE, "--tasks", "text", "--prompts", f"text={file}", "--threshold", "0")
    assert [p.text for call in asked for p in call.args[2][::3]] == [lines[0], lines[1], lines[3]]
    assert (folder / "prompts/text/train.txt").read_text() == file.read_text(), "and kept as often as it was given"


def test_other_rewards_give_other_ranges_and_another_way_to_a_scorer_does_not(go, tmp_path, servers, spy):
    asked = spy(scoring.Panel, "ask")

    def run(weights, **parts):
        asked.clear()
        go("run", "--stage", "curate", *rewards_file(tmp_path, weights, **parts))
        return len(asked)

    first, second = (servers(Served, score_jpeg) for _ in range(2))
    assert run({"far": 1}, scorers={"far": served(first)}) > 0
    assert run({"far": 1}, scorers={"far": served(second, timeout=3.0)}) == 0, "the same scorer, elsewhere"
    assert run({"far": 2}, scorers={"far": served(second)}) > 0
    assert run({"quality": 1}) > 0
