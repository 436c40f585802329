"""Prompts by rules: sentences worked by hand and parsed back, spaces counted out, splits that share no content, and
GenEval's own file reproduced line by line."""

import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from math import comb, perm
from pathlib import Path

import pytest

from data import checklists
from data import files as D
from data import written as P
from rewards import ocr_target

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
TASKS = ("composition", "text", "quality")  # F's; a prompt's own words tell which of them it is
TAGS = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
MIX = {"composition": 3, "typography": 2, "portrait": 2, "general": 3}


def texts(*what):
    return [p.text for p in P.make_prompts(*what)]


def shipped(name):
    if not (SHARED / name).exists():
        pytest.skip(f"the project does not ship {name}")
    return SHARED / name


def most(task):
    """How many distinct test prompts there are, from what the refusal says."""
    with pytest.raises(ValueError) as error:
        P.make_prompts(task, "test", 10**15)
    return int(re.search(r"there are (\d+) distinct ones", str(error.value))[1])


def longest(task, split, count):
    """`count`, or all test prompts that there are of composition."""
    return min(count, P.TEST) if (task, split) == ("composition", "test") else count


# --------------------------------------------------------------------------------------------- GenEval's sentences
def one(name, count=1, **more):
    return {"class": name, "count": count, **more}


@pytest.mark.parametrize("entries, text", [
    ([one("bench")], "a bench"),
    ([one("umbrella")], "an umbrella"),
    ([one("scissors")], "a scissors"),
    ([one("orange", color="orange")], "an orange orange"),
    ([one("elephant", color="blue")], "a blue elephant"),
    ([one("bench", 3)], "three benchs"),
    ([one("bus", 2)], "two buses"),
    ([one("wine glass", 4)], "four wine glasses"),
    ([one("cross", 2, color="green")], "two green crosses"),
    ([one("tie"), one("oven")], "a tie and an oven"),
    ([one("laptop"), one("apple", position=["right of", 0])], "an apple right of a laptop"),
    ([one("laptop", position=["below", 1]), one("apple")], "a laptop below an apple"),
])  # fmt: skip
def test_sentences_are_those_of_geneval_worked_by_hand(entries, text):
    assert checklists.sentence(entries) == f"a photo of {text}"


def parsed(text):
    """A checklist read from the words alone: the way back from a prompt to its tag, include and exclude."""
    body = text.removeprefix("a photo of ")
    number, _, plural = body.partition(" ")
    if number in ("two", "three", "four"):
        count = ("two", "three", "four").index(number) + 2
        (name,) = [c for c in P.CLASSES if plural == c + ("es" if c[-1] == "s" else "s")]
        return {"tag": "counting", "include": [one(name, count)], "exclude": [one(name, count + 1)], "prompt": text}
    joint, entries = re.search(r" (and|left of|right of|above|below) ", body), []
    for article, _, name in (part.partition(" ") for part in (body.split(joint[0]) if joint else [body])):
        assert article == ("an" if name[0] in "aeiou" else "a"), text
        color, _, rest = name.partition(" ")
        entries.append(one(name) if name in P.CLASSES else one(rest, color=color))
        assert entries[-1]["class"] in P.CLASSES and entries[-1].get("color", "red") in P.COLORS
    if joint and joint[1] != "and":
        include = [entries[1], entries[0] | {"position": [joint[1], 0]}]
        return {"tag": "position", "include": include, "prompt": text}
    tags = {(1, False): "single_object", (1, True): "colors", (2, False): "two_object", (2, True): "color_attr"}
    return {"tag": tags[len(entries), "color" in entries[-1]], "include": entries, "prompt": text}


@pytest.mark.parametrize("split", D.SPLITS)
def test_every_checklist_is_what_its_sentence_says(split):
    prompts = P.make_prompts("composition", split, longest("composition", split, 4000), seed=2)
    for p in prompts:
        assert p.metadata == parsed(p.text)
        named = [(e["class"], e.get("color")) for e in p.metadata["include"]]
        assert all(color is None for name, color in named if name == "person")
        assert len({c for c, _ in named}) == len(named), "two different objects"
        if p.metadata["tag"] == "color_attr":
            assert named[0][1] != named[1][1], "in two different colours"
    assert {p.metadata["tag"] for p in prompts} == {*TAGS, *(["single_object"] if split == "test" else [])}


def test_every_line_of_genevals_file_is_one_that_the_rules_can_write():
    published = shipped("geneval_test_metadata.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in dict.fromkeys(published)]  # the file repeats every line four times
    assert len(lines) == 553 and [checklists.sentence(e["include"]) for e in lines] == [e["prompt"] for e in lines]
    spaces = P._composition()
    for line in lines:
        space, first = spaces[line["tag"]], line["include"][0]
        key = tuple(sorted(entry["class"] for entry in line["include"]))
        if line["tag"] in ("counting", "colors"):
            key = (first["class"], first["count"] if line["tag"] == "counting" else first["color"])
        assert key in space.keys, line
        drawable = [space.write(*key, *choice) for choice in itertools.product(*space.parts)]
        assert [json.dumps(metadata) for _, metadata in drawable].count(json.dumps(line)) == 1, "fields in their order"
    for field, ours in (("class", set(P.CLASSES)), ("color", set(P.COLORS))):
        assert {e[field] for line in lines for e in line["include"] if field in e} == ours


def test_the_number_of_quoted_words_is_spread_as_in_the_ocr_file():
    def shares(prompts):
        lengths = Counter(len(ocr_target(p.text).split()) for p in prompts)
        return [lengths[n] / len(prompts) for n in (1, 2, 3, 4)]

    ours, real = shares(P.make_prompts("text", "train", 2000)), shares(D.read_prompts(shipped("ocr_test.txt"), "text"))
    assert ours == [0.05, 0.25, 0.45, 0.25] and real == pytest.approx(ours, abs=0.03)


# ----------------------------------------------------------------------------------------- distinct, in order, split
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", D.SPLITS)
def test_prompts_are_distinct_in_order_and_of_their_own_task_by_their_words_alone(task, split):
    count = P.TEST if (task, split) == ("composition", "test") else P.TRAIN
    long = P.make_prompts(task, split, count, seed=5)
    assert len({p.text for p in long}) == count
    assert all(P.make_prompts(task, split, k, seed=5) == long[:k] for k in (0, 1, 18, 300))
    assert long[16] == D.Prompt(long[16].text, task, long[16].metadata, f"generated {task}:17")
    others = [tuple(texts(task, s, 9, seed)) for s in D.SPLITS for seed in (0, 5, -5)]
    assert len(set(others)) == 6, "every split and seed has its own"
    assert {(D.task_of(p.text, p.metadata), D.task_of(p.text, {})) for p in long} == {(task, task)}
    if task == "text":
        assert all(1 <= len(ocr_target(p.text).split()) <= 4 and re.fullmatch(r"[A-Z][^{}]*\.", p.text) for p in long)


def contents(task, prompts):
    """What each prompt is about, read from its words alone, in no order: what train and test must not share."""
    for p in prompts:
        if task == "composition":
            include = p.metadata["include"]
            classes = frozenset(e["class"] for e in include)
            yield classes if len(include) == 2 else (classes, include[0]["count"], include[0].get("color"))
        elif task == "text":
            yield tuple(ocr_target(p.text).split()[:2])
        elif task == "quality":
            (subject,) = [s for s in P.SUBJECTS if re.search(rf"\b{s} ", p.text)]
            (setting,) = [s for s in P.SETTINGS if f"{subject} {s}" in p.text]
            yield subject, setting
        elif p.metadata["category"] == "portrait":
            (shot,) = [s for s in P.SHOTS if p.text.startswith(f"{s} of ")]
            who = p.text.removeprefix(f"{shot} of ").partition(", wearing ")[0]
            (person,) = [s for s in P.PEOPLE if who.startswith(f"{s} with")]
            assert who.removeprefix(f"{person} ") in P.FEATURES
            yield who


@pytest.mark.parametrize("task", [*TASKS, "t2i"])
def test_train_and_test_share_no_content_and_without_the_hash_they_would(task, monkeypatch):
    def overlap():
        count = 1500 if task == "t2i" else 3000
        train, test = (set(contents(task, P.make_prompts(task, s, longest(task, s, count), len(s)))) for s in D.SPLITS)
        assert min(len(train), len(test)) > 60
        return train & test

    assert overlap() == set()
    monkeypatch.setattr(P, "_held", lambda space, split, kind: space)  # the planted bug: both may draw everything
    assert len(overlap()) > 30


# ------------------------------------------------------------------------------------------------------ the mixes
def test_composition_is_made_of_blocks_at_exactly_the_mix_however_long_the_list():
    train = [p.metadata["tag"] for p in P.make_prompts("composition", "train", 3 * P.TRAIN)]
    test = [p.metadata["tag"] for p in P.make_prompts("composition", "test", P.TEST)]
    blocks = [tuple(train[first : first + 17]) for first in range(0, 3 * P.TRAIN, 17)]
    assert all(Counter(block) == TAGS for block in blocks) and len(set(blocks)) > 30, "each block is shuffled"
    sixes = [test[first : first + 6] for first in range(0, P.TEST, 6)]
    assert all(Counter(six) == dict.fromkeys(["single_object", *TAGS], 1) for six in sixes)


def test_a_kind_that_is_used_up_begins_again_from_all_of_its_prompts():
    prompts = P.make_prompts("composition", "train", 3 * P.TRAIN + 17)
    train = [p.text for p in prompts if p.metadata["tag"] == "counting"]
    rounds = [train[first : first + 175] for first in range(0, 3 * 175, 175)]
    assert all(len(set(part)) == 175 and set(part) == set(rounds[0]) for part in rounds), "each prompt once a round"
    assert len({tuple(part) for part in rounds}) == 3 and len(train) == 3 * 175 + 5, "and in another order"
    rest = [p.text for p in prompts if p.metadata["tag"] == "position"]
    assert len(set(rest)) == len(rest), "what is not used up does not repeat"
    test = {p.text for p in P.make_prompts("composition", "test", P.TEST) if p.metadata["tag"] == "counting"}
    assert len({*train, *test}) == 80 * 3, "GenEval's rules have 240 prompts that count"


def test_t2i_runs_through_its_categories_each_of_which_asks_what_its_own_list_asks():
    train, test = P.make_prompts("t2i", "train", 300), P.make_prompts("t2i", "test", 41)
    assert [p.metadata["category"] for p in test] == [*MIX] * 10 + ["composition"]
    blocks = [tuple(p.metadata["category"] for p in train[first : first + 10]) for first in range(0, 300, 10)]
    assert all(Counter(block) == MIX for block in blocks) and len(set(blocks)) > 20
    assert train[:33] == P.make_prompts("t2i", "train", 33) and train[4].source == "generated t2i:5"
    for split, prompts in (("train", train), ("test", test)):
        for category, task in (("composition", "composition"), ("typography", "text"), ("general", "quality")):
            some = [p for p in prompts if p.metadata["category"] == category]
            alone = P.make_prompts(task, split, len(some))
            assert [(p.text, p.metadata["prompt"]) for p in some] == [(p.text, p.text) for p in alone]
            assert all(("include" in p.metadata) == (category == "composition") for p in some)


# --------------------------------------------------------------------------------------------- the spaces, counted
def shrink(monkeypatch, **sizes):
    for name, size in sizes.items():
        monkeypatch.setattr(P, name, getattr(P, name)[:size])


def held(spaces, split):
    """{text: kind} of every prompt that a split has."""
    parts = ((kind, P._held(space, split, kind)) for kind, space in spaces.items())
    return {space.write(*key, *choice)[0]: kind
            for kind, space in parts for key in space.keys for choice in itertools.product(*space.parts)}  # fmt: skip


def test_the_two_splits_of_composition_together_are_all_that_genevals_rules_allow(monkeypatch):
    shrink(monkeypatch, CLASSES=5, COLORS=3)
    pairs, colored = comb(5, 2), comb(4, 2)  # the first class is the person, who has no colour
    size = {"single_object": 5, "two_object": 2 * pairs, "position": 8 * pairs, "counting": 3 * 5, "colors": 3 * 4,
            "color_attr": 2 * colored * perm(3, 2)}  # fmt: skip
    train, test = (held(P._composition(), split) for split in D.SPLITS)
    train = {text: kind for text, kind in train.items() if kind != "single_object"}  # only ever tested
    assert not train.keys() & test.keys() and Counter((train | test).values()) == size
    assert set(texts("composition", "train", 17 * 40)) == train.keys(), "a long list has them all"
    limit = most("composition")
    assert set(texts("composition", "test", limit)) < test.keys() and limit == 6 * min(Counter(test.values()).values())


def counted(spaces):
    """(prompts that are said to be in the spaces, distinct ones that are)."""
    every = (s.write(*key, *c)[0] for s in spaces.values() for key in s.keys for c in itertools.product(*s.parts))
    return sum(space.size for space in spaces.values()), len(set(every))


def test_no_two_choices_give_one_prompt(monkeypatch):
    shrink(monkeypatch, OPENERS=2, NOUNS=3, ENDINGS=2, LONG_ENDINGS=3, LOOKS=2, THINGS=3, LETTERS=2, LIGHTS=3, STYLES=2)
    shrink(monkeypatch, SUBJECTS=3, SETTINGS=4, DETAILS=2, PEOPLE=3, FEATURES=2, SHOTS=2, CLOTHES=4, PLACES=5)
    scenes = 6 * 2 * 3 * 2 * 3 * 2
    assert counted(P._text()) == ((3 + 6 + 6 * 2 + 6 * 3) * scenes,) * 2
    assert counted(P._quality()) == (12 * (2 + 2 * 3 * 2 + 2 * 3 * 2),) * 2
    assert counted(P._portrait()) == (6 * 2 * 4 * (1 + 3 * 5),) * 2
    # The planted bug: a template that leaves its light out says less than is counted.
    monkeypatch.setattr(P, "TEMPLATES", (*P.TEMPLATES[:5], P.TEMPLATES[5].replace(", {light}", "")))
    said, seen = counted(P._text())
    assert said - seen == (3 + 6 + 6 * 2 + 6 * 3) * (scenes // 6) * 2 // 3


def test_the_longest_list_to_test_on_repeats_nothing_and_a_longer_one_is_refused(monkeypatch):
    assert most("composition") == P.TEST == 390 and most("t2i") == 4 * 390 and most("text") > 10**8
    assert len(set(texts("t2i", "test", 1560))) == 1560
    shrink(monkeypatch, SUBJECTS=5, SETTINGS=6, STYLES=2, LIGHTS=2, DETAILS=2)
    limit = most("quality")
    assert len(set(texts("quality", "test", limit))) == limit > 0
    assert len(texts("quality", "train", 10 * limit)) == 10 * limit, "a training list may be of any length"
    for split, count in (("test", limit + 1), ("test", -1), ("train", -1)):
        with pytest.raises(ValueError, match=f"no list of {count}"):
            P.make_prompts("quality", split, count)
    for task, split in (("ocr", "train"), ("edit", "train"), ("text", "val")):
        with pytest.raises(ValueError, match="unknown"):
            P.make_prompts(task, split, 3)


# ---------------------------------------------------------------------------------------------------------- files
def test_the_command_writes_files_that_read_back_as_the_prompts_in_a_fresh_process(tmp_path):
    folder = tmp_path / "new" / "mine"
    line = [sys.executable, "-m", "data.written", str(folder), "--train", "34", "--test", "7", "--seed", "3"]
    out = subprocess.run(line, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": "7"}, capture_output=True, text=True)
    shown = out.stdout.splitlines()
    assert (out.returncode, out.stderr, len(shown)) == (0, "", 8) and shown[3] == f"{folder}/text/test.txt: 7 prompts"
    assert shown[7].endswith("t2i/test_metadata.jsonl: 7 prompts (composition 2, typography 2, portrait 2, general 1)")
    for task, (split, count) in itertools.product(P.TASKS, (("train", 34), ("test", 7))):
        read, made = D.read_prompts(folder / task, task, split), P.make_prompts(task, split, count, seed=3)
        assert [p[:3] for p in read] == [p[:3] for p in made]
        assert read[6].source.endswith(":7") and made[6].source.endswith(":7"), "the number is the line"


@pytest.mark.parametrize("flags, named", [
    (["--train", "0"], "--train 0"), (["--test", "-3"], "--test -3"), (["--train", "1.5"], "--train"),
    (["--seed", "x"], "--seed"), (["--test", "9999999"], "9999999"), (["--tests", "3"], "--tests"),
])  # fmt: skip
def test_bad_numbers_are_refused_in_one_line_and_nothing_is_written(tmp_path, capsys, flags, named):
    with pytest.raises(SystemExit) as stop:
        P.main([str(tmp_path / "new"), *flags])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and named in said and not list(tmp_path.iterdir())


def test_only_new_and_empty_folders_are_written_to_and_a_full_disk_leaves_nothing(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.txt").write_text("edited\n")
    (tmp_path / "empty").mkdir()
    assert P.main([str(tmp_path / "empty"), "--train", "2", "--test", "2"]) == 0
    before = sorted(tmp_path.rglob("*"))
    for place in ("", "mine.txt", "mine.txt/below", "empty"):
        with pytest.raises(SystemExit):
            P.main([str(tmp_path / place), "--train", "2", "--test", "2"])
        assert str(tmp_path / place) in capsys.readouterr().err and sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "mine.txt").read_text() == "edited\n"
    written, plain = [], Path.write_text

    def write_text(file, *more, **options):
        written.append(file)
        if len(written) == 8:
            raise OSError(28, "No space left on device")
        return plain(file, *more, **options)

    monkeypatch.setattr(Path, "write_text", write_text)
    with pytest.raises(SystemExit):
        P.main([str(tmp_path / "new"), "--train", "3", "--test", "2"])
    assert "No space left" in capsys.readouterr().err and sorted(tmp_path.rglob("*")) == before
