"""Oracles for the panel: who is asked about what, whose answer goes where, what a lost group costs, known alarms."""

import math
import random
import threading
import time
import warnings

import numpy as np
import pytest
import torch

from data.files import Prompt
from rewards import RewardError, Scorer
from scorers import panel as S
from scorers import registry
from scorers.common import check_scores
from tiny import drawings, edits

P, G = 4, 3  # prompts and their samples; with K = 3 scorers no two sizes are alike but K and G, hence:
B = P * G


def prompt(number, task="text", **metadata):
    return Prompt(f"p{number}", task, metadata, f"mine.jsonl:{number + 1}")


def batch(*prompts):
    """Every prompt G times, group by group."""
    return [p for p in prompts for _ in range(G)]


def pictures(count=B):
    """(count, 3, 2, 5); a picture tells which row of the batch it is."""
    return torch.arange(count).float()[:, None, None, None].expand(count, 3, 2, 5) / 100


class Fake:
    """A scorer that answers `values[row]` about the picture of a row; `fails` is asked about every row first.

    It notes what it was asked, and looks at the pictures in an order of its own.
    """

    def __init__(self, name, values=None, fails=lambda row, prompt: None, low=-math.inf, high=math.inf):
        self.values = np.arange(1.0, B + 1) if values is None else np.asarray(values)
        self.calls, self.fails = [], fails
        self.scorer = Scorer(name, self.score, low, high)

    def score(self, images, prompts, sources=None):
        assert images.shape[1:] == (3, 2, 5) and len(images) == len(prompts)
        rows = [round(image.mean().item() * 100) for image in images]
        self.calls.append((rows, [p.text for p in prompts], sources))
        found = torch.zeros(len(rows))
        for i in random.Random(len(rows)).sample(range(len(rows)), len(rows)):
            self.fails(rows[i], prompts[i])
            found[i] = float(self.values[rows[i]])
        return found


def panel(weights, *fakes, **more):
    return S.Panel([fake.scorer for fake in fakes], weights, **more)


def refuses(*rows, kind=RewardError):
    def fails(row, prompt):
        if row in rows:
            raise kind(f"no score for the prompt {prompt.text!r}")

    return fails


# --------------------------------------------------------------------------------------------------- whose weights
def test_a_prompts_weights_are_its_categorys_else_its_tags_else_its_tasks_else_the_defaults():
    rows = {"mine": {"a": 1.0}, "colors": {"a": 2.0}, "text": {"a": 3.0}, "default": {"a": 4.0, "b": 5.0}}
    full = prompt(0, "text", category="mine", tag="colors")
    for known, expected in (("mine colors text", 1), ("colors text", 2), ("text", 3), ("", 4)):
        some = panel({c: rows[c] for c in (*known.split(), "default")}, Fake("a"), Fake("b"))
        assert some.weight("a", full) == expected and some.category(full) == (*known.split(), "default")[0]
        assert some.weight("b", full) == (5 if expected == 4 else 0), "another row adds nothing to the one that serves"
    assert some.weight("a", prompt(1, "quality", tag="other", category="unknown")) == 4


def test_a_prompt_that_no_weights_serve_is_an_error_that_names_its_line():
    some = panel({"text": {"a": 1.0}}, Fake("a"), drop=True)
    assert some.category(prompt(1, "quality", tag="colors", category="mine")) is None
    for ask in (
        lambda: some.check([prompt(0), prompt(1, "quality", tag="colors")]),
        lambda: some.ask(pictures(6), batch(prompt(0), prompt(1, "quality")), G),
    ):  # no dropped group mends it
        with pytest.raises(RewardError, match="^mine.jsonl:2: .*'quality'"):
            ask()


# ------------------------------------------------------------------------------------------------- who is asked
MIXED = [prompt(0, "text"), prompt(1, "quality"), prompt(2, "composition", tag="colors"), prompt(3, "quality")]
MIXED_WEIGHTS = {
    "text": {"a": 2.0, "b": 0.0}, "quality": {"b": -3.0, "a": 0.5}, "colors": {"c": 1.0}, "composition": {"a": 9.0},
}  # fmt: skip
# a row of (K, P): by hand from the two above
WEIGHTS_KP = np.array([[2.0, 0.5, 0.0, 0.5], [0.0, -3.0, 0.0, -3.0], [0.0, 0.0, 1.0, 0.0]])


def mixed(**more):
    rng = np.random.default_rng(5)
    fakes = [Fake(name, rng.normal(size=B).round(3)) for name in "abc"]
    return panel(MIXED_WEIGHTS, *fakes, **more), fakes


def test_each_scorer_is_asked_once_about_the_rows_where_it_counts_and_answers_go_back_to_their_rows():
    some, fakes = mixed()
    order = [8, 3, 11, 0, 5, 2, 9, 1, 7, 4, 10, 6]  # pictures that lie otherwise than their numbers
    prompts = batch(*MIXED)
    found = some.ask(pictures()[order], prompts, G)
    assert found.names == ("a", "b", "c") and found.values.dtype == np.float64 and not found.lost.any()
    for k, (fake, rows) in enumerate(zip(fakes, ([0, 1, 2, 3, 4, 5, 9, 10, 11], [3, 4, 5, 9, 10, 11], [6, 7, 8]))):
        assert fake.calls == [([order[b] for b in rows], [prompts[b].text for b in rows], None)]
        expected = [fake.values[order[b]] if b in rows else math.nan for b in range(B)]
        np.testing.assert_allclose(found.values[k], expected, rtol=1e-6)


def test_a_watched_scorer_is_asked_about_everything_and_pays_nothing():
    some, fakes = mixed(watched=("c", "b"))
    found, quiet = (one.ask(pictures(), batch(*MIXED), G) for one in (some, mixed()[0]))
    assert [len(fake.calls[0][0]) for fake in fakes] == [9, 12, 12] and not np.isnan(found.values[1:]).any()
    assert np.array_equal(S.totals(found), S.totals(quiet))
    for combine in ("sum", "normalised"):
        a, b = (S.advantages(scores, G, combine, "batch") for scores in (found, quiet))
        assert torch.equal(a, b) and a.abs().sum() > 1


def test_a_scorer_sees_a_source_for_every_picture_or_none_at_all_and_answers_go_back_to_their_rows():
    both, others = Fake("a", [7.0, 5.0, 3.0, 2.0, 11.0, 13.0]), Fake("b")
    some = panel({"edit": {"a": 1.0}, "t2i": {"a": 1.0, "b": 1.0}}, both, others)
    prompts = [prompt(i, task) for i, task in enumerate(("edit", "t2i", "t2i", "edit", "t2i", "edit"))]
    found = some.ask(pictures()[[5, 0, 3, 1, 4, 2]], prompts, 1, ["s0", None, None, "s3", None, "s5"])
    assert both.calls == [([5, 1, 2], ["p0", "p3", "p5"], ["s0", "s3", "s5"]), ([0, 3, 4], ["p1", "p2", "p4"], None)]
    assert others.calls == [([0, 3, 4], ["p1", "p2", "p4"], None)] and not found.lost.any()
    none = math.nan
    np.testing.assert_array_equal(found.values, [[13, 7, 2, 5, 11, 3], [none, 1, 4, none, 5, none]])


# ---------------------------------------------------------------------------------- a score that cannot be had
def one(value, low=0.0, high=1.0, **more):
    """A panel of two scorers of which `b` says `value` about row 4, the second sample of the second prompt."""
    values = np.full(B, 0.5)
    values[4] = value
    return panel({"default": {"a": 1.0, "b": 1.0}}, Fake("a"), Fake("b", values, low=low, high=high), **more)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1.5, -0.25])
def test_an_answer_that_is_no_score_ends_the_step_or_is_dropped_with_its_group(value):
    with pytest.raises(RewardError, match="^scorer 'b': .*, for the prompt 'p1'$"):
        one(value).ask(pictures(), batch(*MIXED), G)
    dropped = one(value, drop=True).ask(pictures(), batch(*MIXED), G)
    assert dropped.lost.reshape(P, G).all(1).tolist() == [False, True, False, False] and dropped.lost.sum() == G
    if math.isfinite(value):
        found = one(value, -math.inf, math.inf).ask(pictures(), batch(*MIXED), G)
        assert found.values[1, 4] == value, "a scorer without a range may say any number"


def test_whatever_cannot_be_judged_is_a_reward_error_and_a_bug_is_not():
    weights, prompts = {"default": {"b": 1.0}}, batch(*MIXED)
    for kind in (RewardError, ValueError):
        with pytest.raises(RewardError, match="^scorer 'b': .*'p2'$"):
            panel(weights, Fake("b", fails=refuses(7, kind=kind))).ask(pictures(), prompts, G)
    for lenient in (False, True):
        with pytest.raises(ZeroDivisionError):
            fake = Fake("b", fails=refuses(7, kind=ZeroDivisionError))
            panel(weights, fake, drop=lenient).ask(pictures(), prompts, G)


def test_dropping_loses_exactly_the_groups_that_some_scorer_fails_on():
    a, b = Fake("a", fails=refuses(0)), Fake("b", fails=refuses(4, 5, 10))  # two samples of prompt 1, one of prompt 3
    found = panel({"default": {"a": 1.0, "b": 1.0}}, a, b, drop=True).ask(pictures(), batch(*MIXED), G)
    assert found.lost.tolist() == [True] * 6 + [False] * 3 + [True] * 3
    assert [rows for rows, _, _ in b.calls] == [list(range(B)), *([g, g + 1, g + 2] for g in range(0, B, 3))]
    np.testing.assert_array_equal(found.values[1], [1, 2, 3, *[math.nan] * 3, 7, 8, 9, *[math.nan] * 3])


def test_a_fault_that_passes_loses_nothing():
    moods = iter([RewardError("gone"), None])

    def moody(row, prompt):
        if row == 0 and (mood := next(moods)):
            raise mood

    found = panel({"default": {"a": 1.0}}, Fake("a", fails=moody), drop=True).ask(pictures(), batch(*MIXED), G)
    assert not found.lost.any() and found.values[0].tolist() == list(range(1, B + 1))


# -------------------------------------------------------------------------------------------------- advantages
def scored(lost=()):
    """Answers about the mixed batch, some groups lost."""
    found = mixed()[0].ask(pictures(), batch(*MIXED), G)
    for p in lost:
        found.lost[p * G : p * G + G] = True
    return found


def by_hand(values_KPG, weights_KP, combine, std):
    """F 4.1, Q Eq. 4 and 13, group by group, in plain numbers; where a weight is 0 the scorer was not asked."""
    K, P, G = values_KPG.shape
    total = np.zeros((P, G))
    for p in range(P):
        for k in range(K):
            if weights_KP[k, p] != 0:
                r = values_KPG[k, p]
                part = r if combine == "sum" else (r - r.mean()) / math.sqrt(sum((r - r.mean()) ** 2) / G)
                total[p] += weights_KP[k, p] * part
    if combine == "normalised":
        return total
    deviations = total - total.mean(1, keepdims=True)
    return deviations / {"none": 1.0, "batch": total.std(), "group": total.std(1, keepdims=True)}[std]


WAYS = [("sum", "group"), ("sum", "batch"), ("sum", "none"), ("normalised", "group")]


@pytest.mark.parametrize(("combine", "std"), WAYS)
def test_advantages_are_the_papers_by_hand_with_each_prompts_own_weights(combine, std):
    found = scored()
    advantages = S.advantages(found, G, combine, std)
    assert advantages.shape == (P, G) and advantages.dtype == torch.float32
    values = found.values.reshape(3, P, G)
    np.testing.assert_allclose(advantages, by_hand(values, WEIGHTS_KP, combine, std), rtol=1e-5)
    # Planted bugs: the default's weights for all, or another prompt's, give something else.
    full = np.where(np.isnan(values), np.arange(G) ** 2, values)
    for wrong in (np.ones_like(WEIGHTS_KP), np.roll(WEIGHTS_KP, 1, axis=1), np.abs(WEIGHTS_KP)):
        assert np.abs(by_hand(full, wrong, combine, std) - advantages.numpy()).max() > 0.1


@pytest.mark.parametrize(("combine", "std"), WAYS)
def test_a_lost_group_gets_nothing_and_has_no_influence_on_the_others(combine, std):
    found = scored(lost=[1])
    found.values[:, 4] = [1e6, math.nan, -1e6]  # whatever stands there
    advantages = S.advantages(found, G, combine, std)
    assert advantages.shape == (P, G) and torch.equal(advantages[1], torch.zeros(G))
    kept = [0, 2, 3]
    values = found.values.reshape(3, P, G)[:, kept]
    np.testing.assert_allclose(advantages[kept], by_hand(values, WEIGHTS_KP[:, kept], combine, std), rtol=1e-5)
    if std == "batch":  # planted bug: the lost group counted as a group of zeros
        zeros = np.nan_to_num(np.insert(values, 1, 0.0, axis=1))
        wrong = by_hand(zeros, WEIGHTS_KP, combine, std)[kept]
        assert np.abs(wrong - advantages[kept].numpy()).max() > 0.05
    gone = scored(lost=range(P))
    gone.values[:] = math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(S.advantages(gone, G, combine, std), torch.zeros(P, G))
        metrics = S.metrics(gone, G)
    assert metrics.pop("lost") == 1 and all(map(math.isnan, metrics.values()))


# ------------------------------------------------------------------------------------------- what is logged of it
def small():
    """Two scorers, two prompts of two samples; `b` counts for the second prompt alone. By hand throughout."""
    values = np.array([[1.0, 4.0, 3.0, 5.0], [math.nan, math.nan, 2.0, 8.0]])
    weights = np.array([[2.0, 2.0, 1.0, 1.0], [0.0, 0.0, -0.5, -0.5]])
    return S.Scores(("a", "b"), values, weights, np.zeros(4, bool))


def test_totals_metrics_and_histograms_by_hand():
    found = small()
    assert S.totals(found).tolist() == [2.0, 8.0, 3 - 0.5 * 2, 5 - 0.5 * 8]
    # totals 2 8 | 2 1: their mean is 13/4; half the distances within groups are 3 and 1/2
    expected = {"reward": 3.25, "group_std": 1.75, "reward/a": 13 / 4, "reward/b": 5.0, "lost": 0.0}
    assert S.metrics(found, 2) == pytest.approx(expected)
    assert {k: v.tolist() for k, v in S.histograms(found).items()} == {"rewards/a": [1, 4, 3, 5], "rewards/b": [2, 8]}
    found.lost[:2], found.values[0, :2] = True, math.nan
    np.testing.assert_array_equal(S.totals(found), [math.nan, math.nan, 2.0, 1.0])
    expected = {"reward": 1.5, "group_std": 0.5, "reward/a": 4.0, "reward/b": 5.0, "lost": 0.5}
    assert S.metrics(found, 2) == pytest.approx(expected), "a lost row is no 0"
    found.values[1] = math.nan
    assert list(S.histograms(found)) == ["rewards/a"], "an empty one cannot be drawn"


UP, FLAT, DOWN = [0.1, 0.3, 0.5, 0.7], [0.4] * 4, [0.7, 0.5, 0.3, 0.1]
PEAK, NAN = [0.1, 0.3, 0.7, 0.7, 0.1], math.nan
ALARMS = [  # trained, watched, drop, alarm, in windows of 2: UP goes 0.2 -> 0.6, DOWN 0.6 -> 0.2
    (UP, DOWN, 0.6, True),
    (UP, DOWN, 0.7, False),  # it fell from 0.6 to 0.2, by two thirds
    (UP, UP, 0.001, False),
    (FLAT, DOWN, 0.001, False),  # nothing is gained by it
    (UP, DOWN[:3], 0.001, False),  # before two windows
    # the best stretch is not the first one: 0.2 0.5 0.7 0.4, and it fell by 3/7 of 0.7
    ([0, 0, 1, 1, 1], PEAK, 0.4, True),
    ([0, 0, 1, 1, 1], PEAK, 0.45, False),
    ([NAN, 0.1, 0.3, 0.5, NAN, 0.7], [0.7, NAN, 0.5, 0.3, 0.1, NAN], 0.3, True),  # nan: nobody was asked at this step
]


@pytest.mark.parametrize(("trained", "watched", "drop", "alarm"), ALARMS)
def test_the_alarm_by_hand(trained, watched, drop, alarm):
    assert bool(S.is_hacked(trained, watched, 2, drop)) is alarm


# ------------------------------------------------------------------------------------------------- in the background
def test_batches_are_scored_one_by_one_in_their_order_while_the_caller_goes_on():
    log, busy, gate = [], threading.Lock(), threading.Event()

    def work(number, factor):
        gate.wait(5)
        assert busy.acquire(blocking=False), "two at a time"
        log.append(("begin", number))
        time.sleep(0.02 if number == 0 else 0)  # the first is the slowest
        log.append(("end", number))
        busy.release()
        return number * factor, threading.current_thread()

    line = S.Later(work)
    futures = [line.submit(number, 10) for number in range(5)]
    assert not any(f.done() for f in futures), "nothing can be done before the gate opens"
    gate.set()
    assert futures[4].result(5)[0] == 40 and [f.result(0)[0] for f in futures] == [0, 10, 20, 30, 40]
    assert log == [(what, number) for number in range(5) for what in ("begin", "end")]
    assert futures[0].result()[1].daemon, "a run that ends does not wait for it"
    line.close()


# -------------------------------------------------------------------------------------------------- the scorers
def built(weights, world=drawings, drop=False, scorers=None, watch=()):
    names = [*(name for row in weights.values() for name in row), *watch]
    entries = {name: (scorers or {}).get(name, {"kind": name}) for name in names}
    return S.build(registry.Asked(entries, weights, watch, world), "cpu", drop)


def test_the_tiny_worlds_scorers_are_its_own(capsys):
    some = built({"text": {"task": 1.0}, "quality": {"quality": 0.4, "mine": 0.6}}, scorers={"mine": {"kind": "ocr"}})
    assert [(s.name, s.low, s.high) for s in some.scorers.values()] == [(n, 0, 1) for n in ("task", "quality", "mine")]
    prompts = [p for p in drawings.make_prompts("text", "test", 2) for _ in range(G)]
    images = torch.stack([torch.from_numpy(drawings.draw({"word": word, "color": "black"})) for word in
                          (prompts[0].text[-4:-1], "ZZZ", "ACE", prompts[3].text[-4:-1], "ZZZ", "ACE")])  # fmt: skip
    found = some.ask(images, prompts, G)
    np.testing.assert_allclose(found.values[0], drawings.score_ocr(images, prompts), rtol=1e-6)
    assert found.values[0, [0, 3]].tolist() == [1, 1] and found.values[0, 1] < 1 and np.isnan(found.values[1:]).all()
    assert capsys.readouterr().err == "", "they have no known answers of their own"
    circle = drawings.make_prompts("composition", "test", 1) * 2
    with pytest.raises(RewardError, match="^scorer 'words': "):
        built({"default": {"words": 1.0}}, scorers={"words": {"kind": "ocr"}}).ask(torch.ones(2, 3, 24, 24), circle, 2)


def test_a_scorer_is_put_to_its_known_answer_and_takes_the_name_that_it_is_asked_for_by(capsys):
    kinds = {"plain": {"kind": "jpeg"}, "seen": {"kind": "jpeg"}}
    some = built({"default": {"plain": 2.0, "task": 1.0}}, drop=True, scorers=kinds, watch=("seen",))
    assert [s.name for s in some.scorers.values()] == ["plain", "task", "seen"] and some.drop
    assert some.watched == ("seen",) and some.weight("seen", prompt(0)) == 0
    assert capsys.readouterr().err == "reward jpeg: gave a known picture its known score\n" * 2


def test_a_scorer_that_fails_its_self_test_ends_the_run_before_another_is_loaded(monkeypatch):
    made = []

    def make(kind, *_):
        made.append(kind)
        return Scorer(kind, lambda images, prompts, sources=None: torch.zeros(len(prompts)), 0.0, 1.0)

    monkeypatch.setattr(registry, "make", make)
    with pytest.raises(RewardError, match="^scorer 'jpeg' failed its self-test"):
        built({"default": {"x": 1.0, "ocr": 1.0}}, None, scorers={"x": {"kind": "jpeg"}})
    assert made == ["jpeg"]


def test_the_editing_worlds_defaults_score_both_tasks_of_one_batch():
    """Perfect pictures of every category and kind, by --rewards' defaults: every answer is 1, from its own scorers."""
    some = S.build(registry.read("", ("t2i", "edit"), edits), "cpu")
    assert list(some.scorers) == ["preference", "quality", "instruction", "identity"]
    drawn = edits.make_prompts("t2i", "test", 6)
    rows = [(p, None, drawings.draw({"word": p.text[-4:-1], "color": "red"} if '"' in p.text else
             drawings.scene_of(p.metadata, random.Random(0), 0))) for p in drawn]  # fmt: skip
    for kind in edits.EDITS:
        source, result, text, asked = edits.sample_edit(kind, random.Random(3))
        edit = Prompt(text, "edit", {"tag": kind, **asked, "prompt": text}, "x:1")
        rows.insert(2, (edit, (torch.from_numpy(edits.draw(source)),), edits.draw(result)))
    prompts, sources, images = zip(*rows, strict=True)
    found = some.ask(torch.stack([torch.from_numpy(image) for image in images]), prompts, 1, sources)
    is_edit = np.array([p.task == "edit" for p in prompts])
    np.testing.assert_allclose(found.values[:2], np.where(is_edit, math.nan, 1) * np.ones((2, 1)), atol=1e-6)
    np.testing.assert_allclose(found.values[2:], np.where(is_edit, 1, math.nan) * np.ones((2, 1)), atol=1e-6)
    words = next(p for p in drawn if p.metadata["category"] == "typography")
    assert some.weight("preference", words) == 0.8 and some.weight("preference", drawn[0]) == 0.6


THREE = ["a dog", "a cat", "a cow"]
NO_ANSWER = [*([0.1, bad, 0.3] for bad in (math.nan, math.inf, -math.inf, None, 1.5, -0.5)),
             [0.1, 0.2], [0.1] * 4, [[0.1], [0.2], [0.3]], 0.5]  # fmt: skip


@pytest.mark.parametrize("scores", NO_ANSWER)
def test_an_answer_is_one_finite_number_a_prompt_within_the_bounds_or_an_error_that_names_scorer_and_prompt(scores):
    # (B, 1) times (B,) is (B, B): the shape bug of the released code starts with a score of shape (B, 1).
    with pytest.raises(RewardError, match="scorer 'ocr': " + (".*'a cat'" if np.shape(scores) == (3,) else "")):
        check_scores("ocr", scores, THREE, low=0, high=1)
    assert check_scores("s", [0, 1, 0.5], THREE, low=0, high=1).tolist() == [0, 1, 0.5], "bounds are inclusive"
    assert check_scores("s", [-9, 30, 0.5], THREE).tolist() == [-9, 30, 0.5], "and optional"
