"""The tiny world: what stands in for LAION, GenEval's detector and an OCR engine when there is no download?

Every stage of both papers runs for real on two CPU cores. The project draws its own 24 x 24 images, writes their
captions, and reads images back:

    composition   "a photo of a red circle and a blue square"   scored by GenEval's rules over `detect`
    text          'a sign that says "CAT"'                      scored by the OCR rule over `read_text`
    quality       "a beautiful picture of two green crosses"    scored by `quality`

The scoring *rules* are those of `rewards.py`, which real models use too. Only the detectors are tiny (template
matching, exact on the project's clean drawings and close to zero on noise and blank images).

Why RL has something to learn. The world is drawn with two known faults, so that a model pretrained on it is
mediocre the way SD3.5-M is (F Table 2: GenEval 0.63, OCR 0.59):
  * captions are wrong: every class, colour, count or relation with probability `ATTRIBUTE_ERROR`, every letter with
    probability `LETTER_ERROR`. A model that learns this distribution perfectly still draws the wrong thing that often,
    *differently in each sample*. This is the spread within a group that GRPO turns into a gradient (Q Eq. 4);
  * half of the drawings are spoilt (`DEFECT_RATE`): grain or a faded print. No caption tells which.

Train and test are disjoint: a caption belongs to the test split if a hash of its content says so, and the
whole tag `single_object` is only ever tested. Images are float arrays (3, 24, 24) in [0, 1].

A world has `TASKS`, `KINDS` and `REWARDS`, `make_prompts`, `check_prompt`, `training_batch`, `scorer` and `score`.
`tiny/edits.py` is another one, and `scorers/world.py` is the one of published models.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

import rewards
from data.checklists import NUMBERS, TAG_MIX, TEST_TAGS, checklist, counting, in_test_split, include, phrase, plural
from data.files import SPLITS, DataError, Prompt, check_known
from tiny.canvas import CLASSES, COLORS, INKS, LETTERS, WORD_LENGTH, detect, draw, quality, read_text, spoil

ATTRIBUTE_ERROR, LETTER_ERROR = 0.15, 0.25  # how often a caption is wrong, known by design
TASKS = ("composition", "text", "quality")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


# --------------------------------------------------------------------------------------------------- prompts
def composition_prompt(tag: str, rng: random.Random) -> tuple[str, dict]:
    """A random prompt of a tag and its metadata in GenEval's format: tag, include, exclude, prompt."""
    a, b = rng.sample(CLASSES, 2)
    one, two = rng.sample(sorted(COLORS), 2)
    if tag == "counting":
        return counting(a, rng.choice((2, 3, 4)))
    if tag == "position":
        return checklist(tag, include(b), include(a, position=[rng.choice(sorted(OPPOSITE)), 0]))
    entries = {
        "single_object": [include(a)],
        "colors": [include(a, color=one)],
        "two_object": [include(a), include(b)],
        "color_attr": [include(a, color=one), include(b, color=two)],
    }[tag]
    return checklist(tag, *entries)


def quality_prompt(rng: random.Random) -> tuple[str, dict]:
    """An open prompt, e.g. "a beautiful picture of two green crosses". Its entries have no tag: they grade nothing."""
    a, b = rng.sample(CLASSES, 2)
    one, two = rng.sample(sorted(COLORS), 2)
    count = rng.choice((1, 2, 3))
    entries = [include(a, count, color=one)] if count > 1 else [include(a, color=one), include(b, color=two)]
    return "a beautiful picture of " + " and ".join(map(phrase, entries)), {"include": entries}


def sample_prompt(task: str, split: str, rng: random.Random, tag: str | None = None) -> tuple[str, dict]:
    """One (prompt, metadata) of a task from the "train" or "test" split, by rejection on the content's hash."""
    if task == "composition" and not tag:  # once, before any rejection: the split must not change the mix
        tag = rng.choices(list(TAG_MIX), list(TAG_MIX.values()))[0]
    while True:
        if task == "text":
            word = random_word(rng)
            text, meta, key = f'a sign that says "{word}"', {}, ("word", word)
        else:
            text, meta = quality_prompt(rng) if task == "quality" else composition_prompt(tag, rng)
            key = (task, text)
        only_tested = meta.get("tag") == "single_object"
        if (only_tested or in_test_split(*key)) == (split == "test"):
            return text, meta


def random_word(rng: random.Random) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(WORD_LENGTH))


def make_prompts(task: str, split: str, count: int, seed: int = 0) -> list[Prompt]:
    """`count` prompts of a task. Composition's test split runs through all six GenEval tags in turn. ValueError for
    another task or split."""
    check_known("task", task, TASKS)
    check_known("split", split, SPLITS)
    rng = random.Random(f"{task}/{split}/{seed}")
    tags = [TEST_TAGS[i % len(TEST_TAGS)] if split == "test" else None for i in range(count)]
    drawn = [sample_prompt(task, split, rng, tag if task == "composition" else None) for tag in tags]
    return [Prompt(text, task, meta, f"tiny {split} {task}:{i + 1}") for i, (text, meta) in enumerate(drawn)]


# --------------------------------------------------------------------------------------- what the base learns from
def other(value: object, choices: Sequence, rng: random.Random):
    """Another one of the choices."""
    return rng.choice([c for c in choices if c != value])


def scene_of(meta: dict, rng: random.Random, error: float) -> dict:
    """A scene for GenEval-style entries in which each class, colour, count and relation is wrong with p=`error`.

    Things stand in few places, so that a small model can learn them: one in a corner of the main diagonal, two
    side by side or as their relation says, more in reading order.
    """

    def perhaps(value, choices):
        return other(value, choices, rng) if rng.random() < error else value

    objects = []
    for entry in meta["include"]:
        name = perhaps(entry["class"], CLASSES)
        count = perhaps(entry["count"], NUMBERS) if meta.get("tag") == "counting" else entry["count"]
        # A colour that the caption does not name is random. One counted group shares one colour.
        color = perhaps(entry["color"], COLORS) if "color" in entry else rng.choice(sorted(COLORS))
        objects += [{"class": name, "color": color} for _ in range(count)]
    relations = [entry["position"][0] for entry in meta["include"] if "position" in entry]
    relation = (OPPOSITE[relations[0]] if rng.random() < error else relations[0]) if relations else "right of"
    for thing, cell in zip(objects, cells(len(objects), relation, rng.choice((0, 1))), strict=True):
        thing["cell"] = cell
    return {"objects": objects}


def cells(count: int, relation: str, lane: int) -> list[tuple[int, int]]:
    """Where `count` things stand, as (column, row); of two, the second is `relation` the first."""
    if count == 1:
        return [(lane, lane)]
    if count > 2:
        return [(0, 0), (1, 0), (0, 1), (1, 1)][:count]
    order = (0, 1) if relation in ("right of", "below") else (1, 0)
    return [(i, lane) if relation in ("left of", "right of") else (lane, i) for i in order]


def training_example(rng: random.Random) -> tuple[np.ndarray, str]:
    """One pretraining pair (image (3,24,24), caption): a train-split caption and a drawing that may contradict it."""
    task = rng.choices(TASKS, (6, 2, 3))[0]
    text, meta = sample_prompt(task, "train", rng, rng.choice(list(TAG_MIX)))
    if task == "text":
        word = [other(c, LETTERS, rng) if rng.random() < LETTER_ERROR else c for c in text[-4:-1]]
        scene = {"word": "".join(word), "color": rng.choice(INKS)}
    else:
        scene = scene_of(meta, rng, ATTRIBUTE_ERROR)
    return spoil(draw(scene), rng), text


def training_batch(rng: random.Random, size: int, tasks: Sequence[str] = TASKS) -> Iterator[tuple]:
    """A step of pretraining, in parts that fit into one batch each: (images (B, 3, 24, 24), captions, sources).

    The parts are drawn one after the other, because the caller draws from the same `rng` between them.
    """
    images, captions = zip(*(training_example(rng) for _ in range(size)), strict=True)
    yield torch.from_numpy(np.stack(images)), captions, None


# ----------------------------------------------------------------------------------- tokens (the "text encoder")
_WORDS = ["a", "photo", "of", "and", "sign", "that", "says", "beautiful", "picture", '"', "left", "right", "above"]
VOCABULARY = ["<pad>", *_WORDS, "below", *NUMBERS.values(), *COLORS, *CLASSES, *map(plural, CLASSES), *LETTERS]
MAX_TOKENS = 12


def tokenize(prompt: str, vocabulary: Sequence[str] = VOCABULARY) -> list[int]:
    """Word-level tokens (MAX_TOKENS,), a quoted word letter by letter; ValueError names what the world cannot say.

    vocabulary: `VOCABULARY`, or that and more words after it.
    """
    words, unknown = [], []
    for i, part in enumerate(prompt.split('"')):
        if i % 2:  # inside quotes stand letters: an "a" there is no article, and outside an "A" is no letter
            words += ['"', *part, '"']
            unknown += [letter for letter in part if letter not in LETTERS]
            if len(part) != WORD_LENGTH:
                raise ValueError(f"the tiny world writes words of {WORD_LENGTH} letters, not {part!r}")
        else:
            plain = part.replace(",", " ").replace(".", " ").split()
            words += plain
            unknown += [word for word in plain if word not in vocabulary[1:] or word in LETTERS]
    if unknown or prompt.count('"') % 2:
        fault = f"the tiny world has no word {unknown[0]!r}" if unknown else "a double quote is not closed"
        raise ValueError(f"{fault}; its vocabulary is: {' '.join(vocabulary[1:])}")
    if len(words) > MAX_TOKENS:
        raise ValueError(f"{len(words)} tokens, and the tiny world reads at most {MAX_TOKENS}: {prompt!r}")
    return [vocabulary.index(w) for w in words] + [0] * (MAX_TOKENS - len(words))


# ------------------------------------------------------------------------- scorers: images, prompts -> B scores
def score_geneval(images: Tensor, prompts: Sequence[Prompt], rule: Callable = rewards.geneval_reward) -> list[float]:
    """GenEval's graded training reward over `detect`; in [0, 1], higher is better."""
    found = zip(detect(images), prompts, strict=True)
    return [float(rule(rewards.filter_detections(d, p.metadata), p.metadata)) for d, p in found]


def score_verdict(images: Tensor, prompts: Sequence[Prompt]) -> list[float]:
    """GenEval's strict verdict, 0 or 1: what an evaluation counts."""
    return score_geneval(images, prompts, rewards.geneval_verdict)


def score_ocr(images: Tensor, prompts: Sequence[Prompt]) -> list[float]:
    """The OCR rule (1 - edit distance / length) over `read_text`; in [0, 1]. ValueError for a prompt without a word."""
    read = zip(read_text(images), prompts, strict=True)
    return [rewards.ocr_reward(text, p.text, p.metadata.get("target", "")) for text, p in read]


def score_quality(images: Tensor, prompts: Sequence[Prompt]) -> list[float]:
    """Print quality, whatever the prompt; in [0, 1], higher is better."""
    return quality(images).tolist()


def by_row(images: Tensor, prompts: Sequence[Prompt], choose: Callable[[Prompt], Callable]) -> list[float]:
    """B scores, each by the scorer that is chosen for its prompt."""
    scores, chosen = [0.0] * len(prompts), [choose(p) for p in prompts]
    for scorer in dict.fromkeys(chosen):
        rows = [i for i, own in enumerate(chosen) if own is scorer]
        for i, score in zip(rows, scorer(images[rows], [prompts[i] for i in rows]), strict=True):
            scores[i] = score
    return scores


def score_preference(images: Tensor, prompts: Sequence[Prompt], listed: Callable = score_geneval) -> list[float]:
    """PickScore's part here, in [0, 1]: does the picture show what the prompt says?

    By the checklist if the prompt has one (open prompts do, without a tag), else by the OCR rule, as `score_ocr`.
    """
    return by_row(images, prompts, lambda p: listed if "include" in p.metadata else score_ocr)


SCORERS = {"geneval": score_geneval, "ocr": score_ocr, "quality": score_quality, "preference": score_preference}
TASK_SCORER = {"composition": score_geneval, "text": score_ocr, "quality": score_quality}  # what a task trains on
KINDS = (*SCORERS, "task")  # what --rewards may name in this world
# Without --rewards: {task: {category: weights}}. F blends quality with a preference 4:6, because quality alone is
# hacked: the tiny teacher learns to paint everything black, as F Fig. 2's teachers lose what they are not paid for.
# ERRATUM (F 6.1, App. A): App. A gives 1:1 and other rewards.
REWARDS = {
    "composition": {"composition": {"task": 1.0}}, "text": {"text": {"task": 1.0}},
    "quality": {"quality": {"quality": 0.4, "preference": 0.6}},
}  # fmt: skip


def score_task(images: Tensor, prompts: Sequence[Prompt]) -> list[float]:
    """Each prompt's own reward (F App. A: "exclusively provided by the reward model of the data partition").

    RewardError for a prompt of another task than F's three.
    """
    for p in prompts:
        if p.task not in TASKS:
            raise rewards.RewardError(f"{p.source}: the task {p.task!r} has no own reward; name some in --rewards")
    return by_row(images, prompts, lambda p: TASK_SCORER[p.task])


def scorer(name: str) -> rewards.Scorer:
    """One of `KINDS`, "task" being each prompt's own, in the signature of every scorer; all lie in [0, 1]."""
    function = {**SCORERS, "task": score_task}[name]
    return rewards.Scorer(name, lambda images, prompts, sources=None: torch.tensor(function(images, prompts)), 0.0, 1.0)


# ------------------------------------------------------------------------------------------------------- evaluation
def score(images: Tensor, prompts: Sequence[Prompt], task: str, panel: object = None) -> dict[str, list[float]]:
    """{metric: a score for each image} of a task's test prompts: GenEval's verdicts, the OCR rule, or print quality."""
    if task == "composition":
        return {"geneval": score_verdict(images, prompts)}
    return {{"text": "ocr"}.get(task, task): TASK_SCORER[task](images, prompts)}


THINGS = dict.fromkeys(CLASSES, COLORS)  # what a checklist may name, with the colours that it can have


def check_prompt(
    prompt: Prompt,
    tasks: Sequence[str] = TASKS,
    vocabulary: Sequence[str] = VOCABULARY,
    things: Mapping[str, Mapping] = THINGS,
) -> None:
    """Refuse, by file and line, a prompt that the tiny world (or another, of other words) cannot say or draw."""
    try:
        tokenize(prompt.text, vocabulary)
    except ValueError as fault:
        raise DataError(f"{prompt.source}: {fault}") from None
    if prompt.task not in tasks:
        raise DataError(f"{prompt.source}: the tiny world has no task {prompt.task!r}, only {', '.join(tasks)}")
    if prompt.task == "composition" and "include" not in prompt.metadata:
        raise DataError(f"{prompt.source}: composition is scored by GenEval metadata; use a .jsonl with an include")
    for entry in (*prompt.metadata.get("include", ()), *prompt.metadata.get("exclude", ())):
        for field, known in (("class", things), ("color", things.get(entry["class"], ()))):
            if field in entry and entry[field] not in known:
                raise DataError(f"{prompt.source}: the tiny world has no {field} {entry[field]!r}: {', '.join(known)}")
