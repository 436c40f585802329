"""Prompts by rules: sentences worked by hand and parsed back, spaces counted out, splits that share no content, and
GenEval's own file reproduced line by line."""

import itertools
import json
import os
import random
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
    ([one("scissors")], "a scissors"), ([one("bench", 3)], "three benchs"), ([one("bus", 2)], "two buses"),
    ([one("cross", 2, color="green")], "two green crosses"), ([one("tie"), one("oven")], "a tie and an oven"),
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
    assert len(lines) == 553
    for line in lines:
        assert checklists.sentence(line["include"]) == line["prompt"] and parsed(line["prompt"]) == line
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
            (subject,) = [s for s in P.WORDS["subjects"] if re.search(rf"\b{s} ", p.text)]
            (setting,) = [s for s in P.WORDS["settings"] if f"{subject} {s}" in p.text]
            yield subject, setting
        elif p.metadata["category"] == "portrait":
            yield p.text.partition(" of ")[2].partition(", wearing ")[0]


@pytest.mark.parametrize("task", [*TASKS, "t2i"])
def test_train_and_test_share_no_content_and_without_the_hash_they_would(task, monkeypatch):
    def overlap():
        count = 1500 if task == "t2i" else 3000
        train, test = (set(contents(task, P.make_prompts(task, s, longest(task, s, count), len(s)))) for s in D.SPLITS)
        assert min(len(train), len(test)) > 60
        return train & test

    assert overlap() == set()
    chance = random.Random(0)
    monkeypatch.setattr(P, "in_test_split", lambda *key: chance.random() < 0.5)  # the planted bug: no hash decides
    assert len(overlap()) > 30


# ------------------------------------------------------------------------------------------------------ the mixes
def test_composition_is_made_of_blocks_at_exactly_the_mix_and_a_kind_that_is_used_up_begins_again():
    prompts = P.make_prompts("composition", "train", 3 * P.TRAIN + 17)
    tags = [p.metadata["tag"] for p in prompts]
    blocks = [tuple(tags[first : first + 17]) for first in range(0, len(tags), 17)]
    assert all(Counter(block) == TAGS for block in blocks) and len(set(blocks)) > 30, "each block is shuffled"
    train = [p.text for p in prompts if p.metadata["tag"] == "counting"]
    rounds = [train[first : first + 175] for first in range(0, 3 * 175, 175)]
    assert all(len(set(part)) == 175 and set(part) == set(rounds[0]) for part in rounds), "each prompt once a round"
    assert len({tuple(part) for part in rounds}) == 3 and len(train) == 3 * 175 + 5, "and in another order"
    rest = [p.text for p in prompts if p.metadata["tag"] == "position"]
    assert len(set(rest)) == len(rest), "what is not used up does not repeat"
    prompts = P.make_prompts("composition", "test", P.TEST)
    tags = [p.metadata["tag"] for p in prompts]
    sixes = [tags[first : first + 6] for first in range(0, P.TEST, 6)]
    assert all(Counter(six) == dict.fromkeys(["single_object", *TAGS], 1) for six in sixes)
    test = {p.text for p in prompts if p.metadata["tag"] == "counting"}
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
        monkeypatch.setitem(P.WORDS, name, P.WORDS[name][:size])


def test_the_two_splits_of_composition_together_are_all_that_genevals_rules_allow(monkeypatch):
    monkeypatch.setattr(P, "CLASSES", P.CLASSES[:5])  # the first one is the person, who has no colour
    monkeypatch.setattr(P, "COLORS", P.COLORS[:3])
    pairs, colored = comb(5, 2), comb(4, 2)
    size = {"two_object": 2 * pairs, "position": 8 * pairs, "counting": 3 * 5, "colors": 3 * 4,
            "color_attr": 2 * colored * perm(3, 2)}  # fmt: skip
    found = {p.text: p.metadata["tag"] for p in P.make_prompts("composition", "train", 17 * 60)}
    limit = most("composition")
    lists = (P.make_prompts("composition", "test", limit, seed) for seed in range(300))
    test = {p.text: p.metadata["tag"] for some in lists for p in some}
    singles = {text for text, tag in test.items() if tag == "single_object"}
    assert len(singles) == 5 and not found.keys() & test.keys()
    both = Counter({text: tag for text, tag in (found | test).items() if text not in singles}.values())
    assert both == size and limit == 6 * min(Counter(test.values()).values())


SMALL = {"openers": 2, "nouns": 3, "endings": 2, "long_endings": 3, "looks": 1, "things": 2, "letters": 2, "lights": 2,
         "styles": 2, "subjects": 5, "settings": 6, "details": 2, "people": 6, "features": 4, "clothes": 2, "shots": 2,
         "places": 2}  # fmt: skip


@pytest.mark.parametrize("task", ["text", "quality", "t2i"])
def test_the_longest_list_to_test_on_repeats_nothing_and_a_longer_one_is_refused(monkeypatch, task):
    assert most("composition") == P.TEST == 390 and most("t2i") == 4 * 390 and most("text") > 10**8
    shrink(monkeypatch, **SMALL)
    limit = most(task)
    assert len(set(texts(task, "test", limit))) == limit > 0, "no two choices give one prompt"
    assert len(texts(task, "train", 10 * limit)) == 10 * limit, "a training list may be of any length"
    for split, count in (("test", limit + 1), ("test", -1), ("train", -1)):
        with pytest.raises(ValueError, match=f"no list of {count}"):
            P.make_prompts(task, split, count)
    for wrong in (("ocr", "train"), ("edit", "train"), (task, "val")):
        with pytest.raises(ValueError, match="unknown"):
            P.make_prompts(*wrong, 3)


# ---------------------------------------------------------------------------------------------------------- files
def test_the_command_writes_files_that_read_back_as_the_prompts_in_a_fresh_process(tmp_path):
    folder = tmp_path / "new" / "mine"
    line = [sys.executable, "-m", "data.written", str(folder), "--train", "34", "--test", "7", "--seed", "3"]
    out = subprocess.run(line, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": "7"}, capture_output=True, text=True)
    shown = out.stdout.splitlines()
    assert (out.returncode, out.stderr, len(shown)) == (0, "", 8) and shown[3] == f"{folder}/text/test.txt: 7 prompts"
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
    before, plain = sorted(tmp_path.rglob("*")), Path.write_text

    def full(file, *more, **options):
        if "quality" in str(file):
            raise OSError(28, "No space left on device")
        return plain(file, *more, **options)

    for place in ("", "mine.txt", "mine.txt/below", "empty", "new"):
        if place == "new":
            monkeypatch.setattr(Path, "write_text", full)
        with pytest.raises(SystemExit):
            P.main([str(tmp_path / place), "--train", "2", "--test", "2"])
        assert str(tmp_path / place) in capsys.readouterr().err and sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "mine.txt").read_text() == "edited\n"
