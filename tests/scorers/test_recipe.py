"""Oracles for --rewards: what is asked for by default, what each form says, one line for every mistake in it."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import settings as S
from scorers import recipe as R

ROOT = Path(__file__).resolve().parents[2]
TINY, FLOW = "--preset tiny --stage grpo", "--preset flow-opd --stage grpo"
JUDGE = {"kind": "judge", "rubric": "alignment", "model": "m", "endpoints": ["http://a:1/v1"]}


def read(line):
    return R.read(S.parse(line.split())[0])


def write(tmp_path, content):
    """--rewards FILE of a recipe that holds `content`, written as JSON unless it is text or bytes."""
    file = tmp_path / "r.json"
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    file.write_bytes(content)
    return f"--rewards {file}"


def refusal(line):
    """The message of the SettingsError that a command line gives; it is one line."""
    with pytest.raises(S.SettingsError) as error:
        read(line)
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------- by default
INSTRUCTION = {"kind": "vlm", "dtype": "bfloat16", "rubric": "editing"}
BLEND = {"quality": 0.4, "preference": 0.6}
ALL_TINY = {"composition": {"task": 1.0}, "text": {"task": 1.0}, "quality": BLEND}
ALL_REAL = {"composition": {"geneval": 1.0}, "text": {"ocr": 1.0}, "quality": {"pickscore": 1.0}}
DEFAULTS = [
    (f"{TINY} --task text", {"text": {"task": 1.0}}),
    (f"{TINY} --task composition", {"composition": {"task": 1.0}}),
    (f"{TINY} --task quality", {"quality": BLEND}),
    (f"{TINY} --task mix", ALL_TINY),
    (TINY, ALL_TINY),
    ("--preset tiny --stage curate --tasks quality,text", {"quality": BLEND, "text": {"task": 1.0}}),
    ("--preset tiny --stage curate", ALL_TINY),
    (f"{FLOW} --task text", {"text": {"ocr": 1.0}}),
    (f"{FLOW} --task composition", {"composition": {"geneval": 1.0}}),
    (f"{FLOW} --task quality", {"quality": {"pickscore": 1.0}}),
    (f"{FLOW} --task mix", ALL_REAL),
    ("--stage curate --tasks text", {"text": {"ocr": 1.0}}),
    ("--stage curate --task text", ALL_REAL),  # grpo alone has a --task
    ("--stage opd --tasks text", {"text": {"ocr": 1.0}}),
    ("--stage curate --tasks edit", {"edit": {"instruction": 0.6, "identity": 0.4}}),
]


@pytest.mark.parametrize(("line", "weights"), DEFAULTS, ids=[line for line, _ in DEFAULTS])
def test_without_rewards_each_task_that_is_drawn_is_paid_by_its_own(line, weights):
    asked = read(line)
    names = {name for row in weights.values() for name in row}
    known = {} if "tiny" in line else {"instruction": INSTRUCTION, "identity": {"kind": "face", "no_face": "skip"}}
    assert asked == R.Recipe({name: known.get(name, {"kind": name}) for name in names}, weights)
    assert list(asked.weights) == list(weights), "in the order of the tasks"


def test_a_recipe_shares_no_dictionary_with_the_next():
    first = read(TINY)
    first.weights["text"]["task"], first.scorers["task"]["kind"] = 5.0, "other"
    assert read(TINY).weights == ALL_TINY and read(TINY).scorers["task"] == {"kind": "task"}


# ----------------------------------------------------------------------------------------------- the short form
def test_the_short_form_weighs_kinds_for_all_prompts():
    found = read(f"{FLOW} --rewards geneval=0.8,pickscore=.2,jpeg,ocr=-1,")
    assert found.weights == {"default": {"geneval": 0.8, "pickscore": 0.2, "jpeg": 1.0, "ocr": -1.0}}
    assert found.scorers == {name: {"kind": name} for name in ("geneval", "pickscore", "jpeg", "ocr")}
    assert list(found.scorers) == ["geneval", "pickscore", "jpeg", "ocr"] and found.watch == ()
    assert read(f"{TINY} --task text --rewards task=2,face=0").weights == {"default": {"task": 2.0, "face": 0.0}}


@pytest.mark.parametrize("name", [k for k in R.KINDS if k not in R.REQUIRED])
def test_every_kind_that_needs_nothing_more_has_a_short_form(name):
    assert read(f"{FLOW} --rewards {name}=3").weights == {"default": {name: 3.0}}


@pytest.mark.parametrize("name", R.NAMED)
def test_a_named_judge_is_the_same_one_by_default_in_the_short_form_and_in_a_file(tmp_path, name):
    expected = {name: R.NAMED[name]}
    assert read(f"{FLOW} --rewards {name}=2").scorers == expected
    assert read(f"{FLOW} {write(tmp_path, {'weights': {'portrait': {name: 1}}})}").scorers == expected
    watched = {"weights": {"default": {"jpeg": 1}}, "watch": [name]}
    assert read(f"{FLOW} {write(tmp_path, watched)}").scorers == {"jpeg": {"kind": "jpeg"}, **expected}
    own = {"scorers": {name: {"kind": "hps"}}, "weights": {"default": {name: 1}}}
    assert read(f"{FLOW} {write(tmp_path, own)}").scorers == {name: {"kind": "hps"}}, "the user's comes first"
    assert name in {n for rows in R.DEFAULTS.values() for row in rows.values() for n in row}


def test_no_name_means_two_things_and_no_category_two_weights():
    assert not set(R.NAMED) & set(R.KINDS)
    for table in (R.DEFAULTS, R.TINY_DEFAULTS):
        categories = [category for rows in table.values() for category in rows]
        assert len(categories) == len(set(categories)), "one task's row would replace another's"
        assert all(sum(row.values()) == pytest.approx(1) for rows in table.values() for row in rows.values())


def test_the_tiny_worlds_judges_are_its_own_eyes(tmp_path):
    line = "--preset tiny-qwen --stage grpo --task edit"
    assert read(line).scorers == {name: {"kind": name} for name in ("instruction", "identity")}
    assert read(f"{line} --rewards identity=1").scorers == {"identity": {"kind": "identity"}}
    flag = write(tmp_path, {"weights": {"default": {"portrait": 1}}})
    assert "portrait is not under scorers, and no kind; choose from geneval, ocr" in refusal(f"{line} {flag}")


ANY, REAL = (
    ", ".join([*(k for k in R.kinds(s) if k not in R.REQUIRED), *R.named(s)])
    for s in (S.parse(line.split())[0] for line in (TINY, FLOW))
)
SHORT = [
    (f"{TINY} --rewards orc=1", r"orc=1: no reward 'orc'; did you mean 'ocr'\?"),
    (f"{TINY} --rewards qqqq=1", rf"qqqq=1: no reward 'qqqq'; choose from {ANY}"),
    (f"{TINY} --rewards =1", rf"=1: no reward ''; choose from {ANY}"),
    (f"{FLOW} --rewards zz", rf"zz: no reward 'zz'; choose from {REAL}"),
    (f"{FLOW} --rewards jpeg,preference=1", rf"preference=1: no reward 'preference'; choose from {REAL}"),
    (f"{FLOW} --rewards task", rf"task: no reward 'task'; choose from {REAL}"),
    (f"{FLOW} --rewards pikscore=1", r"pikscore=1: no reward 'pikscore'; did you mean 'pickscore'\?"),
    (f"{TINY} --rewards ocr=1,task=much", r"task=much: 'much' is not a number"),
    (f"{TINY} --rewards ocr=1=2", r"ocr=1=2: '1=2' is not a number"),
    (f"{TINY} --rewards ocr=nan", r"ocr=nan: 'nan' is not a number"),
    (f"{TINY} --rewards ocr=-inf", r"ocr=-inf: '-inf' is not a number"),
    (f"{TINY} --rewards ocr=1,jpeg=2,ocr=3", r"ocr=3: ocr has a weight already"),
    (f"{TINY} --rewards ocr=0,jpeg=0.0", r"ocr=0,jpeg=0\.0: every weight is 0"),
    (f"{TINY} --rewards ,", r",: every weight is 0"),
    (f"{FLOW} --rewards judge=1", r"judge=1: judge needs rubric, model, endpoints: write them to a \.json file"),
    (f"{FLOW} --rewards served", r"served: served needs scorer, endpoints: write them to a \.json file"),
    (f"{TINY} --rewards vlm=2", r"vlm=2: vlm needs rubric: write them to a \.json file"),
    (f"{TINY} --rewards trained=2", r"trained=2: trained needs model: write them to a \.json file"),
]


@pytest.mark.parametrize(("line", "message"), SHORT, ids=[line for line, _ in SHORT])
def test_a_short_form_that_cannot_work_is_refused_in_one_line(line, message):
    assert re.fullmatch(f"--rewards {message}", refusal(line))


def test_the_tiny_world_has_more_kinds_and_its_own_eyes_have_no_options():
    tiny, real = (R.kinds(S.parse(line.split())[0]) for line in (TINY, FLOW))
    assert set(tiny) - set(real) == {*S.TINY_REWARDS} - {"geneval", "ocr"} and real == R.KINDS
    assert tiny == {**R.KINDS, **dict.fromkeys(S.TINY_REWARDS, ())}


# ----------------------------------------------------------------------------------------------------- the file
def examples():
    """The JSON recipes that this module's docstring and the README show."""
    for text in (R.__doc__, (ROOT / "README.md").read_text()):
        yield json.JSONDecoder().raw_decode(text[text.index('{"scorers"') :])[0]


def test_the_examples_that_are_shown_can_be_used_as_they_stand(tmp_path):
    shown, readme = examples()
    found = read(f"{FLOW} {write(tmp_path, shown)}")
    assert found.scorers == {**shown["scorers"], "geneval": {"kind": "geneval"}, "aesthetic": {"kind": "aesthetic"}}
    assert found.weights == {"composition": {"geneval": 0.8, "pick": 0.2}, "default": {"judge": 1.0}}
    assert found.watch == ("aesthetic",)
    found = read(f"{FLOW} {write(tmp_path, readme)}")
    assert {*found.scorers} == {"align", "pick", "geneval", "ocr", "aesthetic"}


def test_a_file_names_its_scorers_and_what_it_does_not_define_is_a_kind_of_its_own(tmp_path):
    scorers = {"soft": {"kind": "geneval", "batch": 2, "device": "cuda:1", "dtype": "bfloat16"}, "ocr": JUDGE}
    content = {"scorers": scorers, "weights": {"counting": {"soft": 1, "geneval": -2}, "text": {"ocr": 0.5}},
               "watch": ["jpeg", "soft"]}  # fmt: skip
    found = read(f"{FLOW} {write(tmp_path, content)}")
    assert found.scorers == {**scorers, "geneval": {"kind": "geneval"}, "jpeg": {"kind": "jpeg"}}
    assert found.scorers["ocr"]["kind"] == "judge", "what is defined comes before the kind of that name"
    assert found.weights == {"counting": {"soft": 1.0, "geneval": -2.0}, "text": {"ocr": 0.5}}
    assert all(type(weight) is float for row in found.weights.values() for weight in row.values())
    assert found.watch == ("jpeg", "soft")


def test_the_short_form_is_a_file_of_default_weights(tmp_path):
    content = {"weights": {"default": {"geneval": 0.8, "pickscore": 0.2}}}
    assert read(f"{FLOW} {write(tmp_path, content)}") == read(f"{FLOW} --rewards geneval=0.8,pickscore=0.2")


def given(**more):
    """A recipe that works, but for what is changed."""
    return {"weights": {"default": {"jpeg": 1.0}}, **more}


def entry(**options):
    """One defined scorer, named `x`."""
    return {"scorers": {"x": options}, "weights": {"default": {"x": 1.0}}}


KINDS, OPTIONS = ", ".join(R.KINDS), ", ".join(("kind", *R.KINDS["pickscore"]))
FILES = [
    ('{"weights": ', r" not JSON \(.+\)"),
    (b'{"weights": "\xff"}', r" not JSON \(.+utf-8.+\)"),
    ("[1]", r" must be an object, not \[1\]"),
    ({}, r" needs 'weights'"),
    (given(wieghts={}), r" has no 'wieghts'; did you mean 'weights'\?"),
    (given(zz={}), r" has no 'zz'; choose from scorers, weights, watch"),
    ({"weights": []}, r" weights must be an object"),
    (given(scorers=[]), r" scorers must be an object"),
    ({"weights": {}}, r" weights gives no scorer any weight"),
    ({"weights": {"default": {}}}, r" weights gives no scorer any weight"),
    ({"weights": {"default": {"jpeg": 0}, "text": {"ocr": 0.0}}}, r" weights gives no scorer any weight"),
    # weights
    ({"weights": {"text": ["ocr"]}}, r" weights\.text must be an object of weights, not \['ocr'\]"),
    ({"weights": {"text": {"ocr": "1"}}}, r" weights\.text\.ocr is '1'; it must be a number"),
    ({"weights": {"text": {"ocr": True}}}, r" weights\.text\.ocr is True; it must be a number"),
    ({"weights": {"text": {"ocr": None}}}, r" weights\.text\.ocr is None; it must be a number"),
    ('{"weights": {"text": {"ocr": NaN}}}', r" weights\.text\.ocr is nan; it must be a number"),
    ('{"weights": {"text": {"ocr": -1e999}}}', r" weights\.text\.ocr is -inf; it must be a number"),
    ({"weights": {"text": {"orc": 1}}},
     r" orc is not under scorers, and no kind; did you mean 'ocr'\?"),
    ({"weights": {"text": {"aligment": 1}}}, r" aligment is not under scorers.*; did you mean 'alignment'\?"),
    ({"weights": {"text": {"judge": 1}}}, r" judge \(not under scorers\) needs 'rubric'"),
    # scorers
    (given(scorers={"x": "ocr"}), r" scorers\.x must be an object, not 'ocr'"),
    (given(scorers={"x": None}), r" scorers\.x must be an object, not None"),
    (entry(model="m"), r" scorers\.x needs 'kind'"),
    (entry(kind="pickscroe"), r" scorers\.x: no reward of the kind 'pickscroe'; did you mean 'pickscore'\?"),
    (entry(kind="zzz"), rf" scorers\.x: no reward of the kind 'zzz'; choose from {KINDS}"),
    (entry(kind=["ocr"]), r" scorers\.x: no reward of the kind \['ocr'\].*"),
    (entry(kind="task"), r" scorers\.x: no reward of the kind 'task'.*"),
    (given(scorers={"x": {"kind": "ocr"}}), r" scorers\.x has no weight and is not watched; use it or remove it"),
    (entry(kind="pickscore", mdoel="m"), r" scorers\.x has no 'mdoel'; did you mean 'model'\?"),
    (entry(kind="pickscore", zzz=1), rf" scorers\.x has no 'zzz'; choose from {OPTIONS}"),
    (entry(kind="jpeg", device="cuda"), r" scorers\.x has no 'device'; choose from kind"),
    (entry(kind="ocr", dtype="float16"), r" scorers\.x has no 'dtype'; .+"),
    (entry(**JUDGE, device="cuda"), r" scorers\.x has no 'device'; .+"),
    (entry(**JUDGE, name="me"), r" scorers\.x has no 'name'; .+"),
    (entry(kind="hps", dtype="float61"), r" scorers\.x: dtype is 'float61'; choose from float32, bfloat16, float16"),
    (entry(kind="vlm", rubric="x", dtype=[]), r" scorers\.x: dtype is \[\]; it must be a str"),
    (entry(kind="geneval", strict="false"), r" scorers\.x: strict is 'false'; it must be a bool"),
    (entry(kind="pickscore", batch=True), r" scorers\.x: batch is True; it must be a int"),
    (entry(**{**JUDGE, "timeout": "fast"}), r" scorers\.x: timeout is 'fast'; it must be a int or float"),
    (entry(kind="face", no_face="never"), r" scorers\.x: no_face is 'never'; choose from error, skip"),
    (entry(**{**JUDGE, "endpoints": [3]}), r" scorers\.x: endpoints must be a list of addresses"),
    (entry(kind="trained"), r" scorers\.x needs 'model'"),
    (entry(kind="vlm", model="m"), r" scorers\.x needs 'rubric'"),
    (entry(kind="served", scorer="ocr"), r" scorers\.x needs 'endpoints'"),
    (entry(kind="served", endpoints=["http://a:1"]), r" scorers\.x needs 'scorer'"),
    (entry(**{**JUDGE, "endpoints": "http://a:1"}), r" scorers\.x: endpoints is 'http://a:1'; it must be a list"),
    (entry(**{**JUDGE, "endpoints": []}), r" scorers\.x: endpoints must be a list of addresses"),
    # watch
    (given(watch={"ocr": 0.3}), r" watch must be a list of scorers' names"),
    (given(watch=[3]), r" watch must be a list of scorers' names"),
    (given(watch=["orc"]), r" orc is not under scorers.*did you mean 'ocr'\?"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "message"), FILES, ids=[str(content)[:60] for content, _ in FILES])
def test_a_file_that_cannot_work_is_refused_by_its_name_and_entry(tmp_path, content, message):
    flag = write(tmp_path, content)
    assert re.fullmatch(re.escape(flag) + ":?" + message, refusal(f"{FLOW} {flag}"))


def test_the_refusals_start_from_a_recipe_that_works(tmp_path):
    assert read(f"{FLOW} {write(tmp_path, given())}").scorers == {"jpeg": {"kind": "jpeg"}}
    assert read(f"{FLOW} {write(tmp_path, entry(**JUDGE))}").scorers == {"x": JUDGE}


def test_a_file_that_is_not_there_is_named(tmp_path):
    assert refusal(f"{FLOW} --rewards {tmp_path}/no.json") == f"--rewards {tmp_path}/no.json: No such file or directory"
    (tmp_path / "d.json").mkdir()
    assert refusal(f"{FLOW} --rewards {tmp_path}/d.json") == f"--rewards {tmp_path}/d.json: Is a directory"


def test_the_tiny_worlds_eyes_take_no_options_and_are_no_kinds_elsewhere(tmp_path):
    flag = write(tmp_path, entry(kind="geneval", strict=True))
    assert read(f"{FLOW} {flag}").scorers == {"x": {"kind": "geneval", "strict": True}}
    assert re.search(r": scorers\.x has no 'strict'; choose from kind$", refusal(f"{TINY} {flag}"))
    flag = write(tmp_path, entry(kind="task"))
    assert read(f"{TINY} {flag}").scorers == {"x": {"kind": "task"}}
    assert "no reward of the kind 'task'" in refusal(f"{FLOW} {flag}")


@pytest.mark.parametrize("kind", R.KINDS)
def test_every_option_of_a_kind_can_be_given(tmp_path, kind):
    special = {"dtype": "float16", "endpoints": ["http://a:1"], "no_face": "skip"}
    values = {bool: True, int: 3, float: 0.5, str: "x"}
    options = {n: special.get(n) or values[R.TYPES.get(n, (str,))[-1]] for n in R.KINDS[kind]}
    assert read(f"{FLOW} {write(tmp_path, entry(kind=kind, **options))}").scorers == {"x": {"kind": kind, **options}}


# -------------------------------------------------------------------------------- what is copied from the factories
NOT_JSON = {"engine", "limits", "clock"}  # Python objects, which a file cannot hold
RENAMED = {"trained": {"folder": "model"}, "served": {"name": "scorer"}}  # what the file calls an argument


def arguments():
    """{kind: {option: whether it must be given}} of the real factories."""
    import reward_model
    from scorers import faces, remote
    from scorers import local as scorers
    from scorers import vlm as judges

    others = {"vlm": judges.local, "judge": remote.judge, "served": remote.served, "face": faces.scorer,
              "trained": reward_model.scorer}  # fmt: skip
    found = {}
    for kind, factory in {**scorers.FACTORIES, **others}.items():
        given = {p.name: p.default is p.empty for p in inspect.signature(factory).parameters.values()}
        found[kind] = {RENAMED.get(kind, {}).get(name, name): must for name, must in given.items()}
        for name in NOT_JSON & set(found[kind]):
            del found[kind][name]
        if "limits" in given:
            found[kind] |= dict.fromkeys(remote.Limits._fields, False)
    del found["judge"]["name"]  # the entry's own name stands in its place
    found["vlm"] |= {"thought": inspect.signature(judges.named).parameters["thought"].default is inspect._empty}
    return found


def test_the_options_are_the_real_factories_own_arguments():
    real = arguments()
    assert list(R.KINDS) == [*R.NEAR, *R.OTHERS] and set(R.KINDS) == set(real)
    for kind, options in R.KINDS.items():
        assert sorted(options) == sorted(real[kind]), kind
        assert set(R.REQUIRED.get(kind, ())) == {name for name, must in real[kind].items() if must}, kind
    from scorers import local as scorers
    from scorers import remote

    assert set(R.NEAR) == set(scorers.FACTORIES), "`scorers.make` knows these"
    assert remote.Limits._fields == R.LIMITS


def test_the_dtypes_and_the_tiny_worlds_eyes_are_the_real_ones():
    import torch

    from rewards import RewardError
    from scorers import local as scorers
    from scorers import vlm as judges
    from tiny import drawings as tiny
    from tiny import edits as tiny_edit

    assert all(isinstance(getattr(torch, name), torch.dtype) for name in R.DTYPES)
    assert [scorers.make("jpeg", dtype=name).name for name in R.DTYPES] == ["jpeg"] * 3
    with pytest.raises(RewardError, match="choose one of float32, bfloat16, float16$"):
        scorers.make("jpeg", dtype="zzzzzz")
    assert set(S.TINY_REWARDS) == {*tiny.SCORERS, "task", *tiny_edit.SCORERS}
    assert set(R.DEFAULTS) == set(R.TINY_DEFAULTS) == set(S.TASKS) == {*tiny.TASKS, *tiny_edit.TASKS}
    assert all(judges.named(entry["rubric"]) for entry in R.NAMED.values() if entry["kind"] == "vlm")


def test_reading_a_recipe_needs_nothing_but_the_standard_library_and_settings():
    code = (
        "import sys; before = set(sys.modules); from scorers import recipe; import settings; "
        "[recipe.read(settings.parse(['--stage', 'grpo', '--rewards', r])[0]) for r in ('', 'geneval=1')]; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before} - {'recipe', 'settings', 'presets'}; "
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
