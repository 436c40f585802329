"""How good is a checkpoint? F Table 2's question: every task's score, for base, teachers, merged and student.

    python eval.py --preset tiny --compare merged=runs/tiny-merge student=runs/tiny-opd
    torchrun --nproc_per_node=8 eval.py --compare student=runs/flow-opd-opd --rewards jpeg=1

Every model draws the same test prompts from the same noise with the ODE sampler (Q Eq. 3); under torchrun each rank
draws its share of them. In the tiny world, composition is the GenEval score, the unweighted mean of per-tag
accuracies; text the OCR reward; quality the print quality on the open prompts. The average is the plain mean of the
three: the tiny world's counterpart of F Table 2's Avg (`rewards.table2_average` is the paper's own, over its four
metrics). Pictures of other models are scored by what `--rewards` names, and drawn without scores if it names nothing.
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


# ---------------------------------------------------------------------------------------------------------- scoring
def score(images: Tensor, prompts: Sequence[Prompt], task: str, panel: scoring.Panel | None, tiny_world: bool):
    """(named scores of the batch, one score per image, accuracies by tag) of images drawn for test prompts of a task.

    The tiny worlds are scored by their tasks' own rules; elsewhere every scorer of the panel has a column a task, and a
    task for which the panel has no weights has none.
    """
    if not tiny_world:
        if panel is None or any(panel.category(p) is None for p in prompts):  # a teacher's rewards: its own task's only
            return {}, [], {}
        found = panel.ask(images, prompts, 1, rollout.sources(prompts))
        asked = {name: row[~np.isnan(row)] for name, row in zip(found.names, found.values, strict=True)}
        named = {f"{task} {name}": float(row.mean()) for name, row in asked.items() if len(row)}
        return named, list(scoring.totals(found)), {}
    if task in settings.QWEN_TASKS:
        return score_two_sides(images, prompts, task)
    if task != "composition":
        each = tiny.SCORERS[tiny.TASK_SCORER[task]](images, prompts)
        return {task: sum(each) / len(each)}, each, {}
    each = tiny.score_verdict(images, prompts)
    verdicts, tags = [v == 1 for v in each], [p.metadata["tag"] for p in prompts]
    return {task: rewards.geneval_score(verdicts, tags)}, each, rewards.per_tag_accuracy(verdicts, tags)


def score_two_sides(images: Tensor, prompts: Sequence[Prompt], task: str):
    """As `score`, of Q's tasks in the tiny world: what was asked for, what it costs, and the mean of the two.

    t2i: alignment by strict rules, and print quality; edit: instruction following, and identity of the rest. By
    category, or by kind of edit, stands the first of the two.
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
    """The scorers that --rewards names for an evaluation; None in the tiny world and where it names none."""
    if is_tiny(s) or not s.rewards:
        return None
    return scoring.build(registry.read(s.rewards, settings.rewarded_tasks(s), is_tiny(s)), device)


def evaluate(
    model: flow.FlowModel, prompts: Mapping[str, Sequence[Prompt]], s: Settings, cfg: float,
    panel: scoring.Panel | None = None,
) -> dict | None:  # fmt: skip
    """Scores of the selected expert, on rank 0 (None elsewhere; every rank must call it, since all draw).

    cfg: the guidance scale it draws with. {"scores": {column: number}, "tags": {tag: accuracy}, "images": {task:
    (images, one score each)}, "sources": {task: source pictures of edits}}; in the tiny worlds the columns are the
    tasks and their average.
    """
    result: dict = {"scores": {}, "tags": {}, "images": {}, "sources": {}}
    rollout.encode_all(model, (p for some in prompts.values() for p in some), cfg != 1)
    if panel is None and ranks.rank_and_world()[0] == 0:
        panel = panel_of(s, model.device)
    for task, some in prompts.items():
        latents = rollout.draw(model, some, s.eval_steps, s.micro_batch, data.seed_for("eval", s.seed, task), cfg)
        if ranks.rank_and_world()[0] > 0:
            continue
        images = model.decode(latents)
        numbers, each, tags = score(images, some, task, panel, is_tiny(s))
        result["images"][task] = (images, each)
        if shown := rollout.sources(some):
            result["sources"][task] = shown
        result["scores"] |= numbers
        result["tags"] |= tags
    if ranks.rank_and_world()[0] > 0:
        return None
    if is_tiny(s):
        result["scores"]["average"] = sum(result["scores"][task] for task in prompts) / len(prompts)
    return result


# --------------------------------------------------------------------------------------------------- whole models
def compare(s: Settings) -> tuple[dict[str, dict], Path]:
    """Base, every teacher and every --compare student on the test prompts -> (rows on rank 0, report)."""
    if not s.eval_prompts:
        raise settings.SettingsError("--eval-prompts 0: nothing would be compared; ask for at least one a task")
    device = ranks.start(s)
    load.locate_all(s)
    folder = Path(s.out) / s.name
    prompts = load.load_prompts(s, "test", s.eval_prompts, settings.test_tasks(s))
    model = load.base_model(s, device)
    experts = load.load_teachers(model, s)
    names: dict[str, str | None] = {"base": None} | {f"teacher {task}": name for task, name in experts.items()}
    for name, where in s.compare.items():
        names[name] = f"compare:{name}"
        model.add_expert(names[name], where)
    rows, panel = {}, panel_of(s, device) if ranks.rank_and_world()[0] == 0 else None
    for name, expert in names.items():
        if ranks.rank_and_world()[0] == 0:
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
