"""Rewards: the rules that turn what a model saw in an image into a number.

A model (an OCR engine, an object detector, a vision-language judge, a face network) reports what it sees in an image.
A *rule* turns the report into a score. The rules are plain Python on plain data, so the tiny worlds' template matchers
and the real models are scored by the very same lines.

    what is asked                                rule                               source
    is the quoted text on the image?             ocr_reward                         F §6.1 (OCR)
    are the right objects there (evaluation)?    geneval_verdict -> geneval_score   F §6.1 (GenEval), Table 2
    how nearly are they there (training)?        geneval_reward                     F §6.1, GRPO's signal
    what does a VLM's score token say?           expected_score                     Q Eq. 12, Q §3
    what does a VLM judge's written reply say?   parse_judge                        F App. A, Fig. 6, Table 4
    ... with one rating a level                  capped_alignment                   Q §3.2
    ... with one answer a demand of an edit      capped_editing                     Q §3.3
    ... with one mark a facet of a pillar        pillar_score                       Q Table 1
    is it still the same person after an edit?   similarity, identity               Q §3.3
    several rewards as one                       composite                          F §6.1, App. A, Q §4.1
    one number for a model                       table2_average                     F Table 2

Notation: B samples, K rewards; boxes are (x0, y0, x1, y1) in pixels with y pointing *down*; a detection is a
dict {"class", "score", "box", "color"}; metadata is one line of a GenEval file (see `data/files.py`).
A score that could not be computed is an error that names its cause, never a silent 0. Rewards have no gradient.
"""

import math
import re
import statistics
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

# GenEval's thresholds. Counting asks for more: a detector's weak second guesses on one object would count as objects.
CONFIDENCE, COUNTING_CONFIDENCE, MAX_PER_CLASS = 0.3, 0.9, 16
# Boxes must be this share of their summed sizes apart, and the rest must point this much (a cosine) along an axis.
POSITION_MARGIN, POSITION_COSINE = 0.1, 0.5
RELATIONS = ("left of", "right of", "above", "below")

SCORE_TOKENS = {str(score): score for score in range(1, 6)}  # Q Eq. 12's S = {1, 2, 3, 4, 5}
LEVELS = {"excellent": 5, "good": 4, "fair": 3, "poor": 2, "bad": 1}  # DeQA's words for the same
LOWEST_RATING, HIGHEST_RATING = 1, 5  # the scale of F Fig. 6 and of DeQA's levels (bad .. excellent)
FACET_POINTS = {"0": 0, "1": 60, "2": 100, "N/A": None}  # Q-Judger's
PICKSCORE_SCALE = 26  # PickScore is published as about 20 to 23; 26 is the divisor that brings it near 0..1
# Q's order of importance (§3.2 prints the first; §3.3 lists what the second is made of).
ALIGNMENT, EDITING = ("objects", "attributes", "relations", "actions"), ("core", "extra", "coherence")


class RewardError(ValueError):
    """A scorer answered with something that is no score; the message names it, on what, and what it said."""


class Scorer(NamedTuple):
    """Anything that turns pictures into numbers, near or far, in one signature. Higher is better.

    score(images, prompts, sources) -> (B,) float32 on the CPU, where images is (B, 3, H, W) in [0, 1] on the CPU,
    prompts are B `data.files.Prompt`, and sources, for editing only, are B tuples of source images (3, H', W'), one or
    more each, in the order of the prompt's pictures; else None.
    low, high: the range of a score, infinite if there is none; silent: nan, no answer, is one, in evaluations only.
    verdict: as score, 1 or 0, what an evaluation counts by tags (GenEval); None: it has the mean of score.
    check(prompt): ValueError for a prompt that it can never score well, asked before anything is drawn.
    """

    name: str
    score: Callable
    low: float
    high: float
    verdict: Callable | None = None
    check: Callable = lambda prompt: None
    silent: bool = False


# ------------------------------------------------------------------------------------------ text on the image
# Characters that a reader takes for one another, and the quotes that a target can stand in.
ALIKE = str.maketrans({
    **dict.fromkeys("\u201c\u201d\u201e\u201f\uff02\u301d\u301e\u301f", '"'),
    **dict.fromkeys("\u2018\u2019\u201a\u201b\u02bc\u2032`\u00b4", "'"),
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-"),
})  # fmt: skip
# A mark right behind a number is inches and opens nothing; no blank stands inside of a pair's two marks.
QUOTED = re.compile(r'(?<![\d½¼¾])"(?!\s)([^"]+)(?<!\s)"|「([^」]*)」|『([^』]*)』|«\s*([^»]*?)\s*»|»([^«]*)«')
# 'like this', outside of words; two letters at least, since rock 'n' roll leaves some out.
SINGLE = re.compile(r"""(?<![\w'])'(?!\s)((?:[^'"]|(?<=\w)'(?=\w)){2,})(?<!\s)'(?!\w)""")


def ocr_target(prompt: str) -> str:
    """The text an image has to show: what stands in the prompt's first pair of double quotes of any script, and if
    there are none, of single ones. F §6.1 (OCR data).

    ValueError: no such pair, nothing or a blank at an end inside, or a quote not closed. `6"x9"`, `dog's` quote none.
    """
    plain = prompt.translate(ALIKE)
    found = QUOTED.search(plain) or SINGLE.search(plain)
    target = prompt[slice(*found.span(found.lastindex))] if found else ""
    if unclosed(prompt) or not as_seen(target) or target != target.strip():
        raise ValueError(f'no target text: put it in double quotes ("like this") and close them: {prompt!r}')
    return target


def unclosed(prompt: str) -> bool:
    """Does a double quote stand alone, so that nobody can say which words are quoted?"""
    return re.search(r'(?<![\d½¼¾])"|[「-』«»]', QUOTED.sub(" ", prompt.translate(ALIKE))) is not None


def levenshtein(a: str, b: str) -> int:
    """Fewest insertions, deletions and substitutions of a character that turn `a` into `b`. F §6.1 (OCR)."""
    row = list(range(len(b) + 1))  # row[j] = distance from a[:i] (here i = 0) to b[:j]
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            # row[j] is still a[:i-1] (delete x), row[j-1] already a[:i] (insert y), diagonal replaces.
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def ocr_reward(read_text: str, prompt: str, target: str = "", released: bool = False) -> float:
    """How much of the target was read: 1 - distance / length, in [0, 1]. F §6.1 (OCR).

    distance = 0 if the target occurs anywhere in `read_text`, else the Levenshtein distance, at most the target's
    length. `read_text` holds all the lines that the engine read, joined. The target is `ocr_target` of the prompt,
    unless it is given. Raises ValueError if there is none.

    DEVIATION (Flow-GRPO's code): it drops white space and capitals (`released`). Here full-width letters, composed
    accents, curly apostrophes and characters of no width are one with what a reader takes them for, too.

    As released, text around the target costs nothing.
    """
    letters = (lambda text: "".join(text.split()).lower()) if released else as_seen
    target, read = letters(target or ocr_target(prompt)), letters(read_text)
    if not target:
        raise ValueError(f"no target text that can be seen: {prompt!r}")
    distance = 0 if target in read else min(levenshtein(read, target), len(target))
    return 1 - distance / len(target)


def as_seen(text: str) -> str:
    """The characters of a text that a reader tells apart, without blanks, capitals and what has no width."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text.translate(ALIKE)).casefold())
    return "".join(c for c in folded if not c.isspace() and c != "\ufe0f" and unicodedata.category(c) != "Cf")


# ---------------------------------------------------------------------------------------- GenEval's checklist
def filter_detections(detections: Sequence[dict], metadata: Mapping) -> list[dict]:
    """Detections that count for a prompt: score > 0.3 (tag "counting": > 0.9), the best 16 of each class.

    F §6.1. Best score first. No non-maximum suppression, as in GenEval: two boxes on one object are two objects.
    """
    threshold = COUNTING_CONFIDENCE if metadata.get("tag") == "counting" else CONFIDENCE
    kept: list[dict] = []
    for found in sorted(detections, key=lambda d: d["score"], reverse=True):
        same = sum(other["class"] == found["class"] for other in kept)
        if found["score"] > threshold and same < MAX_PER_CLASS:
            kept.append(found)
    return kept


def relative_position(box_a: Sequence[float], box_b: Sequence[float]) -> set[str]:
    """Where box a lies as seen from box b: a subset of `RELATIONS`, of size 0, 1 or, on a diagonal, 2.

    F §6.1 (GenEval). With o = centre(a) - centre(b), in pixels, y down:
        o' = sign(o) max(|o| - 0.1 (size(a) + size(b)), 0)      per axis: overlapping boxes have no order
        right of / below if o'_x / o'_y >  0.5 |o|,   left of / above if < -0.5 |o|
    A product, not the quotient o'/|o|, is compared: equal centres need no special case.
    """
    offset, margin = [], []
    for low, high in ((0, 2), (1, 3)):  # (x0, x1), then (y0, y1)
        offset.append((box_a[low] + box_a[high] - box_b[low] - box_b[high]) / 2)
        margin.append(POSITION_MARGIN * (box_a[high] - box_a[low] + box_b[high] - box_b[low]))
    x, y = (math.copysign(max(abs(o) - m, 0.0), o) for o, m in zip(offset, margin, strict=True))
    components = zip(RELATIONS, (-x, x, -y, y), strict=True)
    return {relation for relation, along in components if along > POSITION_COSINE * math.hypot(*offset)}


def geneval_verdict(detections: Sequence[dict], metadata: Mapping) -> bool:
    """GenEval's evaluation: is *everything* on the prompt's checklist true? F §6.1, Table 2.

    `detections` are those that `filter_detections` kept. True if
      * every `include` finds at least `count` objects of its class,
      * its `count` best scored objects all have its `color`,
      * each of them holds the `position` relation to each of the best objects of the include it refers to,
      * no `exclude` class reaches its count (how "exactly two" is asked: include 2, exclude 3).
    Raises ValueError if the metadata has no include.
    """
    include = _checklist(metadata)
    best = [_of_class(detections, entry)[: entry["count"]] for entry in include]
    for entry, objects in zip(include, best, strict=True):
        if len(objects) < entry["count"]:
            return False
        if "color" in entry and any(found["color"] != entry["color"] for found in objects):
            return False
        if "position" in entry and not _relation_holds(entry["position"], objects, best):
            return False
    return all(len(_of_class(detections, entry)) < entry["count"] for entry in metadata.get("exclude", []))


def geneval_reward(detections: Sequence[dict], metadata: Mapping) -> float:
    """GenEval's graded twin for training, in [0, 1]: the mean over the checklist's parts. F §6.1.

    A verdict that is nearly always False gives a group of equal rewards, hence no advantage; partial credit
    does. Every include has one part for its count, and one more for a color and for a position:
        count      max(0, 1 - |count - found| / count)
        color      share of its objects in that color      0 unless found == count
        position   1 if every pair holds the relation      0 unless both includes found exactly their count
    Raises ValueError if the metadata has no include.

    DEVIATION (Flow-GRPO's code): its training reward gives a wrong relation 0.5 and lets the count's part go below 0
    (five dogs for one: -3). Here a wrong relation is 0, since half a reward for a coin's toss teaches little,
    and a part stops at 0, so that one flood of objects cannot outweigh all the rest of the checklist.
    """
    include = _checklist(metadata)
    found = [_of_class(detections, entry) for entry in include]
    exact = [len(objects) == entry["count"] for objects, entry in zip(found, include, strict=True)]
    parts: list[float] = []
    for entry, objects, is_exact in zip(include, found, exact, strict=True):
        count = entry["count"]
        parts.append(max(0.0, 1 - abs(count - len(objects)) / count))
        if "color" in entry:
            matching = [d for d in objects if d["color"] == entry["color"]]
            parts.append(len(matching) / count if is_exact else 0.0)
        if "position" in entry:
            both_exact = is_exact and exact[entry["position"][1]]
            parts.append(float(both_exact and _relation_holds(entry["position"], objects, found)))
    return statistics.fmean(parts)


def _checklist(metadata: Mapping) -> list[dict]:
    if not metadata.get("include"):
        raise ValueError(f"GenEval's rules need metadata with a non-empty 'include', got {metadata!r}")
    return metadata["include"]


def _of_class(detections: Sequence[dict], entry: Mapping) -> list[dict]:
    """The detections of an entry's class, best score first."""
    return sorted((d for d in detections if d["class"] == entry["class"]), key=lambda d: d["score"], reverse=True)


def _relation_holds(position: Sequence, objects: Sequence[dict], groups: Sequence[Sequence[dict]]) -> bool:
    """Does every object hold [relation, index] to every object of the include with that index?"""
    relation, index = position
    return all(relation in relative_position(a["box"], b["box"]) for a in objects for b in groups[index])


def per_tag_accuracy(verdicts: Sequence[float], tags: Sequence[str]) -> dict[str, float]:
    """The mean verdict of each tag, in order of first appearance. F §6.1. ValueError for unequal lengths.

    A verdict is True, False, or the share of a prompt's pictures that pass.
    """
    by_tag: dict[str, list[float]] = {}
    for verdict, tag in zip(verdicts, tags, strict=True):
        by_tag.setdefault(tag, []).append(verdict)
    return {tag: statistics.fmean(group) for tag, group in by_tag.items()}


def geneval_score(verdicts: Sequence[float], tags: Sequence[str]) -> float:
    """GenEval's number, in [0, 1]: the mean of the per-tag accuracies, however many prompts a tag has. F Table 2."""
    return statistics.fmean(per_tag_accuracy(verdicts, tags).values())


# ----------------------------------------------------------------------------------- what a VLM says in words
REASONING = r"(?:think|thinking|thought|reasoning)"
# A rating, after marks such as **, "the score is" or \boxed{, before "/5": not the 1 of 10, 1.5, .1, 1/10 or "1 to 5".
RATING = re.compile(
    r"[^\w<-]*(?:(?:(?:the|my|final|overall)\s+)*(?:score|rating|answer)\b[^\w<-]*(?:is\b)?[^\w<-]*)?(?:boxed\W)?"
    r"(?<![.,])(\w+(?:\.\d+)?)(?:\s*(?:/|out of)\s*5\b)?"
    r"(?!\w|%|[.,]?\d|\s*(?:[/\u2013-]|or\b|to\b|out\b)\s*\d)", re.IGNORECASE,
)  # fmt: skip


def answer(reply: str) -> str:
    """What a judge says after its reasoning (<Thought>, <think>), which may quote what is no answer. RewardError if the
    reasoning has no end: that reply was cut off.
    """
    said = re.sub(rf"^.*</{REASONING}>", "", reply, flags=re.IGNORECASE | re.DOTALL)
    if re.search(rf"<{REASONING}>", said, re.IGNORECASE):
        raise RewardError(f"the reasoning does not end in the reply: {reply}")
    return said


def find_rating(text: str) -> re.Match | None:
    """The rating, a number or a word, with which a text begins, as group 1; None without one, and if more numbers stand
    in the same line outside of brackets: the scale is explained there, or doubted."""
    found = RATING.match(text)
    rest = text[found.end() :].partition("\n")[0] if found else ""
    return None if re.search(r"\d", re.sub(r"\(.*?\)", "", rest)) else found


def expected_score(logprobs: Mapping[str, float], scale: Mapping[str, int] = SCORE_TOKENS) -> float:
    """Q Eq. 12: R = sum over s in {1..5} of s p(s), in [1, 5], from the score token's {text: log-prob}.

    p is normalised over the tokens that say a word of `scale`; servers return only the top few log-probs, so some may
    be missing (p = 0). Blanks around a token and capitals do not count: " 4" and "4" both say four and add up. The
    expectation is finer than the likeliest token: in a group whose images all get a "4" it still ranks.
    `reward_model.expected_score` is the differentiable form, from logits, that a reward model is trained with.
    Raises RewardError if no token says a word of the scale, or a log-prob is no number or above 0.
    """
    words = [(token.strip().lower(), logprob) for token, logprob in logprobs.items()]
    known = [(scale[word], logprob) for word, logprob in words if word in scale]
    if not known:
        raise RewardError(f"no score token {', '.join(scale)} among the judge's log-probs: {dict(logprobs)}")
    top = max(lp for _, lp in known)  # p is unchanged by a common factor; this one keeps exp() from vanishing
    if not -math.inf < top < 1e-3 or any(math.isnan(lp) for _, lp in known):
        raise RewardError(f"the judge's log-probs give no expectation: {dict(logprobs)}")
    weights = [(score, math.exp(lp - top)) for score, lp in known]
    return sum(s * w for s, w in weights) / sum(w for _, w in weights)


def parse_judge(reply: str) -> dict[str, float]:
    """The judge's ratings {"quality", "instruction", "overall"}, each in [1, 5], from its written reply.

    F App. A, Fig. 6: <QualityScore>X</QualityScore> and so on, after a <Thought>. Of several the last ones count.
    RewardError with the reply in it if a tag is missing, no number or off the scale: a 0 would hide a broken judge.

    ERRATUM (F App. A): it names Qwen3-30B-A3B-Instruct as this judge, a model that reads text only; the released
    script serves Qwen3-VL-30B-A3B-Instruct.
    """
    tags, said = {name: f"{name.title()}Score" for name in ("quality", "instruction", "overall")}, answer(reply)
    found = {name: re.findall(rf"<{tag}>(.*?)</{tag}>", said, re.DOTALL) for name, tag in tags.items()}
    return {name: rating(f"<{tags[name]}>", texts, reply) for name, texts in found.items()}


def rating(what: str, found: Sequence[str], reply: str) -> float:
    """The last of the texts that were found, as a rating. RewardError with the reply in it if it is none."""
    said = find_rating(found[-1]) if found else None
    number = said[1] if said and re.fullmatch(r"[0-9]+(\.[0-9]+)?", said[1]) else "nan"
    if not LOWEST_RATING <= float(number) <= HIGHEST_RATING:
        raise RewardError(f"no {what} from {LOWEST_RATING} to {HIGHEST_RATING} in the reply: {reply}")
    return float(number)


def pillar_score(reply: Mapping, hierarchy: Mapping[str, Sequence[str]]) -> float | None:
    """Q Table 1: a picture's score in a pillar of Qwen-Image-Bench, in [0, 100], by Q-Judger; None if all is N/A.

        reply {level 2: {level 3: {"score": s}}};  s = 0, 1, 2 -> 0, 60, 100;  "N/A" is left out
        score = mean over level 2 of the means over level 3;  a picture's total is the plain mean of its pillars

    hierarchy: {level 2: its level 3}, the benchmark's own. A facet counts where the hierarchy has it, wherever the
    reply has put it; one that the reply lacks is left out. RewardError for another facet or score, and for none.
    """
    found, known = dict(_facets(reply)), {facet for facets in hierarchy.values() for facet in facets}
    if not found or not set(found) <= known or not set(found.values()) <= set(FACET_POINTS):
        raise RewardError(f"no scores 0, 1, 2 or N/A of {', '.join(sorted(known))} alone in the reply: {reply}")
    points = [[FACET_POINTS[found[f]] for f in facets if found.get(f, "N/A") != "N/A"] for facets in hierarchy.values()]
    return statistics.fmean(map(statistics.fmean, filter(None, points))) if any(points) else None


def _facets(node: Mapping) -> Iterator[tuple[str, str]]:
    """(name, score) of everything in a reply that has a score, at any depth."""
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from [(name.strip(), str(value["score"]).upper())] if "score" in value else _facets(value)


def capped_alignment(scores: Mapping[str, float]) -> float:
    """Q §3.2: one rating in [1, 5] from those of the levels of `ALIGNMENT`, each in [1, 5].

        min(mean of the levels, objects, attributes + 1, relations + 2, actions + 3)

    Levels that the prompt says nothing about are left out. Raises ValueError if none is left, for an unknown level
    and for a rating off the scale.

    SILENT (Q 3.2): images which fail the highest-priority criteria are capped at low scores, but Q says neither what
    failing is, nor the cap, nor what lower levels do. Here every level caps the total at its own rating plus its rank,
    so that the first one is a hard limit, the last one nearly none, and no threshold makes the reward jump.
    """
    return _capped(scores, ALIGNMENT)


def capped_editing(core: Sequence[float], extra: Sequence[float], coherence: float) -> float:
    """Q §3.3: one rating in [1, 5] from which demands were met (0 to 1 each), core and extra, and the coherence.

    A share of demands becomes a rating, 1 + 4 x share; then min(mean, core, extra + 1, coherence + 2), as in
    `capped_alignment`. `extra` may be empty: not all instructions have more than a core. Raises ValueError if
    `core` is empty or the coherence is not in [1, 5].

    SILENT (Q 3.3): Q names the three things that are assessed and not how they become one score; the rule is the one of
    the alignment reward, because an edit that misses its core has failed, whatever else it kept.
    """
    shares = {"core": core} | ({"extra": extra} if extra else {})
    scale = HIGHEST_RATING - LOWEST_RATING
    ratings = {name: LOWEST_RATING + scale * statistics.fmean(met) for name, met in shares.items()}
    return _capped(ratings | {"coherence": coherence}, EDITING)


def _capped(scores: Mapping[str, float], priority: Sequence[str]) -> float:
    if not scores or not set(scores) <= set(priority):
        raise ValueError(f"ratings of {sorted(scores)}: need one at least, out of {', '.join(priority)}")
    if not all(LOWEST_RATING <= score <= HIGHEST_RATING for score in scores.values()):
        raise ValueError(f"ratings must lie from {LOWEST_RATING} to {HIGHEST_RATING}: {dict(scores)}")
    ceiling = min(scores[level] + rank for rank, level in enumerate(priority) if level in scores)
    return min(statistics.fmean(scores.values()), ceiling)


# ---------------------------------------------------------------------------------------------- faces after an edit
class Face(NamedTuple):
    """A face: its box (x0, y0, x1, y1) in pixels, y down, and its embedding (D,), of any length."""

    box: tuple[float, float, float, float]
    embedding: np.ndarray


def similarity(a: np.ndarray, b: np.ndarray, stranger: float = 0.0) -> float:
    """How alike two embeddings are, in [0, 1]: max(0, (cosine - stranger) / (1 - stranger)). Q §3.3.

    Embeddings of some models spread over all directions, those of others lie in a narrow cone in which even strangers
    have a cosine of 0.9; `stranger` stretches what is left. Raises ValueError for unequal shapes, an embedding of
    length 0 or values that are not finite.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    length = np.linalg.norm(a) * np.linalg.norm(b)
    if a.shape != b.shape or a.ndim != 1 or not math.isfinite(length) or length == 0:
        raise ValueError(f"embeddings of shapes {a.shape} and {b.shape}, lengths {length}: cannot be compared")
    cosine = min(float(a @ b) / length, 1.0)  # rounding may exceed 1
    return max(0.0, (cosine - stranger) / (1 - stranger))


def identity(source_faces: Sequence[Face], result_faces: Sequence[Face], stranger: float = 0.0) -> float | None:
    """How much of the person in the source is still there, in [0, 1]; None if the source shows nobody. Q §3.3.

    The source's largest face is the subject. It is compared with *every* face of the result, and the likeliest counts:
    an edit may add people and move the subject. A result without a face scores 0. Raises as `similarity`.
    """
    if not source_faces:
        return None
    subject = max(source_faces, key=lambda face: (face.box[2] - face.box[0]) * (face.box[3] - face.box[1]))
    return max((similarity(subject.embedding, face.embedding, stranger) for face in result_faces), default=0.0)


# -------------------------------------------------------------------------------------- several scores as one
def composite(scores_KB: np.ndarray, weights_KB: np.ndarray) -> np.ndarray:
    """Weighted sum of rewards: R_b = sum over k of w_kb R_kb -> float64 (B,). F §6.1, App. A; w_kb by category Q §4.2.

    A score of weight 0 does not count, also if it is nan because its scorer was not asked. Weights are taken as given.
    This mixes *before* normalisation, so a wide range dominates; Q Eq. 13 mixes after it. ValueError: unequal shapes.

    ERRATUM (F 6.1, App. A): F contradicts itself on both of its mixes. GRPO-Mix 3:1:1 is a ratio of rewards in §6.1
    but of epochs, each with one reward, in App. A; the DeQA teacher blends DeQA and PickScore 4:6 in §6.1 but 1:1
    in App. A. Ratios of rewards are weights here; a ratio of epochs is a matter of which prompts are drawn.
    """
    scores_KB, weights_KB = np.asarray(scores_KB, np.float64), np.asarray(weights_KB, np.float64)
    if scores_KB.shape != weights_KB.shape:
        raise ValueError(f"scores of shape {scores_KB.shape} but weights of shape {weights_KB.shape}")
    return np.where(weights_KB != 0, weights_KB * scores_KB, 0.0).sum(0)


def table2_average(geneval: float, ocr: float, deqa: float, pickscore: float) -> float:
    """F Table 2's Avg: mean(GenEval, OCR, DeQA / 5, PickScore / 26), about 0..1, from the columns as printed.

    The paper says only "four 0-1 normalized metrics"; these divisors reproduce every row but two.

    ERRATUM (F Table 2): the rows SFT+GRPO-Mix and Merge+GRPO-Mix are printed 0.7166, which is the base model's value;
    their columns average to 0.8515 and 0.8443, so F's lead over them is 0.03 and 0.06, not 0.17 and 0.19.
    """
    return statistics.fmean((geneval, ocr, deqa / HIGHEST_RATING, pickscore / PICKSCORE_SCALE))
