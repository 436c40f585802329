"""What a judge may reply, in every shape that users met, and the one score or none that each is."""

import math
import re
from contextlib import nullcontext, suppress

import pytest

from rewards import LEVELS, RewardError, pillar_score
from scorers import remote
from scorers import rubrics as J
from tests.helpers.checks import refusal

NO = None  # no score: an error with the reply in it


def form(objects=5, attributes=5, relations=5, actions=5):
    tags = {"Objects": objects, "Attributes": attributes, "Relations": relations, "Actions": actions}
    return "<Verdict>" + "".join(f"<{tag}> {value} </{tag}>\n" for tag, value in tags.items()) + "</Verdict>"


def three(overall, before="<Thought>a\nb</Thought>", quality=2):
    return (f"{before}<QualityScore>{quality}</QualityScore><InstructionScore>5</InstructionScore>\n"
            f"<OverallScore>{overall}</OverallScore>")  # fmt: skip


DEMANDS = "<Verdict><Core>yes</Core><Core>No</Core><Extra>yes</Extra><Coherence>4</Coherence></Verdict>"
REPLIES = {  # rubric: {reply: rating from 1 to 5}
    "alignment": {
        "4": 4, " 4": 4, "**4**": 4, "4.": 4, "4/5": 4, "4 out of 5": 4, "Score = 4": 4, "$\\boxed{4}$": 4,
        "My final score is **4**": 4, "Final score: 4 (Score: 1 is worst, 5 is best)": 4, "4\n\nAll 3 are there.": 4,
        "<think>1? 2? The score is 3</think>\n\n4": 4, "a thought that was begun in the prompt: 2</think>4": 4,
        "<thinking>a</thinking><thinking>b</thinking>Score: 4": 4,
        **dict.fromkeys((
            "", " ", "!", "four", "good", "0", "6", "10", "45", "4.5", ".5", "4,5", "-4", "4/10", "40%", "4th",
            "3-4", "3 or 4", "1 (worst) to 5 (best): 4", "1 is worst, 5 is best: 4", "3, no, 4", "I give it a 4",
            "The 4 dogs", "Score: high", "Score:", "<think>4", "<think>Score: 4", "<think>a</think>", "4</think>",
            "<think>a</think><think>4",
        ), NO),
    },
    "deqa": {
        **LEVELS, **{f" {word.title()}.": level for word, level in LEVELS.items()}, "<think>bad</think>good": 4,
        **dict.fromkeys(("goodness", "quite good", "4", "<think>good"), NO),
    },
    "judge": {
        three(4.5): 4.5, three("4/5"): 4, three(" 3\n"): 3, three("**2**"): 2, three(4, ""): 4,
        three(4, "<Thought><OverallScore>1</OverallScore>? No.</Thought>"): 4, three(2, three(5)): 2,
        **dict.fromkeys((
            *map(three, ("X", 0.9, 5.1, -3, "", "4/10", "1 to 5")), three(4, quality="X"), three(4)[:-1],
            three(4).replace("Overall", "Total"), three(4, "<Thought>"), f"<Thought>as {three(5, '')}", "all\nfine", "",
        ), NO),
    },
    "unifiedreward": {
        "cat (object): 1\nFinal Score: 4": 4, "Final Score:** 3.5": 3.5, "**Final Score:**\n4": 4,
        "final score = 2/5": 2,
        "Final Score: 2? Rather\nFinal Score: 5": 5, "Final score: 4 (Score: 1 is worst, 5 is best)": 4,
        "<think>Final Score: 1</think>Final Score: 3": 3, "Final Score: \\boxed{4}": 4,
        **dict.fromkeys((
            "Final Score: 10", "Final Score: 0", "Final Score: 5.5", "Score: 4", "Final Score: good", "Final Score:",
            "<think>Final Score: 3", "Final Score: 1 to 5: 4", "Final Score: 3\nFinal Score:",
        ), NO),
    },
    "alignment_checklist": {  # the objects are the cap, then attributes + 1 ...
        form(2): 2, form(5, 4, 3, "none"): 4, form(5, 1, "none", "None"): 2, form(1) + form(): 5, form("4/5", 4, 4,
        4): 4,
        **dict.fromkeys((
            form(6), form(""), form(0.5), form("none", "none", "none", "none"), "all fine", form().replace("Actions",
            "Deeds"),
            form().replace("Attributes", "Objects"), form()[:-10], f"<think>{form()}", form() + "<Verdict><Objects>1",
        ), NO),
    },
    "editing_checklist": {  # half of the core: at most 3
        DEMANDS: 3, DEMANDS.replace("<Extra>yes</Extra>", ""): 3,
        "<Core>no</Core>" + DEMANDS.replace("No", "yes"): 14 / 3,
        **dict.fromkeys((
            DEMANDS.replace("No", "maybe"), DEMANDS.replace("4", "7"), DEMANDS.replace("Coherence>", "Sense>"),
            DEMANDS.replace("Core>", "Other>"), DEMANDS.replace("Verdict>", "Result>"), DEMANDS[:-30],
        ), NO),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", REPLIES)
def test_every_shape_of_a_reply_is_its_rating_or_an_error_with_the_reply_in_it(name):
    found = {}
    for reply in REPLIES[name]:
        try:
            found[reply] = 5 * J.read(J.RUBRICS[name], reply)
        except RewardError as fault:
            assert repr(" ".join(reply.split())) in str(fault) and "\n" not in str(fault)
            found[reply] = NO
    wrong = {reply: (found[reply], rating) for reply, rating in REPLIES[name].items()
             if found[reply] != (rating if rating is NO else pytest.approx(rating))}  # fmt: skip
    assert not wrong, "reply: (read, right)"


@pytest.mark.parametrize("name", ["judge", "unifiedreward", "alignment_checklist", "editing_checklist"])
def test_a_written_reply_that_breaks_off_is_never_another_score(name):
    """At every length: no score, or the whole reply's. A number that is cut itself is told by how the reply ended."""
    whole = {"judge": three(4.5), "unifiedreward": "Final Score: 4", "alignment_checklist": form(2, 3, 4, 5),
             "editing_checklist": DEMANDS}[name]  # fmt: skip
    score = J.read(J.RUBRICS[name], whole)
    for end in range(len(whole)):
        with suppress(RewardError):
            assert J.read(J.RUBRICS[name], whole[:end]) == score


# --------------------------------------------------------------------------------------- the score token, Q Eq. 12
def tokens(*texts, **likely):
    """A reply's tokens in the API's form; likely: the log-probs at the place of a text, else one that says 1."""
    rows = [likely.get(f"at_{i}", (("1", -0.1),)) for i in range(len(texts))]
    tops = [[{"token": text, "logprob": logprob} for text, logprob in row] for row in rows]
    return [{"token": text, "top_logprobs": top} for text, top in zip(texts, tops, strict=True)]


HALF = (("4", math.log(0.5)), (" 5", math.log(0.25)), ("5", math.log(0.25)))  # expectation 4.5; two tokens say five
PLACES = {
    "alone": tokens("4", at_0=HALF),
    "a blank before": tokens(" ", "4", "<|im_end|>", at_1=HALF),
    "after a thought": tokens("<think>", " 2", "?", "</think>", "\n\n", "4", at_5=HALF),
    "whose beginning is in the prompt": tokens("3", " dogs", "</think>", "4", at_3=HALF),
    "words before": tokens("Score", ":", " 4", "/", "5", at_2=HALF),
    "one text twice": tokens("4", at_0=(("4", math.log(0.25)), ("4", math.log(0.25)), ("5", math.log(0.5)))),
}


@pytest.mark.parametrize("name", PLACES)
def test_the_expectation_is_taken_at_the_score_token(name):
    reply = "".join(token["token"] for token in PLACES[name]).removesuffix("<|im_end|>")
    for content in (reply, [{"type": "thinking", "thinking": "1"}, {"type": "text", "text": reply}]):
        choice = {"message": {"content": content}, "logprobs": {"content": PLACES[name]}, "finish_reason": "length"}
        score = J.read(J.RUBRICS["alignment"], *remote.reply_of(J.RUBRICS["alignment"], choice))
        assert score == pytest.approx(4.5 / 5)


def choice(content="4", logprobs=None, ended="stop"):
    return {"message": {"content": content}, "logprobs": logprobs, "finish_reason": ended}


def certain(logprob, text="4"):
    return {"content": tokens("4", at_0=((text, logprob),))}


SHAPES = {  # (rubric, a choice, rating)
    "no log-probs": ("alignment", choice(), 4), "null": ("alignment", choice(logprobs={"content": None}), 4),
    "none at all": ("alignment", choice(logprobs={"content": []}), 4), "sure": ("alignment",
    choice(logprobs=certain(0.0)), 4),
    "positive": ("alignment", choice(logprobs=certain(0.5)), NO), "huge": ("alignment",
    choice(logprobs=certain(10**300)), NO),
    "nan": ("alignment", choice(logprobs=certain(math.nan)), NO), "other": ("alignment", choice(logprobs=certain(-1,
    "x")), NO),
    "minus infinity": ("alignment", choice(logprobs=certain(-math.inf)), NO),
    "still thinking": ("alignment", choice(None, ended="length"), NO), "refused": ("alignment", choice(None), NO),
    "a number": ("alignment", choice(4), NO), "filtered": ("alignment", choice(ended="content_filter"), NO),
    "no parts": ("alignment", choice([]), NO), "only a thought": ("alignment", choice([{"type": "thinking"}]), NO),
    "one token ends by its length": ("alignment", choice(ended="length"), 4),
    "a form": ("judge", choice(three(4)), 4), "a form that is cut": ("judge", choice(three(4), ended="length"), NO),
    "a number that is cut": ("unifiedreward", choice("Final Score: 3", ended="length"), NO),
    "no reason": ("judge", choice(three(4), ended=None), 4),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_missing_or_cut_off_is_no_score(name):
    rubric, shape, rating = SHAPES[name]
    read = lambda: J.read(J.RUBRICS[rubric], *remote.reply_of(J.RUBRICS[rubric], shape))  # noqa: E731
    if rating is NO:
        refusal(read, error=RewardError)
    else:
        assert 5 * read() == pytest.approx(rating)


# ------------------------------------------------------------------------------------- GenEval 2: one token an atom
def test_the_right_answers_probability_adds_up_its_spellings_and_no_other_answer():
    said = {"four": math.log(0.5), " Four": math.log(0.125), "4": math.log(0.25), "40": -3.0, "five": math.log(0.1)}
    assert J.answer_probability(said, "four") == pytest.approx(0.875)
    assert J.answer_probability({"Yes": math.log(0.75), "No": math.log(0.25)}, "yes") == pytest.approx(0.75)
    assert J.answer_probability({"No": 0.0}, "Yes") == 0


def test_soft_tifa_is_the_arithmetic_and_the_geometric_mean_of_the_atoms():
    assert J.soft_tifa([0.9, 0.4, 0.6]) == pytest.approx((1.9 / 3, 0.216 ** (1 / 3)))
    assert J.soft_tifa([1.0, 1.0, 0.0, 1.0]) == (0.75, 0.0), "one atom that is missing fails the prompt"
    for wrong in ([], [1.5], [math.nan, 0.5]):
        with pytest.raises(ValueError):
            J.soft_tifa(wrong)


# ------------------------------------------------------------------------------------------ Qwen-Image-Bench
marks = lambda **scores: {name: {"score": score, "why": "so"} for name, score in scores.items()}  # noqa: E731


@pytest.mark.parametrize("reply, score", [
    ({"Real": marks(light=2, limbs=1, law="N/A"), "Fine": marks(edges="0"), "Text": {}}, ((100 + 60) / 2 + 0) / 2),
    *((put, 40) for put in ({"Real": marks(light=2, edges=0), "Fine": marks(limbs=1)}, marks(light=2, edges=0, limbs=1),
                            {"Quality": {"Fine": marks(edges=0), "Real": marks(light=2, limbs=1)}})),
    ({"Fine": marks(edges=0), "Text": marks(glyphs=1)}, 30), ({"Fine": marks(edges=0)}, 0),
    ({"Real": marks(light="N/A"), "Text": marks(glyphs="n/a")}, None),
    *((wrong, RewardError) for wrong in ({}, {"Real": {}}, marks(light=3), marks(light=None), marks(sky=1))),
])  # fmt: skip
def test_a_pillar_is_the_mean_of_means_of_0_60_100_wherever_a_facet_was_put(reply, score):
    pillar = {"Real": ["light", "limbs", "law"], "Fine": ["texture", "edges"], "Text": ["glyphs"]}
    with pytest.raises(score, match=re.escape(str(reply))) if score is RewardError else nullcontext():
        assert pillar_score(reply, pillar) == score
