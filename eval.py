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

import plan
import recipe
import settings
from settings import Settings, is_tiny, task_list

if __name__ == "__main__":
    plan.answer_early(sys.argv[1:], "eval.py")

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import adapters
import data
import flow
import models
import prompts as written
import ranks
import report
import rewards
import scoring
import sde
import tiny
from data import Prompt

# Every error that is the user's to mend: printed as one line, exit code 2.
USER_ERRORS = (settings.SettingsError, data.DataError, adapters.ModelError, rewards.RewardError, FloatingPointError)


# --------------------------------------------------------------------------------------------------------- prompts
def load_prompts(s: Settings, split: str, count: int, tasks: Sequence[str]) -> dict[str, list[Prompt]]:
    """Prompts of each task: the user's files (--prompts) or generated ones; DataError names file and line."""
    mine, make = read_own_prompts(s, split), tiny.make_prompts if is_tiny(s) else written.make_prompts
    found = {}
    for task in tasks:
        try:
            found[task] = mine.get(task) or make(task, split, count)
        except ValueError as fault:
            raise data.DataError(f"--{'eval' if split == 'test' else split}-prompts {count}: {fault}") from None
        if split == "test":
            found[task] = found[task][:count]
    return found


def read_own_prompts(s: Settings, split: str) -> dict[str, list[Prompt]]:
    """--prompts TASK=PATH ... -> prompts by task; "auto" routes each prompt by itself (F Eq. 7, `data.task_of`)."""
    found: dict[str, list[Prompt]] = {}
    for task, path in s.prompts.items():
        for prompt in data.read_prompts(path, "quality" if task == "auto" else task, split):
            if task == "auto":
                prompt = prompt._replace(task=data.task_of(prompt.text, prompt.metadata))
            if is_tiny(s):
                tiny.check_prompt(prompt)
            elif prompt.task not in settings.TASKS:
                known = ", ".join(settings.TASKS)
                raise data.DataError(f"{prompt.source}: a prompt of the task {prompt.task!r}; this model knows {known}")
            found.setdefault(prompt.task, []).append(prompt)
    return found


def batches(items: Sequence, size: int) -> list[Sequence]:
    """`items` in parts of `size`, the last one shorter; size 0: all in one part."""
    size = size or len(items)
    return [items[i : i + size] for i in range(0, len(items), size)]


def conditions(model: flow.FlowModel, texts: Sequence[str], cfg: float) -> tuple[flow.Cond, flow.Cond | None]:
    """Cond of the prompts and, where guidance is on, of as many empty prompts."""
    return model.encode(texts), None if cfg == 1 else model.encode([""] * len(texts))


# ---------------------------------------------------------------------------------------------------------- drawing
@torch.no_grad()
def draw(model: flow.FlowModel, prompts: Sequence[Prompt], s: Settings, seed: int) -> Tensor:
    """ODE samples (B, C, H, W) of the expert that is selected, latents on the CPU, the same on every rank.

    Noise depends on `seed` and on the row alone. Rank r draws rows r, r + world, ...; a last, incomplete round is
    filled up with the first rows again, because under FSDP every rank must run as many forwards as the others.
    """
    rank, world = ranks.rank_and_world()
    size = -(-len(prompts) // world)
    rows = [(k * world + rank) % len(prompts) for k in range(size)]
    ts, drawn = model.time_grid(s.eval_steps), []
    for part in batches(rows, s.micro_batch or 96):
        sources = [torch.Generator().manual_seed(data.seed_for("draw", seed, i)) for i in part]
        x = sde.standard_normal((len(part), *model.latent_shape), sources).to(model.device)
        cond, uncond = conditions(model, [prompts[i].text for i in part], s.cfg)
        drawn.append(sde.sample(lambda x, t, c=cond, u=uncond: model.velocity(x, t, c, u, s.cfg), x, ts).cpu())
    mine = torch.cat(drawn)
    if not dist.is_initialized():
        return mine
    parts = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(parts, mine)
    return torch.stack(parts, 1).flatten(0, 1)[: len(prompts)]  # row k * world + r is rank r's k-th


# ---------------------------------------------------------------------------------------------------------- scoring
def score(images: Tensor, prompts: Sequence[Prompt], task: str, panel: scoring.Panel | None, tiny_world: bool):
    """(named scores of the batch, one score per image, GenEval's tags) of images drawn for test prompts of a task.

    The tiny world is scored by its tasks' own rules; elsewhere every scorer of the panel has a column a task, and a
    task for which the panel has no weights has none.
    """
    if not tiny_world:
        if panel is None or any(panel.category(p) is None for p in prompts):  # a teacher's rewards: its own task's only
            return {}, [], {}
        found = panel.ask(images, prompts, 1)
        asked = {name: row[~np.isnan(row)] for name, row in zip(found.names, found.values, strict=True)}
        named = {f"{task} {name}": float(row.mean()) for name, row in asked.items() if len(row)}
        return named, list(panel.totals(found, prompts)), {}
    if task != "composition":
        each = tiny.SCORERS[tiny.TASK_SCORER[task]](images, prompts)
        return {task: sum(each) / len(each)}, each, {}
    each = tiny.score_verdict(images, prompts)
    verdicts, tags = [v == 1 for v in each], [p.metadata["tag"] for p in prompts]
    return {task: rewards.geneval_score(verdicts, tags)}, each, rewards.per_tag_accuracy(verdicts, tags)


def panel_of(s: Settings, device: torch.device) -> scoring.Panel | None:
    """The scorers that --rewards names for an evaluation; None in the tiny world and where it names none."""
    if is_tiny(s) or not s.rewards:
        return None
    return scoring.build(recipe.read(s), device, False, False)


def evaluate(
    model: flow.FlowModel, prompts: Mapping[str, Sequence[Prompt]], s: Settings, panel: scoring.Panel | None = None
) -> dict | None:
    """Scores of the selected expert, on rank 0 (None elsewhere; every rank must call it, since all draw).

    {"scores": {column: number}, "tags": {tag: accuracy}, "images": {task: (images, one score each)}}; in the tiny
    world the columns are the tasks and their average.
    """
    result: dict = {"scores": {}, "tags": {}, "images": {}}
    model.prepare(["", *(p.text for some in prompts.values() for p in some)])
    if panel is None and ranks.rank_and_world()[0] == 0:
        panel = panel_of(s, model.device)
    for task, some in prompts.items():
        latents = draw(model, some, s, data.seed_for("eval", s.seed, task))
        if ranks.rank_and_world()[0] > 0:
            continue
        images = model.decode(latents)
        numbers, each, tags = score(images, some, task, panel, is_tiny(s))
        result["images"][task] = (images, each)
        result["scores"] |= numbers
        result["tags"] |= tags
    if ranks.rank_and_world()[0] > 0:
        return None
    if is_tiny(s):
        result["scores"]["average"] = sum(result["scores"][task] for task in prompts) / len(prompts)
    return result


# --------------------------------------------------------------------------------------------------- whole models
def load_teachers(model: flow.FlowModel, s: Settings) -> dict[str, str]:
    """Put every teacher (and MAR's anchor) beside the student: {task: expert's name}, with "anchor" where MAR is on."""
    experts = {}
    for task, where in s.teachers.items():
        experts[task] = f"teacher:{task}"
        model.add_expert(experts[task], where)
    if s.mar > 0 and s.stage == "opd":
        experts["anchor"] = experts.get(s.anchor, "anchor")
        if experts["anchor"] == "anchor":
            model.add_expert("anchor", s.anchor)
    return experts


def locate_all(s: Settings) -> None:
    """Find (or fetch) everything that a run will read, before any of it is loaded. ModelError names what is not there.

    One rank a node goes first, so that a download happens once.
    """
    if ranks.local_rank() > 0:
        ranks.wait()
    adapters.locate(s.model, models.BASE_FILES)
    teachers = s.teachers.values() if s.stage in ("opd", "sft", "merge") else ()
    anchor = [s.anchor] if s.stage == "opd" and s.mar > 0 and s.anchor not in s.teachers else []
    for where in (*teachers, *anchor, *([s.init] if s.init else []), *s.compare.values()):
        adapters.kind(adapters.locate(where))
    if ranks.local_rank() == 0:
        ranks.wait()


def compare(s: Settings) -> tuple[dict[str, dict], Path]:
    """Base, every teacher and every --compare student on the test prompts -> (rows on rank 0, report)."""
    if not s.eval_prompts:
        raise settings.SettingsError("--eval-prompts 0: nothing would be compared; ask for at least one a task")
    device = ranks.start(s)
    locate_all(s)
    folder = Path(s.out) / s.name
    prompts = load_prompts(s, "test", s.eval_prompts, task_list(s))
    model = models.load(s, device)
    experts = load_teachers(model, s)
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
            result = evaluate(model, prompts, s, panel)
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
        s, _ = settings.parse(list(sys.argv[1:] if argv is None else argv), prog="eval.py")
        recipe.read(s)
        if s.dry_run:
            print(plan.describe(s, prog="eval.py"))
            return 0
        rows, where = compare(s)
    except USER_ERRORS as fault:
        return ranks.fail(fault)
    if rows:
        print(report.markdown_table({name: row["scores"] for name, row in rows.items()}))
        print(f"\npictures: {where.parent / 'samples'}\nreport:   {where}")
    return 0


if __name__ == "__main__":
    ranks.leave(main)
