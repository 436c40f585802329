"""Rubrics: what a vision-language judge is asked about a picture, and how its answer is read.

A *rubric* is data, its words stand in rubrics.toml. The same words go to a model on this machine (vlm.py) and, as
OpenAI-style chat messages (`messages`), to one behind an endpoint (remote.py). The same rule (`read`) turns the answer
of either into a number.

    rubric                asks about                           the answer, read by           source
    judge                 quality, instruction, overall        three tags, `overall` counts  F App. A, Fig. 6, Table 4
    alignment             is what the prompt says there?       one score token, Q Eq. 12     Q §3.2
    alignment_checklist   the same, level by level             four tags, `capped_alignment` Q §3.2
    aesthetic, portrait   is it beautiful? are the people?     one score token               Q §3.2
    editing               was the instruction carried out?     one score token               Q §3.3
    editing_checklist     the same, demand by demand           yes or no, `capped_editing`   Q §3.3
    unifiedreward         alignment and quality                a number after `Final Score:` F Table 4
    deqa                  how good is the picture as such?     one word, excellent .. bad    F §6.1, Table 2
    arena                 which of two pictures is better?     A, B or C, an expectation     Q 5, Fig. 4

A rubric of a user's own is FILE.toml:NAME, a file such as rubrics.toml. With `ask = "pillar"` its answer is Q-Judger's
JSON (Q Table 1), and its question has the benchmark's checklist.

Every score lies in [0.2, 1]: all of them are ratings from 1 to 5, divided by 5, as F's tables print them. One score
token carries more than the number that it spells: its probabilities give an expectation, which ranks pictures that
all get "4". Reasoning before the answer (Q §3 trains its reward models so) is skipped: of a model that thinks by itself
the token after it counts; other models reason in the checklists.

DEVIATION (F Fig. 6, Q 3): the wording of every rubric is this project's own, and follows the papers in what is asked,
in which order and on which scale. Q prints none of its prompts. A reward model that was trained on one fixed prompt
scores best with that one: `rubric._replace(user=...)`.
"""

import json
import math
import re
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor

import rewards
from data.common import first_line
from data.pictures import PNG_URI, png, to_picture
from rewards import ALIGNMENT, HIGHEST_RATING, LEVELS, LOWEST_RATING, SCORE_TOKENS, RewardError

NUMBER_WORDS = "zero one two three four five six seven eight nine ten".split()
PREFERENCE = {"a": 5, "b": 1, "c": 3}  # of two pictures the first or the second is better, or neither
SCALES = {"expected": SCORE_TOKENS, "levels": LEVELS, "preference": PREFERENCE}  # the words of a one-token answer
PILLAR = "pillar"  # the form of Q-Judger's answer, see `_pillar`
WRITTEN_TOKENS = 1024  # how long a written answer may get


class Rubric(NamedTuple):
    """What a judge is asked, and how its answer is read."""

    name: str
    ask: str  # the form of the answer: a key of `SCALES` or of `WRITTEN`
    system: str
    user: str  # with the prompt's place, {prompt}, in it; a picture stands before it, or at {picture}
    images: tuple[str, ...] = ("picture",)  # what is shown, in order
    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"  # the checkpoint that vlm.py takes by default
    side: int = 0  # pictures are resized to side x side first; 0 leaves them as they are
    longest: int = 0  # larger pictures are shrunk to this many pixels on the longer side; 0 leaves them as they are
    tokens: int = 0  # how long a written answer may get; 0: `WRITTEN_TOKENS`

    @property
    def max_tokens(self) -> int:
        """How long a reply may get, of a model that does not think by itself: the score token alone, or a form."""
        return 1 if self.ask in SCALES else self.tokens or WRITTEN_TOKENS

    @property
    def low(self) -> float:
        """The least score: of a rating from 1 to 5, or of Q-Judger's points from 0 to 100."""
        return 0.0 if self.ask == PILLAR else LOWEST_RATING / HIGHEST_RATING


# ---------------------------------------------------------------------------------------------------- the rubrics
# How each kind of answer has to look. It follows the question, so that it is the last thing the model reads.
ONE_TOKEN = {
    "expected": "Answer with one digit from 1 (worst) to 5 (best) and nothing else.",
    "levels": "Answer with one of the words excellent, good, fair, poor, bad and nothing else.",
    "preference": "Answer with A if the first is better, B if the second is, C if they are alike, and nothing else.",
}


def _rubric(name: str, entry: dict) -> Rubric:
    """An entry of rubrics.toml; its lists are tuples here."""
    return Rubric(name, **{key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()})


def from_file(file: Path) -> dict[str, Rubric]:
    """The rubrics of a file such as rubrics.toml. RewardError, one line, if it is none."""
    try:
        found = {name: _rubric(name, entry) for name, entry in tomllib.loads(file.read_text("utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError) as fault:
        raise RewardError(f"{file}: no rubrics: {first_line(fault)}") from fault
    for rubric in found.values():
        if rubric.ask not in (forms := (*SCALES, *WRITTEN, PILLAR)):
            raise RewardError(f"{file}: {rubric.name}: ask is {rubric.ask!r}; choose from {', '.join(forms)}")
    return found


def named(name: str) -> Rubric:
    """A rubric of `RUBRICS`, or one of a user's own, FILE.toml:NAME. RewardError for an unknown one."""
    file, _, own = name.rpartition(":")
    known = from_file(Path(file)) if file else RUBRICS
    if own not in known:
        raise RewardError(f"unknown rubric {name!r}: choose one of {', '.join(known)}")
    return known[own]


# --------------------------------------------------------------------------------------------------- the question
def user_turn(rubric: Rubric, prompt: str, images: Sequence[Tensor]) -> list[str | Image.Image]:
    """What the user says: texts, and the pictures that the rubric shows, in its order and size.

    images: (3, H, W) each, in [0, 1]: an edit's sources, if there are any, and the picture; a rubric about the picture
    alone leaves the sources out. RewardError if a source is missing, or a picture holds values that are not finite.
    """
    if len(images) < len(rubric.images):
        raise RewardError(f"rubric {rubric.name!r} is about {' and '.join(rubric.images)}: {len(images)} given")
    pictures = [to_picture(image) for image in (images if len(rubric.images) > 1 else images[-1:])]
    if rubric.side:
        pictures = [picture.resize((rubric.side, rubric.side), Image.Resampling.BICUBIC) for picture in pictures]
    for picture in pictures if rubric.longest else ():
        picture.thumbnail((rubric.longest, rubric.longest), Image.Resampling.LANCZOS)
    # A prompt must not end its own turn or add pictures: Qwen's control tokens all begin with these two characters.
    before, _, after = rubric.user.rpartition("{picture}")
    before, text = (words.replace("{prompt}", prompt.replace("<|", "< |")) for words in (before, after))
    if rubric.ask in SCALES:
        text += "\n\n" + ONE_TOKEN[rubric.ask]
    if len(pictures) == 1:
        return [*([before] if before else []), *pictures, text]
    names = [name.title() for name in rubric.images]
    if len(pictures) > 2:  # an edit of several
        names = [*(f"Source {i}" for i in range(1, len(pictures))), "Result"]
    parts = [part for name, each in zip(names, pictures, strict=True) for part in (f"\n{name}: ", each)]
    return [parts[0].lstrip(), *parts[1:], "\n" + text]


def messages(rubric: Rubric, prompt: str, images: Sequence[Tensor]) -> list[dict]:
    """The question as OpenAI-style chat messages, pictures as PNG in data URLs. Arguments and errors: `user_turn`."""
    content = []
    for part in user_turn(rubric, prompt, images):
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        else:
            content.append({"type": "image_url", "image_url": {"url": PNG_URI + png(part, level=1)}})
    return [{"role": "system", "content": rubric.system}, {"role": "user", "content": content}]


# ----------------------------------------------------------------------------------------------------- the answer
def read(rubric: Rubric, reply: str, token_logprobs: Mapping[str, float] | None = None) -> float:
    """The score of a reply, in [0.2, 1]: a rating from 1 to 5, by `WRITTEN` or `SCALES`, divided by 5. Q-Judger's are
    points from 0 to 100, divided by 100, nan if nothing of the pillar applies.

    token_logprobs: {token text: log-prob} of the likeliest tokens at the place of the score token (`score_token` finds
    it), for rubrics that ask for one; Q Eq. 12 then gives the expectation. Without them the word itself counts.
    RewardError, one line with the reply in it, if the reply is not what was asked for.
    """
    try:
        if rubric.ask == PILLAR:
            return _pillar(rubric, reply)
        if rubric.ask in WRITTEN:
            return WRITTEN[rubric.ask](reply) / HIGHEST_RATING
        scale, found = SCALES[rubric.ask], rewards.find_rating(rewards.answer(reply))
        if not found or found[1].lower() not in scale:
            raise RewardError(f"none of {', '.join(scale)} is the reply: {reply}")
        rating = scale[found[1].lower()] if token_logprobs is None else rewards.expected_score(token_logprobs, scale)
        return rating / HIGHEST_RATING
    except ValueError as fault:
        cause = " ".join(str(fault).removesuffix(reply).split())
        raise RewardError(f"{cause} {' '.join(reply.split())!r}") from None


def score_token(tokens: Sequence[str]) -> int | None:
    """Which of a reply's tokens is the score's: the one in which the rating after all reasoning begins; None without
    a rating."""
    reply, end = "".join(tokens), 0
    said = rewards.answer(reply)
    found = rewards.find_rating(said)
    for index, token in enumerate(tokens):
        end += len(token)
        if found and len(reply) - len(said) + found.start(1) < end:
            return index
    return None


def answer_probability(logprobs: Mapping[str, float], right: str) -> float:
    """How probable the right answer is as the first token, in [0, 1], of {token: log-prob}. GenEval 2's soft score.

    Blanks, capitals and numbers in digits do not count: "four", " Four" and "4" add up. Not normalised over the other
    answers. 0 if no token says it: servers return the likeliest few only.
    """
    said = {right.strip().lower()}
    said |= {str(n) for n, word in enumerate(NUMBER_WORDS) if word in said}
    return min(sum(math.exp(lp) for token, lp in logprobs.items() if token.strip().lower() in said), 1.0)


def soft_tifa(probabilities: Sequence[float]) -> tuple[float, float]:
    """GenEval 2's Soft-TIFA of one picture, (AM, GM): arithmetic and geometric mean of its atoms' soft scores.

    AM says how many atoms are right, GM whether the whole prompt is: one atom at 0 makes it 0. The benchmark's numbers
    are the means over prompts. Raises ValueError without an atom, and for a number that is no probability.
    """
    if not probabilities or not all(0 <= p <= 1 for p in probabilities):
        raise ValueError(f"soft scores must be probabilities of one atom at least: {probabilities}")
    return statistics.fmean(probabilities), math.prod(probabilities) ** (1 / len(probabilities))


def _final(reply: str) -> float:
    """UnifiedReward's rating in [1, 5]: what stands after the last `Final Score:`. F Table 4."""
    marked = re.split(r"final score[\s*_]*[:=]", rewards.answer(reply), flags=re.IGNORECASE)[1:]
    return rewards.rating("number after `Final Score:`", marked, reply)


def _alignment(reply: str) -> float:
    """Q §3.2: each of the four levels of `ALIGNMENT` once, with a rating or none, which leaves it out."""
    tags = [(name.lower(), value.lower()) for name, value in _verdict(reply)]
    if sorted(name for name, _ in tags) != sorted(ALIGNMENT):
        raise RewardError(f"no <Verdict> with each of the four levels once in the reply: {reply}")
    levels = {name: rewards.rating(f"<{name}>", [value], reply) for name, value in tags if value != "none"}
    return rewards.capped_alignment(levels)


def _editing(reply: str) -> float:
    """Q §3.3: a yes or no for each demand, one core demand at least, and one coherence."""
    tags, names = _verdict(reply), ("Core", "Extra", "Coherence")
    core, extra, coherence = ([value.lower() for key, value in tags if key == name] for name in names)
    if not core or len(coherence) != 1 or not {*core, *extra} <= {"yes", "no"}:
        raise RewardError(f"no <Verdict> with a yes or no in each <Core>, <Extra> and one <Coherence>: {reply}")
    met = [[said == "yes" for said in demands] for demands in (core, extra)]
    return rewards.capped_editing(*met, rewards.rating("<Coherence>", coherence, reply))


def _pillar(rubric: Rubric, reply: str) -> float:
    """Q Table 1: the pillar's points / 100, by `rewards.pillar_score`. The question has the hierarchy: a line
    "## LEVEL 2" and below it lines "- LEVEL 3: question"."""
    hierarchy: dict[str, list[str]] = {}
    for mark, name in re.findall(r"^(## |- )([^:\n]+)", rubric.user, re.M):
        if mark == "## ":
            hierarchy[name.strip()] = []
        elif hierarchy:
            hierarchy[[*hierarchy][-1]].append(name.strip())
    said = rewards.answer(reply)
    found = json.loads(said[said.find("{") : said.rfind("}") + 1] or "null")
    if not isinstance(found, dict):
        raise RewardError(f"no JSON object in the reply: {reply}")
    points = rewards.pillar_score(found, {name: facets for name, facets in hierarchy.items() if facets})
    return math.nan if points is None else points / 100


def _verdict(reply: str) -> list[tuple[str, str]]:
    """(name, content) of the tags in the last <Verdict> after all reasoning; none if that was begun and not ended."""
    _, begun, block = rewards.answer(reply).rpartition("<Verdict>")
    block, ended, _ = block.partition("</Verdict>")
    return re.findall(r"<(\w+)>\s*(.*?)\s*</\1>", block, re.DOTALL) if begun and ended else []


WRITTEN = {  # how a longer answer becomes a rating in [1, 5]
    "overall": lambda reply: rewards.parse_judge(reply)["overall"],
    "final": _final, "alignment": _alignment, "editing": _editing,
}  # fmt: skip
RUBRICS = from_file(Path(__file__).with_name("rubrics.toml"))
