"""The tiny world's second task: what is an edit, was it done, and what did it spoil? Q 3.3, 4.

A source picture and an instruction go in. A picture comes out in which what the instruction names has changed and
everything else has stayed. Sources are drawings as those of `drawings.py`, two objects or a word, on white or tinted
paper:

    recolor      "make the circle blue"          one of two objects is named
    add          "add a green cross"             beside the object that is there
    remove       "remove the circle"             one of two
    word         'change the word to "CAT"'      the ink stays
    background   "make the background pink"      the objects stay

Q scores edits by two rewards, and so does this file, by the project's general rules over tiny detectors:

    instruction   Q 3.3's decomposition into core demands (what was asked) and others (what else must be there), and how
                  coherent the picture is, as `rewards.capped_editing` makes one score of them. A demand is an entry of
                  a GenEval checklist over `detect`, or the OCR rule.
    identity      is what was not named still the same? The mean over its places of `rewards.similarity` between the
                  embeddings of source and result. The tiny identity network is `embedding`: colour and shape.

RL has the same to learn as in `drawings.py`: in the pictures that the base learns from, the edit itself is wrong with
probability `ATTRIBUTE_ERROR` (a letter with `LETTER_ERROR`, a removal with two thirds of it), what should stay has
changed with probability `DRIFT`, and half of the results are spoilt. No instruction shows any of it.

A prompt is a line of an editing file (`data/files.py`): `include` is the checklist of the *result*, `t2i_prompt` says
what the source shows, `image` is the source itself, as a data URI. Two fields are the tiny world's own: `core`, the
indices of the entries that were asked for, and `keep`, the boxes (x0, y0, x1, y1) of what was not named. Of a line
without `core` every entry was asked for. One without `keep` has an instruction reward, and no identity reward.

The first task, "t2i", is drawn from the three of `drawings.py`, each a category (Q 4.2: composition, typography, open).
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

import rewards
from data.checklists import TEST_TAGS, in_test_split, include, sentence
from data.files import SPLITS, DataError, Prompt, check_known
from data.pictures import data_uri, source_images, sources
from tiny import canvas, drawings
from tiny.canvas import (
    BOXES,
    CLASSES,
    COLORS,
    INKS,
    LETTERS,
    PAPERS,
    SIZE,
    WORD_BOX,
    draw,
    embedding,
    name_color,
    purity,
    read_text,
    spoil,
)  # fmt: skip
from tiny.drawings import ATTRIBUTE_ERROR, LETTER_ERROR, other

TASKS = ("t2i", "edit")
EDITS = {"recolor": 3, "add": 2, "remove": 2, "word": 2, "background": 2}  # the mix of the kinds
DRIFT = 0.3  # how often what should stay does not
CATEGORIES = {"composition": 6, "text": 2, "quality": 3}  # the tasks of `drawings.py` in the first task, and their mix
CATEGORY_NAMES = {"composition": "composition", "text": "typography", "quality": "open"}
VOCABULARY = [*drawings.VOCABULARY, "make", "the", "add", "remove", "change", "word", "to", "background", *PAPERS]
THINGS = {**drawings.THINGS, "background": PAPERS}  # what the checklist of an edit may name
tokenize = partial(drawings.tokenize, vocabulary=VOCABULARY)


# ------------------------------------------------------------------------------------------------ scenes and edits
def box_of(thing: Mapping) -> tuple[int, int, int, int]:
    """One of `BOXES`: (x0, y0, x1, y1) of the cell in which an object stands."""
    column, row = thing["cell"]
    return BOXES[2 * row + column]


def listed(things: Sequence[Mapping]) -> list[dict]:
    """A checklist's entries of objects, each with its colour."""
    return [include(thing["class"], color=thing["color"]) for thing in things]


def source_scene(kind: str, rng: random.Random) -> dict:
    """What the source of an edit of this kind shows."""
    paper = rng.choice(["white", *PAPERS])  # white twice
    if kind == "word":
        return {"word": drawings.random_word(rng), "color": rng.choice(INKS), "paper": paper}
    names, colors = rng.sample(CLASSES, 2), rng.sample(sorted(COLORS), 2)
    places = drawings.cells(2, rng.choice(sorted(drawings.OPPOSITE)), rng.choice((0, 1)))
    things = [{"class": n, "color": c, "cell": p} for n, c, p in zip(names, colors, places, strict=True)]
    if kind == "background":  # names none of them: their order, which no picture shows, must not decide on the split
        things.sort(key=lambda thing: thing["cell"])
    return {"objects": things[:1] if kind == "add" else things, "paper": paper}


def sample_edit(kind: str, rng: random.Random) -> tuple[dict, dict, str, dict]:
    """One edit: (source scene, result scene, instruction, what was asked: the entries and fields of its metadata)."""
    source = source_scene(kind, rng)
    paper = include("background", color=source["paper"])
    if kind == "word":
        while (word := drawings.random_word(rng)) == source["word"]:
            pass
        asked = {"include": [paper], "core": [], "keep": [WORD_BOX]}  # the OCR rule reads its demand from the prompt
        return source, {**source, "word": word}, f'change the word to "{word}"', asked
    things = source["objects"]
    if kind == "background":
        color = other(source["paper"], list(PAPERS), rng)
        entries = [include("background", color=color), *listed(things)]
        asked = {"include": entries, "core": [0], "keep": [box_of(t) for t in things]}
        return source, {**source, "paper": color}, f"make the background {color}", asked
    stays, named = things[0], things[-1]
    entries, keep = [*listed([stays]), paper], [box_of(stays)]
    if kind == "remove":
        asked = {"include": entries, "exclude": [include(named["class"])], "core": [], "keep": keep}
        return source, {**source, "objects": [stays]}, f"remove the {named['class']}", asked
    if kind == "recolor":
        new = {**named, "color": other(named["color"], sorted(COLORS), rng)}
        text = f"make the {new['class']} {new['color']}"
    else:
        new = {"class": other(stays["class"], CLASSES, rng), "color": rng.choice(sorted(COLORS))}
        new["cell"] = (1 - stays["cell"][0], stays["cell"][1])  # beside it
        text = f"add a {new['color']} {new['class']}"
    asked = {"include": [*listed([new]), *entries], "core": [0], "keep": keep}
    return source, {**source, "objects": [stays, new]}, text, asked


def corrupted(kind: str, source: dict, result: dict, rng: random.Random) -> dict:
    """What the world draws for `result`: the edit is sometimes wrong, and what should stay sometimes drifts."""
    if kind == "word":
        letters = [other(c, LETTERS, rng) if rng.random() < LETTER_ERROR else c for c in result["word"]]
        ink = other(result["color"], INKS, rng) if rng.random() < DRIFT else result["color"]
        return {**result, "word": "".join(letters), "color": ink}
    things, paper, wrong = [dict(t) for t in result["objects"]], result["paper"], rng.random() < ATTRIBUTE_ERROR
    attributes = {"color": sorted(COLORS), "class": CLASSES}
    if wrong and kind in ("recolor", "add"):
        field = rng.choice(("color", "class")) if kind == "add" else "color"
        things[-1][field] = other(things[-1][field], attributes[field], rng)
    elif wrong and kind == "remove":  # the other one, in two of three
        stays, named = source["objects"]
        things = [dict(rng.choice((named, stays, named)))]
    elif wrong:
        paper = other(paper, list(PAPERS), rng)
    if rng.random() < DRIFT:
        drifting = rng.choice(things) if kind == "background" else things[0]
        field = "color" if rng.random() < 0.7 else "class"
        drifting[field] = other(drifting[field], attributes[field], rng)
    return {**result, "objects": things, "paper": paper}


# ---------------------------------------------------------------------------------------------------------- prompts
def sample(split: str, rng: random.Random, kind: str | None = None) -> tuple[str, dict, dict, str, dict]:
    """(kind, source, result, instruction, asked) of one split; a hash of instruction and source decides."""
    kind = kind or rng.choices(list(EDITS), list(EDITS.values()))[0]
    while True:
        source, result, text, asked = sample_edit(kind, rng)
        if in_test_split("edit", text, sorted(map(str, source.items()))) == (split == "test"):
            return kind, source, result, text, asked


def make_prompts(task: str, split: str, count: int, seed: int = 0) -> list[Prompt]:
    """`count` prompts of "t2i" or "edit". The test split runs through categories and kinds in turn. ValueError for
    another task or split."""
    check_known("task", task, TASKS)
    check_known("split", split, SPLITS)
    rng, one = random.Random(f"{task}/{split}/{seed}"), {"t2i": _t2i, "edit": _edit}[task]
    drawn = [one(split, i, rng) for i in range(count)]
    return [Prompt(text, task, meta, f"tiny {split} {task}:{i}") for i, (text, meta) in enumerate(drawn, start=1)]


def _edit(split: str, number: int, rng: random.Random) -> tuple[str, dict]:
    kind = list(EDITS)[number % len(EDITS)] if split == "test" else None
    kind, source, _, text, asked = sample(split, rng, kind)
    shown = f'a sign that says "{source["word"]}"' if kind == "word" else sentence(listed(source["objects"]))
    image = data_uri(torch.from_numpy(draw(source)))
    return text, {"tag": kind, **asked, "prompt": text, "t2i_prompt": shown, "image": image}


def _t2i(split: str, number: int, rng: random.Random) -> tuple[str, dict]:
    names, tag = list(CATEGORIES), None
    kind = names[number % len(names)] if split == "test" else rng.choices(names, list(CATEGORIES.values()))[0]
    if split == "test" and kind == "composition":
        tag = TEST_TAGS[number // len(names) % len(TEST_TAGS)]
    text, meta = drawings.sample_prompt(kind, split, rng, tag)
    return text, {**meta, "category": CATEGORY_NAMES[kind]}


def check_prompt(prompt: Prompt) -> None:
    """DataError, by file and line, for a prompt that this world cannot say, draw or score.

    Everything is scored by what the prompt names: an include list (an edit's is about its result), or a quoted word.
    """
    edit, meta, fault = prompt.task == "edit", prompt.metadata, ""
    drawings.check_prompt(prompt, TASKS, VOCABULARY, THINGS if edit else drawings.THINGS)
    entries = [*meta.get("include", ()), *meta.get("exclude", ())]
    core = meta.get("core", [])
    if not entries and '"' not in prompt.text:
        fault = "nothing to score by; give it an include list, or quote a word"
    elif edit and any("position" in entry for entry in entries):
        fault = "an edit's checklist knows no position in this world; leave it out"
    elif type(core) is not list or not {(type(i), i) for i in core} <= {(int, i) for i in range(len(entries))}:
        fault = f"core is {core!r}; it must be a list of indices of the include list"
    elif "core" in meta and not core and "exclude" not in meta and '"' not in prompt.text:
        fault = "core is empty; name at least one entry of the include list"
    elif edit and [image.shape for image in source_images(prompt)] != [(SIZE, SIZE, 3)]:
        fault = f"its image is not one of {SIZE} x {SIZE} pixels; give one of that size"
    elif edit and not _kept_is_seen(prompt):
        fault = f"keep is {meta['keep']!r}; it must be a list of places with something in them, out of {BOXES}"
    if fault:
        raise DataError(f"{prompt.source}: {fault}")


def _kept_is_seen(prompt: Prompt) -> bool:
    keep, ((source,),) = prompt.metadata.get("keep", []), sources([prompt])
    known = [*BOXES, *map(list, BOXES)]  # JSON knows no tuples
    return type(keep) is list and all(box in known and embedding(source, box).any() for box in keep)


def training_edit(rng: random.Random) -> tuple[np.ndarray, np.ndarray, str]:
    """One pretraining triple: (source (3, 24, 24), result, instruction), of the training split."""
    kind, source, result, text, _ = sample("train", rng)
    return draw(source), spoil(draw(corrupted(kind, source, result, rng)), rng), text


def training_batch(rng: random.Random, size: int, tasks: Sequence[str] = TASKS) -> Iterator[tuple]:
    """As `drawings.training_batch`; half of it are edits if "edit" is one of the tasks."""
    changed = size // 2 if "edit" in tasks else 0
    yield from drawings.training_batch(rng, size - changed)
    if changed:
        before, after, captions = zip(*(training_edit(rng) for _ in range(changed)), strict=True)
        yield torch.from_numpy(np.stack(after)), captions, list(torch.from_numpy(np.stack(before)))


# ---------------------------------------------------------------------------------------------------------- scorers
def detect(images: Tensor) -> list[list[dict]]:
    """`canvas.detect`'s objects, and one more of class "background", in the paper's colour."""
    found, box = canvas.detect(images), (0.0, 0.0, float(SIZE), float(SIZE))
    for objects, paper in zip(found, canvas.paper_of(images), strict=True):
        objects.append({"class": "background", "score": 1.0, "box": box, "color": name_color(paper, PAPERS)})
    return found


def score_instruction(images: Tensor, prompts: Sequence[Prompt]) -> list[float]:
    """Q 3.3's instruction following, in [0, 1]: `rewards.capped_editing` of the demands that the result meets."""
    words, clean = read_text(images), purity(images, [*PAPERS.values(), *COLORS.values()])
    scores = []
    for p, found, word, coherence in zip(prompts, detect(images), words, clean.tolist(), strict=True):
        core, extra = demands(p, found, word)
        rating = rewards.capped_editing(core, extra, 1 + 4 * coherence)
        scores.append((rating - rewards.LOWEST_RATING) / (rewards.HIGHEST_RATING - rewards.LOWEST_RATING))
    return scores


def demands(prompt: Prompt, found: Sequence[dict], word: str) -> tuple[list[float], list[float]]:
    """(core, other) demands of an edit, each met to a degree in [0, 1].

    What is excluded and what is quoted is core: both are asked for in so many words. RewardError without a demand.
    """
    meta, seen = prompt.metadata, rewards.filter_detections(found, prompt.metadata)
    entries = meta.get("include", ())
    asked = meta.get("core", range(len(entries)))
    met = [float(rewards.geneval_verdict(seen, {"include": [entry]})) for entry in entries]
    core = [value for i, value in enumerate(met) if i in asked]
    core += [float(not rewards.geneval_verdict(seen, {"include": [entry]})) for entry in meta.get("exclude", ())]
    if "target" in meta or '"' in prompt.text:
        core.append(rewards.ocr_reward(word, prompt.text, meta.get("target", "")))
    if not core:
        raise rewards.RewardError(f"{prompt.source}: no demand to score an edit by; give it an include list")
    return core, [value for i, value in enumerate(met) if i not in asked]


def score_identity(images: Tensor, prompts: Sequence[Prompt], before: Sequence[tuple[Tensor]]) -> list[float]:
    """Q 3.3's identity, in [0, 1]: the mean over the places that were not named of how alike source and result are.

    A thing that is gone counts 0. RewardError for a prompt that does not say what it keeps.
    """
    scores = []
    for image, p, (source,) in zip(images, prompts, before, strict=True):
        if not p.metadata.get("keep"):
            raise rewards.RewardError(f"{p.source}: identity needs the field 'keep'; add it, or use no 'identity'")
        alike = []
        for box in p.metadata["keep"]:
            one, two = embedding(source, box), embedding(image, box)
            alike.append(rewards.similarity(one, two, canvas.STRANGER) if two.any() else 0.0)
        scores.append(sum(alike) / len(alike))
    return scores


KINDS = (*drawings.KINDS, "instruction", "identity")  # what --rewards may name in this world
REWARDS = {
    "t2i": {"t2i": {"preference": 0.6, "quality": 0.4}, "typography": {"preference": 0.8, "quality": 0.2}},
    "edit": {"edit": {"instruction": 0.6, "identity": 0.4}},
}


def scorer(name: str) -> rewards.Scorer:
    """One of `KINDS` in the signature of every scorer; all lie in [0, 1]."""
    if name in drawings.KINDS:
        return drawings.scorer(name)

    def score(images: Tensor, prompts: Sequence[Prompt], sources: Sequence[tuple[Tensor]] | None = None) -> Tensor:
        if name == "instruction":
            return torch.tensor(score_instruction(images, prompts))
        if sources is None:
            raise rewards.RewardError("scorer 'identity': needs the source pictures of edits")
        return torch.tensor(score_identity(images, prompts, sources))

    return rewards.Scorer(name, score, 0.0, 1.0)


# ------------------------------------------------------------------------------------------------------- evaluation
def score(images: Tensor, prompts: Sequence[Prompt], task: str, panel: object = None) -> dict[str, list[float]]:
    """As `drawings.score`, of Q's tasks: two sides of a picture and, under the task's name, their mean.

    t2i: alignment by strict rules, and print quality. edit: instruction following, and identity of the rest; nan for an
    edit that does not say what it keeps, as a user's own need not.
    """
    if task == "edit":
        told = [i for i, p in enumerate(prompts) if p.metadata.get("keep")]
        some = [prompts[i] for i in told]
        sides = {"instruction": score_instruction(images, prompts), "identity": np.full(len(prompts), np.nan)}
        sides["identity"][told] = score_identity(images[told], some, sources(some) or [])
    else:
        sides = {"alignment": drawings.score_preference(images, prompts, drawings.score_verdict)}
        sides["aesthetic"] = drawings.score_quality(images, prompts)
    return {task: np.nanmean([*sides.values()], 0), **sides}
