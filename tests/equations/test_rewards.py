"""Oracles for the scoring rules: hand-made detections and boxes, a recursive edit distance, F Table 2."""

import itertools
import math
import random
import re
import statistics
from functools import lru_cache

import numpy as np
import pytest

import rewards as R


def thing(name, score=0.95, box=(0, 0, 10, 10), color="red"):
    return {"class": name, "score": score, "box": box, "color": color}


# -------------------------------------------------------------------------------------------------------- OCR
@pytest.mark.parametrize(
    "prompt",
    [
        "no quotes",
        'one " only',
        'empty ""',
        'blank "  " here',
        'a sign " CAT "',
        'a "12" pizza" beside a "CAT"',
        'a 6"x9" and a 5\'10" man',
        "the dog's and the cats' beds",
        "rock 'n' roll 'til dawn",
        "open 「CAT",
        '"CAT" in the "sun',
        'a 12" pizza and a 14" laptop',
        "open “CAT",
        'unseen "\u200b"',
    ],
)
def test_a_prompt_without_a_quoted_target_is_an_error_with_the_prompt_in_it(prompt):
    for rule in (R.ocr_target, lambda prompt: R.ocr_reward("CAT", prompt)):
        with pytest.raises(ValueError, match=re.escape(repr(prompt))):
            rule(prompt)
    assert R.ocr_target('a sign "Open Now" beside "Closed"') == "Open Now"


MARKS = [
    'A 27" monitor that shows "CAT"', '6"x9" "CAT"', 'the "CAT" on a 27" screen', "a sign that says 'CAT'",
    "the dog's ‘CAT’ sign", 'a 5\'10" man\'s "CAT"', '‘no’ but "CAT"', 'a "CAT"-shaped sign, 1/2" thick',
    '写着"CAT"的招牌',
]  # fmt: skip


@pytest.mark.parametrize("prompt", MARKS)
def test_inches_feet_and_apostrophes_are_no_quotes(prompt):
    assert R.ocr_target(prompt) == "CAT"
    assert R.ocr_target(prompt.replace("CAT", "Route 66")) == "Route 66"


@pytest.mark.parametrize("quotes", ["“{}”", "„{}“", "”{}”", "＂{}＂", "「{}」", "『{}』", "«{}»", "« {} »", "»{}«"])
def test_every_kind_of_double_quotes_holds_the_target(quotes):
    assert R.ocr_target(f"a sign {quotes.format('it’s 营业中')}, beside “more” and 「more」") == "it’s 营业中"


SEEN_ALIKE = [("ＯＰＥＮ：２４", "open:24"), ("cafe\u0301", "Café"), ("ROCK'N'ROLL", "Rock’n’Roll"),
              ("a\u200bb\ufeff", "AB"), ("☀", "☀\ufe0f"),
              ("ﬁve\u00a0stars", "five stars"), ("ｶﾞｽ", "ガス"), ("STRASSE", "Straße"), ("10–20", "10-20")]  # fmt: skip


@pytest.mark.parametrize(("read", "target"), SEEN_ALIKE)
def test_text_is_compared_as_a_reader_sees_it_and_as_released_on_demand(read, target):
    prompt = f'a sign "{target}"'
    assert R.ocr_reward(read, prompt) == R.ocr_reward(read, "a sign", target) == 1
    assert R.ocr_reward(read, prompt, released=True) < 1 == R.ocr_reward(f" {target} ", prompt, released=True)
    assert R.ocr_reward("x" * 40, prompt) == 0, "nothing in common"


@lru_cache(None)
def recursive_distance(a, b):
    """The definition, top down: an independent route to the same number."""
    if not a or not b:
        return len(a + b)
    if a[0] == b[0]:
        return recursive_distance(a[1:], b[1:])
    return 1 + min(recursive_distance(a[1:], b), recursive_distance(a, b[1:]), recursive_distance(a[1:], b[1:]))


def test_levenshtein_equals_its_recursive_definition_on_random_words():
    rng = random.Random(0)
    for _ in range(400):
        a, b = ("".join(rng.choices("abc", k=rng.randrange(7))) for _ in range(2))
        assert R.levenshtein(a, b) == recursive_distance(a, b) == R.levenshtein(b, a), (a, b)


@pytest.mark.parametrize(
    ("read", "target", "reward"),
    [
        ("OPEN NOW", "Open Now", 1),
        ("open n0w", "Open Now", 1 - 1 / 7),  # one substitution
        ("openw", "Open Now", 1 - 2 / 7),  # two deletions
        ("xopennxow", "Open Now", 1 - 2 / 7),  # two insertions
        ("", "Open Now", 0),  # distance 7 of 7
        ("h e\nL\tlO", "He llo", 1),
        # Levenshtein alone: 19 letters read, 16 of them to delete, capped at 3 -> reward 0.
        ("welcome to the CAT cafe", "cat", 1),
        # Nothing in common and far longer: the distance is 12, capped at 3. Without the cap: 1 - 12/3 = -3.
        ("zzzzzzzzzzzz", "cat", 0),
    ],
)
def test_ocr_reward_by_hand(read, target, reward):
    assert R.ocr_reward(read, f'a sign that says "{target}"') == pytest.approx(reward)


# ------------------------------------------------------------------------------------------------- detections
def test_filter_keeps_confidence_above_03_and_above_09_for_counting():
    found = [thing("dog", s) for s in (0.3, 0.31, 0.9, 0.91, 0.1)]
    for metadata, scores in (({"tag": "colors"}, [0.91, 0.9, 0.31]), ({}, [0.91, 0.9, 0.31]), (TWO_DOGS, [0.91])):
        assert [d["score"] for d in R.filter_detections(found, metadata)] == scores


def test_filter_keeps_the_best_16_of_each_class_and_each_class_has_its_own_16():
    scores = [0.5 + i / 100 for i in range(20)]
    found = [thing(name, s) for s in scores for name in ("dog", "cat")] + [thing("cow", 0.4)]
    kept = R.filter_detections(found, {"tag": "two_object"})
    for name, expected in (("dog", scores[:3:-1]), ("cat", scores[:3:-1]), ("cow", [0.4])):  # best first
        assert [d["score"] for d in kept if d["class"] == name] == expected
    assert len(found) == 41, "the caller's list is left alone"


# --------------------------------------------------------------------------------------------------- geometry
POSITIONS = [  # o, and o' = o less the margins
    # Centres (2, 3) and (20, 4): o = (-18, -1), margins 0.1 (4+6, 6+4) = (1, 1): o' = (-17, 0)
    ((0, 0, 4, 6), (17, 2, 23, 6), {"left of"}),
    # Centres (3, 2) and (4, 20): the same, transposed; y points down, so smaller y is above.
    ((0, 0, 6, 4), (2, 17, 6, 23), {"above"}),
    # o = (-20, -20), margins (2, 2): o' = (-18, -18), |o| = 28.3, cosine 0.64 on both axes.
    ((0, 0, 10, 10), (20, 20, 30, 30), {"left of", "above"}),
    ((20, 0, 30, 10), (0, 20, 10, 30), {"right of", "above"}),
    # o = (-1, 0) inside the margins (2, 2): o' = 0, and no relation, on unit scale too.
    ((0, 0, 10, 10), (1, 0, 11, 10), set()),
    ((0, 0, 1, 1), (0.15, 0, 1.15, 1), set()),
    ((0, 0, 10, 10), (2, 2, 8, 8), set()),  # equal centres: |o| = 0
    ((0, 0, 0, 0), (3, 4, 3, 4), {"left of", "above"}),  # o = (-3, -4), |o| = 5, no size: cosines 0.6 and 0.8
    ((0, 0, 0, 0), (0.28, 0.96, 0.28, 0.96), {"above"}),  # o = (-0.28, -0.96): 0.28 is not beyond 0.5
    # Widths 5 + 5 cost 1 of o_x = -2: o'_x = -1 with |o| = 2: 0.5 is not beyond 0.5. One hair more is.
    ((0, 0, 5, 0), (2, 0, 7, 0), set()),
    ((0, 0, 5, 0), (2.01, 0, 7.01, 0), {"left of"}),
    # o = (-10, -10), sizes 20 + 20 wide and 0 high: o' = (-6, -10), |o| = 14.1: cosines 0.42 and 0.71.
    # Planted bug: dividing by |o'| = 11.7 would give 0.51 and add "left of".
    ((0, 0, 20, 0), (10, 10, 30, 10), {"above"}),
]


@pytest.mark.parametrize(("a", "b", "expected"), POSITIONS)
def test_relative_position_by_hand(a, b, expected):
    assert R.relative_position(a, b) == expected


def test_relative_position_mirrors_when_the_boxes_swap():
    rng, seen = random.Random(1), set()
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for _ in range(300):
        corners = [(rng.uniform(-3, 3), rng.uniform(-3, 3)) for _ in range(2)]
        a, b = ((x, y, x + rng.random(), y + rng.random()) for x, y in corners)
        ab = R.relative_position(a, b)
        assert {opposite[r] for r in ab} == R.relative_position(b, a)
        seen |= ab
    assert seen == set(R.RELATIONS)


# --------------------------------------------------------------------------------------------------- verdicts
def meta(*include, exclude=None, tag="t"):
    return {"tag": tag, "include": list(include)} | ({"exclude": exclude} if exclude else {})


def need(name, count=1, **extra):
    return {"class": name, "count": count, **extra}


def dogs(*colors, scores=(0.95,) * 9):
    return [thing("dog", score, color=color) for color, score in zip(colors, scores)]


TWO_DOGS = meta(need("dog", 2), exclude=[need("dog", 3)], tag="counting")
OTHERS = meta(need("dog"), exclude=[need("cow", 2), need("cat", 1)])
BOTH, RED = meta(need("dog"), need("cat")), meta(need("dog", 2, color="red"))
DOG, CAT, COW, LAPTOP = map(thing, ("dog", "cat", "cow", "laptop"))
LEFT, RIGHT, MIDDLE = (0, 0, 10, 10), (60, 0, 70, 10), (30, 0, 40, 10)
BESIDE = meta(need("laptop"), need("cow", position=["right of", 0]))
THIRD = meta(need("laptop"), need("cow", position=["right of", 2]), need("cat"))
FIRST = meta(need("laptop"), need("cow", position=["right of", 0]), need("cat"))
PAIRS = meta(need("laptop", 2), need("cow", 2, position=["right of", 0]))
ALL = meta(need("laptop"), need("cow", 2, color="red", position=["right of", 0]))
COW_RIGHT, LAPTOP_LEFT = thing("cow", 0.9, RIGHT), thing("laptop", 0.9, LEFT)
COWS = [COW_RIGHT, thing("cow", 0.8, (60, 1, 70, 11))]
LAPTOPS = [LAPTOP_LEFT, thing("laptop", 0.8, MIDDLE)]
ROW = [thing("cow", box=MIDDLE), thing("laptop", box=RIGHT), thing("cat", box=LEFT)]
CHECKLISTS = [  # detections, metadata, the verdict, the training reward: the mean over the checklist's parts
    # count 2: found 0, 1, 2, 3, 4, 5 -> 1 - |2 - n| / 2 = 0, 1/2, 1, 1/2, 0, then -1/2, floored.
    *(([DOG] * n, TWO_DOGS, n == 2, reward) for n, reward in enumerate((0, 0.5, 1, 0.5, 0, 0))),
    ([DOG] * 3, meta(need("dog", 2)), True, 0.5),  # without the exclude "at least" is enough
    ([DOG, DOG, CAT], TWO_DOGS, True, 1),  # other classes never matter
    ([DOG, COW], OTHERS, True, 1), ([DOG, CAT], OTHERS, False, 1), ([DOG, COW, COW], OTHERS, False, 1),
    ([CAT, DOG], BOTH, True, 1), ([DOG], BOTH, False, 1 / 2), ([CAT], BOTH, False, 1 / 2),
    # The verdict asks the colour of the best scored objects only; the reward is the share, if the count is exact.
    (dogs("blue", "red", "red", scores=(0.6, 0.8, 0.9)), RED, True, (1 / 2 + 0) / 2),
    (dogs("red", "red", "blue", scores=(0.6, 0.8, 0.7)), RED, False, (1 / 2 + 0) / 2),
    (dogs("red", "blue"), RED, False, (1 + 1 / 2) / 2),
    (dogs("red", "blue", "red", "red"), meta(need("dog", 4, color="red")), False, (1 + 3 / 4) / 2),
    (dogs("red", "blue", "red"), meta(need("dog", 4, color="red")), False, (3 / 4 + 0) / 2),
    ([], RED, False, 0),
    # A position is 1 or 0, and needs both counts. The released code's 0.5 for a wrong relation would give 5/6.
    ([COW_RIGHT, LAPTOP_LEFT], BESIDE, True, 1),
    ([thing("cow", box=LEFT), thing("laptop", box=RIGHT)], BESIDE, False, 2 / 3),
    ([COW_RIGHT], BESIDE, False, 1 / 3), ([LAPTOP_LEFT], BESIDE, False, 1 / 3),  # no vacuous truth
    ([COW_RIGHT, COW_RIGHT, LAPTOP_LEFT], BESIDE, True, 1 / 3),  # parts 0, 1, 0
    ([COW_RIGHT, LAPTOP_LEFT, LAPTOP_LEFT], BESIDE, True, 1 / 3),  # the reference is ambiguous
    (ROW, THIRD, True, 1), (ROW, FIRST, False, 3 / 4),  # the index counts includes: 2 is the cat, 0 the laptop
    # Every pair of the best objects must hold the relation; one that stands between the laptops does not.
    ([*LAPTOPS, *COWS], PAIRS, True, 1),
    ([*LAPTOPS, COW_RIGHT, thing("cow", 0.8, (15, 0, 25, 10))], PAIRS, False, 2 / 3),
    # A third, worse scored cow or laptop in the wrong place is not among the best two.
    ([thing("cow", 0.5, LEFT), thing("laptop", 0.5, (90, 0, 99, 10)), *LAPTOPS, *COWS], PAIRS, True, 1 / 3),
    # The number of parts does not depend on the image.
    ([COW_RIGHT, COW_RIGHT, LAPTOP_LEFT], ALL, True, 1),
    ([COW_RIGHT, LAPTOP_LEFT], ALL, False, (1 + 1 / 2 + 0 + 0) / 4),
]  # fmt: skip


@pytest.mark.parametrize(("found", "metadata", "verdict", "reward"), CHECKLISTS)
def test_verdict_and_training_reward_by_hand(found, metadata, verdict, reward):
    assert R.geneval_verdict(found, metadata) is verdict
    assert R.geneval_reward(found, metadata) == pytest.approx(reward)


@pytest.mark.parametrize("rule", [R.geneval_verdict, R.geneval_reward])
def test_rules_without_a_checklist_are_an_error_not_true(rule):
    for metadata in ({}, {"include": []}, {"tag": "colors"}):
        with pytest.raises(ValueError, match="include"):
            rule([DOG], metadata)


def test_reward_is_one_exactly_where_an_exact_verdict_is_true_on_random_scenes():
    rng = random.Random(2)
    include = [need("dog", 1), need("cat", 1, color="red", position=["left of", 0])]
    metadata = meta(*include, exclude=[need("dog", 2), need("cat", 2)])
    agree = {True: 0, False: 0}
    for _ in range(1500):
        choices = (("dog", "cat"), (LEFT, MIDDLE, RIGHT), ("red", "blue"))
        drawn = [[rng.choice(some) for some in choices] for _ in range(rng.randrange(1, 4))]
        found = [thing(name, rng.random(), box, color) for name, box, color in drawn]
        reward, verdict = R.geneval_reward(found, metadata), R.geneval_verdict(found, metadata)
        assert 0 <= reward <= 1 and (reward == 1) == verdict
        agree[verdict] += 1
    assert min(agree.values()) > 20


# ------------------------------------------------------------------------------------------------------ score
def test_geneval_score_weighs_tags_not_images():
    verdicts, tags = [True, False, False, False, True], ["colors", "colors", "colors", "colors", "position"]
    assert R.per_tag_accuracy(verdicts, tags) == {"colors": 0.25, "position": 1.0}
    assert R.geneval_score(verdicts, tags) == 0.625  # (1/4 + 1) / 2; the mean over images would be 2/5
    assert list(R.per_tag_accuracy(np.array([1, 0, 1]) > 0, ["b", "a", "b"]).items()) == [("b", 1.0), ("a", 0.0)]
    for verdicts, tags in (([], []), ([True], []), ([True], ["a", "b"]), ([], ["a"])):
        with pytest.raises(ValueError):
            R.geneval_score(verdicts, tags)


# ------------------------------------------------------------------------------------------------- VLM judges
def test_expected_score_by_hand():
    # p(4) = 3/4, p(5) = 1/4 after normalising over the score tokens: 4.25. " 4" and "4" add up.
    logprobs = {"4": math.log(0.2), " 4": math.log(0.1), "5\n": math.log(0.1), "Good": math.log(0.6)}
    assert R.expected_score(logprobs) == pytest.approx(4.25)
    assert R.expected_score({str(s): -1000.0 for s in range(1, 6)}) == pytest.approx(3), "however small they are"
    assert R.expected_score({"1": -1000.0, "2": -1000.0 - math.log(3)}) == pytest.approx(1.25)
    for score in range(1, 6):
        assert R.expected_score({str(score): -0.7}) == score
        assert R.expected_score({str(score): 0.0} | {str(s): -math.inf for s in range(1, 6) if s != score}) == score


def test_levels_are_five_to_one_and_several_tokens_that_say_one_word_add_up():
    half = {"excellent": 0.5, "good": 0.1, " good": 0.1, "Good": 0.1, "bad": 0.2}
    logprobs = {token: math.log(p) for token, p in half.items()}
    assert R.expected_score(logprobs, R.LEVELS) == pytest.approx(0.5 * 5 + 0.3 * 4 + 0.2 * 1)


NO_SCORES = [{}, {"0": 0.0, "6": 0.0}, {"45": 0.0, "five": 0.0, "": 0.0}, {"3": math.nan}, {"3": math.inf},
             {"3": -math.inf}, {"3": -1.0, "4": math.nan}, {"3": 0.1}]  # fmt: skip


@pytest.mark.parametrize("logprobs", NO_SCORES)
def test_no_score_token_or_no_number_is_an_error_and_not_a_score(logprobs):
    with pytest.raises(R.RewardError):
        R.expected_score(logprobs)


def reply(quality="3", instruction="4", overall="5"):
    return (
        f"<Thought> sharp, all there </Thought>\n<QualityScore>{quality}</QualityScore>\n"
        f"<InstructionScore> {instruction}\n</InstructionScore>\n<OverallScore>{overall}</OverallScore>"
    )


def test_parse_judge_reads_the_three_tags_of_figure_6():
    assert R.parse_judge(reply()) == {"quality": 3.0, "instruction": 4.0, "overall": 5.0}
    assert R.parse_judge(reply("1", "4.5", "2.25")) == {"quality": 1.0, "instruction": 4.5, "overall": 2.25}
    text = "<Thought> <OverallScore>1</OverallScore>? No. </Thought>" + reply(overall="4")
    assert R.parse_judge(text)["overall"] == 4, "the score after the thought"


UNREADABLE = [reply(quality="X"), reply(quality="0.9"), "I cannot judge images.", reply(instruction="5.1"),
              *(reply(overall=bad) for bad in ("-3", "4/10", "")), reply().replace("Overall", "Total")]  # fmt: skip


@pytest.mark.parametrize("text", UNREADABLE)
def test_an_unreadable_reply_is_an_error_with_the_reply_in_it(text):
    with pytest.raises(R.RewardError, match=re.escape(text)):
        R.parse_judge(text)


# --------------------------------------------------------------------------------------------- what caps a score
def rated(*scores):
    return dict(zip(R.ALIGNMENT, scores, strict=True))


def is_capped_rule(rule):
    """Whether a rule of four ratings has all the properties, checked on every combination of whole ratings."""
    grid = {r: rule(rated(*r)) for r in itertools.product(range(1, 6), repeat=4)}
    return all(
        1 <= total <= 5
        and all(total <= score + rank for rank, score in enumerate(ratings))
        # No rating is worth less for being better, and a failure weighs no more further down the hierarchy.
        and all(grid[tuple(np.minimum(np.add(ratings, step), 5))] >= total for step in np.eye(4, dtype=int))
        and all(
            grid[(*ratings[:i], ratings[i + 1], ratings[i], *ratings[i + 2 :])] >= total
            for i in range(3)
            if ratings[i] < ratings[i + 1]
        )
        for ratings, total in grid.items()
    )


def test_a_failed_level_caps_the_total_and_higher_levels_cap_it_lower():
    assert R.capped_alignment(rated(5, 5, 5, 5)) == 5 and R.capped_alignment(rated(1, 1, 1, 1)) == 1
    assert [R.capped_alignment(rated(*row)) for row in ((1, 5, 5, 5), (5, 1, 5, 5), (5, 5, 1, 5))] == [1, 2, 3]
    assert R.capped_alignment(rated(5, 5, 5, 1)) == 4, "both the mean and the cap"
    assert R.capped_alignment(rated(4, 3, 5, 5)) == 4 and R.capped_alignment(rated(5, 3, 4, 3)) == 3.75
    assert R.capped_alignment({"objects": 4, "actions": 2}) == 3, "levels that the prompt does not have do not count"
    assert is_capped_rule(R.capped_alignment)


def test_the_properties_of_a_capped_score_refuse_rules_that_are_not():
    def mean(s):
        return statistics.fmean(s.values())

    def upside_down(s):
        return min(mean(s), *(s[level] + 3 - rank for rank, level in enumerate(R.ALIGNMENT)), s["objects"])

    assert not is_capped_rule(mean), "no cap"
    assert not is_capped_rule(lambda s: min(mean(s), 6 - max(s.values()))), "worse for better"
    assert not is_capped_rule(upside_down)


def test_an_edit_that_misses_its_core_has_failed_whatever_else_is_right():
    assert R.capped_editing([True], [], 5) == 5 and R.capped_editing([False], [True, True], 5) == 1
    assert R.capped_editing([True, False], [True], 5) == 3, "half the core: at most 1 + 4 / 2"
    assert R.capped_editing([True], [False, False], 5) == 2 and R.capped_editing([True], [True], 1) == 3
    assert R.capped_editing([True], [True, True, False], 4) == pytest.approx((5 + 1 + 8 / 3 + 4) / 3)


def test_ratings_that_are_none_are_refused():
    for bad in ({}, {"objects": 0}, {"objects": 5.5}, {"objects": math.nan}, {"beauty": 3}):
        with pytest.raises(ValueError):
            R.capped_alignment(bad)
    for bad in (([], [True], 3), ([True], [], 0), ([True], [], 6)):
        with pytest.raises(ValueError):
            R.capped_editing(*bad)


# ------------------------------------------------------------------------------------------------ the same person?
def face(*embedding, box=(0, 0, 10, 10)):
    return R.Face(box, np.array(embedding, dtype=np.float64))


def test_the_score_is_the_cosine_stretched_from_strangers_to_one():
    assert R.similarity([3, 4], [4, 3]) == pytest.approx(24 / 25)
    assert R.similarity([3, 4], [8, 6]) == pytest.approx(24 / 25), "lengths do not count"
    assert R.similarity([3, 4], [4, 3], stranger=0.9) == pytest.approx(0.6)
    assert R.similarity([1, 0], [-1, 0]) == 0 and R.similarity([1, 0], [-1, 0], stranger=-1.0) == 0
    assert R.similarity([1, 0], [0, 1], stranger=-1.0) == 0.5 and R.similarity([1, 0], [0, 1], stranger=0.5) == 0
    assert all(R.similarity(x, x, 0.8) <= 1 for x in np.random.default_rng(0).normal(size=(99, 7))), "rounding is cut"
    for a, b in (([0, 0], [1, 0]), ([1, 0], [1, 0, 0]), ([math.nan, 1], [1, 1]), ([[1.0]], [[1.0]])):
        with pytest.raises(ValueError):
            R.similarity(a, b)


def test_the_largest_face_of_the_source_is_kept_if_any_face_of_the_result_is_like_it():
    subject, passer_by = face(1, 0, box=(5, 5, 25, 30)), face(0, 1, box=(0, 0, 22, 22))
    for source in ([subject, passer_by], [passer_by, subject]):
        assert R.identity(source, [face(1, 0)]) == 1 and R.identity(source, [face(0, 1)]) == 0
    crowd = [face(0, 1, box=(0, 0, 99, 99)), face(3, 4, box=(50, 0, 55, 5)), face(-1, 0)]
    assert R.identity([face(4, 3)], crowd) == R.identity([face(4, 3)], crowd[::-1]) == pytest.approx(24 / 25)
    assert R.identity([], [face(1, 0)]) is None and R.identity([], []) is None, "nobody is there to be kept"
    assert R.identity([face(1, 0)], []) == 0


# ------------------------------------------------------------------------------------------------- composites
PROMPTS = ["a dog", "a cat", "a cow"]


def test_composite_by_hand_and_sample_by_sample():
    scores = np.array([[0.5, 1.0, 0.0], [0.9, 0.8, 0.7]])
    weights = np.array([[4.0, 4.0, 4.0], [6.0, 6.0, 0.0]])  # the third prompt's category has no weight for the second
    assert R.composite(scores, weights).tolist() == pytest.approx([7.4, 8.8, 0.0])  # 4 a + 6 b
    scores[0, 0] = 0.0  # only sample 0 moves
    assert R.composite(scores, weights).tolist() == pytest.approx([5.4, 8.8, 0.0])
    scores[1, 2] = math.nan  # what was not asked does not count; a score that counts and is nan stays nan
    assert R.composite(scores, weights)[2] == 0
    scores[1, 1] = math.nan
    assert math.isnan(R.composite(scores, weights)[1])
    with pytest.raises(ValueError):  # (K, B) and (K, 1) would broadcast
        R.composite(scores, weights[:, :1])


# ---------------------------------------------------------------------------------------------------- Table 2
TABLE_2 = {  # F Table 2: GenEval, OCR, DeQA, PickScore, Avg as printed
    "SD-3.5-M": (0.63, 0.59, 4.07, 21.64, 0.7166),
    "GRPO-Geneval": (0.94, 0.65, 4.01, 21.53, 0.8050),
    "GRPO-OCR": (0.64, 0.92, 4.06, 21.69, 0.8016),
    "GRPO-deqa": (0.64, 0.66, 4.23, 23.02, 0.7578),
    "GRPO-Pickscore": (0.51, 0.69, 4.22, 23.19, 0.7340),
    "GRPO-Mix": (0.73, 0.83, 4.33, 21.84, 0.8165),
    "Ours (SFT)": (0.91, 0.92, 4.29, 21.83, 0.8819),
    "Ours (Merge)": (0.92, 0.94, 4.35, 23.08, 0.9044),
}
MISPRINTED = {
    "SFT+GRPO-Mix": (0.85, 0.86, 4.29, 21.79, 0.7166, 0.8515),
    "Merge+GRPO-Mix": (0.84, 0.86, 4.18, 21.87, 0.7166, 0.8443),
}


def test_table2_average_reproduces_the_printed_rows():
    for *columns, printed in TABLE_2.values():
        assert round(R.table2_average(*columns), 4) == printed


def test_two_rows_of_table2_are_misprinted_with_the_base_models_average():
    for *columns, printed, right in MISPRINTED.values():
        assert printed == TABLE_2["SD-3.5-M"][-1] and round(R.table2_average(*columns), 4) == right
