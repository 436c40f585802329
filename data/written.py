"""Prompts by rules, for real models: train and test one with no download.

F §6.1 trains on three prompt sets that have to be fetched, and Q §4.2's are not public. These are written like them:

    composition   "a photo of a cow right of a laptop"             GenEval's own rules, with its checklist
    text          'A film still of a dusty banner ... that reads "Open Market" in bold red letters, at dusk.'
    quality       "a red fox in a birch forest, an oil painting, at sunrise, muted colours"
    t2i           a mix of Q's categories: composition, typography and general as the three above, and portrait,
                  "a close-up portrait of an elderly man with grey stubble, wearing a raincoat, at dusk, on a ferry"

    python -m data.written FOLDER        writes them as files to look at and to edit; then --prompts text=FOLDER/text

A prompt is a *key* (its content) and one choice from each of several lists (its form). A hash of the key alone decides
the split, so train and test share no key, whatever the seed: no pair of classes (in either order, with any colours or
relation), no counted or coloured class, no core of the quoted words, no subject in its setting, no person with the same
looks. The tag `single_object` is only ever tested.

Test prompts never come twice. Train prompts do if a kind is used up: GenEval's rules know only 240 prompts that
count, 175 of them for training, and at the training mix they are all seen after `TRAIN` lines. Then they begin again.

DEVIATION (GenEval): what is held out is a choice by hash, not GenEval's published file, whose prompts follow the same
rules. Many of them, most of all those that count, are among ours for training. A score on that file then flatters the
model.
"""

import argparse
import itertools
import json
import math
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from data.batches import seed_for
from data.checklists import NUMBERS, TAG_MIX, TEST_TAGS, checklist, counting, in_test_split, include
from data.files import SPLITS, Prompt, check_known
from rewards import RELATIONS

TASKS = ("composition", "text", "quality", "t2i")
TRAIN, TEST = 595, 390  # the longest lists in which no composition prompt comes twice


# words.json has the lists of words. Classes are the 80 of COCO under GenEval's names, colors those that its classifier
# tells apart. A thing has the place where it is found: a neon sign hangs nowhere in a forest.
WORDS: dict[str, list] = json.loads(Path(__file__).with_name("words.json").read_text(encoding="utf-8"))
CLASSES, COLORS = WORDS["classes"], WORDS["colors"]
COLORLESS = "person"  # GenEval never asks for a green person
# Every template uses every field. Otherwise two choices would give one prompt, and the count of prompts be wrong.
TEMPLATES = (
    '{style} of {look} {thing} {place} that reads "{words}" in {letters} letters, {light}.',
    '{style}: {look} {thing} {place}, with the words "{words}" in {letters} lettering, {light}.',
    '{place}, {look} {thing} displays "{words}" in {letters} letters, {light}, as {style}.',
    '{look} {thing} {place} says "{words}", written in {letters} letters, {light}, {style}.',
    '{light}, {style} shows {look} {thing} marked "{words}" in {letters} letters, {place}.',
    'The text "{words}" stands in {letters} letters on {look} {thing} {place}, {light}, {style}.',
)
TEXT_MIX = {1: 1, 2: 5, 3: 9, 4: 5}  # prompts by number of quoted words, about as in the OCR set of F §6.1
QUALITY_MIX = {"short": 1, "listed": 2, "led": 2}
PORTRAIT_MIX = {"plain": 1, "placed": 2}
# Q 4.2's categories, each with the list that it is drawn from. SILENT (Q 4.2): their mix is not given;
# this one is ours, and so is the choice of the four.
CATEGORIES = {"composition": "composition", "typography": "text", "portrait": "portrait", "general": "quality"}
T2I_MIX = {"composition": 3, "typography": 2, "portrait": 2, "general": 3}


class Space(NamedTuple):
    """All prompts of a kind: (text, metadata) = `write(*key, *choices)`, one choice from each of `parts`."""

    keys: Sequence[tuple]
    parts: Sequence[Sequence]
    write: Callable[..., tuple[str, dict]]

    @property
    def size(self) -> int:
        return len(self.keys) * math.prod(map(len, self.parts))


# ------------------------------------------------------------------------------------------------- the four spaces
def _composition() -> dict[str, Space]:
    """GenEval's six tags. Pairs come sorted, one key for both orders: "a and b" and "b and a" are one content."""
    pairs = list(itertools.combinations(sorted(CLASSES), 2))
    colored_pairs = [pair for pair in pairs if COLORLESS not in pair]
    colored = [(name, color) for name in CLASSES if name != COLORLESS for color in COLORS]
    counted = [(name, count) for name in CLASSES for count in NUMBERS if count > 1]
    swap = (False, True)

    def two_object(a, b, swapped):
        return checklist("two_object", *map(include, (b, a) if swapped else (a, b)))

    def color_attr(a, b, swapped, colors):
        names = (b, a) if swapped else (a, b)
        return checklist("color_attr", *(include(n, color=c) for n, c in zip(names, colors, strict=True)))

    def position(a, b, swapped, relation):
        a, b = (b, a) if swapped else (a, b)
        return checklist("position", include(b), include(a, position=[relation, 0]))

    return {
        "single_object": Space([(c,) for c in CLASSES], (), lambda c: checklist("single_object", include(c))),
        "position": Space(pairs, (swap, RELATIONS), position),
        "counting": Space(counted, (), counting),
        "color_attr": Space(colored_pairs, (swap, list(itertools.permutations(COLORS, 2))), color_attr),
        "colors": Space(colored, (), lambda c, color: checklist("colors", include(c, color=color))),
        "two_object": Space(pairs, (swap,), two_object),
    }


def _text() -> dict[int, Space]:
    """One to four quoted words; the key is their core, ("Fresh", "Bread") or ("", "Bread"), without the ending."""
    cores = list(itertools.product(WORDS["openers"], WORDS["nouns"]))
    scene = (TEMPLATES, *(WORDS[part] for part in ("looks", "things", "letters", "lights", "styles")))

    def sign(opener, noun, ending, template, look, thing, letters, light, style):
        fields = {"look": look, "thing": thing[0], "place": thing[1], "letters": letters, "light": light}
        text = template.format(words=" ".join(filter(None, (opener, noun, ending))), style=style, **fields)
        return text[0].upper() + text[1:], {}

    return {
        1: Space([("", noun) for noun in WORDS["nouns"]], (("",), *scene), sign),
        2: Space(cores, (("",), *scene), sign),
        3: Space(cores, (WORDS["endings"], *scene), sign),
        4: Space(cores, (WORDS["long_endings"], *scene), sign),
    }


def _quality() -> dict[str, Space]:
    """From a bare line to a full one; the key is who is where."""
    keys = list(itertools.product(WORDS["subjects"], WORDS["settings"]))
    full = tuple(WORDS[part] for part in ("styles", "lights", "details"))

    def listed(subject, setting, *more):
        return ", ".join((f"{subject} {setting}", *more)), {}

    def led(subject, setting, style, *more):
        return listed(f"{style} of {subject}", setting, *more)

    return {
        "short": Space(keys, full[:1], listed),
        "listed": Space(keys, full, listed),
        "led": Space(keys, full, led),
    }


def _portrait() -> dict[str, Space]:
    """The key is who, and how this person looks; clothes, light and place are anybody's."""
    keys = list(itertools.product(WORDS["people"], WORDS["features"]))
    full = tuple(WORDS[part] for part in ("shots", "clothes", "lights", "places"))

    def placed(person, feature, shot, clothes, *more):
        return ", ".join((f"{shot} of {person} {feature}", f"wearing {clothes}", *more)), {}

    return {
        "plain": Space(keys, full[:2], placed),
        "placed": Space(keys, full, placed),
    }


# ----------------------------------------------------------------------------------------------------- drawing
def make_prompts(task: str, split: str, count: int, seed: int = 0) -> list[Prompt]:
    """`count` prompts of "composition", "text", "quality" or "t2i" for "train" or "test". F §6.1; Q §4.2.

    A function of (task, split, seed): the first k of a longer list are the list of k. Composition has GenEval's
    metadata, in train at its mix (each 17 prompts hold 7 position, 5 counting, 3 color_attr, 1 colors, 1 two_object),
    in test six tags alike. T2i has its category in the metadata, in train each 10 prompts at `T2I_MIX`, in test the
    four in turn. `source` is "generated TASK:NUMBER".
    Raises ValueError for an unknown task or split ("edit" is one, because no rule can draw its pictures), for a
    negative count, or for more test prompts than are distinct.
    """
    check_known("task", task, TASKS)
    check_known("split", split, SPLITS)
    if task == "t2i":
        drawn, shares = _mixed(split, seed), T2I_MIX if split == "train" else dict.fromkeys(T2I_MIX, 1)
        rooms = {kind: _most(_spaces(part, split)) for kind, part in CATEGORIES.items()}
        most = sum(shares.values()) * min(room // shares[kind] for kind, room in rooms.items())
    else:
        drawn, most = _endless(task, split, seed), _most(_spaces(task, split))
    if count < 0 or (split == "test" and count > most):
        raise ValueError(f"no list of {count} {task} prompts to {split} on; there are {most} distinct ones")
    first = enumerate(itertools.islice(drawn, count), start=1)
    return [Prompt(text, task, meta, f"generated {task}:{n}") for n, (text, meta) in first]


def _spaces(part: str, split: str) -> dict[object, tuple[Space, int]]:
    """{kind: (its prompts of a split, its share)} of one of F's tasks or of the portraits."""
    spaces, mix = {
        "composition": (_composition, TAG_MIX if split == "train" else dict.fromkeys(TEST_TAGS, 1)),
        "text": (_text, TEXT_MIX),
        "quality": (_quality, QUALITY_MIX),
        "portrait": (_portrait, PORTRAIT_MIX),
    }[part]
    return {kind: (_held(space, split, kind), mix[kind]) for kind, space in spaces().items() if kind in mix}


def _held(space: Space, split: str, kind: object) -> Space:
    """The part of a space that belongs to a split; `single_object` is all test."""
    if kind == "single_object":
        return space
    return space._replace(keys=[key for key in space.keys if in_test_split(*key) == (split == "test")])


def _most(spaces: Mapping[object, tuple[Space, int]]) -> int:
    """The longest list of these kinds, at these shares, in which nothing comes twice."""
    return min(space.size // share for space, share in spaces.values()) * sum(share for _, share in spaces.values())


def _endless(part: str, split: str, seed: int) -> Iterator[tuple[str, dict]]:
    """Its prompts, without end. A kind that is used up begins again, so that there is always one that is not seen."""
    rng, spaces = random.Random(seed_for("generated", part, split, seed)), _spaces(part, split)
    seen: dict[object, set[str]] = {kind: set() for kind in spaces}
    for kind in _kinds({kind: share for kind, (_, share) in spaces.items()}, rng):
        space = spaces[kind][0]
        if len(seen[kind]) == space.size:
            seen[kind].clear()
        text = None
        while text is None or text in seen[kind]:
            text, metadata = space.write(*rng.choice(space.keys), *map(rng.choice, space.parts))
        seen[kind].add(text)
        yield text, metadata


def _mixed(split: str, seed: int) -> Iterator[tuple[str, dict]]:
    """The prompts of Q's categories, each with its own in the metadata, by which the weights of rewards are chosen."""
    rng = random.Random(seed_for("generated", "t2i", split, seed))
    lists = {category: _endless(part, split, seed) for category, part in CATEGORIES.items()}
    for category in _kinds(T2I_MIX, rng) if split == "train" else itertools.cycle(CATEGORIES):
        text, metadata = next(lists[category])
        yield text, {**metadata, "prompt": text, "category": category}


def _kinds(mix: Mapping, rng: random.Random) -> Iterator:
    """The kind of each prompt, without end: shuffled blocks at exactly the mix."""
    block = [kind for kind, share in mix.items() for _ in range(share)]
    while True:
        rng.shuffle(block)
        yield from block


# ------------------------------------------------------------------------------------------------------- files
def write(folder: Path, train: int = TRAIN, test: int = TEST, seed: int = 0) -> dict[str, list[Prompt]]:
    """Write FOLDER/TASK/{train,test}.txt or, of composition and t2i, {train,test}_metadata.jsonl. F §6.1, Q §4.2.

    Returns the prompts by file name. The folder appears complete or not at all. Raises ValueError as `make_prompts`
    and for a count below 1, and OSError for a folder that is a file, not empty or not writable.
    """
    if min(train, test) < 1:
        raise ValueError(f"--train {train} --test {test}: both must be 1 or more")
    files = {}
    for task, (split, count) in itertools.product(TASKS, (("train", train), ("test", test))):
        ending = "_metadata.jsonl" if task in ("composition", "t2i") else ".txt"
        files[f"{task}/{split}{ending}"] = make_prompts(task, split, count, seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as hidden:
        for name, prompts in files.items():
            file = Path(hidden, "whole", name)
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps(p.metadata) if p.metadata else p.text for p in prompts)
            file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        Path(hidden, "whole").rename(folder)  # OSError unless it is new or empty: no edited prompt is lost
    return files


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exits with 2 after one line that says what is wrong."""
    parser = argparse.ArgumentParser("data.written", description="Write prompts for four tasks.", allow_abbrev=False)
    parser.add_argument("folder", metavar="FOLDER", help="a new or empty folder", type=Path)
    parser.add_argument("--train", metavar="N", type=int, default=TRAIN, help=f"train prompts a task ({TRAIN})")
    parser.add_argument("--test", metavar="N", type=int, default=TEST, help=f"test prompts a task ({TEST})")
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="other seeds give other prompts (0)")
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")  # argparse's own prints its usage, too
    given = parser.parse_args(argv)
    try:
        files = write(**vars(given))
    except OSError as fault:
        parser.error(f"{given.folder}: cannot be written ({fault.strerror}); name a new or empty folder")
    except ValueError as fault:
        parser.error(str(fault))
    for name, prompts in files.items():
        print(f"{given.folder / name}: {len(prompts)} prompts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
