"""Oracles for the generated prompts: sentences worked by hand and parsed back, spaces counted out, splits that share
no content, and GenEval's own file reproduced line by line.
"""

import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from math import comb, perm, prod
from pathlib import Path

import pytest

from data import files as D
from data import written as P
from rewards import ocr_target

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
TASKS = ("composition", "text", "quality")  # F's, of which a prompt's own words tell which it is
TRAIN_TAGS = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
FIELDS = {"words", "look", "thing", "place", "letters", "light", "style"}
LISTS = (
    "CLASSES", "COLORS", "OPENERS", "NOUNS", "ENDINGS", "LONG_ENDINGS", "LOOKS", "THINGS", "LETTERS", "TEMPLATES",
    "STYLES", "LIGHTS", "SUBJECTS", "SETTINGS", "DETAILS", "PEOPLE", "FEATURES", "CLOTHES", "SHOTS", "PLACES",
)  # fmt: skip


def texts(*what):
    return [p.text for p in P.make_prompts(*what)]


def real_lines():
    """GenEval's published test lines, each once (the file repeats every line four times)."""
    file = SHARED / "geneval_test_metadata.jsonl"
    if not file.exists():
        pytest.skip("the project does not ship GenEval's file")
    return [json.loads(line) for line in dict.fromkeys(file.read_text().splitlines())]


def most(task):
    """How many distinct test prompts there are, from what the refusal says."""
    with pytest.raises(ValueError) as error:
        P.make_prompts(task, "test", 10**15)
    found = re.fullmatch(
        rf"no list of 10{{15}} {task} prompts to test on; ask for 0 to (\d+), the distinct ones",
        str(error.value),
    )
    return int(found[1])


def longest(task, split, count):
    """`count`, or all test prompts that there are of composition."""
    return min(count, P.TEST) if (task, split) == ("composition", "test") else count


# --------------------------------------------------------------------------------------------- GenEval's sentences
@pytest.mark.parametrize(
    "entries, text",
    [
        ([{"class": "bench", "count": 1}], "a photo of a bench"),
        ([{"class": "umbrella", "count": 1}], "a photo of an umbrella"),
        ([{"class": "scissors", "count": 1}], "a photo of a scissors"),
        ([{"class": "orange", "count": 1, "color": "orange"}], "a photo of an orange orange"),
        ([{"class": "elephant", "count": 1, "color": "blue"}], "a photo of a blue elephant"),
        ([{"class": "bench", "count": 3}], "a photo of three benchs"),
        ([{"class": "bus", "count": 2}], "a photo of two buses"),
        ([{"class": "wine glass", "count": 4}], "a photo of four wine glasses"),
        ([{"class": "tie", "count": 1}, {"class": "oven", "count": 1}], "a photo of a tie and an oven"),
        (
            [{"class": "laptop", "count": 1}, {"class": "apple", "count": 1, "position": ["right of", 0]}],
            "a photo of an apple right of a laptop",
        ),
        (
            [{"class": "laptop", "count": 1, "position": ["below", 1]}, {"class": "apple", "count": 1}],
            "a photo of a laptop below an apple",
        ),
    ],
)
def test_sentences_are_those_of_geneval_worked_by_hand(entries, text):
    assert P.sentence(entries) == text


def parsed_name(name):
    if name in P.CLASSES:
        return {"class": name, "count": 1}
    color, _, rest = name.partition(" ")
    assert color in P.COLORS and rest in P.CLASSES, name
    return {"class": rest, "count": 1, "color": color}


def parsed(text):
    """A checklist read out of the words alone: the way back from a prompt to its tag, include and exclude."""
    body = text.removeprefix("a photo of ")
    number, _, plural = body.partition(" ")
    if number in ("two", "three", "four"):
        count = ("two", "three", "four").index(number) + 2
        (name,) = [c for c in P.CLASSES if plural == c + ("es" if c[-1] == "s" else "s")]
        exclude = [{"class": name, "count": count + 1}]
        return {"tag": "counting", "include": [{"class": name, "count": count}], "exclude": exclude, "prompt": text}
    joint = re.search(r" (and|left of|right of|above|below) ", body)
    names = [body[: joint.start()], body[joint.end() :]] if joint else [body]
    entries = []
    for article, _, name in (part.partition(" ") for part in names):
        assert article == ("an" if name[0] in "aeiou" else "a"), text
        entries.append(parsed_name(name))
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
    assert len({p.metadata["tag"] for p in prompts}) == {"train": 5, "test": 6}[split]


# ------------------------------------------------------------------------------------------------ GenEval's file
def test_every_line_of_genevals_file_is_reproduced_from_its_checklist():
    lines = real_lines()
    assert len(lines) == 553
    assert [P.sentence(line["include"]) for line in lines] == [line["prompt"] for line in lines]
    odd = re.compile("(benchs|knifes|sandwichs|toothbrushs|sheeps|persons)$")
    assert sum(bool(odd.search(line["prompt"])) for line in lines) == 7, "a rule with proper plurals would fail here"


def test_every_line_of_genevals_file_can_be_drawn_with_its_fields_in_its_order():
    spaces = P._composition()
    for line in real_lines():
        space, first = spaces[line["tag"]], line["include"][0]
        key = tuple(sorted(entry["class"] for entry in line["include"]))
        if line["tag"] in ("counting", "colors"):
            key = (first["class"], first["count"] if line["tag"] == "counting" else first["color"])
        assert key in space.keys, line
        drawable = [space.write(*key, *choice) for choice in itertools.product(*space.parts)]
        assert [json.dumps(metadata) for _, metadata in drawable].count(json.dumps(line)) == 1, line


def test_the_generator_and_genevals_file_use_the_same_vocabulary():
    def vocabulary(lines):
        entries = [(line["tag"], entry) for line in lines for entry in line["include"]]
        return {
            "tags": {line["tag"] for line in lines},
            "classes": {e["class"] for _, e in entries},
            "colors": {(tag, e["color"]) for tag, e in entries if "color" in e},
            "relations": {e["position"][0] for _, e in entries if "position" in e},
            "counts": {(tag, e["count"]) for tag, e in entries},
            "persons": {tag for tag, e in entries if e["class"] == "person"},
            "shapes": {(line["tag"], *line, *map(tuple, line["include"])) for line in lines},
            "excludes": {e["count"] - line["include"][0]["count"] for line in lines for e in line.get("exclude", [])},
        }

    drawn = [("train", 6000, 0), *(("test", P.TEST, seed) for seed in range(3))]
    ours = vocabulary([p.metadata for what in drawn for p in P.make_prompts("composition", *what)])
    assert ours == vocabulary(real_lines())
    assert ours["classes"] == set(P.CLASSES) and len(P.CLASSES) == 80


def test_the_number_of_quoted_words_is_spread_as_in_the_ocr_file():
    file = SHARED / "ocr_test.txt"
    if not file.exists():
        pytest.skip("the project does not ship the OCR file")

    def shares(prompts):
        lengths = Counter(len(ocr_target(p.text).split()) for p in prompts)
        return [lengths[n] / len(prompts) for n in (1, 2, 3, 4)]

    real, ours = shares(D.read_prompts(file, "text")), shares(P.make_prompts("text", "train", 2000))
    assert ours == [0.05, 0.25, 0.45, 0.25] and all(abs(a - b) < 0.03 for a, b in zip(ours, real, strict=True))


# ----------------------------------------------------------------------------------------- distinct, in order, split
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", D.SPLITS)
def test_prompts_are_distinct_and_a_longer_list_begins_with_the_shorter(task, split):
    count = min(longest(task, split, 1500), P.TRAIN if task == "composition" else 1500)
    long = P.make_prompts(task, split, count, seed=5)
    assert len({p.text for p in long}) == len(long) == count >= 390
    for k in (0, 1, 18, 300):
        assert P.make_prompts(task, split, k, seed=5) == long[:k]
    assert long[16] == D.Prompt(long[16].text, task, long[16].metadata, f"generated {task}:17")
    assert P.make_prompts(task, split, 9) == P.make_prompts(task, split, 9, seed=0)
    others = [texts(task, s, 9, seed) for s in D.SPLITS for seed in (0, 5, -5)]
    assert len({tuple(other) for other in others}) == 6, "every split and seed has its own"


def contents(task, prompts):
    """What each prompt is about, read out of its words alone, in no order: what train and test must not share."""
    for p in prompts:
        if task == "composition":
            include = p.metadata["include"]
            classes = frozenset(e["class"] for e in include)
            yield classes if len(include) == 2 else (classes, include[0]["count"], include[0].get("color"))
        elif task == "text":
            words = ocr_target(p.text).split()
            yield tuple(words[:2]) if len(words) > 1 else tuple(words)
        else:
            (subject,) = [s for s in P.SUBJECTS if re.search(rf"\b{s} ", p.text)]
            (setting,) = [s for s in P.SETTINGS if f"{subject} {s}" in p.text]
            yield subject, setting


def overlap(task):
    train, test = (set(contents(task, P.make_prompts(task, s, longest(task, s, 3000), len(s)))) for s in D.SPLITS)
    assert min(len(train), len(test)) > 150
    return train & test


@pytest.mark.parametrize("task", TASKS)
def test_train_and_test_share_no_content_and_without_the_hash_they_would(task, monkeypatch):
    assert overlap(task) == set()
    monkeypatch.setattr(P, "_held", lambda space, split, kind: space)  # the planted bug: both may draw everything
    assert len(overlap(task)) > 30


# --------------------------------------------------------------------------------------------- Q's categories
MIX = {"composition": 3, "typography": 2, "portrait": 2, "general": 3}


def by_category(split, count, seed=0):
    found = {category: [] for category in MIX}
    for p in P.make_prompts("t2i", split, count, seed):
        found[p.metadata["category"]].append(p)
    return found


def test_t2i_runs_through_its_categories_in_turn_and_in_training_has_its_mix_in_every_ten():
    test = [p.metadata["category"] for p in P.make_prompts("t2i", "test", 21)]
    assert test == [*MIX] * 5 + ["composition"]
    train = [p.metadata["category"] for p in P.make_prompts("t2i", "train", 300)]
    assert all(Counter(train[first : first + 10]) == MIX for first in range(0, 300, 10))
    assert len({tuple(train[first : first + 10]) for first in range(0, 300, 10)}) > 20, "each block is shuffled"
    assert P.make_prompts("t2i", "train", 300)[:33] == P.make_prompts("t2i", "train", 33)
    assert P.make_prompts("t2i", "train", 33)[4].source == "generated t2i:5"


@pytest.mark.parametrize("split", D.SPLITS)
def test_what_a_category_asks_for_is_what_its_list_asks_for_and_a_scorer_can_use_it(split):
    found = by_category(split, 200)
    for category, task in (("composition", "composition"), ("typography", "text"), ("general", "quality")):
        alone = P.make_prompts(task, split, len(found[category]))
        assert [p.text for p in found[category]] == [p.text for p in alone]
    for category, some in found.items():
        for p in some:
            assert p.task == "t2i" and p.metadata["prompt"] == p.text
            assert ("include" in p.metadata) == (category == "composition")
            assert ('"' in p.text) == (category == "typography")
    assert all({"tag", "include", "category"} <= p.metadata.keys() for p in found["composition"])


def people(prompts):
    """Who is portrayed, and with which looks, read out of the words alone."""
    for p in prompts:
        (shot,) = [s for s in P.SHOTS if p.text.startswith(f"{s} of ")]
        who = p.text.removeprefix(f"{shot} of ").partition(", wearing ")[0]
        (person,) = [s for s in P.PEOPLE if who.startswith(f"{s} with")]
        assert who.removeprefix(f"{person} ") in P.FEATURES
        assert p.text.partition(", wearing ")[2].split(",")[0] in P.CLOTHES
        yield who


def test_portraits_are_of_people_whose_looks_train_and_test_do_not_share(monkeypatch):
    def shared():
        train, test = (set(people(by_category(split, 1500)["portrait"])) for split in D.SPLITS)
        assert min(len(train), len(test)) > 60
        return train & test

    assert shared() == set()
    monkeypatch.setattr(P, "_held", lambda space, split, kind: space)  # the planted bug: both may draw everything
    assert len(shared()) > 30


def test_the_longest_list_to_test_on_is_four_of_the_shortest_lists_and_repeats_nothing():
    with pytest.raises(ValueError, match="no list of 1561 t2i prompts to test on; ask for 0 to 1560, "):
        P.make_prompts("t2i", "test", 1561)
    assert len({p.text for p in P.make_prompts("t2i", "test", 1560)}) == 1560 == 4 * most("composition")


# ------------------------------------------------------------------------------------------------- GenEval's mix
def test_composition_is_made_of_blocks_at_exactly_the_mix_however_long_the_list():
    train = [p.metadata["tag"] for p in P.make_prompts("composition", "train", 3 * P.TRAIN)]
    test = [p.metadata["tag"] for p in P.make_prompts("composition", "test", P.TEST)]
    for first in range(0, 3 * P.TRAIN, 17):
        assert Counter(train[first : first + 17]) == TRAIN_TAGS
    for first in range(0, P.TEST, 6):
        assert Counter(test[first : first + 6]) == dict.fromkeys(["single_object", *TRAIN_TAGS], 1)
    assert P.TRAIN % 17 == P.TEST % 6 == 0
    assert len({tuple(train[first : first + 17]) for first in range(0, P.TRAIN, 17)}) > 30, "each block is shuffled"


def counting(split, count):
    """The prompts of a list that count, in order."""
    return [p.text for p in P.make_prompts("composition", split, count) if p.metadata["tag"] == "counting"]


def test_the_default_lengths_are_the_longest_without_a_repetition():
    train, test = counting("train", P.TRAIN), counting("test", P.TEST)
    assert (len(train), len(test)) == (175, 65) and len({*train, *test}) == 80 * 3, "GenEval's rules have 240"
    assert len(set(texts("composition", "train", P.TRAIN))) == P.TRAIN
    assert len(set(texts("composition", "train", P.TRAIN + 17))) == P.TRAIN + 17 - 5
    assert most("composition") == P.TEST == 390


def test_a_kind_that_is_used_up_begins_again_from_all_of_its_prompts():
    train = counting("train", 3 * P.TRAIN + 17)
    rounds = [train[first : first + 175] for first in range(0, 3 * 175, 175)]
    assert all(len(set(one)) == 175 and set(one) == set(rounds[0]) for one in rounds), "each prompt once a round"
    assert len({tuple(one) for one in rounds}) == 3 and len(train) == 3 * 175 + 5, "and in another order"
    rest = [p.text for p in P.make_prompts("composition", "train", 3 * P.TRAIN) if p.metadata["tag"] == "position"]
    assert len(set(rest)) == len(rest) == 7 * 105, "what is not used up does not repeat"


def test_quality_and_text_repeat_no_sooner_than_their_smallest_kind_is_used_up(monkeypatch):
    shrink(monkeypatch, SUBJECTS=5, SETTINGS=6, STYLES=2, LIGHTS=2, DETAILS=2)
    lines = texts("quality", "train", 1000)
    short = [line for line in lines if line.count(",") == 1]
    room = 2 * len({line.partition(",")[0] for line in short})  # two styles a subject in its setting
    assert 10 < room < 60 and len(short) == 200, "a fifth of all, used up or not"
    for first in range(0, 200 - room, room):
        assert len(set(short[first : first + room])) == room
    limit = most("quality")
    assert len(set(texts("quality", "test", limit))) == limit == 5 * (2 * 30 - room), "a fifth of these is short, too"


# --------------------------------------------------------------------------------------------- the spaces, counted
def shrink(monkeypatch, **sizes):
    for name, size in sizes.items():
        monkeypatch.setattr(P, name, getattr(P, name)[:size])


def written(spaces, split):
    """{text: kind} of every prompt that a split has."""
    return {
        space.write(*key, *choice)[0]: kind
        for kind, space in ((kind, P._held(space, split, kind)) for kind, space in spaces.items())
        for key in space.keys
        for choice in itertools.product(*space.parts)
    }


def test_the_two_splits_of_composition_together_are_all_that_genevals_rules_allow(monkeypatch):
    shrink(monkeypatch, CLASSES=5, COLORS=3)
    pairs, colored = comb(5, 2), comb(4, 2)  # the first class is the person, who has no colour
    size = {"single_object": 5, "two_object": 2 * pairs, "position": 8 * pairs, "counting": 3 * 5, "colors": 3 * 4,
            "color_attr": 2 * colored * perm(3, 2)}  # fmt: skip
    train, test = (written(P._composition(), split) for split in D.SPLITS)
    train = {text: kind for text, kind in train.items() if kind != "single_object"}  # only ever tested
    assert not train.keys() & test.keys() and Counter((train | test).values()) == size
    a_photo_of = {f"a photo of {a} and {b}" for a, b in itertools.permutations(map(article, P.CLASSES), 2)}
    assert a_photo_of <= (train | test).keys(), "pairs come in both orders"
    assert set(texts("composition", "train", 17 * 40)) == train.keys(), "a long list has them all"
    limit = most("composition")
    assert set(texts("composition", "test", limit)) < test.keys() and limit == 6 * min(Counter(test.values()).values())


def article(name):
    return ("an " if name[0] in "aeiou" else "a ") + name


def counted(spaces):
    """(prompts that are said to be in the spaces, distinct ones that are)."""
    said, seen = 0, set()
    for space in spaces.values():
        said += len(space.keys) * prod(map(len, space.parts))
        seen |= {space.write(*key, *choice)[0] for key in space.keys for choice in itertools.product(*space.parts)}
    return said, len(seen)


def test_no_two_choices_give_one_prompt(monkeypatch):
    shrink(monkeypatch, OPENERS=2, NOUNS=3, ENDINGS=2, LONG_ENDINGS=3, LOOKS=2, THINGS=3, LETTERS=2, LIGHTS=3, STYLES=2)
    shrink(monkeypatch, SUBJECTS=3, SETTINGS=4, DETAILS=2)
    scenes = 6 * 2 * 3 * 2 * 3 * 2
    assert counted(P._text()) == ((3 + 6 + 6 * 2 + 6 * 3) * scenes,) * 2
    assert counted(P._quality()) == (12 * (2 + 2 * 3 * 2 + 2 * 3 * 2),) * 2
    shrink(monkeypatch, PEOPLE=3, FEATURES=2, SHOTS=2, CLOTHES=4, PLACES=5)
    assert counted(P._portrait()) == (6 * 2 * 4 * (1 + 3 * 5),) * 2
    # The planted bug: a template that leaves its light out says less than is counted.
    monkeypatch.setattr(P, "TEMPLATES", (*P.TEMPLATES[:5], P.TEMPLATES[5].replace(", {light}", "")))
    said, seen = counted(P._text())
    assert said - seen == (3 + 6 + 6 * 2 + 6 * 3) * (scenes // 6) * 2 // 3


def test_every_template_uses_every_field_and_no_list_repeats_an_item():
    for template in P.TEMPLATES:
        assert sorted(re.findall(r"{(\w+)}", template)) == sorted(FIELDS)
    for name in LISTS:
        items = getattr(P, name)
        assert len(set(items)) == len(items) > 5, name
        if name not in ("THINGS", "TEMPLATES"):
            assert all(item == " ".join(item.split()) and item.isascii() and '"' not in item for item in items), name
    assert not any(set(a) & set(b) for a, b in itertools.combinations([P.ENDINGS, P.NOUNS, P.OPENERS], 2))


def test_text_has_more_prompts_than_a_run_needs_and_quality_thousands():
    assert len(set(texts("text", "train", 50_000))) == 50_000 and most("text") > 10**8
    quality = texts("quality", "train", 20_000)  # as many as a run makes
    assert len(set(quality)) == 20_000 and most("quality") > 10_000


# ---------------------------------------------------------------------------------------------- what they look like
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", D.SPLITS)
def test_every_prompt_routes_to_its_own_task_by_its_words_alone(task, split):
    for p in P.make_prompts(task, split, longest(task, split, 2000), seed=4):
        assert p.task == task == D.task_of(p.text, p.metadata) == D.task_of(p.text, {})


def test_text_prompts_quote_one_to_four_words_from_the_lists_and_are_sentences():
    words = {w for name in ("OPENERS", "NOUNS", "ENDINGS", "LONG_ENDINGS") for item in getattr(P, name)
             for w in item.split()}  # fmt: skip
    for text in texts("text", "train", 2000):
        target = ocr_target(text).split(" ")
        assert 1 <= len(target) <= 4 and set(target) <= words
        assert text.count('"') == 2 and text.isascii() and re.fullmatch(r"[A-Z].*\.", text) and "{" not in text


def test_quality_prompts_are_open_and_unquoted():
    for text in texts("quality", "train", 2000):
        assert '"' not in text and not text.startswith("a photo of") and text.isascii()
        assert any(style in text for style in P.STYLES)


# ------------------------------------------------------------------------------------------------------- refusals
def test_unknown_tasks_and_splits_name_the_allowed_values():
    with pytest.raises(ValueError, match="^unknown task 'ocr': choose one of composition, text, quality, t2i$"):
        P.make_prompts("ocr", "train", 3)
    with pytest.raises(ValueError, match="^edits need pictures: give both with --prompts edit=FILE.jsonl$"):
        P.make_prompts("edit", "train", 3)
    with pytest.raises(ValueError, match="^unknown split 'val': choose one of train, test$"):
        P.make_prompts("text", "val", 3)


def test_more_test_prompts_than_there_are_is_refused_and_the_last_one_is_not(monkeypatch):
    assert len(P.make_prompts("composition", "test", 390)) == 390
    with pytest.raises(ValueError, match="^no list of 391 composition prompts to test on; ask for 0 to 390, "):
        P.make_prompts("composition", "test", 391)
    shrink(monkeypatch, CLASSES=6, COLORS=2)
    limit = most("composition")
    assert len(set(texts("composition", "test", limit))) == limit > 0
    for count in (limit + 1, -1):
        with pytest.raises(ValueError, match=f"^no list of {count} .* ask for 0 to {limit}, the distinct ones$"):
            P.make_prompts("composition", "test", count)
    assert len(texts("composition", "train", 10 * limit)) == 10 * limit, "a training list may be of any length"
    with pytest.raises(ValueError, match="^no list of -1 composition prompts to train on; ask for 0 or more$"):
        P.make_prompts("composition", "train", -1)


# ---------------------------------------------------------------------------------------------------------- files
FILES = [
    "composition/test_metadata.jsonl", "composition/train_metadata.jsonl", "quality/test.txt", "quality/train.txt",
    "t2i/test_metadata.jsonl", "t2i/train_metadata.jsonl", "text/test.txt", "text/train.txt",
]  # fmt: skip


def held(folder):
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() or f.name.startswith("."))


def test_the_command_writes_files_that_read_back_as_the_prompts_in_a_fresh_process(tmp_path):
    folder = tmp_path / "new" / "mine"
    line = [sys.executable, "-m", "data.written", str(folder), "--train", "34", "--test", "7", "--seed", "3"]
    out = subprocess.run(line, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": "7"}, capture_output=True, text=True)
    assert (out.returncode, out.stderr) == (0, "") and held(folder) == FILES
    shown = out.stdout.splitlines()
    tags = "(position 14, counting 10, color_attr 6, colors 2, two_object 2)"
    assert shown[0].startswith(f"{folder}/composition/train_metadata.jsonl: 34 prompts (") and len(shown) == 8
    assert sorted(re.findall(r"\w+ \d+", shown[0].partition("(")[2])) == sorted(re.findall(r"\w+ \d+", tags))
    assert shown[3] == f"{folder}/text/test.txt: 7 prompts"
    counts = "7 prompts (composition 2, typography 2, portrait 2, general 1)"
    assert shown[7] == f"{folder}/t2i/test_metadata.jsonl: {counts}"
    for task, (split, count) in itertools.product(P.TASKS, (("train", 34), ("test", 7))):
        read = D.read_prompts(folder / task, task, split)
        made = P.make_prompts(task, split, count, seed=3)
        assert [p[:3] for p in read] == [p[:3] for p in made]
        assert read[6].source.endswith(":7") and made[6].source.endswith(":7"), "the number is the line"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--train", "0"], "--train 0 --test 390: both must be 1 or more"),
        (["--test", "-3"], "--train 595 --test -3: both must be 1 or more"),
        (["--train", "1.5"], "argument --train: invalid int value: '1.5'; see --help"),
        (["--seed", "x"], "argument --seed: invalid int value: 'x'; see --help"),
        (
            ["--test", "9999999"],
            r"no list of 9999999 composition prompts to test on; ask for 0 to 390, the distinct ones",
        ),
        (["--tests", "3"], "unrecognized arguments: --tests 3; see --help"),
    ],
)
def test_bad_numbers_are_refused_in_one_line_and_nothing_is_written(tmp_path, capsys, arguments, message):
    assert P.main([str(tmp_path / "new"), *arguments]) == 2
    shown = capsys.readouterr()
    assert re.fullmatch(f"error: {message}\n", shown.err) and shown.out == ""
    assert not (tmp_path / "new").exists()


def test_a_missing_folder_argument_is_refused_in_one_line(capsys):
    assert P.main([]) == 2
    assert capsys.readouterr().err == "error: the following arguments are required: FOLDER; see --help\n"


def test_only_new_and_empty_folders_are_written_to(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("edited\n")
    for place in (tmp_path, tmp_path / "mine.txt"):
        assert P.main([str(place), "--train", "2", "--test", "2"]) == 2
        fault = "not an empty folder; name a new one, so that no edited prompt is lost"
        assert capsys.readouterr().err == f"error: {place}: {fault}\n"
    below = tmp_path / "mine.txt" / "below"
    assert P.main([str(below), "--train", "2", "--test", "2"]) == 2
    assert capsys.readouterr().err == f"error: {below}: cannot be written (Not a directory); name a folder that can\n"
    assert held(tmp_path) == ["mine.txt"] and (tmp_path / "mine.txt").read_text() == "edited\n"
    (tmp_path / "empty").mkdir()
    assert P.main([str(tmp_path / "empty"), "--train", "2", "--test", "2"]) == 0
    assert held(tmp_path / "empty") == FILES


def test_a_task_is_not_seen_before_it_is_complete_and_a_full_disk_leaves_nothing(tmp_path, capsys, monkeypatch):
    seen, plain = [], Path.write_text

    def write_text(file, *more, **options):
        seen.append([f.name for f in tmp_path.joinpath("new").iterdir() if not f.name.startswith(".")])
        if len(seen) == 16:
            raise OSError(28, "No space left on device")
        return plain(file, *more, **options)

    monkeypatch.setattr(Path, "write_text", write_text)
    P.write(tmp_path / "new", train=3, test=2)
    assert seen == [[]] * 8 and held(tmp_path / "new") == FILES
    (tmp_path / "new").rename(tmp_path / "old")
    assert P.main([str(tmp_path / "new"), "--train", "3", "--test", "2"]) == 2
    assert seen == [[]] * 16 and list((tmp_path / "new").iterdir()) == []
    assert capsys.readouterr().err.endswith("cannot be written (No space left on device); name a folder that can\n")
