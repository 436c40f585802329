"""Runs whose rewards come from a far scorer, as a user starts them: every curve against the pictures themselves, a
scorer that fails, answers in any order and at any speed, a watched reward, prompts that are worth their samples.

The far scorer is a real server on this machine. Its score is the picture's brightness, so that a score that goes to
another picture is seen.
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
from contextlib import ExitStack
from itertools import count

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from harness import curation, rollout
from harness.run import Run
from scorers import panel as scoring
from tests.helpers.far import ABOUT, Far
from tests.helpers.runs import TASKS, metrics, same, stored, the_error
from tiny import drawings as tiny

TEXT = ["--stage", "grpo", "--task", "text"]
NOT_WARM = ["--warmup", "0", "--lr", "0.01"]  # the first update already moves the policy


@pytest.fixture
def start():
    """start(): a far scorer that is stopped when the test ends."""
    with ExitStack() as stack:

        def start(port=0):
            far = stack.enter_context(Far(port=port))
            far.answer = lambda body: {"scores": values_of(body), **ABOUT}
            return far

        yield start


@pytest.fixture
def far(start):
    return start()


@pytest.fixture
def shuffled(far):
    """It answers each picture after a delay of its own, up to 20 ms; `answered`: the scores in that order."""
    chance, far.answered = random.Random(0), []

    def plan(number, body):
        time.sleep(0.02 * chance.random())
        far.answered += values_of(body)

    far.plan = plan
    return far


def values_of(body):
    """The brightness of a request's pictures: the mean of all pixels."""
    pictures = (Image.open(io.BytesIO(base64.b64decode(png))) for png in body["images"])
    return [float(np.asarray(picture, np.float64).mean() / 255) for picture in pictures]


def brightness_of(images):
    """The same of (B, 3, H, W) in [0, 1], after the 8 bits of a PNG."""
    return ((images * 255).round().double().mean((1, 2, 3)) / 255).numpy()


def asks(folder, far, weights=None, near=None, **more):
    """--rewards FILE: "far", asked picture by picture, beside `near` scorers; weights: {category: {name: weight}}."""
    fast = {"timeout": 5.0, "deadline": 1.5, "tries": 2, "rest": 0.01, "longest_rest": 0.05, "batch": 1}
    entry = {"kind": "served", "scorer": "far", "endpoints": [far.url], **fast, **more}
    file, weights = folder / "rewards.json", weights or {"default": {"far": 1.0}}
    file.write_text(json.dumps({"scorers": {"far": entry, **(near or {})}, "weights": weights}))
    return ["--rewards", str(file)]


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


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


# ------------------------------------------------------------------------------------------- what is asked, and logged
def test_near_and_far_scorers_are_mixed_by_category_and_each_has_its_curve(go, tmp_path, far, spy):
    weights = {"counting": {"near": 0.5, "far": 2.0}, "default": {"near": 1.0}}
    drawn, near = spy(rollout, "roll_out"), {"near": {"kind": "quality"}}
    flags = ["--stage", "grpo", "--task", "composition", "--updates", "3", "--steps", "3"]
    folder = go("mixed", *flags, *asks(tmp_path, far, weights, near))
    counted, questions = [], []
    for step, line in enumerate(metrics(folder)):
        calls = drawn[3 * step : 3 * step + 3]
        prompts = [row.prompt for call in calls for row in call.args[1]]
        images = torch.cat([call.result[1] for call in calls])
        quality, bright = tiny.quality(images).double().numpy(), brightness_of(images)
        counts = np.array([p.metadata["tag"] == "counting" for p in prompts])
        total = np.where(counts, 0.5 * quality + 2 * bright, quality)
        expected = {"reward": total.mean(), "group_std": total.reshape(3, 2).std(1).mean(), "lost": 0.0}
        expected |= {"reward/near": quality.mean()} | ({"reward/far": bright[counts].mean()} if counts.any() else {})
        found = {key: value for key, value in line.items() if key in ("reward", "group_std", "lost") or "/" in key}
        assert found == pytest.approx(expected, rel=2e-4, abs=1e-6)
        counted.append(int(counts.sum()))
        questions += [(p.text, round(v, 9)) for p, v, c in zip(prompts, bright, counts, strict=True) if c]
    assert 0 < sum(counted) < 18, "both categories came up"
    asked = [(body["prompts"][0]["text"], round(*values_of(body), 9)) for _, _, body in far.requests]
    assert sorted(asked) == sorted(questions), "each picture with its own prompt, and no other"
    events = EventAccumulator(str(folder), {"histograms": 0}).Reload()
    assert {"reward", "reward/near", "reward/far"} <= set(events.Tags()["scalars"])
    sizes = {name: [e.histogram_value.num for e in events.Histograms(f"rewards/{name}")] for name in ("near", "far")}
    assert sizes == {"near": [6] * 3, "far": [n for n in counted if n]}


# What a scorer answers; none of it may reach the weights.
NO_SCORES = {
    "near": lambda far, m: m.setitem(tiny.SCORERS, "quality", lambda i, p: [1.5] * len(i)),  # out of its range
    "far": lambda far, m: setattr(far, "answer", lambda body: {"scores": [-0.5], **ABOUT}),
    "far, nan": lambda far, m: setattr(far, "answer", lambda body: {"scores": [math.nan], **ABOUT}),
}


@pytest.mark.parametrize("what", NO_SCORES)
def test_what_is_no_score_ends_the_run_and_names_scorer_and_prompt(
    go, tmp_path, far, monkeypatch, updates, capsys, what
):
    NO_SCORES[what](far, monkeypatch)
    name = what.split(",")[0]
    near = {"near": {"kind": "quality"}}
    folder = go("run", *TEXT, *asks(tmp_path, far, {"default": {"near": 1, "far": 1}}, near), code=2)
    line = the_error(capsys)
    assert f"'{name}'" in line and re.search(r"prompt 'a sign that says \"[A-Z]+\"'", line)
    assert not updates and stored(folder)["step"] == 0 and not (folder / "metrics.jsonl").exists()


def test_a_run_whose_scorer_is_gone_is_saved_and_goes_on_when_it_is_back(go, tmp_path, start, monkeypatch, capsys):
    far = start()
    flags = [*TEXT, "--steps", "4", "--save-every", "9", *NOT_WARM, *asks(tmp_path, far)]
    whole = go("whole", *flags)
    with monkeypatch.context() as patch:
        after(patch, 2, far.__exit__)
        cut = go("cut", *flags, code=2)
    assert "'far'" in (line := the_error(capsys)) and far.url in line
    assert [p.name for p in (cut / "checkpoints").iterdir()] == ["step-000002"], "the last whole step"
    assert not (cut / "report.html").exists()
    start(far.server_port)
    go("cut", *flags)
    assert same(stored(cut), stored(whole)) and metrics(cut) == metrics(whole) and len(metrics(whole)) == 4


# ------------------------------------------------------------------------------------ drawing while others score
@pytest.mark.parametrize("overlap", ["--no-overlap", "--overlap"])
def test_every_score_goes_to_its_own_picture_whatever_the_order_of_the_answers(go, tmp_path, shuffled, spy, overlap):
    taught, drawn = spy(train, "update_policy"), spy(rollout, "roll_out")
    flags = [*TEXT, overlap, "--steps", "4", "--save-every", "9", "--updates", "3", "--advantage-std", "none"]
    folder = go("run", *flags, *NOT_WARM, *asks(tmp_path, shuffled))
    assert len(taught) == 4 * 3
    for call in taught:
        run, parts, advantage_B, _ = call.args
        images = torch.cat([run.model.decode(part.x0) for part in parts])
        scores = torch.from_numpy(brightness_of(images)).reshape(-1, 2)
        assert scores.unique().numel() == scores.numel(), "a picture is known by its score"
        expected = (scores - scores.mean(1, keepdim=True)).flatten()
        assert torch.allclose(advantage_B.double(), expected, rtol=0, atol=1e-6)
    in_order = brightness_of(torch.cat([call.result[1] for call in drawn]))
    assert sorted(shuffled.answered) == pytest.approx(sorted(in_order), abs=1e-9)
    assert shuffled.answered != pytest.approx(list(in_order), abs=1e-9), "the answers came in another order"
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3, 4]


@pytest.mark.parametrize("more", [["--micro-batch", "3"], ["--micro-batch", "0", "--overlap"]])
def test_others_are_drawn_while_a_group_is_scored(go, tmp_path, far, monkeypatch, more):
    """Q 4.1: the rest of the same step, of which the first three rows hold one whole group of two; or the next step."""
    begun, waits, real = threading.Semaphore(0), [], rollout.roll_out

    def roll_out(*args):
        begun.release()
        return real(*args)

    def plan(number, body):  # no answer about a group before the micro-batch after it is being drawn
        if not waits:
            waits.append(begun.acquire(timeout=5) and begun.acquire(timeout=5))

    monkeypatch.setattr(rollout, "roll_out", roll_out)
    far.plan = plan
    flags = [*TEXT, *more, "--updates", "1", "--steps", "2", "--save-every", "9"]
    go("run", *flags, *asks(tmp_path, far, concurrency=1, deadline=20.0))
    assert waits == [True]


def test_the_first_ratio_is_one_unless_the_batch_was_drawn_by_the_policy_before(go, spy):
    rows = spy(rollout, "rows_of")
    flags = [*TEXT, "--rewards", "quality=1", "--steps", "5", "--save-every", "3", "--micro-batch", "3", *NOT_WARM]
    at_once = [line["ratio_std"] for line in metrics(go("at-once", *flags))]
    assert at_once == [0.0] * 5, "drawn, scored and learnt from, one after the other"
    ahead = [line["ratio_std"] for line in metrics(go("ahead", *flags, "--overlap"))]
    assert [value > 0 for value in ahead] == [False, True, True, False, True], "and not right after a checkpoint"
    drawn = [call.result for call in rows]
    assert drawn[:5] == drawn[5:] and len(drawn) == 10, "the same prompts and noise, step by step"


@pytest.mark.parametrize("stage", ["grpo", "nft"])
@pytest.mark.parametrize("every", ["2", "9"])
def test_an_overlapped_run_that_is_stopped_ends_with_the_bits_of_one_that_was_not(go, monkeypatch, stage, every):
    """Killed, stopped between two steps, and while a step is drawn: by the policy before the last update, if ahead."""
    flags = ["--stage", stage, "--task", "text", "--overlap", "--rewards", "quality=1", "--steps", "5", *NOT_WARM]
    flags += ["--save-every", every]
    whole = go("whole", *flags)
    calls, real = iter(range(99)), rollout.roll_out

    def fourth(*what):
        if next(calls) == 3:
            terminate()
        return real(*what)

    for name, code, at in (("killed", 130, 2), ("between", 0, 3), ("within", 0, 2)):
        with monkeypatch.context() as patch:
            if name == "within":
                patch.setattr(rollout, "roll_out", fourth)
            else:
                after(patch, 3, interrupt if code else terminate)
            cut = go(name, *flags, code=code)
        assert code or stored(cut)["step"] == at
        go(name, *flags)
        assert same(stored(cut), stored(whole)) and metrics(cut) == metrics(whole), name


@pytest.mark.parametrize("overlap", ["--no-overlap", "--overlap"])
def test_a_run_that_is_told_to_stop_does_not_wait_for_a_scorer(go, tmp_path, far, overlap):
    flags = [*TEXT, overlap, "--steps", "3", "--save-every", "1", *NOT_WARM]  # at each step, so that --overlap rests
    flags += asks(tmp_path, far, deadline=20.0)
    whole = go("whole", *flags)
    done = len(far.requests)

    def plan(number, body):
        if number >= done + 6 * 2 - 1:  # in the second step
            terminate()
            far.over.wait(5)

    far.plan = plan
    began = time.monotonic()
    cut = go("cut", *flags)
    assert time.monotonic() - began < 4, "the scorer has not answered yet"
    assert stored(cut)["step"] == 1
    far.plan = lambda number, body: None
    go("cut", *flags)
    assert same(stored(cut), stored(whole)) and metrics(cut) == metrics(whole)


def test_a_watched_reward_that_falls_while_the_trained_one_rises_has_a_column_and_one_warning(
    go, tmp_path, monkeypatch, capsys
):
    def says(first, slope):
        steps = count(1)

        def score(images, prompts):
            level = first + slope * next(steps)
            return [level + 0.01 * float(image.mean()) for image in images]

        return score

    monkeypatch.setitem(tiny.SCORERS, "quality", says(0.0, 0.1))
    monkeypatch.setitem(tiny.SCORERS, "preference", says(0.9, -0.1))
    monkeypatch.setattr(scoring.is_hacked, "__defaults__", (2, 0.1))  # windows of two steps, where a run's are of 20
    file = tmp_path / "r.json"
    file.write_text(json.dumps({"weights": {"default": {"quality": 1}}, "watch": ["preference"]}))
    lines = metrics(go("run", *TEXT, "--steps", "6", "--rewards", str(file)))
    assert [round(line["reward/preference"], 1) for line in lines] == [0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
    # Means over two steps: 0.75 at first, 0.55 after four, the first that may be compared.
    assert re.findall(r"warning: step (\d).*preference", capsys.readouterr().err) == ["4"], "once"


# ------------------------------------------------------------------------------------------------------- curation
CURATE = ["--stage", "curate", "--train-prompts", "12", "--rewards", "quality=1", "--group-size", "3"]


def files(folder):
    """Every file of a curation, by its name: what it holds."""
    found = [folder / "curation.md", *sorted((folder / "prompts").rglob("*.*"))]
    return {str(file.relative_to(folder)): file.read_text() for file in found}


def ranges(folder):
    """{(task, text): range} of 36 prompts, as they were written down."""
    entries = map(json.loads, filter(None, (folder / "ranges/rank-0.jsonl").read_text().splitlines()))
    return {(entry["task"], entry["text"]): max(entry["scores"]) - min(entry["scores"]) for entry in entries}


def threshold(folder):
    """A value that half of the ranges exceed."""
    return str(sum(sorted(ranges(folder).values())[17:19]) / 2)


def test_a_curation_that_is_interrupted_asks_no_prompt_twice_and_ends_with_the_same_files(go, spy, monkeypatch):
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

    left = iter(range(6))

    def add(known, *found):
        real(known, *found)
        if next(left, None) is None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(curation.Ranges, "add", add)
        cut = go("cut", *flags, code=130)
    before = groups()
    assert len(before) == 3 * 7 and not (cut / "curation.md").exists()
    go("cut", *flags)
    assert before + groups() == everything and files(cut) == files(whole)
    assert len(files(whole)) == 1 + len(TASKS), "the report, and a file of prompts for each task"


def test_a_prompt_that_is_given_twice_is_asked_about_once(go, tmp_path, spy, capsys):
    asked, encoded, file = spy(scoring.Panel, "ask"), spy(rollout, "encode_all"), tmp_path / "words.txt"
    lines = [f'a sign that says "{word}"' for word in ("CAT", "HAT", "CAT", "HEN")]
    file.write_text("".join(line + "\n" for line in lines))
    folder = go("run", *CURATE, "--tasks", "text", "--prompts", f"text={file}", "--threshold", "0")
    assert [p.text for call in asked for p in call.args[2][::3]] == [lines[0], lines[1], lines[3]]
    assert [call.args[2] for call in encoded] == [False], "without guidance nothing asks for the empty prompt"
    assert "run: 100%" in capsys.readouterr().err
    assert (folder / "prompts/text/train.txt").read_text() == file.read_text(), "and kept as often as it was given"


def test_other_rewards_give_other_ranges_and_another_way_to_a_scorer_does_not(go, tmp_path, start, spy):
    asked, first, second = spy(scoring.Panel, "ask"), start(), start()

    def run(*flags):
        asked.clear()
        go("run", "--stage", "curate", *flags)
        return len(asked)

    assert run(*asks(tmp_path, first)) > 0
    assert run(*asks(tmp_path, second, timeout=3.0)) == 0, "the same scorer, elsewhere"
    assert run(*asks(tmp_path, second, {"default": {"far": 2.0}})) > 0
    assert run("--rewards", "quality=1") > 0
