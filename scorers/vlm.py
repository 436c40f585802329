"""What does a vision-language model say of this picture?

A *rubric* is what it is asked, as data. The same words go to a model on this machine (`local`) and, as OpenAI-style
chat messages (`messages`), to one behind an endpoint (remote.py); the same rule (`read`) turns the answer of either
into a number. Nothing else about a judge is anybody's business.

    rubric                asks about                           the answer, read by           source
    judge                 quality, instruction, overall        three tags, `overall` counts  F App. A, Fig. 6, Table 4
    alignment             is what the prompt says there?       one score token, Q Eq. 12     Q §3.2
    alignment_checklist   the same, level by level             four tags, `capped_alignment` Q §3.2
    aesthetic, portrait   is it beautiful? are the people?     one score token               Q §3.2
    editing               was the instruction carried out?     one score token               Q §3.3
    editing_checklist     the same, demand by demand           yes or no, `capped_editing`   Q §3.3
    unifiedreward         alignment and quality                a number after `Final Score:` F Table 4
    deqa                  how good is the picture as such?     one word, excellent .. bad    F §6.1, Table 2

Every score lies in [0.2, 1]: all of them are ratings from 1 to 5, divided by 5, as F's tables print them. One score
token carries more than the number that it spells: its probabilities give an expectation, which ranks pictures that
all get "4". `named("alignment", thought=True)` lets the model reason before it gives the token (Q §3 trains its
reward models so); that costs some hundred tokens a picture instead of one.

A reply that says anything else than what was asked is a `rewards.RewardError` with the reply in it.

DEVIATION (F Fig. 6, Q §3): the wording of every rubric is this project's own, and follows the papers in what is asked,
in which order and on which scale. Q prints none of its prompts. A reward model that was trained on one fixed prompt
scores best with that one: `rubric._replace(user=...)`.
"""

import base64
import io
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from rewards import (
    HIGHEST_RATING,
    LOWEST_RATING,
    SCORE_TOKENS,
    RewardError,
    Scorer,
    expected_score,
    judge_reward,
    to_picture,
)

LEVELS = {"excellent": 5, "good": 4, "fair": 3, "poor": 2, "bad": 1}  # DeQA's
SCALES = {"expected": SCORE_TOKENS, "levels": LEVELS}  # the words of a one-token answer
ASKS = (*SCALES, "overall", "final", "alignment", "editing")  # how an answer is read, see `read`
# Q's order of importance (§3.2 prints the first; §3.3 lists what the second is made of).
ALIGNMENT = ("objects", "attributes", "relations", "actions")
EDITING = ("core", "extra", "coherence")
THOUGHT_TOKENS = 1024
QWEN_VL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")  # what `local` can ask; all write images alike
JUDGE_FILES = (
    "config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "model.safetensors",
    "model.safetensors.index.json", "model-0*.safetensors",
)  # fmt: skip


class Rubric(NamedTuple):
    """What a judge is asked. `user` holds the prompt's place, {prompt}; `ask` says how the answer is read (`ASKS`).

    images: what is shown, in order; model: the checkpoint that `local` takes unless told otherwise; thought: reason
    first, then the one token; side: pictures are resized to side x side first, 0 leaves them as they are.
    """

    name: str
    system: str
    user: str
    ask: str
    images: tuple[str, ...] = ("picture",)
    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    thought: bool = False
    side: int = 0

    @property
    def max_tokens(self) -> int:
        """How long a reply may get: the score token alone, or a thought and the score."""
        return 1 if self.ask in SCALES and not self.thought else THOUGHT_TOKENS


# ---------------------------------------------------------------------------------------------------- the rubrics
# How each kind of answer has to look. It follows the question, so that it is the last thing the model reads.
ONE_TOKEN = {
    "expected": "Answer with one digit from 1 (worst) to 5 (best) and nothing else.",
    "levels": "Answer with one of the words excellent, good, fair, poor, bad and nothing else.",
}
THOUGHT_FIRST = {
    "expected": "First go through the points above one by one. Then end with a line `Score: X`, X from 1 to 5.",
    "levels": "First go through the points above one by one. Then end with a line `Score: X`, X being one of the words "
    "excellent, good, fair, poor, bad.",
}

JUDGE = Rubric(
    "judge",
    "You check images as a profession. You rate a generated image against the instruction that it was made from, "
    "in three respects, each from 1 to 5.",
    """Rate the image.

1. Quality. 1-2: blurred, badly lit or a jumble. 3: sharp and well enough lit, but plain. 4-5: crisp, with rich colors
   and a composition that impresses.
2. Instruction. 1-2: ignored or contradicted, main elements missing. 3: followed in part, with some main element wrong.
   4-5: every element of the instruction is there as described.
3. Overall. The instruction comes before quality: a plain image that shows all that was asked for rates higher than a
   beautiful one that does not.

Be strict: a detail counts only where it can be seen. Go through the instruction keyword by keyword before you rate.

Instruction: {prompt}

Answer in this form, the analysis first:
<Thought>analysis of quality and of each keyword</Thought>
<QualityScore>X</QualityScore>
<InstructionScore>Y</InstructionScore>
<OverallScore>Z</OverallScore>""",
    "overall",
    model="Qwen/Qwen3-VL-30B-A3B-Instruct",
)

ALIGNMENT_POINTS = """in this order of importance:
1. objects: is everything that is named there, and as often as asked?
2. attributes: are colors, sizes, shapes and materials right?
3. relations: is everything where it should be relative to the rest?
4. actions: do figures do what they should, in the pose they should?"""
ALIGNMENT_SYSTEM = (
    "You rate from 1 to 5 how faithfully an image shows what a prompt asks for. Beauty does not count. What is "
    "missing, misread or contradicted does."
)

EDITING_POINTS = """1. core: the change itself, without which the edit has failed
2. extra: everything else that the instruction asks for, and what it implies should stay as it was
3. coherence: does the result hold together as one picture?"""
EDITING_SYSTEM = (
    "You rate from 1 to 5 how well an image was edited. You see the source, the result, and the instruction that "
    "leads from one to the other."
)

RUBRICS = {
    rubric.name: rubric
    for rubric in (
        JUDGE,
        Rubric(
            "alignment",
            ALIGNMENT_SYSTEM,
            f"Prompt: {{prompt}}\n\nCompare the image with the prompt, {ALIGNMENT_POINTS}\n\nThe total is at most the "
            "rating of the objects, at most one more than that of the attributes, at most two more than that of the "
            "relations and at most three more than that of the actions, however good the rest is.",
            "expected",
        ),
        Rubric(
            "alignment_checklist",
            ALIGNMENT_SYSTEM,
            f"Prompt: {{prompt}}\n\nCompare the image with the prompt, {ALIGNMENT_POINTS}\n\nExplain what you see. "
            "Then rate each of the four from 1 to 5, or write none where the prompt asks for nothing of the kind, in "
            "this form:\n<Verdict><Objects>X</Objects><Attributes>X</Attributes><Relations>X</Relations>"
            "<Actions>X</Actions></Verdict>",
            "alignment",
        ),
        Rubric(
            "aesthetic",
            "You rate from 1 to 5 how good an image looks. What it shows does not count.",
            "The image was made from this prompt: {prompt}\n\nRate its looks: balance of the composition, light that "
            "could be real, textures and materials down to the detail, one style throughout, no artifacts such as "
            "smeared or repeated texture.",
            "expected",
        ),
        Rubric(
            "portrait",
            "You rate from 1 to 5 how good the people in an image look.",
            "The image was made from this prompt: {prompt}\n\nRate the people in it: faces that attract and whose "
            "proportions are right, features that belong to one person, skin and hair with real texture. Look for "
            "what goes wrong often, wrong numbers of fingers, distorted features and impossible proportions of the "
            "body, and rate an image with any of them 1 or 2.",
            "expected",
        ),
        Rubric(
            "editing",
            EDITING_SYSTEM,
            f"Instruction: {{prompt}}\n\nTake the instruction apart and compare the two images:\n{EDITING_POINTS}\n\n"
            "The total is at most the rating of the core, at most one more than that of the extra demands and at most "
            "two more than that of the coherence, however good the rest is.",
            "expected",
            images=("source", "picture"),
        ),
        Rubric(
            "editing_checklist",
            EDITING_SYSTEM,
            f"Instruction: {{prompt}}\n\nTake the instruction apart into single demands and compare the two images:\n"
            f"{EDITING_POINTS}\n\nExplain what you see. Then write, for each core demand and for each extra one, a tag "
            "with yes or no, and rate the coherence from 1 to 5, in this form:\n<Verdict><Core>yes</Core>"
            "<Extra>yes</Extra><Extra>no</Extra><Coherence>X</Coherence></Verdict>",
            "editing",
            images=("source", "picture"),
        ),
        Rubric(
            "unifiedreward",
            "You are a helpful assistant.",
            "Here is a caption and an image that was generated from it. Rate the image by two criteria:\n1. Alignment "
            "with the caption: are its objects, their attributes and their relations right?\n2. Quality of the image: "
            "is it clear, detailed, right in its colors and pleasing?\nList the key elements of the caption, each as "
            "'element (type): value' with value 1 where the image shows it and 0 where it does not. Then give one "
            "score from 1 to 5 after 'Final Score:'.\nCaption: [{prompt}]",
            "final",
            model="CodeGoat24/UnifiedReward-7b-v1.5",
            side=512,
        ),
        Rubric(
            "deqa",
            "You rate the technical quality of images.",
            "How good is the quality of this image: sharpness, noise, exposure, colors, artifacts?",
            "levels",
            model="zhiyuanyou/DeQA-Score-Mix3",
        ),
    )
}


def named(name: str, thought: bool = False) -> Rubric:
    """A rubric of `RUBRICS`, with reasoning before the score token if `thought`. Q §3 (chain of thought).

    RewardError for an unknown name, and for a thought where the rubric's answer holds one anyway.
    """
    if name not in RUBRICS:
        raise RewardError(f"unknown rubric {name!r}: choose one of {', '.join(RUBRICS)}")
    if thought and RUBRICS[name].ask not in SCALES:
        raise RewardError(f"the rubric {name!r} reasons in its reply anyway; leave the thought out")
    return RUBRICS[name]._replace(thought=thought)


# --------------------------------------------------------------------------------------------------- the question
def messages(rubric: Rubric, prompt: str, images: Sequence[Tensor]) -> list[dict]:
    """The question as OpenAI-style chat messages, pictures as PNG in data URLs.

    images: (3, H, W) each, in [0, 1]: the picture, or the source and the picture; a rubric about the picture alone
    leaves the source out. RewardError where a source is missing, or a picture holds values that are not finite.
    """
    shown = iter(_pictures(rubric, images))
    content = []
    for part in _parts(rubric, prompt):
        if part is None:
            stream = io.BytesIO()
            next(shown).save(stream, "PNG", compress_level=1)
            url = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
            content.append({"type": "image_url", "image_url": {"url": url}})
        else:
            content.append({"type": "text", "text": part})
    return [{"role": "system", "content": rubric.system}, {"role": "user", "content": content}]


def _parts(rubric: Rubric, prompt: str) -> list[str | None]:
    """The user's turn: texts, and None where a picture stands."""
    # A prompt must not end its own turn or add pictures: Qwen's control tokens all begin with these two characters.
    text = rubric.user.replace("{prompt}", prompt.replace("<|", "< |"))
    if rubric.ask in SCALES:
        text += "\n\n" + (THOUGHT_FIRST if rubric.thought else ONE_TOKEN)[rubric.ask]
    if len(rubric.images) == 1:
        return [None, text]
    return ["Source: ", None, "\nResult: ", None, "\n" + text]


def _pictures(rubric: Rubric, images: Sequence[Tensor]) -> list[Image.Image]:
    if len(images) < len(rubric.images):
        raise RewardError(f"rubric {rubric.name!r} is about {' and '.join(rubric.images)}: {len(images)} given")
    return [_picture(image, rubric.side) for image in images[-len(rubric.images) :]]


def _picture(image: Tensor, side: int) -> Image.Image:
    picture = to_picture(image)
    return picture.resize((side, side), Image.Resampling.BICUBIC) if side else picture


# ----------------------------------------------------------------------------------------------------- the answer
def read(rubric: Rubric, reply: str, token_logprobs: Mapping[str, float] | None = None) -> float:
    """The score of a reply, in [0.2, 1]: a rating from 1 to 5, divided by 5.

    token_logprobs: {token text: log-prob} of the likeliest tokens where the score token stands (`score_token` finds
    it), for rubrics that ask for one; Q Eq. 12 then gives the expectation. Without them the word itself counts.

        ask          the rating
        expected     expectation over the digits 1 to 5                                   Q Eq. 12
        levels       the same over excellent .. bad = 5 .. 1                              DeQA, F §6.1
        overall      the tag OverallScore                                                 F Fig. 6
        final        the last number after `Final Score:`                                 UnifiedReward, F Table 4
        alignment    `capped_alignment` of the tags in the last <Verdict>                 Q §3.2
        editing      `capped_editing` of the tags in the last <Verdict>                   Q §3.3

    RewardError with the reply in it, on one line, where it is not what was asked for.
    """
    try:
        if rubric.ask == "overall":
            return judge_reward(reply)
        rating = _written(rubric.ask, reply) if rubric.ask not in SCALES else _spoken(rubric, reply, token_logprobs)
    except ValueError as fault:
        raise RewardError(f"{_one_line(str(fault).removesuffix(reply))} {_one_line(reply)!r}") from None
    return rating / HIGHEST_RATING


def score_token(rubric: Rubric, tokens: Sequence[str]) -> int | None:
    """Which of a reply's tokens is the score's: its index, or None where the reply is not what was asked for.

    It is where the first word of the reply begins, or with `thought` the first after the last `Score:`.
    """
    found, end = _score_word(rubric, "".join(tokens)), 0
    for index, token in enumerate(tokens):
        end += len(token)
        if found and found.start(1) < end:
            return index
    return None


def _score_word(rubric: Rubric, reply: str) -> re.Match | None:
    """The word that is the score, as group 1; None where there is none, or another word or number."""
    starts = [mark.end() for mark in re.finditer(r"\bscore:", reply, re.IGNORECASE)] if rubric.thought else [0]
    # Markup may stand around it. No part of a longer number is a score: not the 1 of 10, nor the 4 of 4.5.
    found = re.compile(r"[^\w-]*(\w+)(?!\.?\d)").match(reply, starts[-1]) if starts else None
    return found if found and found[1].lower() in SCALES[rubric.ask] else None


def _spoken(rubric: Rubric, reply: str, token_logprobs: Mapping[str, float] | None) -> float:
    scale, found = SCALES[rubric.ask], _score_word(rubric, reply)
    if found is None:
        where = "after `Score:`" if rubric.thought else "at the start"
        raise ValueError(f"none of {', '.join(scale)} {where} of the reply:")
    if token_logprobs is None:
        return float(scale[found[1].lower()])
    merged: dict[str, float] = {}  # "good", " good" and "Good" are three tokens that all say 4
    for token, logprob in token_logprobs.items():
        digit = str(scale.get(token.strip().lower(), token))
        merged[digit] = _logaddexp(merged.get(digit, -math.inf), logprob)
    return expected_score(merged)


def _logaddexp(a: float, b: float) -> float:
    if math.isnan(a) or math.isnan(b):  # max() may lose it, and then a broken answer would pass for a score
        return math.nan
    top = max(a, b)
    return top if math.isinf(top) else top + math.log(math.exp(a - top) + math.exp(b - top))


def _written(ask: str, reply: str) -> float:
    if ask == "final":
        found = re.findall(r"final score:[^\w-]*(\d+(?:\.\d+)?)", reply, re.IGNORECASE)
        return _rating("number after `Final Score:`", found[-1] if found else "")
    blocks = re.findall(r"<Verdict>(.*?)</Verdict>", reply, re.DOTALL)
    tags = re.findall(r"<(\w+)>\s*(.*?)\s*</\1>", blocks[-1], re.DOTALL) if blocks else []
    if ask == "alignment":
        said = dict(tags)
        if set(said) != {level.capitalize() for level in ALIGNMENT} or len(tags) != len(said):
            raise ValueError("no <Verdict> with each of the four levels once in the reply:")
        rated = {k.lower(): _rating(f"<{k}>", v) for k, v in said.items() if v.lower() != "none"}
        return capped_alignment(rated)
    demands = {name: [_yes(name, value) for key, value in tags if key == name] for name in ("Core", "Extra")}
    coherence = [value for key, value in tags if key == "Coherence"]
    if not demands["Core"] or len(coherence) != 1:
        raise ValueError("no <Verdict> with a <Core> and one <Coherence> in the reply:")
    return capped_editing(demands["Core"], demands["Extra"], _rating("<Coherence>", coherence[0]))


def _rating(what: str, text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?", text) or not LOWEST_RATING <= float(text) <= HIGHEST_RATING:
        raise ValueError(f"no {what} from {LOWEST_RATING} to {HIGHEST_RATING} in the reply:")
    return float(text)


def _yes(name: str, text: str) -> bool:
    if text.lower() not in ("yes", "no"):
        raise ValueError(f"a <{name}> that is neither yes nor no in the reply:")
    return text.lower() == "yes"


def _one_line(text: str) -> str:
    return " ".join(text.split())


# --------------------------------------------------------------------------------------------- what caps a score
def capped_alignment(scores: Mapping[str, float]) -> float:
    """Q §3.2: one rating from those of the levels of `ALIGNMENT`, each in [1, 5] -> [1, 5].

        min(mean of the levels, objects, attributes + 1, relations + 2, actions + 3)

    Levels that the prompt says nothing about are left out. Raises ValueError where none is left, for an unknown level
    and for a rating off the scale.

    DEVIATION: Q says that images which fail the highest-priority criteria are capped at low scores, and neither what
    failing is, nor the cap, nor what lower levels do. Here every level caps the total at its own rating plus its rank,
    so that the first one is a hard limit, the last one nearly none, and no threshold makes the reward jump.
    """
    return _capped(scores, ALIGNMENT)


def capped_editing(core: Sequence[bool], extra: Sequence[bool], coherence: float) -> float:
    """Q §3.3: one rating from which demands were met, the core and the others, and the coherence -> [1, 5].

    A share of demands becomes a rating, 1 + 4 x share; then min(mean, core, extra + 1, coherence + 2), as in
    `capped_alignment`. `extra` may be empty: not all instructions have more than a core. Raises ValueError where
    `core` is empty or the coherence is not in [1, 5].

    DEVIATION: Q names the three things that are assessed and not how they become one score; the rule is the one of
    the alignment reward, because an edit that misses its core has failed, whatever else it kept.
    """
    if not core:
        raise ValueError("an edit without a core demand cannot be rated")
    scores = {"core": _share(core), "coherence": coherence}
    return _capped(scores | ({"extra": _share(extra)} if extra else {}), EDITING)


def _share(met: Sequence[bool]) -> float:
    return LOWEST_RATING + (HIGHEST_RATING - LOWEST_RATING) * statistics.fmean(met)


def _capped(scores: Mapping[str, float], priority: Sequence[str]) -> float:
    if not scores or not set(scores) <= set(priority):
        raise ValueError(f"ratings of {sorted(scores)}: need one at least, out of {', '.join(priority)}")
    if not all(LOWEST_RATING <= score <= HIGHEST_RATING for score in scores.values()):
        raise ValueError(f"ratings must lie from {LOWEST_RATING} to {HIGHEST_RATING}: {dict(scores)}")
    ceiling = min(scores[level] + rank for rank, level in enumerate(priority) if level in scores)
    return min(statistics.fmean(scores.values()), ceiling)


# ------------------------------------------------------------------------------------------- a model of one's own
def local(
    rubric: Rubric, model: str = "", device: torch.device | str = "cpu", dtype=torch.float32, batch: int = 8
) -> Scorer:
    """A Qwen-VL checkpoint as a judge, through transformers, greedy. Scores in [0.2, 1]. Q §3; F App. A.

    model: a folder or Hub id of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL, as published or fine-tuned; the rubric's own by
    default. Safetensors only, no remote code. `batch` pictures are asked about at a time. Raises RewardError, one
    line, for a checkpoint that cannot be asked, among them DeQA's own and UnifiedReward-7b's (UnifiedReward-qwen-7b,
    from the same authors, is a Qwen2.5-VL and can); ModelError where there is none.
    """
    where = model or rubric.model
    tokenizer, processor, vlm = _load(where, device, dtype)
    candidates = _candidates(tokenizer, rubric, where)

    def score(images: Tensor, prompts: Sequence, sources: Sequence[Tensor] | None = None) -> Tensor:
        scores = []
        for start in range(0, len(prompts), batch):
            rows = range(start, min(start + batch, len(prompts)))
            shown = [[*([] if sources is None else [sources[b]]), images[b]] for b in rows]
            questions = [_question(rubric, prompts[b], pictures) for b, pictures in zip(rows, shown, strict=True)]
            replies = _ask(tokenizer, processor, vlm, questions, candidates, rubric.max_tokens)
            for b, (tokens, reply) in zip(rows, replies, strict=True):
                scores.append(_score(rubric, prompts[b], tokens, reply))
        return torch.tensor(scores, dtype=torch.float32)

    return Scorer(rubric.name, score, LOWEST_RATING / HIGHEST_RATING, 1.0)


def _question(rubric: Rubric, prompt, images: Sequence[Tensor]) -> tuple[str, list[Image.Image]]:
    """The chat as the text that all Qwen-VL models are trained on, an image's place being one <|image_pad|>."""
    try:
        pictures = _pictures(rubric, images)
    except RewardError as fault:
        raise RewardError(f"scorer {rubric.name!r}: {fault}, for the prompt {prompt.text!r}") from None
    place = "<|vision_start|><|image_pad|><|vision_end|>"
    user = "".join(place if part is None else part for part in _parts(rubric, prompt.text))
    turns = f"<|im_start|>system\n{rubric.system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"
    return f"{turns}<|im_start|>assistant\n", pictures


def _score(rubric: Rubric, prompt, tokens: Sequence[tuple[str, Mapping[str, float]]], reply: str) -> float:
    index = score_token(rubric, [text for text, _ in tokens]) if rubric.ask in SCALES else None
    try:
        return read(rubric, reply, None if index is None else tokens[index][1])
    except RewardError as fault:
        raise RewardError(f"scorer {rubric.name!r}: {fault}, for the prompt {prompt.text!r}") from None


@cache
def _load(where: str, device: torch.device | str, dtype: torch.dtype):
    """(tokenizer, image processor, model); of a wrong checkpoint nothing but its config.json is fetched.

    Scorers that ask one checkpoint by several rubrics share it.
    """
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig

    from models import (
        lora as adapters,  # here, because it brings PEFT along, which judges behind an endpoint do not need
    )

    kind = _kind(adapters.locate(where, ("config.json",)) / "config.json")
    if kind not in QWEN_VL:
        raise RewardError(
            f"{where}: a {kind} model, which cannot be asked here without its authors' own code; serve it (vLLM, "
            "SGLang or a reward server) and ask through remote.py, or give a Qwen2-VL, Qwen2.5-VL or Qwen3-VL"
        )
    folder = adapters.locate(where, JUDGE_FILES)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        # The image half of the processor alone: its video half wants torchvision, which nothing here needs.
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
        vlm, found = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except Exception as fault:  # broken files raise what they like
        cause = _one_line(str(fault)) or type(fault).__name__
        raise RewardError(f"{where}: no whole Qwen-VL checkpoint in safetensors ({cause}); fetch it again") from None
    if found["missing_keys"]:  # they would be random, and so would the scores
        lacking = ", ".join(sorted(found["missing_keys"]))[:200]
        raise RewardError(f"{where}: has no weights for {lacking}; fetch it again")
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    # Qwen publishes sampling settings and a repetition penalty beside its weights; a judge is asked for the likeliest.
    vlm.generation_config = GenerationConfig(do_sample=False, eos_token_id=ends, pad_token_id=ends[-1])
    return tokenizer, processor, vlm.to(device).eval()


def _kind(file: Path) -> object:
    try:
        return json.loads(file.read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise RewardError(f"{file}: missing, or no model's configuration; give a checkpoint's folder") from None


def _candidates(tokenizer, rubric: Rubric, where: str) -> dict[int, str]:
    """{token id: text} of all tokens that say one of the scale's words, with or without a blank or a capital."""
    found = {}
    for word in SCALES.get(rubric.ask, ()):
        spelled = {v: tokenizer.encode(v, add_special_tokens=False) for v in (word, f" {word}", word.title())}
        own = {ids[0]: text for text, ids in spelled.items() if len(ids) == 1}
        if not own:
            raise RewardError(f"{where}: its tokenizer has no single token for {word!r}, which {rubric.name!r} needs")
        found |= own
    return found


@torch.no_grad()
def _ask(tokenizer, processor, vlm, questions, candidates: Mapping[int, str], max_tokens: int):
    """Greedy replies to (text, pictures) questions: of each its tokens [(text, {candidate: log-prob})] and its text.

    The tokens are left out where there are no candidates, since nobody looks at them then.
    """
    from transformers import LogitsProcessorList

    seen: list[Tensor] = []  # a step's log-probs of the candidates, (B, candidates): those of all tokens are too many

    def watch(_ids: Tensor, logits: Tensor) -> Tensor:
        seen.append(logits.float().log_softmax(-1)[:, list(candidates)].cpu())
        return logits

    inputs = {name: value.to(vlm.device) for name, value in _inputs(tokenizer, processor, questions).items()}
    watchers = LogitsProcessorList([watch] if candidates else [])
    replies = vlm.generate(**inputs, max_new_tokens=max_tokens, logits_processor=watchers)
    answers = []
    for b, ids in enumerate(replies[:, inputs["input_ids"].shape[1] :].tolist()):
        length = next((i for i, token in enumerate(ids) if token in vlm.generation_config.eos_token_id), len(ids))
        texts = [tokenizer.decode([token]) for token in ids[:length]]
        steps = [dict(zip(candidates.values(), step[b].tolist(), strict=True)) for step in seen[:length]]
        answers.append((list(zip(texts, steps, strict=False)), tokenizer.decode(ids[:length])))
    return answers


def _inputs(tokenizer, processor, questions: Sequence[tuple[str, list[Image.Image]]]) -> dict[str, Tensor]:
    """What the model takes: what transformers' own processor makes of text and images, without its video half."""
    pictures = processor([p for _, shown in questions for p in shown], return_tensors="pt")
    # An image is as many <|image_pad|> as the vision tower makes tokens of it: one for merge_size^2 patches.
    counts = iter((pictures["image_grid_thw"].prod(-1) // processor.merge_size**2).tolist())
    pad = "<|image_pad|>"
    texts = [re.sub(re.escape(pad), lambda _: pad * next(counts), text) for text, _ in questions]
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    longest = max(map(len, rows))
    # Padded on the left: every row's reply begins right after its question.
    ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    # Without the token types, Qwen2.5-VL silently gives images the positions of text.
    types = (ids == tokenizer.convert_tokens_to_ids(pad)).int()
    return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": types, **pictures}
