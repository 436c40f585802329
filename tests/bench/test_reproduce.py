"""bench/reproduce.py: what a verdict says of numbers by hand, what is fresh about the split, what is written where."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

import train
from bench import claims, reproduce
from tiny import drawings, edits


def claim_of(*above):
    return claims.Claim("x", "A beats B", "F", {"A": "opd", "B": "mix"}, above, ("text",))


@pytest.mark.parametrize("a, b, said", [
    ((0.9, 0.8, 0.85), (0.7, 0.65, 0.6), "**Reproduced** (A - B, text: 0.200 ± 0.050; 3 seeds)."),
    ((0.9, 0.5, 0.85), (0.7, 0.65, 0.6), "**Not reproduced** (A - B, text: 0.100 ± 0.218; 3 seeds)."),  # a seed is not
    ((0.9, 0.71), (0.5, 0.7), "**Not reproduced** (A - B, text: 0.205 ± 0.276; 2 seeds)."),  # the spread is larger
    ((0.5,), (0.25,), "**Not decided** (A - B, text: 0.250; 1 seed)."),
])  # fmt: skip
def test_a_claim_holds_in_every_seed_and_by_more_than_the_spread(a, b, said):
    seeds = {i: {"A": {"scores": {"text": x}}, "B": {"scores": {"text": y}}} for i, (x, y) in enumerate(zip(a, b))}
    assert reproduce.verdict(claim_of(("A", "B", "text")), seeds) == said
    both = reproduce.verdict(claim_of(("A", "B", "text"), ("B", "A", "text")), seeds)
    word = {"**R": "**Reproduced in part**", "**N": "**Not reproduced**"}[said[:3]]
    assert both.startswith(word if len(a) > 1 else "**Not decided**")


def test_a_verdict_counts_the_seeds_of_its_pairs_and_a_page_takes_rows_of_fewer_seeds(monkeypatch):
    """B has two of three seeds, and a second column in one: a run that was stopped leaves such records."""
    seeds = {i: {"A": {"scores": {"text": 0.75, "noise": 1.0}}} for i in range(3)}
    for i, own in ((0, {"text": 0.5}), (1, {"text": 0.5, "noise": 2.0})):
        seeds[i]["B"] = {"scores": own}
    claim = claim_of(("A", "B", "text"))._replace(columns=("text", "noise"))
    assert reproduce.verdict(claim, seeds) == "**Reproduced** (A - B, text: 0.250 ± 0.000; 2 seeds)."
    monkeypatch.setattr(reproduce, "SEEDS", [0, 1, 2])
    monkeypatch.setattr(reproduce, "found_by", lambda _, seed: seeds[seed])
    monkeypatch.setattr(reproduce, "records", dict)
    text = "\n".join(reproduce.section(claim))
    assert "| B | <u>0.500 ± 0.000</u> | <u>2.000</u> |" in text and "B (2 of 3 seeds)" in text


def test_a_q_row_that_is_drawn_with_guidance_is_another_measurement_than_the_plain_one(tmp_path, monkeypatch):
    """Q Fig. 3 asks both of the same three teachers."""
    claim = next(claim for claim in claims.CLAIMS if claim.number == "7c")
    assert len(reproduce.needs(claim)) == len(claim.rows) == 6
    scales = []
    monkeypatch.setattr(reproduce, "drawn", lambda model, s, some, seed, cfg: scales.append(cfg) or torch.zeros(0))
    monkeypatch.setattr(reproduce, "fresh", lambda world, task: [])
    monkeypatch.setattr(edits, "score", lambda *_: {})
    monkeypatch.setattr(reproduce.suites, "numbers", lambda *_: {"": {"scores": {"average": 0.5}}})
    monkeypatch.setattr(reproduce, "RECORDS", tmp_path / "records.jsonl")
    rows = next(claim for claim in claims.CLAIMS if claim.number == "7b").rows
    for name in (rows["base"], "q-"):
        reproduce.scores_of(name, 0)
    assert scales == [2.0, 2.0, 1.0, 1.0], "tiny-qwen's --cfg, t2i and edits; none"


@pytest.mark.parametrize("world, tasks", [(drawings, drawings.TASKS), (edits, ("t2i", "edit"))])
def test_the_fresh_split_has_no_seen_prompt_but_of_tags_that_have_no_other(world, tasks):
    for task in tasks:
        seen = {p.text for p in world.make_prompts(task, "test", 192)}
        found = reproduce.fresh(world, task)
        assert len(found) == 96
        tags = Counter(p.metadata["tag"] for p in found) if task == "composition" else {"": 96}
        assert set(tags.values()) == {96 // len(tags)}
        old = {p.metadata.get("tag") for p in found if p.text in seen}
        assert old == ({*tags} - {"color_attr"} if task == "composition" else set())


def test_a_run_is_made_once_after_what_it_needs_and_scored_on_the_fresh_split(tmp_path, monkeypatch):
    (tmp_path / "assets").symlink_to(Path("assets").resolve())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "fresh", lambda world, task: world.make_prompts(task, "test", 3))
    step = "--stage opd --steps 1 --prompts-per-step 3 --keep 9 --save-every 1"
    runs = {"merge": "--stage merge", "far": f"{step} --init @merge", "teacher-states": f"{step} --drawn-states 0"}
    monkeypatch.setattr(claims, "RUNS", runs)
    monkeypatch.setattr(reproduce, "RUNS", runs)
    rows = {"base": "", "far": "far", "off": "teacher-states"}
    monkeypatch.setattr(reproduce, "CLAIMS", [claims.Claim("x", "", "", rows, (), ("average", "noise"))])
    monkeypatch.setattr(reproduce, "SEEDS", [3])
    page = tmp_path / "docs/RESULTS.md"
    page.parent.mkdir()
    page.write_text("".join(reproduce.MARKS))
    reproduce.main([])
    found = reproduce.found_by(reproduce.CLAIMS[0], 3)
    assert list(found) == list(rows)
    for row in found.values():
        scores = row["scores"]
        assert scores["average"] == pytest.approx(sum(scores[task] for task in drawings.TASKS) / 3)
        assert scores["diversity"] > 0.01 and scores.get("noise", 1) > 0
    assert "noise" in found["far"]["scores"] and found["far"]["scores"]["average"] != found["base"]["scores"]["average"]
    assert list(found["far"]["curve"]) == ["000001"] and found["far"]["scores"]["seconds"] > 0
    assert found["far"]["command"].startswith("python train.py --preset tiny --stage opd --steps 1")
    monkeypatch.setattr(train, "main", lambda flags: pytest.fail("it is there"))
    monkeypatch.setattr(reproduce, "drawn", lambda *_: pytest.fail("it is scored"))
    monkeypatch.setattr(reproduce, "gradients", lambda *_: pytest.fail("its noise is known"))
    before = page.read_text()
    reproduce.main([])
    assert str(reproduce.found_by(reproduce.CLAIMS[0], 3)) == str(found) and page.read_text() == before


def test_the_page_is_written_between_its_marks_from_the_records(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "CLAIMS", [claim_of(("A", "B", "text"))])
    lines = []
    for seed, (a, b) in enumerate(((0.75, 0.5), (0.5, 0.375))):
        for run, value in (("opd", a), ("mix", b)):
            command = f"python train.py {' '.join(claims.flags_of(run, seed))} --name x"
            row = {"run": run, "seed": seed, "scores": {"text": value}, "seconds": 90.0, "commit": "abc1234"}
            lines.append(json.dumps(row | {"command": command}) + "\n")
    page = tmp_path / "docs/RESULTS.md"
    page.parent.mkdir()
    (tmp_path / "docs/reproduced.jsonl").write_text("".join(lines))
    page.write_text(f"before\n{reproduce.MARKS[0]}old\n{reproduce.MARKS[1]}after\n")
    reproduce.main(["page"])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "**x. A beats B** (F). **Reproduced** (A - B, text: 0.188 ± 0.088; 2 seeds)." in text
    assert "| A | **0.625 ± 0.177** |" in text and "commit abc1234, 6 minutes" in text
    assert "hours of one free core are left for seeds 0, 1, 2" in text, "the third seed"
    assert reproduce.estimate(reproduce.CLAIMS, [0, 1]) == 0
    assert reproduce.estimate(reproduce.CLAIMS * 2, [2]) == pytest.approx((100 * 1.0 + 50 * 2.5 + 2 * 15) / 3600)
    with pytest.raises(SystemExit, match="nothing"):
        reproduce.main(["nothing"])
    reproduce.is_of.cache_clear()
    monkeypatch.setitem(claims.RUNS, "opd", claims.RUNS["opd"] + " --mar 0")
    assert ("opd", 0) not in reproduce.records() and ("mix", 0) in reproduce.records(), "another command's numbers"
