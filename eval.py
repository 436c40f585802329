"""How good is a checkpoint? F Table 2's question: every task's score, for base, teachers, merged and student.

    python eval.py --preset tiny --compare merged=runs/tiny-merge student=runs/tiny-opd
    torchrun --nproc_per_node=8 eval.py --compare student=runs/flow-opd-opd --rewards jpeg=1

Every model draws the same test prompts from the same noise with the ODE sampler (Q Eq. 3). Under torchrun each rank
draws its share of them. GenEval's number is the unweighted mean over tags of strict verdicts, never the graded reward
that GRPO trains with; a second table has the tags. In the tiny world that is the column composition, text is the OCR
reward, quality the print quality on the open prompts, and their average is the plain mean of the three. Pictures of
other models are scored by what `--rewards` names, and drawn without scores if it names nothing. If it names `geneval`
for composition, `ocr` for text, `deqa` and `pickscore` for quality, F Table 2's Avg is a column, too.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import settings
from harness import cli, threads
from settings import Settings

if __name__ == "__main__":
    threads.sleep_while_waiting()
    cli.answer_early(sys.argv[1:], "eval.py")

import torch

from data.batches import seed_for
from data.files import Prompt
from data.pictures import sources
from harness import load, ownership, plan, ranks, report, rollout
from models import flow
from scorers import panel as scoring


def named_panel(s: Settings, device: torch.device) -> scoring.Panel | None:
    """The scorers that --rewards names for an evaluation; None if it names none or the world has scorers of its own."""
    if load.world_of(s).KINDS or not s.rewards:
        return None
    return scoring.build(load.asked_of(s), device)


def evaluate(
    model: flow.FlowModel, prompts: Mapping[str, Sequence[Prompt]], s: Settings, cfg: float,
    panel: scoring.Panel | None = None,
) -> dict | None:  # fmt: skip
    """Scores of the selected expert on rank 0; None on the other ranks, which call this too, since all of them draw.

    cfg is the guidance scale that it draws with. Returns {"scores": {column: number}, "tags": {tag: accuracy},
    "images": {task: (images, one score each)}, "sources": {task: source pictures of edits}}.
    """
    first, world = ranks.rank_and_world()[0] == 0, load.world_of(s)
    result: dict = {"scores": {}, "tags": {}, "images": {}, "sources": {}}
    rollout.encode_all(model, (p for some in prompts.values() for p in some), cfg != 1)
    if panel is None and first:
        panel = named_panel(s, model.device)
    for task, some in prompts.items():
        latents = rollout.draw(model, some, s.eval_steps, s.micro_batch, seed_for("eval", s.seed, task), cfg)
        if not first:
            continue
        images = model.decode(latents)
        numbers, each, tags = world.score(images, some, task, panel)
        result["images"][task] = (images, each)
        if shown := sources(some):
            result["sources"][task] = shown
        result["scores"] |= numbers
        result["tags"] |= tags
    if first:
        result["scores"] |= world.average(result["scores"])
    return result if first else None


# --------------------------------------------------------------------------------------------------- whole models
def compare(s: Settings) -> tuple[dict[str, dict], Path]:
    """Base, every teacher and every --compare student on the test prompts -> (rows on rank 0, the report's path)."""
    if not s.eval_prompts:
        raise settings.SettingsError("--eval-prompts 0: nothing would be compared; ask for at least one a task")
    lock = load.claim(s)
    device, first = ranks.start(s), ranks.rank_and_world()[0] == 0
    load.locate_all(s)
    load.try_all(s)
    folder = ownership.of(s)
    prompts = load.load_prompts(s, "test", s.eval_prompts, settings.test_tasks(s))
    model = load.base_model(s, device)
    experts = load.load_teachers(model, s)
    names: dict[str, str | None] = {"base": None} | {f"teacher {task}": name for task, name in experts.items()}
    for name, where in s.compare.items():
        names[name] = f"compare:{name}"
        model.add_expert(names[name], where)
    if first:
        ownership.prepare(s)
    rows, panel = {}, named_panel(s, device) if first else None
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
    if rows:
        teachers = {task: rows[f"teacher {task}"]["scores"] for task in prompts if task in experts}
        own = [scores[task] for task, scores in teachers.items() if task in scores]
        notes = [f"Mean of the teachers' own-task scores: {sum(own) / len(own):.3f}."] if own else []
        notes += load.seen_in_training(s)
        report.write_report(folder, f"Evaluation: {s.name}", rows, notes)
    del lock
    return rows, folder / "report.md"


def main(argv: Sequence[str] | None = None) -> int:
    try:
        s, _ = cli.parse(list(sys.argv[1:] if argv is None else argv), prog="eval.py")
        load.asked_of(s)
        if s.dry_run:
            return plan.show(s, {})
        rows, where = compare(s)
    except (*ranks.USER_ERRORS, OSError) as fault:
        return ranks.fail(fault)
    except KeyboardInterrupt:
        print("interrupted: nothing is kept; repeat the command", file=sys.stderr)
        return 130
    if rows:
        print("\n".join(report.lines_of(rows)))
        print(f"pictures: {where.parent / 'samples'}\nreport:   {where}")
    return 0


if __name__ == "__main__":
    ranks.leave(main)
