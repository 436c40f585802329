"""Oracles for --rewards: what is asked for by default, what each form says, how options reach their factory."""

import functools
import json

import pytest
import torch

import settings
from harness import cli, load
from models import hub
from rewards import RewardError, Scorer
from scorers import registry as R
from scorers import remote, rubrics, vlm
from scorers import world as real
from tests.helpers.checks import refusal as _refusal
from tests.helpers.runs import metrics, the_error
from tiny import drawings, edits

JUDGE = {"kind": "judge", "rubric": "alignment", "model": "m", "endpoints": ["http://a:1/v1"]}


def write(tmp_path, content):
    """A rewards file that holds `content`, written as JSON unless it is text or bytes."""
    file = tmp_path / "r.json"
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    file.write_bytes(content)
    return str(file)


def refusal(call, *arguments):
    return _refusal(call, *arguments, error=RewardError)


# ------------------------------------------------------------------------------------------------------- by default
BLEND = {"quality": 0.4, "preference": 0.6}
DEFAULTS = [
    ("--preset tiny --stage curate --tasks quality,text", {"quality": BLEND, "text": {"task": 1.0}}),
    ("--preset flow-opd --stage grpo --task mix",
     {"composition": {"geneval": 1.0}, "text": {"ocr": 1.0}, "quality": {"pickscore": 1.0}}),
    ("--stage curate --tasks edit", {"edit": {"instruction": 0.6, "identity": 0.4}}),
]  # fmt: skip


@pytest.mark.parametrize(("line", "weights"), DEFAULTS, ids=[line for line, _ in DEFAULTS])
def test_without_rewards_each_task_that_is_drawn_is_paid_by_its_own(line, weights):
    s, _ = cli.parse(line.split())
    asked = load.asked_of(s)
    assert asked.weights == weights and asked.world == (drawings if "tiny" in line else real)
    kinds = {"instruction": "vlm", "identity": "face"}
    named = {name: kinds.get(name, name) for row in weights.values() for name in row}
    assert {name: entry["kind"] for name, entry in asked.scorers.items()} == named
    asked.weights["text"], asked.scorers["task"] = {}, {}
    assert load.asked_of(s).weights == weights, "nothing is shared"


def test_no_name_means_two_things_and_no_category_has_two_rows_of_weights():
    assert not set(R.NAMED) & set(R.KINDS)
    for owner, tasks in ((real, settings.TASKS), (drawings, drawings.TASKS), (edits, edits.TASKS)):
        assert set(owner.REWARDS) == set(tasks)
        categories = [category for rows in owner.REWARDS.values() for category in rows]
        assert len(categories) == len(set(categories)), "one task's row would replace another's"
        assert all(sum(row.values()) == pytest.approx(1) for rows in owner.REWARDS.values() for row in rows.values())
    assert all(entry["rubric"] in rubrics.RUBRICS for entry in R.NAMED.values() if entry["kind"] == "vlm")


# ------------------------------------------------------------------------------------- the short form, and the file
def test_the_short_form_weighs_scorers_for_all_prompts():
    found = R.read("geneval=0.8,pickscore=.2,jpeg,portrait=-1,my.py:own=2,", (), real)
    assert found.weights == {"default": {"geneval": 0.8, "pickscore": 0.2, "jpeg": 1.0, "portrait": -1.0, "own": 2.0}}
    kinds = {name: {"kind": name} for name in ("geneval", "pickscore", "jpeg")}
    assert found.scorers == {**kinds, "portrait": R.NAMED["portrait"], "own": {"kind": "my.py:own"}}
    assert R.read("identity=1", (), edits).scorers == {"identity": {"kind": "identity"}}, "the tiny world's own"


def test_the_example_that_is_shown_can_be_used_as_it_stands(tmp_path):
    shown, _ = json.JSONDecoder().raw_decode(R.__doc__[R.__doc__.index('{"scorers"') :])
    found = R.read(write(tmp_path, shown), (), real)
    assert found.scorers == {**shown["scorers"], "geneval": {"kind": "geneval"}, "aesthetic": {"kind": "aesthetic"}}
    assert found.weights == {"composition": {"geneval": 0.8, "pick": 0.2}, "default": {"judge": 1.0}}
    assert found.watch == ("aesthetic",)
    R.check(found)


def test_a_file_names_its_scorers_and_what_it_does_not_define_is_a_kind_of_its_own(tmp_path):
    scorers = {"soft": {"kind": "geneval", "batch": 2, "device": "cuda:1", "dtype": "bfloat16"}, "ocr": JUDGE}
    content = {"scorers": scorers, "weights": {"counting": {"soft": 1, "beauty": -2}, "text": {"ocr": 0.5}},
               "watch": ["jpeg", "soft"]}  # fmt: skip
    found = R.read(write(tmp_path, content), (), real)
    assert found.scorers == {**scorers, "beauty": R.NAMED["beauty"], "jpeg": {"kind": "jpeg"}}
    assert found.weights == {"counting": {"soft": 1.0, "beauty": -2.0}, "text": {"ocr": 0.5}}
    assert found.watch == ("jpeg", "soft")


def given(**more):
    return {"weights": {"default": {"jpeg": 1.0}}, **more}


SHORT = ["orc=1", "=1", "jpeg,preference=1", "ocr=1,task=much", "ocr=1=2", "ocr=nan", "ocr=-inf", "ocr=3,jpeg,ocr=3",
         "ocr=0,jpeg=0.0", ",", "no.json"]  # fmt: skip
FILES = [
    '{"weights": ', b'{"weights": "\xff"}', "[1]", {}, given(wieghts={}), {"weights": []}, given(scorers=[]),
    given(watch={"ocr": {"drop": 1}}), given(watch=[3]), {"weights": {}}, {"weights": {"default": {}}},
    {"weights": {"default": {"jpeg": 0}, "text": {"ocr": 0.0}}}, {"weights": {"text": ["ocr"]}},
    {"weights": {"text": {"ocr": "1"}}}, {"weights": {"text": {"ocr": True}}},
    '{"weights": {"text": {"ocr": NaN}}}', {"weights": {"text": {"orc": 1}}}, given(watch=["orc"]),
    given(scorers={"x": "ocr"}), given(scorers={"x": {"kind": "ocr"}}),
    {"scorers": {"x": {"kind": "task"}}, "weights": {"default": {"x": 1}}},
    {"scorers": {"x": {"model": "m"}}, "weights": {"default": {"x": 1}}},
]  # fmt: skip


@pytest.mark.parametrize("content", [*SHORT, *FILES], ids=lambda content: str(content)[:60])
def test_what_cannot_work_is_refused_by_its_name(tmp_path, content):
    text = content if content in SHORT else write(tmp_path, content)
    assert refusal(R.read, text, (), real).startswith(f"--rewards {text}: ")
    assert R.read(write(tmp_path, given(watch=["ocr"])), (), real).watch == ("ocr",), "a file that works"


# ------------------------------------------------------------------------------------------------------- the options
WRONG = {  # options of a kind, and the one that a message must name
    "pickscore": [{"mdoel": "m"}, {"batch": True}, {"batch": "3"}, {"dtype": "float61"}, {"dtype": []}],
    "jpeg": [{"device": "cuda"}],
    "geneval": [{"strict": "false"}],
    "face": [{"no_face": 3}, {"engine": "dlib"}],
    "vlm": [{}, {"rubric": 3}],
    "trained": [{}],
    "served": [{"scorer": "ocr"}, {"endpoints": ["http://a:1"]}],
    "judge": [{**JUDGE, "timeout": "fast"}, {**JUDGE, "endpoints": "http://a:1"}, {**JUDGE, "endpoints": []},
              {**JUDGE, "endpoints": [3]}, {**JUDGE, "device": "cuda"}, {**JUDGE, "clock": 3}],
}  # fmt: skip
NAMED_IN = {"vlm": "rubric", "trained": "model", "served": "", "judge": ""}


@pytest.mark.parametrize(("kind", "options"), [(kind, o) for kind, some in WRONG.items() for o in some])
def test_an_option_that_a_factory_does_not_take_is_refused_before_anything_is_loaded(kind, options):
    said = refusal(R.check, R.Asked({"mine": {**options, "kind": kind}}, {}))
    assert said.startswith("scorer 'mine': ") and NAMED_IN.get(kind, next(iter(options), "")) in said


def test_the_tiny_worlds_own_scorers_take_no_options_and_are_no_kinds_elsewhere():
    asked = R.Asked({"x": {"kind": "geneval", "strict": True}}, {})
    R.check(asked)
    assert "geneval has no options" in refusal(R.check, asked._replace(world=drawings))
    assert "no kind 'task'" in refusal(R.check, R.Asked({"x": {"kind": "task"}}, {}))


def test_options_reach_their_factory_each_as_what_it_takes_and_the_device_is_the_runs_unless_it_is_named(monkeypatch):
    calls = []
    for name in ("judge", "served"):
        fake = functools.wraps(getattr(remote, name))(lambda **given: calls.append(given) or Scorer("x", None, 0, 1))
        monkeypatch.setattr(remote, name, fake)
    monkeypatch.setattr(
        vlm, "vlm", functools.wraps(vlm.vlm)(lambda **given: calls.append(given) or Scorer("x", None, 0, 1))
    )
    fields = {"rubric": "alignment", "model": "m", "endpoints": ["http://a:1"], "request": {"max_tokens": None}}
    R.make("judge", {**fields, "timeout": 3, "tries": 5}, "cuda:7")
    assert calls.pop() == {**fields, "limits": remote.LIMITS._replace(timeout=3, tries=5)}
    R.make("served", {"scorer": "ocr", "endpoints": ["http://a:1"], "batch": 3})
    assert calls.pop() == {"scorer": "ocr", "endpoints": ["http://a:1"], "batch": 3}
    for device in ({}, {"device": "cuda:3"}):
        R.make("vlm", {"rubric": "deqa", "dtype": "bfloat16", **device}, "cuda:7")
        assert calls.pop() == {"rubric": "deqa", "dtype": torch.bfloat16, "device": "cuda:7", **device}


# -------------------------------------------------------------------------------------------- a function of one's own
OWN = """
def darkness(images, prompts, sources):
    assert len(images) == len(prompts) and sources is None
    return 1 - images.mean((1, 2, 3))

def broken(images, prompts, sources):
    return images.mean((1, 2, 3)) / 0 * 0

def raises(images, prompts, sources):
    return {}["no such key"]

def silent(images, prompts, sources):
    pass

def leaves(images, prompts, sources, asked=[]):
    asked.append(1)
    return exit("enough") if len(asked) == 2 else images.mean((1, 2, 3))

def grows(images, prompts, sources):
    return images.mean((1, 2, 3)).requires_grad_()
"""


def test_a_users_own_function_is_a_reward(go, tmp_path, capsys):
    """A whole run by it: `reward` is its mean before the weight, and the policy of the run moves."""
    (tmp_path / "own.py").write_text(OWN)
    flags = ["--stage", "grpo", "--task", "text", "--steps", "2", "--rewards"]
    folder = go("own", *flags, f"{tmp_path}/own.py:darkness=3")
    lines = metrics(folder)
    assert [line["reward"] for line in lines] == pytest.approx([3 * line["reward/darkness"] for line in lines], 1e-4)
    assert all(0 < line["reward/darkness"] < 1 and line["group_std"] > 0 and line["grad_norm"] > 0 for line in lines)
    for name in ("broken", "raises", "leaves"):
        folder = go(name, *flags, f"{tmp_path}/own.py:{name}", "--micro-batch", "0", "--updates", "1", code=2)
        assert name in the_error(capsys) and hub.last_checkpoint(folder).name == f"step-{int(name == 'leaves'):06d}"


def test_a_file_without_the_function_is_refused(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    assert "no function 'light'" in refusal(R.own, f"{tmp_path}/own.py:light")
    assert "no file" in refusal(R.own, f"{tmp_path}/other.py:light")
    own = R.make(f"{tmp_path}/own.py:darkness", {})
    assert isinstance(own, Scorer) and own.name == "darkness"
    assert "has no options" in refusal(R.make, f"{tmp_path}/own.py:darkness", {"batch": 3})


def test_whatever_a_scorer_or_its_file_raises_is_one_line_with_its_name(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    images = torch.rand(3, 3, 4, 5)
    for name, said in (("raises", "scorer 'raises': KeyError: 'no such key'"), ("silent", "scorer 'silent': ")):
        assert refusal(R.make(f"{tmp_path}/own.py:{name}", {}).score, images, [None] * 3, None).startswith(said)
    found = R.make(f"{tmp_path}/own.py:grows", {}).score(images, [None] * 3, None)
    assert found.tolist() == images.mean((1, 2, 3)).tolist() and not found.requires_grad
    for text, said in (("1 / 0", "ZeroDivisionError"), ("exit(3)", "SystemExit: 3")):
        (tmp_path / "bad.py").write_text(text)
        assert f"bad.py: {said}" in refusal(R.own, f"{tmp_path}/bad.py:x")
