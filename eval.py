"""How good is a checkpoint? F Table 2's question: every task's score, for base, teachers, merged and student.

    python eval.py --compare merged=runs/tiny-merge student=runs/tiny-opd

Every model draws the same test prompts from the same noise with the ODE sampler (Q Eq. 3). Composition is the
GenEval score, the unweighted mean of per-tag accuracies; text the OCR reward; quality the print quality on the
open prompts. The average is the plain mean of the three: the tiny world's counterpart of F Table 2's Avg
(`rewards.table2_average` is the paper's own, over its four metrics).
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

import data
import models
import rewards
import runtime
import sde
import settings
import tiny
from data import Prompt
from settings import Settings, task_list

# Every error that is the user's to mend: printed as one line, exit code 2.
USER_ERRORS = (settings.SettingsError, data.DataError, models.ModelError, rewards.RewardError, FloatingPointError)


def load_prompts(s: Settings, split: str, count: int, tasks: Sequence[str]) -> dict[str, list[Prompt]]:
    """Prompts of each task: the user's files (--prompts) or the tiny world's own; DataError names file and line."""
    mine = read_own_prompts(s.prompts, split)
    prompts = {}
    for task in tasks:
        prompts[task] = mine.get(task) or tiny.make_prompts(task, split, count)
        if split == "test":
            prompts[task] = prompts[task][:count]
    return prompts


def read_own_prompts(paths: Mapping[str, str], split: str) -> dict[str, list[Prompt]]:
    """--prompts TASK=PATH ... -> prompts by task; "auto" routes each prompt by itself (F Eq. 7, `data.task_of`)."""
    found: dict[str, list[Prompt]] = {}
    for task, path in paths.items():
        for prompt in data.read_prompts(path, "quality" if task == "auto" else task, split):
            if task == "auto":
                prompt = prompt._replace(task=data.task_of(prompt.text, prompt.metadata))
            tiny.check_prompt(prompt)
            found.setdefault(prompt.task, []).append(prompt)
    return found


@torch.no_grad()
def draw(model: models.FlowModel, prompts: Sequence[Prompt], steps: int, cfg: float, seed: int, batch=96) -> Tensor:
    """ODE samples (B, 3, H, W) in [0, 1] of the adapter that is selected; noise depends on `seed` and row alone."""
    noise = torch.randn((len(prompts), *model.latent_shape), generator=torch.Generator().manual_seed(seed))
    images = []
    for x, part in zip(noise.split(batch), batches(prompts, batch), strict=True):
        cond, uncond = conditions(model, [p.text for p in part], cfg)
        x = sde.sample(lambda x, t, c=cond, u=uncond: model.velocity(x, t, c, u, cfg), x, model.time_grid(steps))
        images.append(model.decode(x))
    return torch.cat(images)


def batches(items: Sequence, size: int) -> list[Sequence]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def conditions(model: models.FlowModel, texts: Sequence[str], cfg: float) -> tuple[models.Cond, models.Cond | None]:
    """Cond of the prompts and, where guidance is on, of as many empty prompts."""
    return model.encode(texts), None if cfg == 1 else model.encode([""] * len(texts))


def score(images: Tensor, prompts: Sequence[Prompt], task: str) -> tuple[float, list[float], dict[str, float]]:
    """(the task's score, one score per image, details) of images drawn for test prompts of one task."""
    if task != "composition":
        each = tiny.SCORERS[tiny.TASK_SCORER[task]](images, prompts)
        return sum(each) / len(each), each, {}
    each = tiny.score_verdict(images, prompts)
    verdicts, tags = [v == 1 for v in each], [p.metadata["tag"] for p in prompts]
    return rewards.geneval_score(verdicts, tags), each, rewards.per_tag_accuracy(verdicts, tags)


def evaluate(model: models.FlowModel, prompts: Mapping[str, Sequence[Prompt]], s: Settings) -> dict:
    """Scores of the selected adapter: {task: score, "average", "tags", "images": {task: (images, scores)}}."""
    result: dict = {"tags": {}, "images": {}}
    for task, some in prompts.items():
        images = draw(model, some, s.eval_steps, s.cfg, data.seed_for("eval", s.seed, task))
        result[task], each, details = score(images, some, task)
        result["images"][task] = (images, each)
        result["tags"].update(details)
    result["average"] = sum(result[task] for task in prompts) / len(prompts)
    return result


def markdown_table(rows: Mapping[str, Mapping], columns: Sequence[str], digits: int = 3) -> str:
    """{name: {column: number}} -> a markdown table; missing numbers stay empty."""
    lines = [f"| model | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for name, row in rows.items():
        cells = [f"{row[c]:.{digits}f}" if c in row else "" for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def save_samples(
    folder: Path, name: str, result: dict, prompts: Mapping[str, Sequence[Prompt]], count: int = 16
) -> None:
    """One grid a task with prompts and scores, samples/NAME-TASK.png."""
    for task, (images, each) in result["images"].items():
        captions = [f"{p.text}\n{value:.2f}" for p, value in zip(prompts[task][:count], each, strict=False)]
        runtime.save_grid(folder / "samples" / f"{name}-{task}.png", images[:count], captions)


def write_report(
    folder: Path, title: str, rows: dict[str, dict], tasks: Sequence[str], notes: Sequence[str] = ()
) -> Path:
    """report.md of a run: the table, GenEval's tags, the curves and every grid in samples/."""
    tags = [t for t in tiny.TEST_TAGS if any(t in row["tags"] for row in rows.values())]
    parts = [f"# {title}", "", markdown_table(rows, [*tasks, "average"]), ""]
    if tags:
        parts += ["Composition by GenEval tag:", "", markdown_table({n: r["tags"] for n, r in rows.items()}, tags), ""]
    parts += [*notes, ""]
    pictures = [*runtime.plot_metrics(folder), *sorted((folder / "samples").glob("*.png"))]
    for picture in dict.fromkeys(pictures):
        parts += [f"![{picture.stem}](samples/{picture.name})", ""]
    runtime.write_atomic(folder / "report.md", "\n".join(parts))
    numbers = {n: {k: v for k, v in row.items() if k != "images"} for n, row in rows.items()}
    runtime.write_atomic(folder / "results.json", json.dumps(numbers, indent=1) + "\n")
    return folder / "report.md"


def load_teachers(model: models.FlowModel, s: Settings) -> dict[str, str]:
    """Put every teacher (and MAR's anchor) on the backbone: {task: adapter name}, with "anchor" where MAR is on."""
    experts = {}
    for task, path in s.teachers.items():
        experts[task] = f"teacher:{task}"
        state, config = models.load_adapter(runtime.adapter_folder(path), model)
        model.add_adapter(experts[task], config, state)
    if s.mar > 0 and s.stage == "opd":
        experts["anchor"] = experts.get(s.anchor, "anchor")
        if experts["anchor"] == "anchor":
            state, config = models.load_adapter(runtime.adapter_folder(s.anchor), model)
            model.add_adapter("anchor", config, state)
    return experts


def compare(s: Settings) -> tuple[dict[str, dict], Path]:
    """Base, every teacher and every --compare adapter on the test prompts -> (rows, report)."""
    runtime.start(s.threads)
    folder = Path(s.out) / s.name
    prompts = load_prompts(s, "test", s.eval_prompts, task_list(s))
    model = models.load_tiny(runtime.adapter_folder(s.model))
    experts = load_teachers(model, s)
    names: dict[str, str | None] = {"base": None} | {f"teacher {task}": name for task, name in experts.items()}
    for name, path in s.compare.items():
        state, config = models.load_adapter(runtime.adapter_folder(path), model)
        model.add_adapter(names.setdefault(name, f"compare:{name}"), config, state)
    rows = {}
    for name, adapter in names.items():
        print(f"evaluating {name} ...", file=sys.stderr)
        with model.adapter(adapter):
            rows[name] = evaluate(model, prompts, s)
        save_samples(folder, name.replace(" ", "-"), rows[name], prompts)
    ceiling = sum(rows[f"teacher {t}"][t] for t in prompts if t in experts) / max(1, sum(t in experts for t in prompts))
    note = f"Mean of the teachers' own-task scores: {ceiling:.3f}."
    return rows, write_report(folder, f"Evaluation: {s.name}", rows, list(prompts), [note])


def main(argv: Sequence[str] | None = None) -> int:
    try:
        s, _ = settings.parse(list(sys.argv[1:] if argv is None else argv), prog="eval.py")
        rows, report = compare(s)
    except USER_ERRORS as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    print(markdown_table(rows, [*task_list(s), "average"]))
    print(f"\npictures: {report.parent / 'samples'}\nreport:   {report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
