"""The tiny world: what stands in for LAION, GenEval's detector and an OCR engine when there is no download?

Everything in this file exists so that every stage of both papers runs for real on two CPU cores. The project
draws its own 24 x 24 images, writes their captions, and reads images back:

    composition   "a photo of a red circle and a blue square"   scored by GenEval's rules over `detect`
    text          'a sign that says "CAT"'                      scored by the OCR rule over `read_text`
    quality       "a beautiful picture of two green crosses"    scored by `quality`

The scoring *rules* are those of `rewards.py`, which real models use too; only the eyes behind them are tiny
(template matching, exact on the project's clean drawings and close to zero on noise and blank images).

Why RL has something to fix. The world is drawn with two known faults, so that a model pretrained on it is
mediocre the way SD3.5-M is (F Table 2: GenEval 0.63, OCR 0.59):
  * captions lie: every class, colour, count or relation is wrong with probability `ATTRIBUTE_ERROR`, every
    letter with probability `LETTER_ERROR`. A model that learns this distribution perfectly still draws the
    wrong thing that often, *differently in each sample*, which is exactly the spread within a group that
    GRPO turns into a gradient (Q Eq. 4);
  * half of the drawings are spoilt (`DEFECT_RATE`): grain or a faded print. No caption tells which.

Train and test are disjoint: a caption belongs to the test split if a hash of its content says so, and the
whole tag `single_object` is only ever tested. Images are float arrays (3, 24, 24) in [0, 1].
"""

import hashlib
import random
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import rewards
from data.files import DataError, Prompt

SIZE, CELL, OBJECT = 24, 12, 10  # pixels: the image, one of the 2 x 2 cells, one object inside its cell
ATTRIBUTE_ERROR, LETTER_ERROR, DEFECT_RATE = 0.15, 0.25, 0.5  # how often the world lies, known by design
TASKS = ("composition", "text", "quality")

CLASSES = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (0.86, 0.08, 0.08), "green": (0.05, 0.62, 0.15), "blue": (0.10, 0.25, 0.95),
    "yellow": (0.98, 0.85, 0.05), "purple": (0.60, 0.10, 0.75), "black": (0.0, 0.0, 0.0),
}  # fmt: skip
INKS = ("red", "green", "blue", "purple", "black")  # colours that a word is printed in (yellow is illegible)
LETTERS, WORD_LENGTH = "ACEHLNOTXZ", 3
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# GenEval's own training mix; `single_object` is never trained on, so its test score is out of distribution.
TAG_MIX = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
TEST_TAGS = ("single_object", *TAG_MIX)


def plural(name: str) -> str:
    return name + ("es" if name == "cross" else "s")


# --------------------------------------------------------------------------------------------------- drawing
@lru_cache
def object_masks() -> dict[str, np.ndarray]:
    """The four shapes as binary masks (OBJECT, OBJECT): the ink of one object."""
    y, x = np.mgrid[:OBJECT, :OBJECT] - (OBJECT - 1) / 2
    return {
        "circle": (x**2 + y**2 <= 5**2).astype(np.float32),
        "square": np.ones((OBJECT, OBJECT), np.float32),
        "triangle": (np.abs(x) <= (y + 5.5) / 2).astype(np.float32),
        "cross": ((np.abs(x) < 2) | (np.abs(y) < 2)).astype(np.float32),
    }


@lru_cache
def letter_masks() -> dict[str, np.ndarray]:
    """The alphabet as binary masks (10, 8), printed by Pillow's own font and centred in a cell of 8 pixels."""
    font = ImageFont.load_default(size=13)
    masks = {}
    for letter in LETTERS:
        canvas = Image.new("1", (24, 24))
        pen = ImageDraw.Draw(canvas)
        pen.fontmode = "1"  # no anti-aliasing: crisp ink
        pen.text((6, 4), letter, fill=1, font=font)
        glyph = canvas.crop(canvas.getbbox())
        cell = Image.new("1", (8, 10))
        cell.paste(glyph, ((8 - glyph.width) // 2, (10 - glyph.height) // 2))
        masks[letter] = np.asarray(cell, np.float32)
    return masks


def paint(image: np.ndarray, mask: np.ndarray, x: int, y: int, color: str) -> None:
    """Paint `mask` (h, w) onto `image` (3, SIZE, SIZE) in place, its corner at pixel (x, y)."""
    h, w = mask.shape
    patch = image[:, y : y + h, x : x + w]
    patch += mask * (np.asarray(COLORS[color], np.float32)[:, None, None] - patch)


def draw(scene: dict) -> np.ndarray:
    """Draw a scene on white paper: {"word", "color"} or {"objects": [{"class", "color", "cell"}]} -> (3, 24, 24)."""
    image = np.ones((3, SIZE, SIZE), np.float32)
    if "word" in scene:
        for i, letter in enumerate(scene["word"]):
            paint(image, letter_masks()[letter], i * 8, 7, scene["color"])
        return image
    for thing in scene["objects"]:
        column, row = thing["cell"]
        paint(image, object_masks()[thing["class"]], column * CELL + 1, row * CELL + 1, thing["color"])
    return image


def spoil(image: np.ndarray, rng: random.Random) -> np.ndarray:
    """With probability DEFECT_RATE, one of two printing faults: grain or a faded print (both keep the content)."""
    if rng.random() >= DEFECT_RATE:
        return image
    if rng.random() < 0.5:
        noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(image.shape, np.float32)
        return (image + 0.18 * noise).clip(0, 1)
    return 0.55 * image + 0.45 * 0.62  # towards grey


# ------------------------------------------------------------------------------------------ scenes and captions
def in_test_split(*content: object) -> bool:
    """One caption in four is kept for evaluation; a hash of its content decides, so no list has to be stored."""
    return hashlib.sha256(repr(content).encode()).digest()[1] % 4 == 0


def include(name: str, count: int = 1, color: str | None = None, position: list | None = None) -> dict:
    """One entry of GenEval's `include` list; absent fields stay absent, as in GenEval's own files."""
    entry = {"class": name, "count": count}
    if color:
        entry["color"] = color
    if position:
        entry["position"] = position
    return entry


def composition_metadata(tag: str, rng: random.Random) -> dict:
    """A random prompt in GenEval's metadata format: tag, include, exclude, prompt."""
    a, b = rng.sample(CLASSES, 2)
    one, two = rng.sample(sorted(COLORS), 2)
    if tag == "single_object":
        return {"tag": tag, "include": [include(a)], "prompt": f"a photo of a {a}"}
    if tag == "colors":
        return {"tag": tag, "include": [include(a, color=one)], "prompt": f"a photo of a {one} {a}"}
    if tag == "counting":
        n = rng.choice((2, 3, 4))
        meta = {"tag": tag, "include": [include(a, n)], "exclude": [include(a, n + 1)]}
        return {**meta, "prompt": f"a photo of {NUMBERS[n]} {plural(a)}"}
    if tag == "two_object":
        return {"tag": tag, "include": [include(a), include(b)], "prompt": f"a photo of a {a} and a {b}"}
    if tag == "color_attr":
        meta = {"tag": tag, "include": [include(a, color=one), include(b, color=two)]}
        return {**meta, "prompt": f"a photo of a {one} {a} and a {two} {b}"}
    relation = rng.choice(sorted(OPPOSITE))
    meta = {"tag": tag, "include": [include(b), include(a, position=[relation, 0])]}
    return {**meta, "prompt": f"a photo of a {a} {relation} a {b}"}


def quality_prompt(rng: random.Random) -> tuple[str, dict]:
    """An open prompt without a checklist, e.g. "a beautiful picture of two green crosses", and its scene entries."""
    a, b = rng.sample(CLASSES, 2)
    one, two = rng.sample(sorted(COLORS), 2)
    n = rng.choice((1, 2, 3))
    if n == 1:
        text = f"a {one} {a} and a {two} {b}"
        entries = [include(a, color=one), include(b, color=two)]
    else:
        text = f"{NUMBERS[n]} {one} {plural(a)}"
        entries = [include(a, n, color=one)]
    return f"a beautiful picture of {text}", {"include": entries}


def sample_prompt(task: str, split: str, rng: random.Random, tag: str | None = None) -> tuple[str, dict]:
    """One (prompt, metadata) of a task from the "train" or "test" split, by rejection on the content's hash."""
    if task == "composition" and not tag:  # once, before any rejection: the split must not bend the mix
        tag = rng.choices(list(TAG_MIX), list(TAG_MIX.values()))[0]
    while True:
        if task == "text":
            word = "".join(rng.choice(LETTERS) for _ in range(WORD_LENGTH))
            text, meta, key = f'a sign that says "{word}"', {}, ("word", word)
        elif task == "quality":
            text, meta = quality_prompt(rng)
            key = ("quality", text)
        else:
            meta = composition_metadata(tag, rng)
            text, key = meta["prompt"], ("composition", meta["prompt"])
            if tag == "single_object" and split == "test":
                return text, meta
        if in_test_split(*key) == (split == "test"):
            return text, meta


def make_prompts(task: str, split: str, count: int, seed: int = 0) -> list[Prompt]:
    """`count` prompts of a task. Composition's test split runs through all six GenEval tags in turn."""
    rng = random.Random(f"{task}/{split}/{seed}")
    tags = [TEST_TAGS[i % len(TEST_TAGS)] if split == "test" else None for i in range(count)]
    drawn = [sample_prompt(task, split, rng, tag if task == "composition" else None) for tag in tags]
    return [Prompt(text, task, meta, f"tiny {split} {task}:{i + 1}") for i, (text, meta) in enumerate(drawn)]


def scene_of(meta: dict, rng: random.Random, error: float) -> dict:
    """A scene for GenEval-style entries in which each class, colour, count and relation is wrong with p=`error`.

    Things stand in few places, so that a small model can learn where: one in a corner of the main diagonal, two
    side by side or as their relation says, more in reading order.
    """

    def lie(value, choices):
        return rng.choice([c for c in choices if c != value]) if rng.random() < error else value

    objects = []
    for entry in meta["include"]:
        name = lie(entry["class"], CLASSES)
        count = lie(entry["count"], NUMBERS) if meta.get("tag") == "counting" else entry["count"]
        # A colour that the caption does not name is anybody's; one counted group shares one colour.
        color = lie(entry["color"], COLORS) if "color" in entry else rng.choice(sorted(COLORS))
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
        word = [rng.choice(LETTERS.replace(c, "")) if rng.random() < LETTER_ERROR else c for c in text[-4:-1]]
        scene = {"word": "".join(word), "color": rng.choice(INKS)}
    else:
        scene = scene_of(meta, rng, ATTRIBUTE_ERROR)
    return spoil(draw(scene), rng), text


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


# ------------------------------------------------------------------------- the eyes: detector, reader, quality
def correlate(windows: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Normalised cross-correlation in [-1, 1] of windows (N, L) with masks (M, L) -> (N, M); flat windows give 0."""
    windows = windows - windows.mean(-1, keepdim=True)
    masks = masks - masks.mean(-1, keepdim=True)
    norm = windows.norm(dim=-1, keepdim=True)
    # A blank or faint window has no shape to speak of: below this contrast (0.15 rms) its score fades to zero.
    floor = 0.15 * windows.shape[-1] ** 0.5
    return (windows @ (masks / masks.norm(dim=-1, keepdim=True)).T) / norm.clamp(min=floor)


def _ink(images: torch.Tensor) -> torch.Tensor:
    """How far each pixel is from white paper, (B, 3, H, W) -> (B, H, W): 1 for every full colour of the world."""
    return 1 - images.amin(1)


def _windows(ink: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """All windows of a size, (B, H, W) -> (B, rows, columns, height*width)."""
    return ink.unfold(1, height, 1).unfold(2, width, 1).flatten(3)


def detect(images: torch.Tensor) -> list[list[dict]]:
    """Objects of each image (B, 3, 24, 24) as GenEval-style detections: class, score, box (x0, y0, x1, y1), color.

    One object a cell, the class that correlates best; the score stretches the correlation so that GenEval's
    thresholds mean something here: 0.3 at correlation 0.62, 0.9 at 0.86.
    """
    # One pixel of paper around the object belongs to its shape: without it a square has no edge.
    masks = torch.stack([torch.from_numpy(np.pad(m, 1)).flatten() for m in object_masks().values()])
    images = images.float()
    cells = _ink(images).unfold(1, CELL, CELL).unfold(2, CELL, CELL).flatten(3).flatten(1, 2)  # (B, 4, 144)
    best, kind = correlate(cells, masks).max(-1)  # (B, 4) each
    results: list[list[dict]] = [[] for _ in images]
    for b, cell in ((best - 0.5) > 0).nonzero().tolist():
        name = CLASSES[kind[b, cell]]
        y, x = cell // 2 * CELL + 1, cell % 2 * CELL + 1
        ink = torch.from_numpy(object_masks()[name]).bool()
        pixels = images[b, :, y : y + OBJECT, x : x + OBJECT][:, ink]  # (3, number of ink pixels)
        results[b].append({
            "class": name,
            "score": min((best[b, cell].item() - 0.5) / 0.4, 1.0),
            "box": (float(x), float(y), float(x + OBJECT), float(y + OBJECT)),
            "color": name_color(pixels.median(1).values, COLORS),
        })  # fmt: skip
    return results


def name_color(pixel: torch.Tensor, palette: Mapping[str, tuple[float, float, float]]) -> str:
    """The palette colour nearest to a pixel (3,), also when the whole print has faded towards grey by some amount."""
    return list(palette)[int(color_distances(pixel, palette).argmin())]


def color_distances(pixel: torch.Tensor, palette: Mapping[str, tuple[float, float, float]]) -> torch.Tensor:
    """Squared distance of a pixel (3,) from each palette colour, faded by whatever amount brings it nearest."""
    fade = torch.linspace(0, 0.5, 6)[:, None, None]
    shades = torch.tensor(list(palette.values())) * (1 - fade) + 0.62 * fade  # (6, colours, 3)
    return (shades - pixel).square().sum(-1).amin(0)


def read_text(images: torch.Tensor) -> list[str]:
    """The letters of each image (B, 3, 24, 24), left to right on the line that reads best; "" where there are none."""
    masks = torch.stack([torch.from_numpy(m).flatten() for m in letter_masks().values()])
    found = _windows(_ink(images.float()), 10, 8)[:, :, :: CELL * 2 // WORD_LENGTH]  # (B, rows, letters, 80)
    scores, letter = correlate(found.flatten(0, 2), masks).unflatten(0, found.shape[:3]).max(-1)
    line = scores.sum(-1).argmax(1)  # (B,) the row that reads best
    rows = torch.arange(len(images))
    return [
        "".join(LETTERS[i] for i, s in zip(letters, values, strict=True) if s > 0.6)
        for letters, values in zip(letter[rows, line].tolist(), scores[rows, line].tolist(), strict=True)
    ]


def quality(images: torch.Tensor) -> torch.Tensor:
    """Print quality of images (B, 3, 24, 24) in [0, 1] -> (B,): clean paper, full colours, and something on it.

    exp(-6 d) with d the mean distance of a pixel from the nearest pure colour (paper or palette), times a gate
    that is 1 where 4 to 70 % of the page is inked and 0 for an empty page or one of solid paint (four squares are
    69 %): without the gate, RL on quality alone learns to hand in blank paper (F Fig. 2's seesaw).
    """
    coverage = (_ink(images.float()) > 0.5).float().mean((1, 2))
    gate = (coverage / 0.04).clamp(max=1) * ((1 - coverage) / 0.3).clamp(max=1)
    return purity(images, [(1.0, 1.0, 1.0), *COLORS.values()]) * gate


def purity(images: torch.Tensor, pure: Sequence[tuple[float, float, float]]) -> torch.Tensor:
    """exp(-6 d), (B,), with d the mean distance of a pixel of (B, 3, 24, 24) from the nearest of the pure colours."""
    colours = torch.tensor(list(pure))[None, :, :, None, None]  # (1, n, 3, 1, 1)
    return torch.exp(-6 * (images.float()[:, None] - colours).norm(dim=2).amin(1).mean((1, 2)))


# ------------------------------------------------------------------------- scorers: images, prompts -> (B,) scores
def score_geneval(images: torch.Tensor, prompts: Sequence[Prompt]) -> list[float]:
    """GenEval's graded training reward over `detect`; in [0, 1], higher is better."""
    found = zip(detect(images), prompts, strict=True)
    return [rewards.geneval_reward(rewards.filter_detections(d, p.metadata), p.metadata) for d, p in found]


def score_verdict(images: torch.Tensor, prompts: Sequence[Prompt]) -> list[float]:
    """GenEval's strict verdict, 0 or 1: what an evaluation counts."""
    found = zip(detect(images), prompts, strict=True)
    return [float(rewards.geneval_verdict(rewards.filter_detections(d, p.metadata), p.metadata)) for d, p in found]


def score_ocr(images: torch.Tensor, prompts: Sequence[Prompt]) -> list[float]:
    """The OCR rule (1 - edit distance / length) over `read_text`; in [0, 1], higher is better."""
    return [rewards.ocr_reward(text, p.text) for text, p in zip(read_text(images), prompts, strict=True)]


def score_quality(images: torch.Tensor, prompts: Sequence[Prompt]) -> list[float]:
    """Print quality, whatever the prompt; in [0, 1], higher is better."""
    return quality(images).tolist()


def score_preference(images: torch.Tensor, prompts: Sequence[Prompt]) -> list[float]:
    """What a viewer who reads the prompt would like, PickScore's part here: does the picture show what it says?

    The GenEval checklist where the prompt has one (open prompts do, without a tag), else the OCR rule; in [0, 1].
    Raises RewardError for a prompt that has neither.
    """
    scores = []
    for p, found, text in zip(prompts, detect(images), read_text(images), strict=True):
        if "include" in p.metadata:
            scores.append(rewards.geneval_reward(rewards.filter_detections(found, p.metadata), p.metadata))
        elif '"' in p.text:
            scores.append(rewards.ocr_reward(text, p.text))
        else:
            raise rewards.RewardError(f"{p.source}: no include list to prefer by; give a .jsonl or --rewards quality")
    return scores


SCORERS = {"geneval": score_geneval, "ocr": score_ocr, "quality": score_quality, "preference": score_preference}
TASK_SCORER = {"composition": "geneval", "text": "ocr", "quality": "quality"}


def score_task(images: torch.Tensor, prompts: Sequence[Prompt]) -> list[float]:
    """Each prompt's own reward (F App. A: "exclusively provided by the reward model of the data partition").

    RewardError for a prompt of another task than F's three.
    """
    for p in prompts:
        if p.task not in TASK_SCORER:
            raise rewards.RewardError(f"{p.source}: the task {p.task!r} has no own reward; name some in --rewards")
    scores = [0.0] * len(prompts)
    for task, name in TASK_SCORER.items():
        rows = [i for i, p in enumerate(prompts) if p.task == task]
        if rows:
            for i, score in zip(rows, SCORERS[name](images[rows], [prompts[i] for i in rows]), strict=True):
                scores[i] = score
    return scores


def scorer(name: str) -> rewards.Scorer:
    """One of `SCORERS`, or "task", the prompt's own, in the signature of every scorer; all lie in [0, 1]."""
    function = {**SCORERS, "task": score_task}[name]
    return rewards.Scorer(name, lambda images, prompts, sources=None: torch.tensor(function(images, prompts)), 0.0, 1.0)


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
