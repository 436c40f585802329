"""Rewards: how good is this image for this prompt, and which rule turns what a model saw into that number?

A reward has two halves. The *eyes* (an OCR engine, an object detector, a vision-language judge) look at the
pixels and report; the *rule* turns the report into a score. This file holds the rules. They are plain Python
on plain data, so the tiny world's template matchers and the real models are scored by the very same lines.

    what is asked                                rule                               source
    is the quoted text on the image?             ocr_reward                         F §6.1 (OCR)
    are the right objects there (evaluation)?    geneval_verdict -> geneval_score   F §6.1 (GenEval), Table 2
    how nearly are they there (training)?        geneval_reward                     F §6.1, GRPO's signal
    what does a VLM's score token say?           expected_score                     Q Eq. 12, Q §3
    what does a VLM judge's written reply say?   parse_judge -> judge_reward        F App. A, Fig. 6, Table 4
    how plain is the picture (smoke runs)?       score_jpeg                         DDPO
    several rewards as one                       composite                          F §6.1, App. A, Q §4.1
    one number for a model                       table2_average                     F Table 2

Notation: B samples, K rewards; boxes are (x0, y0, x1, y1) in pixels with y pointing *down*; a detection is a
dict {"class", "score", "box", "color"}; metadata is one line of a GenEval file (see `data.py`).

One principle: a score that could not be computed is an error that names its cause, never a silent 0, which
would train on as if every image were bad. Nothing here is differentiable: rewards are numbers about finished
images, and no gradient flows through them.
"""

import io
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

# GenEval's thresholds. Counting asks for far more confidence, because a detector's weak second guesses on one
# object would otherwise be counted as objects.
CONFIDENCE, COUNTING_CONFIDENCE, MAX_PER_CLASS = 0.3, 0.9, 16
# Two boxes must be this share of their summed sizes apart before "left" means anything, and the remaining
# offset must point this much (as a cosine) along an axis.
POSITION_MARGIN, POSITION_COSINE = 0.1, 0.5
RELATIONS = ("left of", "right of", "above", "below")

SCORE_TOKENS = {str(score): score for score in range(1, 6)}  # Q Eq. 12's S = {1, 2, 3, 4, 5}
JUDGE_TAGS = {"quality": "QualityScore", "instruction": "InstructionScore", "overall": "OverallScore"}
LOWEST_RATING, HIGHEST_RATING = 1, 5  # the scale of F Fig. 6 and of DeQA's levels (bad .. excellent)
PICKSCORE_SCALE = 26  # PickScore is published as about 20 to 23; 26 is the divisor that brings it near 0..1


class RewardError(ValueError):
    """A scorer answered with something that is no score; the message names it, on what, and what it said."""


class Scorer(NamedTuple):
    """Anything that judges pictures, near or far: one signature for all. Higher is better.

    score(images, prompts, sources) -> (B,) float32 on the CPU, where images is (B, 3, H, W) in [0, 1] on the CPU,
    prompts are B `data.Prompt`, and sources, for editing only, are B source images (3, H', W'), else None.
    low, high: the range that a score can have, checked by `check_scores`; infinite where there is none.
    """

    name: str
    score: Callable
    low: float
    high: float


# ------------------------------------------------------------------------------------------ text on the image
def ocr_target(prompt: str) -> str:
    """The text an image has to show: what stands between the prompt's first pair of ASCII double quotes.

    F §6.1 (OCR data). Raises ValueError where there is no such pair or nothing but blanks inside it.
    """
    parts = prompt.split('"')  # before, target, after, ...
    if len(parts) < 3 or not parts[1].strip():
        raise ValueError(f'no target text: put it in ASCII double quotes ("like this"): {prompt!r}')
    return parts[1]


def levenshtein(a: str, b: str) -> int:
    """Fewest insertions, deletions and substitutions of a character that turn `a` into `b`. F §6.1 (OCR)."""
    row = list(range(len(b) + 1))  # row[j] = distance from a[:i] (here i = 0) to b[:j]
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            # row[j] is still a[:i-1] (delete x), row[j-1] already a[:i] (insert y), diagonal replaces.
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def ocr_reward(read_text: str, prompt: str) -> float:
    """How much of the quoted text was read: 1 - distance / length, in [0, 1]. F §6.1 (OCR).

    distance = 0 where the target occurs anywhere in `read_text`, else the Levenshtein distance, at most the
    target's length. Case and white space do not count: engines are unsure of both. `read_text` holds all the
    lines that the engine read, joined. Raises ValueError where the prompt has no target.

    Known weakness, kept because the papers' numbers depend on it: text around the target costs nothing, so
    an image that repeats itself still scores 1.
    """
    target = _letters(ocr_target(prompt))
    read = _letters(read_text)
    distance = 0 if target in read else min(levenshtein(read, target), len(target))
    return 1 - distance / len(target)


def _letters(text: str) -> str:
    return "".join(text.split()).lower()


# ---------------------------------------------------------------------------------------- GenEval's checklist
def filter_detections(detections: Sequence[dict], metadata: Mapping) -> list[dict]:
    """Detections that count for a prompt: score > 0.3 (tag "counting": > 0.9), the best 16 of each class.

    F §6.1 (GenEval). Best score first. There is no non-maximum suppression, as in GenEval: two boxes on one
    object are two objects.
    """
    threshold = COUNTING_CONFIDENCE if metadata.get("tag") == "counting" else CONFIDENCE
    kept: list[dict] = []
    seen: dict[str, int] = {}
    for found in sorted(detections, key=lambda d: d["score"], reverse=True):
        seen[found["class"]] = seen.get(found["class"], 0) + 1
        if found["score"] > threshold and seen[found["class"]] <= MAX_PER_CLASS:
            kept.append(found)
    return kept


def relative_position(box_a: Sequence[float], box_b: Sequence[float]) -> set[str]:
    """Where box a lies as seen from box b: a subset of `RELATIONS`, of size 0, 1 or, on a diagonal, 2.

    F §6.1 (GenEval). With o = centre(a) - centre(b), in pixels, y down:
        o' = sign(o) max(|o| - 0.1 (size(a) + size(b)), 0)      per axis: overlapping boxes have no order
        right of / below where o'_x / o'_y >  0.5 |o|,   left of / above where < -0.5 |o|
    Compared as a product, not as the quotient o'/|o|, so that equal centres need no special case.
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

    `detections` are those that `filter_detections` kept. True where
      * every `include` finds at least `count` objects of its class,
      * its `count` best scored objects all have its `color`,
      * each of them holds the `position` relation to each of the best objects of the include it refers to,
      * no `exclude` class reaches its count (how "exactly two" is asked: include 2, exclude 3).
    Raises ValueError where the metadata has no include.
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
    Raises ValueError where the metadata has no include.

    DEVIATION: the released training code gives a wrong relation 0.5 and lets the count's part go below 0
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
    members = [found for found in detections if found["class"] == entry["class"]]
    return sorted(members, key=lambda d: d["score"], reverse=True)


def _relation_holds(position: Sequence, objects: Sequence[dict], groups: Sequence[Sequence[dict]]) -> bool:
    """Does every object hold [relation, index] to every object of the include with that index?"""
    relation, index = position
    return all(relation in relative_position(a["box"], b["box"]) for a in objects for b in groups[index])


def per_tag_accuracy(verdicts: Sequence[bool], tags: Sequence[str]) -> dict[str, float]:
    """Share of True verdicts of each tag, in [0, 1], tags in order of first appearance. F §6.1 (GenEval).

    Raises ValueError where there is no verdict, or not one tag a verdict.
    """
    if len(verdicts) == 0 or len(verdicts) != len(tags):
        raise ValueError(f"need one tag a verdict, and one at least: {len(verdicts)} and {len(tags)}")
    by_tag: dict[str, list[bool]] = {}
    for verdict, tag in zip(verdicts, tags, strict=True):
        by_tag.setdefault(tag, []).append(bool(verdict))
    return {tag: statistics.fmean(group) for tag, group in by_tag.items()}


def geneval_score(verdicts: Sequence[bool], tags: Sequence[str]) -> float:
    """GenEval's number, in [0, 1]: the unweighted mean of the per-tag accuracies. F Table 2.

    Not the mean over images: a tag counts the same however many prompts it has. Raises as `per_tag_accuracy`.
    """
    return statistics.fmean(per_tag_accuracy(verdicts, tags).values())


# ----------------------------------------------------------------------------------- what a VLM says in words
def expected_score(logprobs: Mapping[str, float]) -> float:
    """Q Eq. 12: R = sum over s in {1..5} of s p(s), in [1, 5], from the score token's {text: log-prob}.

    p is normalised over the five score tokens alone; servers return only the top few log-probs, so some of
    the five may be missing (p = 0). Blanks around a token do not count; " 4" and "4" add up: both say four.
    The expectation is finer than the likeliest token: in a group whose images all get a "4" it still ranks.
    Raises RewardError where none of the five is there or their log-probs are not numbers.
    """
    stripped = [(token.strip(), lp) for token, lp in logprobs.items()]
    known = [(SCORE_TOKENS[token], lp) for token, lp in stripped if token in SCORE_TOKENS]
    if not known:
        raise RewardError(f"no score token 1 to 5 among the judge's log-probs: {dict(logprobs)}")
    top = max(lp for _, lp in known)  # p is unchanged by a common factor; this one keeps exp() from vanishing
    weights = [(score, math.exp(lp - top)) for score, lp in known]
    score = sum(s * w for s, w in weights) / sum(w for _, w in weights)
    if not math.isfinite(score):
        raise RewardError(f"the judge's log-probs give no expectation: {dict(logprobs)}")
    return score


def parse_judge(reply: str) -> dict[str, float]:
    """The judge's ratings {"quality", "instruction", "overall"}, each in [1, 5], from its written reply.

    F App. A, Fig. 6: <QualityScore>X</QualityScore> and so on, after a <Thought>. Where the thought quotes
    the tags too, the last ones count. Raises RewardError with the reply in it where a tag is missing, no
    number or off the scale: a judge that answers something else is broken, and a 0 would hide that.

    ERRATUM: F App. A names Qwen3-30B-A3B-Instruct as this judge, a model that reads text only; the released
    script serves Qwen3-VL-30B-A3B-Instruct.
    """
    ratings = {}
    for name, tag in JUDGE_TAGS.items():
        found = re.findall(rf"<{tag}>\s*([0-9]+(?:\.[0-9]+)?)\s*</{tag}>", reply)
        if not found or not LOWEST_RATING <= float(found[-1]) <= HIGHEST_RATING:
            raise RewardError(f"no <{tag}> from {LOWEST_RATING} to {HIGHEST_RATING} in the reply: {reply}")
        ratings[name] = float(found[-1])
    return ratings


def judge_reward(reply: str) -> float:
    """F App. A, Fig. 6: the judge's overall rating / 5, in [0.2, 1]. Raises as `parse_judge`."""
    return parse_judge(reply)["overall"] / HIGHEST_RATING


# -------------------------------------------------------------------------------------- several scores as one
def check_scores(
    name: str,
    scores: Sequence[float],
    prompts: Sequence[str],
    low: float | None = None,
    high: float | None = None,
) -> np.ndarray:
    """A scorer's answer for a batch as float64 (B,), or a RewardError naming scorer and prompt. F §6.1.

    There must be one score for each of the B `prompts`, in shape (B,) exactly: a (B, 1) would later broadcast
    against (B,) to (B, B). Every score must be finite and, where given, low <= score <= high.
    """
    scores_B = np.asarray(scores, dtype=np.float64)
    if scores_B.shape != (len(prompts),):
        raise RewardError(f"scorer {name!r}: {len(prompts)} prompts but scores of shape {scores_B.shape}")
    for score, prompt in zip(scores_B, prompts, strict=True):
        if not math.isfinite(score):
            raise RewardError(f"scorer {name!r}: {score} is not finite, for the prompt {prompt!r}")
        if (low is not None and score < low) or (high is not None and score > high):
            raise RewardError(
                f"scorer {name!r}: {score} is outside [{low}, {high}], for the prompt {prompt!r}"
            )
    return scores_B


def composite(
    scores_K: Mapping[str, Sequence[float]], weights: Mapping[str, float], prompts: Sequence[str]
) -> np.ndarray:
    """Weighted sum of rewards: R_b = sum over k of w_k R_kb -> float64 (B,). F §6.1, App. A.

    `scores_K` maps each scorer's name to its (B,) scores and `weights` the same names to w_k. Weights are
    taken as given: 3:1:1 and 0.6:0.2:0.2 differ by a factor that group normalisation removes. This mixes
    *before* normalisation, so a reward with a wide range dominates; Q Eq. 13 mixes after it
    (`grpo.multi_reward_advantages`). Raises ValueError where the names differ or a weight is not finite, and
    RewardError as `check_scores`.

    ERRATUM: F contradicts itself on both of its mixes. GRPO-Mix 3:1:1 is a ratio of rewards in §6.1 but of
    epochs, each with one reward, in App. A; the DeQA teacher blends DeQA and PickScore 4:6 in §6.1 but 1:1
    in App. A. Ratios of rewards are weights here; a ratio of epochs is a matter of which prompts are drawn.
    """
    if scores_K.keys() != weights.keys():
        raise ValueError(f"scores of {sorted(scores_K)} but weights of {sorted(weights)}")
    total_B = np.zeros(len(prompts))
    for name, scores in scores_K.items():
        if not math.isfinite(weights[name]):
            raise ValueError(f"the weight of scorer {name!r} is {weights[name]}: it must be finite")
        total_B += weights[name] * check_scores(name, scores, prompts)
    return total_B


def to_picture(image: torch.Tensor) -> Image.Image:
    """An image (3, H, W) in [0, 1] as the 8-bit RGB picture that every eye sees and every file holds.

    RewardError for values that are not finite: a nan becomes 0 when it is made a byte, and a broken decoder would be
    scored as a black picture.
    """
    if not image.isfinite().all():
        raise RewardError("a picture holds values that are not finite; the model that drew it has diverged")
    pixels = (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous()
    return Image.fromarray(pixels.cpu().numpy())


def score_jpeg(images: torch.Tensor, prompts: Sequence) -> list[float]:
    """Compressibility (DDPO's reward, in neither paper): 1 - JPEG bytes / raw bytes, (B,), below 1, higher is plainer.

    images: (B, 3, H, W) in [0, 1]. It needs no model and no download and any image model can learn it: the reward to
    try a new machine with. Quality 95 and no chroma subsampling, so that detail counts.
    """
    scores = []
    for image in images:
        stream = io.BytesIO()
        to_picture(image).save(stream, "JPEG", quality=95, subsampling=0)
        scores.append(1 - stream.tell() / image.numel())
    return scores


def table2_average(geneval: float, ocr: float, deqa: float, pickscore: float) -> float:
    """F Table 2's Avg: mean(GenEval, OCR, DeQA / 5, PickScore / 26), about 0..1, from the columns as printed.

    The paper says only "four 0-1 normalized metrics"; these divisors reproduce every row but two.

    ERRATUM: the rows SFT+GRPO-Mix and Merge+GRPO-Mix are printed 0.7166, which is the base model's value;
    their columns average to 0.8515 and 0.8443, so F's lead over them is 0.03 and 0.06, not 0.17 and 0.19.
    """
    return statistics.fmean((geneval, ocr, deqa / HIGHEST_RATING, pickscore / PICKSCORE_SCALE))
