"""The tiny world's second task: what is an edit, and who can tell whether it was done and what it spoilt? Q 3.3, 4.

A source picture and an instruction go in, a picture comes out in which what the instruction names has changed and
everything else has stayed. Sources are drawings of `tiny.py`, two objects or a word, on white or tinted paper:

    recolor      "make the circle blue"          one of two objects is named
    add          "add a green cross"             beside the object that is there
    remove       "remove the circle"             one of two
    word         'change the word to "CAT"'      the ink stays
    background   "make the background pink"      the objects stay

Q scores edits by two rewards, and so does this file, by the project's general rules over tiny eyes:

    instruction   Q 3.3's decomposition into core demands (what was asked) and others (what else must be there), and how
                  coherent the picture is, as `rewards.capped_editing` makes one score of them. A demand is an entry of
                  a GenEval checklist, held against `tiny.detect`, or the OCR rule.
    identity      is what was not named still the same? The mean over its places of `rewards.similarity` between the
                  embeddings of source and result. The tiny identity network is `embedding`: colour and shape.

Why RL has something to fix, as in tiny.py: in the pictures that the base learns from, the edit itself is wrong with
probability `tiny.ATTRIBUTE_ERROR` (a letter with `tiny.LETTER_ERROR`, a removal with two thirds of it), what should
stay has changed with probability `DRIFT`, and half of the results are spoilt. None of it shows in the instruction.

A prompt is a line of an editing file (`data.py`): `include` is the checklist of the *result*, `t2i_prompt` says what
the source shows, `image` is the source itself, as a data URI. Two fields are the tiny world's own: `core`, the indices
of the entries that were asked for, and `keep`, the boxes (x0, y0, x1, y1) of what was not named. Of a line without
`core` every entry was asked for; one without `keep` has an instruction reward, and no identity reward.

The first task is drawn from tiny.py's three, each a category of its own (Q 4.2: composition, typography, open).
"""

import base64
import io
import random
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image

import rewards
from data import files as data
from data.files import Prompt
from tiny import drawings as tiny
from tiny.drawings import CELL, CLASSES, COLORS, INKS, LETTERS, SIZE, include

PAPERS = {"white": (1.0, 1.0, 1.0), "pink": (1.0, 0.78, 0.86), "mint": (0.78, 1.0, 0.84), "sky": (0.76, 0.88, 1.0)}
TASKS = ("t2i", "edit")
EDITS = {"recolor": 3, "add": 2, "remove": 2, "word": 2, "background": 2}  # the mix of the kinds
DRIFT = 0.3  # how often what should stay does not
CATEGORIES = {"composition": 6, "text": 2, "quality": 3}  # tiny.py's tasks within the first task, and their mix
CATEGORY_NAMES = {"composition": "composition", "text": "typography", "quality": "open"}
VOCABULARY = [*tiny.VOCABULARY, "make", "the", "add", "remove", "change", "word", "to", "background", *PAPERS]
THINGS = {**tiny.THINGS, "background": PAPERS}  # what the checklist of an edit may name
WORD_BOX = (0, 7, SIZE, 17)
BOXES = [(x, y, x + CELL, y + CELL) for y in (0, CELL) for x in (0, CELL)] + [WORD_BOX]  # where a thing can stand
STRANGER = 0.5  # the cosine of two things that differ in colour or in shape
INK = 0.4  # as far from its paper as this, a pixel is ink: that of a faded yellow on pink is 0.45


def tokenize(prompt: str) -> list[int]:
    """`tiny.tokenize` with the words of instructions."""
    return tiny.tokenize(prompt, VOCABULARY)


# ------------------------------------------------------------------------------------------------ scenes and edits
def draw(scene: Mapping) -> np.ndarray:
    """`tiny.draw`, (3, 24, 24), on the scene's own paper: {"word", "color"} or {"objects"}, and "paper"."""
    ink = tiny.draw(scene)
    blank = (ink == 1).all(0)  # no colour of the world is white
    return np.where(blank, np.asarray(PAPERS[scene.get("paper", "white")], np.float32)[:, None, None], ink)


def cell_box(thing: Mapping) -> tuple[int, int, int, int]:
    """One of `BOXES`: (x0, y0, x1, y1) of the cell in which an object stands."""
    column, row = thing["cell"]
    return BOXES[2 * row + column]


def source_scene(kind: str, rng: random.Random) -> dict:
    """What the source of an edit of this kind shows."""
    paper = rng.choice(["white", *PAPERS])  # white twice
    if kind == "word":
        return {"word": _word(rng), "color": rng.choice(INKS), "paper": paper}
    names, colors = rng.sample(CLASSES, 2), rng.sample(sorted(COLORS), 2)
    places = tiny.cells(2, rng.choice(sorted(tiny.OPPOSITE)), rng.choice((0, 1)))
    things = [{"class": n, "color": c, "cell": p} for n, c, p in zip(names, colors, places, strict=True)]
    if kind == "background":  # names none of them: their order, which no picture shows, must not decide on the split
        things.sort(key=lambda thing: thing["cell"])
    return {"objects": things[:1] if kind == "add" else things, "paper": paper}


def _word(rng: random.Random) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(tiny.WORD_LENGTH))


def _other(value: str, choices: Sequence[str], rng: random.Random) -> str:
    return rng.choice([c for c in choices if c != value])


def sample_edit(kind: str, rng: random.Random) -> tuple[dict, dict, str, dict]:
    """One edit: (source scene, result scene, instruction, what was asked: the entries and fields of its metadata)."""
    source = source_scene(kind, rng)
    paper = include("background", color=source["paper"])
    if kind == "word":
        while (word := _word(rng)) == source["word"]:
            pass
        asked = {"include": [paper], "core": [], "keep": [WORD_BOX]}  # the OCR rule reads its demand off the prompt
        return source, {**source, "word": word}, f'change the word to "{word}"', asked
    things = source["objects"]
    if kind == "background":
        color = _other(source["paper"], list(PAPERS), rng)
        entries = [include("background", color=color), *(include(t["class"], color=t["color"]) for t in things)]
        asked = {"include": entries, "core": [0], "keep": [cell_box(t) for t in things]}
        return source, {**source, "paper": color}, f"make the background {color}", asked
    stays, named = things[0], things[-1]
    entries, keep = [include(stays["class"], color=stays["color"]), paper], [cell_box(stays)]
    if kind == "remove":
        asked = {"include": entries, "exclude": [include(named["class"])], "core": [], "keep": keep}
        return source, {**source, "objects": [stays]}, f"remove the {named['class']}", asked
    if kind == "recolor":
        new = {**named, "color": _other(named["color"], sorted(COLORS), rng)}
        text = f"make the {new['class']} {new['color']}"
    else:
        new = {"class": _other(stays["class"], CLASSES, rng), "color": rng.choice(sorted(COLORS))}
        new["cell"] = (1 - stays["cell"][0], stays["cell"][1])  # beside it
        text = f"add a {new['color']} {new['class']}"
    asked = {"include": [include(new["class"], color=new["color"]), *entries], "core": [0], "keep": keep}
    return source, {**source, "objects": [stays, new]}, text, asked


def corrupted(kind: str, source: dict, result: dict, rng: random.Random) -> dict:
    """What the world draws for `result`: the edit is sometimes wrong, and what should stay sometimes drifts."""
    if kind == "word":
        letters = [_other(c, LETTERS, rng) if rng.random() < tiny.LETTER_ERROR else c for c in result["word"]]
        ink = _other(result["color"], INKS, rng) if rng.random() < DRIFT else result["color"]
        return {**result, "word": "".join(letters), "color": ink}
    things, paper, wrong = [dict(t) for t in result["objects"]], result["paper"], rng.random() < tiny.ATTRIBUTE_ERROR
    attributes = {"color": sorted(COLORS), "class": CLASSES}
    if wrong and kind in ("recolor", "add"):
        field = rng.choice(("color", "class")) if kind == "add" else "color"
        things[-1][field] = _other(things[-1][field], attributes[field], rng)
    elif wrong and kind == "remove":  # the other one, in two of three
        stays, named = source["objects"]
        things = [dict(rng.choice((named, stays, named)))]
    elif wrong:
        paper = _other(paper, list(PAPERS), rng)
    if rng.random() < DRIFT:
        drifting = rng.choice(things) if kind == "background" else things[0]
        field = "color" if rng.random() < 0.7 else "class"
        drifting[field] = _other(drifting[field], attributes[field], rng)
    return {**result, "objects": things, "paper": paper}


def caption(scene: Mapping) -> str:
    """What a scene shows, in the words of tiny.py."""
    if "word" in scene:
        return f'a sign that says "{scene["word"]}"'
    return "a photo of " + " and ".join(f"a {t['color']} {t['class']}" for t in scene["objects"])


# ---------------------------------------------------------------------------------------------------------- prompts
def _sample(split: str, rng: random.Random, kind: str | None = None) -> tuple[str, dict, dict, str, dict]:
    """(kind, source, result, instruction, asked) of one split; a hash of instruction and source decides."""
    kind = kind or rng.choices(list(EDITS), list(EDITS.values()))[0]
    while True:
        source, result, text, asked = sample_edit(kind, rng)
        if tiny.in_test_split("edit", text, sorted(map(str, source.items()))) == (split == "test"):
            return kind, source, result, text, asked


def make_prompts(task: str, split: str, count: int, seed: int = 0) -> list[Prompt]:
    """`count` prompts of "t2i" or "edit". The test split runs through categories and kinds in turn. ValueError for
    another task or split."""
    for name, value, allowed in (("task", task, TASKS), ("split", split, data.SPLITS)):
        if value not in allowed:
            raise ValueError(f"this world has no {name} {value!r}, only {', '.join(allowed)}")
    rng, sample = random.Random(f"{task}/{split}/{seed}"), {"t2i": _t2i, "edit": _edit}[task]
    drawn = [sample(split, i, rng) for i in range(count)]
    return [Prompt(text, task, meta, f"tiny {split} {task}:{i}") for i, (text, meta) in enumerate(drawn, start=1)]


def _edit(split: str, number: int, rng: random.Random) -> tuple[str, dict]:
    kind = list(EDITS)[number % len(EDITS)] if split == "test" else None
    kind, source, _, text, asked = _sample(split, rng, kind)
    return text, {
        "tag": kind, **asked, "prompt": text, "t2i_prompt": caption(source), "image": data_uri(draw(source))
    }  # fmt: skip


def _t2i(split: str, number: int, rng: random.Random) -> tuple[str, dict]:
    names, tag = list(CATEGORIES), None
    kind = names[number % len(names)] if split == "test" else rng.choices(names, list(CATEGORIES.values()))[0]
    if split == "test" and kind == "composition":
        tag = tiny.TEST_TAGS[number // len(names) % len(tiny.TEST_TAGS)]
    text, meta = tiny.sample_prompt(kind, split, rng, tag)
    return text, {**meta, "category": CATEGORY_NAMES[kind]}


def data_uri(image: np.ndarray) -> str:
    """A picture (3, H, W) in [0, 1] as a PNG in a data URI."""
    stream = io.BytesIO()
    Image.fromarray((image.transpose(1, 2, 0) * 255).round().astype(np.uint8)).save(stream, "PNG")
    return data.PNG_URI + base64.b64encode(stream.getvalue()).decode()


def check_prompt(prompt: Prompt) -> None:
    """Refuse, by file and line, a prompt that this world cannot say, draw or score; `tiny.check_prompt` for its tasks.

    Everything is scored by what the prompt names: an include list (an edit's is about its result), or a quoted word.
    """
    edit, meta, fault = prompt.task == "edit", prompt.metadata, ""
    tiny.check_prompt(prompt, TASKS, VOCABULARY, THINGS if edit else tiny.THINGS)
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
    elif edit and data.source_image(prompt).shape != (SIZE, SIZE, 3):
        fault = f"its image is not {SIZE} x {SIZE} pixels; give one of that size"
    elif edit and not _kept_is_seen(prompt):
        fault = f"keep is {meta['keep']!r}; it must be a list of places with something in them, out of {BOXES}"
    if fault:
        raise data.DataError(f"{prompt.source}: {fault}")


def _kept_is_seen(prompt: Prompt) -> bool:
    keep, source = prompt.metadata.get("keep", []), torch.from_numpy(data.source_image(prompt)).permute(2, 0, 1) / 255
    places = [*BOXES, *map(list, BOXES)]  # JSON knows no tuples
    return type(keep) is list and all(box in places and embedding(source, box).any() for box in keep)


def training_edit(rng: random.Random) -> tuple[np.ndarray, np.ndarray, str]:
    """One pretraining triple: (source (3, 24, 24), result, instruction), of the training split."""
    kind, source, result, text, _ = _sample("train", rng)
    return draw(source), tiny.spoil(draw(corrupted(kind, source, result, rng)), rng), text


# ------------------------------------------------------------------------------------------------- eyes and scorers
def detect(images: torch.Tensor) -> list[list[dict]]:
    """`tiny.detect`'s objects, and one more of class "background": the paper's colour, read off its upper and lower
    edge, where nothing is ever drawn."""
    edges = images.float()[:, :, (0, -1)].flatten(2)  # (B, 3, 2 * 24)
    found = tiny.detect(images)
    for objects, paper in zip(found, edges.median(2).values, strict=True):
        box = (0.0, 0.0, float(SIZE), float(SIZE))
        objects.append({"class": "background", "score": 1.0, "box": box, "color": tiny.name_color(paper, PAPERS)})
    return found


def score_instruction(images: torch.Tensor, prompts: Sequence[Prompt]) -> list[float]:
    """Q 3.3's instruction following, in [0, 1]: `rewards.capped_editing` of the demands that the result meets."""
    words, clean = tiny.read_text(images), tiny.purity(images, [*PAPERS.values(), *COLORS.values()])
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
    if '"' in prompt.text:
        core.append(rewards.ocr_reward(word, prompt.text))
    if not core:
        raise rewards.RewardError(f"{prompt.source}: no demand to score an edit by; give it an include list")
    return core, [value for i, value in enumerate(met) if i not in asked]


def embedding(image: torch.Tensor, box: Sequence[int]) -> np.ndarray:
    """The tiny identity network: (11,), what stands in one of `BOXES` of a picture (3, 24, 24).

    Two halves of length 1: the colour (6), and the shape (4, and one more for everything else, letters included). Both
    are soft choices that allow for faded print, so that a pale circle is still the same circle; an empty box is all 0.
    """
    x0, y0, x1, y1 = box
    patch = image.float()[:, y0:y1, x0:x1].flatten(1)  # (3, pixels)
    paper = image.float()[:, (0, -1)].flatten(1).median(1).values
    ink = (patch - paper[:, None]).norm(dim=0)  # (pixels,), how far each is from paper
    there = ink > INK
    if there.sum() < 8:  # grain, no thing
        return np.zeros(len(COLORS) + len(CLASSES) + 1)
    color = torch.softmax(-40 * tiny.color_distances(patch[:, there].median(1).values, COLORS), 0)  # (6,)
    fits = torch.full((len(CLASSES) + 1,), 0.5)  # what correlates less with a shape is not of that shape, `tiny.detect`
    if tuple(box) == WORD_BOX:
        fits[:-1] = 0
    else:
        masks = torch.stack([torch.from_numpy(np.pad(m, 1)).flatten() for m in tiny.object_masks().values()])
        fits[:-1] = tiny.correlate(ink[None], masks)[0]
    shape = torch.softmax(20 * fits, 0)  # (5,)
    return torch.cat([color / color.norm(), shape / shape.norm()]).numpy()


def score_identity(images: torch.Tensor, prompts: Sequence[Prompt], sources: Sequence[torch.Tensor]) -> list[float]:
    """Q 3.3's identity, in [0, 1]: the mean over the places that were not named of how alike source and result are.

    A thing that is gone is a stranger. RewardError for a prompt that does not say what it keeps.
    """
    scores = []
    for image, p, source in zip(images, prompts, sources, strict=True):
        if not p.metadata.get("keep"):
            raise rewards.RewardError(f"{p.source}: identity needs the field 'keep'; add it, or use no 'identity'")
        alike = []
        for box in p.metadata["keep"]:
            before, after = embedding(source, box), embedding(image, box)
            alike.append(rewards.similarity(before, after, STRANGER) if after.any() else 0.0)
        scores.append(sum(alike) / len(alike))
    return scores


def score_alignment(images: torch.Tensor, prompts: Sequence[Prompt]) -> list[float]:
    """How an evaluation counts the first task, in [0, 1]: GenEval's strict verdict where there is a checklist, else the
    OCR rule. ValueError for a prompt that has neither."""
    listed = ["include" in p.metadata for p in prompts]
    scores = [0.0] * len(prompts)
    for some, rule in ((True, tiny.score_verdict), (False, tiny.score_ocr)):
        rows = [i for i, has in enumerate(listed) if has is some]
        if rows:
            for i, score in zip(rows, rule(images[rows], [prompts[i] for i in rows]), strict=True):
                scores[i] = score
    return scores


SCORERS = ("instruction", "identity")


def scorer(name: str) -> rewards.Scorer:
    """One of `SCORERS` in the signature of every scorer; both lie in [0, 1]. ValueError for another name."""
    if name not in SCORERS:
        raise ValueError(f"no eyes for {name!r} here, only for {', '.join(SCORERS)}")

    def score(images: torch.Tensor, prompts: Sequence[Prompt], sources: Sequence[torch.Tensor] | None = None):
        if name == "instruction":
            return torch.tensor(score_instruction(images, prompts))
        if sources is None:
            raise rewards.RewardError("scorer 'identity': needs the source pictures of edits")
        return torch.tensor(score_identity(images, prompts, sources))

    return rewards.Scorer(name, score, 0.0, 1.0)
