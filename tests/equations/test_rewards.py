"""Oracles for the scoring rules: hand-made detections and boxes, a recursive edit distance, F Table 2."""

import io
import math
import random
from functools import lru_cache

import numpy as np
import pytest
import torch
from PIL import Image

import rewards as R


def thing(name, score=0.95, box=(0, 0, 10, 10), color="red"):
    return {"class": name, "score": score, "box": box, "color": color}


# -------------------------------------------------------------------------------------------------------- OCR
def test_ocr_target_is_what_the_first_pair_of_ascii_quotes_holds():
    assert R.ocr_target('a sign "Open Now" beside "Closed"') == "Open Now"
    assert R.ocr_target('"CAT"') == "CAT"


@pytest.mark.parametrize(
    "prompt", ["no quotes", 'one " only', 'empty ""', 'blank "  " here', "curly “CAT”", "'CAT'"]
)
def test_a_prompt_without_a_quoted_target_is_an_error_with_the_prompt_in_it(prompt):
    with pytest.raises(ValueError, match="no target text: put it in ASCII double quotes") as error:
        R.ocr_target(prompt)
    assert repr(prompt) in str(error.value)
    with pytest.raises(ValueError, match="no target text"):
        R.ocr_reward("CAT", prompt)


@lru_cache(None)
def recursive_distance(a, b):
    """The definition, top down: an independent route to the same number."""
    if not a or not b:
        return len(a + b)
    if a[0] == b[0]:
        return recursive_distance(a[1:], b[1:])
    return 1 + min(
        recursive_distance(a[1:], b), recursive_distance(a, b[1:]), recursive_distance(a[1:], b[1:])
    )


def test_levenshtein_equals_its_recursive_definition_on_random_words():
    rng = random.Random(0)
    for _ in range(400):
        a, b = ("".join(rng.choices("abc", k=rng.randrange(7))) for _ in range(2))
        assert R.levenshtein(a, b) == recursive_distance(a, b) == R.levenshtein(b, a), (a, b)


def test_levenshtein_by_hand():
    assert R.levenshtein("kitten", "sitting") == 3  # k->s, e->i, +g
    assert R.levenshtein("", "abc") == 3 and R.levenshtein("abc", "") == 3 and R.levenshtein("", "") == 0


def test_ocr_reward_by_hand():
    prompt = 'a sign that says "Open Now"'  # target "opennow", 7 letters
    assert R.ocr_reward("OPEN NOW", prompt) == 1
    assert R.ocr_reward("open n0w", prompt) == pytest.approx(1 - 1 / 7)  # one substitution
    assert R.ocr_reward("openw", prompt) == pytest.approx(1 - 2 / 7)  # two deletions
    assert R.ocr_reward("xopennxow", prompt) == pytest.approx(1 - 2 / 7)  # two insertions
    assert R.ocr_reward("", prompt) == 0  # distance 7 of 7


def test_ocr_reward_ignores_case_and_white_space_on_both_sides():
    assert R.ocr_reward("h e\nL\tlO", 'says "He llo"') == 1


def test_ocr_reward_is_one_wherever_the_target_is_a_substring():
    assert R.ocr_reward("welcome to the CAT cafe", 'says "cat"') == 1
    # The planted bug (Levenshtein alone): 19 letters read, 16 of them to delete, capped at 3 -> reward 0.
    assert min(R.levenshtein("welcometothecatcafe", "cat"), 3) == 3


def test_ocr_reward_caps_the_distance_at_the_targets_length():
    # Nothing in common and far longer: the distance is 12, capped at 3. Without the cap: 1 - 12/3 = -3.
    assert R.levenshtein("zzzzzzzzzzzz", "cat") == 12
    assert R.ocr_reward("zzzzzzzzzzzz", 'says "cat"') == 0


# ------------------------------------------------------------------------------------------------- detections
def test_filter_keeps_confidence_above_03_and_above_09_for_counting():
    found = [thing("dog", s) for s in (0.3, 0.31, 0.9, 0.91, 0.1)]
    assert [d["score"] for d in R.filter_detections(found, {"tag": "colors"})] == [0.91, 0.9, 0.31]
    assert [d["score"] for d in R.filter_detections(found, {"tag": "counting"})] == [0.91]
    assert [d["score"] for d in R.filter_detections(found, {})] == [0.91, 0.9, 0.31]


def test_filter_keeps_the_best_16_of_each_class_and_each_class_has_its_own_16():
    scores = [0.5 + i / 100 for i in range(20)]
    found = [thing(name, s) for s in scores for name in ("dog", "cat")] + [thing("cow", 0.4)]
    kept = R.filter_detections(found, {"tag": "two_object"})
    for name in ("dog", "cat"):
        assert [d["score"] for d in kept if d["class"] == name] == scores[:3:-1]  # the best 16, best first
    assert sum(d["class"] == "cow" for d in kept) == 1
    assert len(found) == 41, "the caller's list is left alone"


def test_filter_does_no_suppression_of_overlapping_boxes():
    assert len(R.filter_detections([thing("dog", 0.8), thing("dog", 0.8)], {"tag": "colors"})) == 2


# --------------------------------------------------------------------------------------------------- geometry
@pytest.mark.parametrize(
    "a, b, expected",
    [
        # Centres (2, 3) and (20, 4): o = (-18, -1), margins 0.1 (4+6, 6+4) = (1, 1): o' = (-17, 0)
        ((0, 0, 4, 6), (17, 2, 23, 6), {"left of"}),
        ((17, 2, 23, 6), (0, 0, 4, 6), {"right of"}),
        # Centres (3, 2) and (4, 20): the same, transposed; y points down, so smaller y is above.
        ((0, 0, 6, 4), (2, 17, 6, 23), {"above"}),
        ((2, 17, 6, 23), (0, 0, 6, 4), {"below"}),
        # o = (-20, -20), margins (2, 2): o' = (-18, -18), |o| = 28.3, cosine 0.64 on both axes.
        ((0, 0, 10, 10), (20, 20, 30, 30), {"left of", "above"}),
        ((20, 0, 30, 10), (0, 20, 10, 30), {"right of", "above"}),
        # o = (-1, 0) inside the margins (2, 2): o' = 0, and no relation, on unit scale too.
        ((0, 0, 10, 10), (1, 0, 11, 10), set()),
        ((0, 0, 1, 1), (0.15, 0, 1.15, 1), set()),
        # Equal centres: |o| = 0.
        ((0, 0, 10, 10), (2, 2, 8, 8), set()),
        # o = (-3, -4), |o| = 5, no size: cosines 0.6 and 0.8.
        ((0, 0, 0, 0), (3, 4, 3, 4), {"left of", "above"}),
        # o = (-0.28, -0.96): 0.28 is not beyond 0.5.
        ((0, 0, 0, 0), (0.28, 0.96, 0.28, 0.96), {"above"}),
    ],
)
def test_relative_position_by_hand(a, b, expected):
    assert R.relative_position(a, b) == expected


def test_relative_position_is_strict_at_a_cosine_of_one_half():
    # Widths 5 + 5 cost 1 of o_x = -2: o'_x = -1 with |o| = 2: 0.5 is not beyond 0.5. One hair more is.
    assert R.relative_position((0, 0, 5, 0), (2, 0, 7, 0)) == set()
    assert R.relative_position((0, 0, 5, 0), (2.01, 0, 7.01, 0)) == {"left of"}


def test_relative_position_is_divided_by_the_raw_offset_not_the_shortened_one():
    # o = (-10, -10), sizes 20 + 20 wide and 0 high: o' = (-6, -10), |o| = 14.1: cosines 0.42 and 0.71.
    # Planted bug: dividing by |o'| = 11.7 would give 0.51 and add "left of".
    assert R.relative_position((0, 0, 20, 0), (10, 10, 30, 10)) == {"above"}


def test_relative_position_mirrors_when_the_boxes_swap():
    rng, opposite = (
        random.Random(1),
        {"left of": "right of", "right of": "left of", "above": "below", "below": "above"},
    )
    seen = set()
    for _ in range(300):
        a, b = ((x, y, x + rng.random(), y + rng.random()) for x, y in [(rng.random(), rng.random())] * 2)
        a = tuple(v + shift for v, shift in zip(a, (rng.uniform(-3, 3), rng.uniform(-3, 3)) * 2, strict=True))
        ab = R.relative_position(a, b)
        assert {opposite[r] for r in ab} == R.relative_position(b, a)
        seen |= ab
    assert seen == set(R.RELATIONS)


# --------------------------------------------------------------------------------------------------- verdicts
def meta(*include, exclude=None, tag="t"):
    return {"tag": tag, "include": list(include)} | ({"exclude": exclude} if exclude else {})


def need(name, count=1, **extra):
    return {"class": name, "count": count, **extra}


TWO_DOGS = meta(need("dog", 2), exclude=[need("dog", 3)], tag="counting")


def test_counting_verdict_needs_exactly_the_count_through_its_exclude():
    assert [R.geneval_verdict([thing("dog")] * n, TWO_DOGS) for n in range(5)] == [
        False,
        False,
        True,
        False,
        False,
    ]
    # Without the exclude "at least" is enough; other classes never matter.
    assert [R.geneval_verdict([thing("dog")] * n, meta(need("dog", 2))) for n in range(4)] == [
        False,
        False,
        True,
        True,
    ]
    assert R.geneval_verdict([thing("dog"), thing("dog"), thing("cat")], TWO_DOGS)


def test_any_exclude_fails_the_verdict():
    metadata = meta(need("dog"), exclude=[need("cow", 2), need("cat", 1)])
    assert R.geneval_verdict([thing("dog"), thing("cow")], metadata)
    assert not R.geneval_verdict([thing("dog"), thing("cat")], metadata)
    assert not R.geneval_verdict([thing("dog"), thing("cow"), thing("cow")], metadata)


def test_every_include_must_be_found():
    metadata = meta(need("dog"), need("cat"))
    assert R.geneval_verdict([thing("cat"), thing("dog")], metadata)
    assert not R.geneval_verdict([thing("dog")], metadata) and not R.geneval_verdict([thing("cat")], metadata)


def test_verdict_asks_the_colour_of_the_best_scored_objects_only():
    metadata = meta(need("dog", 2, color="red"))
    red, blue = thing("dog", 0.8), thing("dog", 0.7, color="blue")
    assert R.geneval_verdict([thing("dog", 0.6, color="blue"), red, thing("dog", 0.9)], metadata)
    assert not R.geneval_verdict([thing("dog", 0.6), red, blue], metadata)
    assert not R.geneval_verdict([red, blue], metadata)
    assert not R.geneval_verdict([thing("cat"), red, blue], metadata)


LEFT, RIGHT, MIDDLE = (0, 0, 10, 10), (60, 0, 70, 10), (30, 0, 40, 10)


def test_position_is_asked_of_the_include_towards_the_one_it_refers_to():
    metadata = meta(need("laptop"), need("cow", position=["right of", 0]))
    assert R.geneval_verdict([thing("cow", box=RIGHT), thing("laptop", box=LEFT)], metadata)
    assert not R.geneval_verdict([thing("cow", box=LEFT), thing("laptop", box=RIGHT)], metadata)
    # The index counts includes: 2 is the cat, not the laptop.
    metadata = meta(need("laptop"), need("cow", position=["right of", 2]), need("cat"))
    found = [thing("cow", box=MIDDLE), thing("laptop", box=RIGHT), thing("cat", box=LEFT)]
    assert R.geneval_verdict(found, metadata) and R.geneval_reward(found, metadata) == 1
    metadata["include"][1]["position"] = ["right of", 0]
    assert not R.geneval_verdict(found, metadata) and R.geneval_reward(found, metadata) == pytest.approx(
        3 / 4
    )


def test_every_pair_of_the_best_objects_must_hold_the_relation():
    metadata = meta(need("laptop", 2), need("cow", 2, position=["right of", 0]))
    laptops = [thing("laptop", 0.9, LEFT), thing("laptop", 0.8, MIDDLE)]
    above, cow = (60, 1, 70, 11), thing("cow", 0.9, RIGHT)
    assert R.geneval_verdict([*laptops, cow, thing("cow", 0.8, above)], metadata)
    assert not R.geneval_verdict(
        [*laptops, cow, thing("cow", 0.8, (15, 0, 25, 10))], metadata
    )  # between laptops
    # A third, worse scored cow or laptop in the wrong place is not among the best two.
    spare = [thing("cow", 0.5, LEFT), thing("laptop", 0.5, (90, 0, 99, 10))]
    assert R.geneval_verdict([*spare, *laptops, cow, thing("cow", 0.8, above)], metadata)


@pytest.mark.parametrize("metadata", [{}, {"include": []}, {"tag": "colors"}])
@pytest.mark.parametrize("rule", [R.geneval_verdict, R.geneval_reward])
def test_rules_without_a_checklist_are_an_error_not_true(rule, metadata):
    with pytest.raises(ValueError, match="need metadata with a non-empty 'include'"):
        rule([thing("dog")], metadata)


# -------------------------------------------------------------------------------------------- training reward
def test_count_part_is_one_minus_the_relative_error_floored_at_zero():
    # count 2: found 0, 1, 2, 3, 4, 5 -> 1 - |2 - n| / 2 = 0, 1/2, 1, 1/2, 0, then -1/2, floored.
    assert [R.geneval_reward([thing("dog")] * n, TWO_DOGS) for n in range(6)] == [0, 0.5, 1, 0.5, 0, 0]


def test_a_flood_of_one_class_costs_its_own_part_only():
    # One cat as asked, five dogs for one: parts 0 and 1. Unfloored, -3 and 1 would sum to less than nothing.
    assert R.geneval_reward([thing("dog")] * 5 + [thing("cat")], meta(need("dog"), need("cat"))) == 0.5


def test_colour_part_is_the_share_of_matching_objects_where_the_count_is_exact():
    metadata = meta(need("dog", 4, color="red"))
    found = [thing("dog", color=c) for c in ("red", "blue", "red", "red")]
    assert R.geneval_reward(found, metadata) == pytest.approx((1 + 3 / 4) / 2)
    assert R.geneval_reward(found[:3], metadata) == pytest.approx((3 / 4 + 0) / 2)  # wrong count: colour 0
    assert R.geneval_reward([], metadata) == 0


def test_position_part_is_one_or_zero_and_needs_both_counts():
    metadata = meta(need("laptop"), need("cow", position=["right of", 0]))
    cow, laptop = thing("cow", box=RIGHT), thing("laptop", box=LEFT)
    assert R.geneval_reward([cow, laptop], metadata) == 1
    # A wrong relation scores 0 (the released code's 0.5 would give 5/6).
    wrong = [thing("cow", box=LEFT), thing("laptop", box=RIGHT)]
    assert R.geneval_reward(wrong, metadata) == pytest.approx(2 / 3)
    assert R.geneval_reward([cow], metadata) == pytest.approx(
        1 / 3
    )  # no laptop: no relation, no vacuous truth
    assert R.geneval_reward([laptop], metadata) == pytest.approx(1 / 3)
    assert R.geneval_reward([cow, cow, laptop], metadata) == pytest.approx(1 / 3)  # parts 0, 1, 0
    # Two laptops, both left of the cow: the reference is ambiguous; parts 0, 1, 0.
    assert R.geneval_reward([cow, laptop, laptop], metadata) == pytest.approx(1 / 3)


def test_the_number_of_parts_does_not_depend_on_the_image():
    metadata = meta(need("laptop"), need("cow", 2, color="red", position=["right of", 0]))
    cow, laptop = thing("cow", box=RIGHT), thing("laptop", box=LEFT)
    assert R.geneval_reward([cow, cow, laptop], metadata) == 1
    assert R.geneval_reward([cow, laptop], metadata) == pytest.approx((1 + 1 / 2 + 0 + 0) / 4)


def test_reward_is_one_exactly_where_an_exact_verdict_is_true_on_random_scenes():
    rng = random.Random(2)
    include = [need("dog", 1), need("cat", 1, color="red", position=["left of", 0])]
    metadata = meta(*include, exclude=[need("dog", 2), need("cat", 2)])
    agree = {True: 0, False: 0}
    for _ in range(1500):
        found = [
            thing(
                rng.choice(("dog", "cat")),
                rng.random(),
                rng.choice((LEFT, MIDDLE, RIGHT)),
                rng.choice(("red", "blue")),
            )
            for _ in range(rng.randrange(1, 4))
        ]
        reward, verdict = R.geneval_reward(found, metadata), R.geneval_verdict(found, metadata)
        assert 0 <= reward <= 1 and (reward == 1) == verdict
        agree[verdict] += 1
    assert min(agree.values()) > 20


def test_detection_order_changes_nothing():
    metadata = meta(need("dog", 2, color="red"), need("cat", 1, position=["left of", 0]))
    found = [
        thing("dog", 0.9, RIGHT),
        thing("dog", 0.7, MIDDLE),
        thing("dog", 0.5, LEFT, "blue"),
        thing("cat"),
    ]
    rng = random.Random(3)
    first = R.geneval_verdict(found, metadata), R.geneval_reward(found, metadata)
    assert first[0]
    for _ in range(10):
        rng.shuffle(found)
        assert (R.geneval_verdict(found, metadata), R.geneval_reward(found, metadata)) == first


# ------------------------------------------------------------------------------------------------------ score
def test_geneval_score_weighs_tags_not_images():
    verdicts, tags = [True, False, False, False, True], ["colors", "colors", "colors", "colors", "position"]
    assert R.per_tag_accuracy(verdicts, tags) == {"colors": 0.25, "position": 1.0}
    assert R.geneval_score(verdicts, tags) == 0.625  # (1/4 + 1) / 2; the mean over images would be 2/5
    assert list(R.per_tag_accuracy(np.array([1, 0, 1]) > 0, ["b", "a", "b"]).items()) == [
        ("b", 1.0),
        ("a", 0.0),
    ]


@pytest.mark.parametrize("verdicts, tags", [([], []), ([True], []), ([True], ["a", "b"]), ([], ["a"])])
def test_geneval_score_needs_one_tag_a_verdict(verdicts, tags):
    with pytest.raises(
        ValueError, match=f"need one tag a verdict, and one at least: {len(verdicts)} and {len(tags)}"
    ):
        R.geneval_score(verdicts, tags)


# ------------------------------------------------------------------------------------------------- VLM judges
def test_expected_score_by_hand():
    # p(4) = 3/4, p(5) = 1/4 after normalising over the score tokens: 4.25. " 4" and "4" add up.
    logprobs = {"4": math.log(0.2), " 4": math.log(0.1), "5\n": math.log(0.1), "Good": math.log(0.6)}
    assert R.expected_score(logprobs) == pytest.approx(4.25)


@pytest.mark.parametrize("score", [1, 2, 3, 4, 5])
def test_one_certain_token_is_its_own_score(score):
    assert R.expected_score({str(score): -0.7}) == score
    assert (
        R.expected_score({str(score): 0.0} | {str(s): -math.inf for s in range(1, 6) if s != score}) == score
    )


def test_expected_score_of_equal_log_probs_is_three_however_small_they_are():
    assert R.expected_score({str(s): -1000.0 for s in range(1, 6)}) == pytest.approx(3)
    assert R.expected_score({"1": -1000.0, "2": -1000.0 - math.log(3)}) == pytest.approx(1.25)


@pytest.mark.parametrize("logprobs", [{}, {"0": 0.0, "6": 0.0}, {"45": 0.0, "five": 0.0, "": 0.0}])
def test_no_score_token_is_an_error(logprobs):
    with pytest.raises(R.RewardError, match="no score token 1 to 5 among"):
        R.expected_score(logprobs)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_log_probs_that_are_no_numbers_are_an_error(value):
    with pytest.raises(R.RewardError, match="give no expectation"):
        R.expected_score({"3": value})


def reply(quality="3", instruction="4", overall="5"):
    return (
        f"<Thought> sharp, all there </Thought>\n<QualityScore>{quality}</QualityScore>\n"
        f"<InstructionScore> {instruction}\n</InstructionScore>\n<OverallScore>{overall}</OverallScore>"
    )


def test_parse_judge_reads_the_three_tags_of_figure_6():
    assert R.parse_judge(reply()) == {"quality": 3.0, "instruction": 4.0, "overall": 5.0}
    assert R.parse_judge(reply("1", "4.5", "2.25")) == {"quality": 1.0, "instruction": 4.5, "overall": 2.25}


def test_parse_judge_takes_the_scores_after_the_thought():
    text = "<Thought> <OverallScore>1</OverallScore>? No. </Thought>" + reply(overall="4")
    assert R.parse_judge(text)["overall"] == 4


@pytest.mark.parametrize(
    "text, tag",
    [
        (reply(quality="X"), "QualityScore"),
        (reply(quality="0.9"), "QualityScore"),
        (reply(instruction="5.1"), "InstructionScore"),
        (reply(overall="-3"), "OverallScore"),
        (reply(overall="4/5"), "OverallScore"),
        (reply(overall=""), "OverallScore"),
        ("I cannot judge images.", "QualityScore"),
        (reply().replace("OverallScore", "Overall"), "OverallScore"),
    ],
)
def test_an_unreadable_reply_is_an_error_with_the_reply_in_it(text, tag):
    for rule in (R.parse_judge, R.judge_reward):
        with pytest.raises(R.RewardError, match=f"no <{tag}> from 1 to 5 in the reply") as error:
            rule(text)
        assert text in str(error.value)


def test_judge_reward_is_the_overall_rating_over_five():
    assert [R.judge_reward(reply(overall=str(n))) for n in range(1, 6)] == [0.2, 0.4, 0.6, 0.8, 1.0]


# ------------------------------------------------------------------------------------------------- composites
PROMPTS = ["a dog", "a cat", "a cow"]


def test_composite_by_hand_and_sample_by_sample():
    scores = {"deqa": [0.5, 1.0, 0.0], "pickscore": np.array([0.9, 0.8, 0.7], np.float32)}
    total = R.composite(scores, {"pickscore": 6, "deqa": 4}, PROMPTS)
    assert total.dtype == np.float64 and total.tolist() == pytest.approx([7.4, 8.8, 4.2])  # 4 a + 6 b
    scores["deqa"][0] = 0.0  # only sample 0 moves
    assert R.composite(scores, {"pickscore": 6, "deqa": 4}, PROMPTS).tolist() == pytest.approx(
        [5.4, 8.8, 4.2]
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
def test_a_score_that_is_no_number_names_its_scorer_and_prompt(bad):
    with pytest.raises(
        R.RewardError, match=r"scorer 'ocr': (nan|-?inf) is not finite, for the prompt 'a cat'"
    ):
        R.check_scores("ocr", [0.1, bad, 0.3], PROMPTS)
    with pytest.raises(R.RewardError, match="scorer 'ocr'.*not finite.*'a cow'"):
        R.composite({"geneval": [0, 0, 0], "ocr": [0, 0, bad]}, {"geneval": 3, "ocr": 1}, PROMPTS)


def test_a_broken_scorer_is_a_reward_error_and_a_value_error():
    assert issubclass(R.RewardError, ValueError)


def test_check_scores_bounds_are_inclusive_and_optional():
    assert R.check_scores("s", [0, 1, 0.5], PROMPTS, low=0, high=1).tolist() == [0, 1, 0.5]
    assert R.check_scores("s", [-9, 30, 0.5], PROMPTS).tolist() == [-9, 30, 0.5]
    assert R.check_scores("s", [5, 0, 0.5], PROMPTS, low=0).tolist() == [5, 0, 0.5]
    assert R.check_scores("s", [-5, 0, 0.5], PROMPTS, high=1).tolist() == [-5, 0, 0.5]
    with pytest.raises(R.RewardError, match=r"scorer 's': 1.5 is outside \[0, 1\], for the prompt 'a cow'"):
        R.check_scores("s", [0, 1, 1.5], PROMPTS, low=0, high=1)
    with pytest.raises(
        R.RewardError, match=r"scorer 's': -0.5 is outside \[0, None\], for the prompt 'a dog'"
    ):
        R.check_scores("s", [-0.5, 1, 1], PROMPTS, low=0)


@pytest.mark.parametrize("scores", [[0.1, 0.2], [0.1] * 4, [[0.1], [0.2], [0.3]], 0.5])
def test_check_scores_wants_one_number_a_prompt(scores):
    # (B, 1) times (B,) is (B, B): the shape bug of the released code starts with a score of shape (B, 1).
    with pytest.raises(R.RewardError, match=r"scorer 's': 3 prompts but scores of shape \("):
        R.check_scores("s", scores, PROMPTS)


def test_composite_wants_one_finite_weight_a_scorer():
    with pytest.raises(ValueError, match=r"scores of \['a'\] but weights of \['a', 'b'\]"):
        R.composite({"a": [0, 0, 0]}, {"b": 1, "a": 1}, PROMPTS)
    with pytest.raises(ValueError, match="the weight of scorer 'a' is nan"):
        R.composite({"a": [0, 0, 0]}, {"a": math.nan}, PROMPTS)


# ------------------------------------------------------------------------------------------- what every eye sees
def test_a_picture_is_the_nearest_bytes_in_rgb_and_no_further_than_black_and_white():
    image = torch.tensor([[[-0.5, 0.1, 1.5]], [[0.0, 0.5, 1.0]], [[0.25, 0.75, 2 / 255]]])  # (3, 1, 3)
    found = R.to_picture(image.double().requires_grad_())
    assert found.mode == "RGB" and found.size == (3, 1)
    # 0.1, 0.25, 0.5 and 0.75 times 255 are 25.5, 63.75, 127.5 and 191.25; halves go to the even one
    pixels = np.asarray(found)[0]
    assert pixels[0].tolist() == [0, 0, 64] and pixels[2].tolist() == [255, 255, 2]
    assert pixels[1].tolist() == [26, 128, 191]
    assert np.asarray(R.to_picture(torch.rand(3, 5, 8))).shape == (5, 8, 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_picture_with_a_value_that_is_no_number_is_an_error_and_not_black(bad):
    image = torch.full((3, 4, 5), 0.5)
    image[2, 3, 4] = bad
    with pytest.raises(R.RewardError, match="^a picture holds values that are not finite; the model that drew it has"):
        R.to_picture(image)
    with pytest.raises(R.RewardError, match="not finite"):
        R.score_jpeg(torch.stack([torch.zeros_like(image), image]), ["a", "b"])


# ------------------------------------------------------------------------------------------------------- JPEG
def grey_and_noise():
    """(2, 3, 16, 24): one plain picture, one of noise."""
    noise = torch.rand(3, 16, 24, generator=torch.Generator().manual_seed(0))
    return torch.stack([torch.full_like(noise, 0.25), noise])


def jpeg_bytes(pixels, **options):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", **options)
    return len(stream.getvalue())


def test_jpeg_is_one_minus_the_bytes_of_the_file_over_those_of_the_pixels():
    images = grey_and_noise()
    scores = R.score_jpeg(images, ["a", "b"])
    # 0.25 is byte 63.75, hence 64; a picture of 16 x 24 x 3 = 1,152 bytes
    flat = jpeg_bytes(np.full((16, 24, 3), 64, np.uint8), quality=95, subsampling=0)
    noise = np.moveaxis(np.round(images[1].numpy() * 255).astype(np.uint8), 0, 2)
    rough = jpeg_bytes(np.ascontiguousarray(noise), quality=95, subsampling=0)
    assert scores == [1 - flat / 1152, 1 - rough / 1152] and scores[0] > scores[1]
    assert jpeg_bytes(noise, quality=95) != rough != jpeg_bytes(noise, quality=75, subsampling=0), "its own settings"


def test_jpeg_prefers_the_plainer_picture_whatever_the_prompt_and_never_reaches_one():
    images = torch.nn.functional.interpolate(grey_and_noise(), scale_factor=8)  # room enough for the file's header
    half = 0.5 * images[0] + 0.5 * images[1]
    plain, noise = R.score_jpeg(images, ["a", "b"])
    assert noise < R.score_jpeg(half[None], ["a"])[0] < plain < 1 and plain > 0.95
    assert R.score_jpeg(images.flip(0), ["b", "b"]) == [noise, plain]


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


@pytest.mark.parametrize("row", TABLE_2)
def test_table2_average_reproduces_the_printed_row(row):
    *columns, printed = TABLE_2[row]
    assert round(R.table2_average(*columns), 4) == printed


@pytest.mark.parametrize("row", MISPRINTED)
def test_two_rows_of_table2_are_misprinted_with_the_base_models_average(row):
    *columns, printed, right = MISPRINTED[row]
    assert printed == TABLE_2["SD-3.5-M"][-1]
    assert round(R.table2_average(*columns), 4) == right
