"""How good is a checkpoint? F Table 2's question: every task's score, for base, teachers, merged and student.

    python eval.py --preset tiny --compare merged=runs/tiny-merge student=runs/tiny-opd
    torchrun --nproc_per_node=8 eval.py --compare student=runs/flow-opd-opd --rewards jpeg=1

Every model draws the same test prompts from the same noise with the ODE sampler (Q Eq. 3). Under torchrun each rank
draws its share of them. In the tiny world, composition is the GenEval score (the unweighted mean of per-tag
accuracies), text the OCR reward, and quality the print quality on the open prompts. Their average is the plain mean of
the three. Pictures of other models are scored by what `--rewards` names, and drawn without scores if it names nothing.
Strict GenEval, OCR, DeQA and PickScore together make F Table 2's Avg.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import settings
from harness import cli, threads
from scorers import registry
from settings import Settings, is_tiny

if __name__ == "__main__":
    threads.sleep_while_waiting()
    cli.answer_early(sys.argv[1:], "eval.py")

import numpy as np
import torch
from torch import Tensor

import rewards
from data import files as data
from data.files import Prompt
from harness import load, plan, ranks, report, rollout
from models import flow
from scorers import panel as scoring
from tiny import drawings as tiny
from tiny import edits as tiny_edit

# F Table 2's columns: each task's test prompts under its own scorers. The paper does not say on which prompts it
# measures DeQA and PickScore.
TABLE2 = ("composition geneval", "text ocr", "quality deqa", "quality pickscore")


# ---------------------------------------------------------------------------------------------------------- scoring
def score(images: Tensor, prompts: Sequence[Prompt], task: str, panel: scoring.Panel | None, tiny_world: bool):
    """(named scores of the batch, one score for each image, accuracies by tag) of images of a task's test prompts.

    The tiny worlds are scored by their own rules. Elsewhere every scorer of the panel that is asked has a column.
    """
    if not tiny_world:
        return score_by_panel(images, prompts, task, panel) if panel else ({}, [], {})
    if task in settings.QWEN_TASKS:
        return score_two_sides(images, prompts, task)
    if task != "composition":
        each = tiny.SCORERS[tiny.TASK_SCORER[task]](images, prompts)
        return {task: sum(each) / len(each)}, each, {}
    each = tiny.score_verdict(images, prompts)
    verdicts, tags = [v == 1 for v in each], [p.metadata["tag"] for p in prompts]
    return {task: rewards.geneval_score(verdicts, tags)}, each, rewards.per_tag_accuracy(verdicts, tags)


def score_by_panel(images: Tensor, prompts: Sequence[Prompt], task: str, panel: scoring.Panel):
    """As `score`: the mean of each scorer's answers; of GenEval's strict verdicts, the mean over tags.

    A task for which the panel has no weights is not scored: a teacher's rewards are for its own task.
    """
    if any(panel.category(p) is None for p in prompts):
        return {}, [], {}
    found, named, by_tag = panel.ask(images, prompts, 1, rollout.sources(prompts)), {}, {}
    tags = [p.metadata.get("tag") for p in prompts]
    for name, row in zip(found.names, found.values, strict=True):  # (B,), nan for a picture that was not asked about
        if not np.isnan(row).all():
            named[f"{task} {name}"] = float(row[~np.isnan(row)].mean())
        if name == "geneval" and all(tags) and set(row) <= {0.0, 1.0}:
            named[f"{task} {name}"] = rewards.geneval_score(list(row == 1), tags)
            by_tag = rewards.per_tag_accuracy(list(row == 1), tags)
    return named, list(scoring.totals(found)), by_tag


def score_two_sides(images: Tensor, prompts: Sequence[Prompt], task: str):
    """As `score`, of Q's tasks in the tiny world: two sides of a picture, and their mean.

    t2i: alignment by strict rules, and print quality. edit: instruction following, and identity of the rest. The
    accuracies by category, or by kind of edit, are of the first side.
    """
    if task == "edit":
        sides = {"instruction": tiny_edit.score_instruction(images, prompts)}
        if all(p.metadata.get("keep") for p in prompts):  # a user's own edits need not say what they keep
            sides["identity"] = tiny_edit.score_identity(images, prompts, rollout.sources(prompts))
    else:
        sides = {"alignment": tiny_edit.score_alignment(images, prompts)}
        sides["aesthetic"] = tiny.score_quality(images, prompts)
    values = np.array([*sides.values()])  # (1 or 2, B)
    tags = np.array([p.metadata.get("tag" if task == "edit" else "category", task) for p in prompts])
    by_tag = {str(tag): float(values[0][tags == tag].mean()) for tag in dict.fromkeys(tags)}
    named = {f"{task} {name}": float(side.mean()) for name, side in zip(sides, values, strict=True)}
    return {task: float(values.mean()), **named}, list(values.mean(0)), by_tag


def panel_of(s: Settings, device: torch.device) -> scoring.Panel | None:
    """The scorers that --rewards names for an evaluation; None in the tiny worlds and if it names none."""
    if is_tiny(s) or not s.rewards:
        return None
    return scoring.build(registry.read(s.rewards, settings.rewarded_tasks(s), is_tiny(s)), device)


def evaluate(
    model: flow.FlowModel, prompts: Mapping[str, Sequence[Prompt]], s: Settings, cfg: float,
    panel: scoring.Panel | None = None,
) -> dict | None:  # fmt: skip
    """Scores of the selected expert on rank 0; None on the other ranks, which call this too, since all of them draw.

    cfg is the guidance scale that it draws with. Returns {"scores": {column: number}, "tags": {tag: accuracy},
    "images": {task: (images, one score each)}, "sources": {task: source pictures of edits}}.
    """
    first = ranks.rank_and_world()[0] == 0
    result: dict = {"scores": {}, "tags": {}, "images": {}, "sources": {}}
    rollout.encode_all(model, (p for some in prompts.values() for p in some), cfg != 1)
    if panel is None and first:
        panel = panel_of(s, model.device)
    for task, some in prompts.items():
        latents = rollout.draw(model, some, s.eval_steps, s.micro_batch, data.seed_for("eval", s.seed, task), cfg)
        if not first:
            continue
        images = model.decode(latents)
        numbers, each, tags = score(images, some, task, panel, is_tiny(s))
        result["images"][task] = (images, each)
        if shown := rollout.sources(some):
            result["sources"][task] = shown
        result["scores"] |= numbers
        result["tags"] |= tags
    scores = result["scores"]
    if is_tiny(s) and first:
        scores["average"] = sum(scores[task] for task in prompts) / len(prompts)
    elif result["tags"] and set(TABLE2) <= set(scores):  # scorers give DeQA / 5 and PickScore / 26
        geneval, ocr, deqa, pickscore = (scores[column] for column in TABLE2)
        printed = (deqa * rewards.HIGHEST_RATING, pickscore * rewards.PICKSCORE_SCALE)
        scores["Avg"] = rewards.table2_average(geneval, ocr, *printed)
    return result if first else None


# --------------------------------------------------------------------------------------------------- whole models
def compare(s: Settings) -> tuple[dict[str, dict], Path]:
    """Base, every teacher and every --compare student on the test prompts -> (rows on rank 0, the report's path)."""
    if not s.eval_prompts:
        raise settings.SettingsError("--eval-prompts 0: nothing would be compared; ask for at least one a task")
    device, first = ranks.start(s), ranks.rank_and_world()[0] == 0
    load.locate_all(s)
    folder = Path(s.out) / s.name
    prompts = load.load_prompts(s, "test", s.eval_prompts, settings.test_tasks(s))
    model = load.base_model(s, device)
    experts = load.load_teachers(model, s)
    names: dict[str, str | None] = {"base": None} | {f"teacher {task}": name for task, name in experts.items()}
    for name, where in s.compare.items():
        names[name] = f"compare:{name}"
        model.add_expert(names[name], where)
    rows, panel = {}, panel_of(s, device) if first else None
    for name, expert in names.items():
        if first:
            print(f"evaluating {name} ...", file=sys.stderr)
        model.keep([expert] if expert else [])
        with model.adapter(expert):
            cfg = settings.student_cfg(s) if name in s.compare else settings.teacher_cfg(s)
            result = evaluate(model, prompts, s, cfg, panel)
        if result:
            report.save_samples(folder, name.replace(" ", "-"), result, prompts)
            rows[name] = {key: result[key] for key in ("scores", "tags")}
    notes = []
    if is_tiny(s) and rows:
        own = [rows[f"teacher {t}"]["scores"][t] for t in prompts if t in experts]
        notes = [f"Mean of the teachers' own-task scores: {sum(own) / max(1, len(own)):.3f}."]
    if rows:
        report.write_report(folder, f"Evaluation: {s.name}", rows, notes)
    return rows, folder / "report.md"


def main(argv: Sequence[str] | None = None) -> int:
    try:
        s, _ = cli.parse(list(sys.argv[1:] if argv is None else argv), prog="eval.py")
        registry.read(s.rewards, settings.rewarded_tasks(s), is_tiny(s))
        if s.dry_run:
            return plan.show(s, {})
        rows, where = compare(s)
    except ranks.USER_ERRORS as fault:
        return ranks.fail(fault)
    if rows:
        print(report.markdown_table({name: row["scores"] for name, row in rows.items()}))
        print(f"\npictures: {where.parent / 'samples'}\nreport:   {where}")
    return 0


if __name__ == "__main__":
    ranks.leave(main)
