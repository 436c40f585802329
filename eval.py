"""How good is a checkpoint? Every model of a list on the same prompts and noise, and the papers' tables of it.

    python eval.py --preset tiny --compare merged=runs/tiny-merge student=runs/tiny-opd
    torchrun --nproc_per_node=8 eval.py --compare base student=runs/flow-opd-opd --suite table2,arena --samples 4

1. draw    every model draws the test prompts with the ODE sampler (Q Eq. 3), each rank its share, each picture once
           (harness/drawn.py). A command that was stopped goes on when it is repeated.
2. score   what the suites or --rewards name scores the files. To score again, repeat the command: nothing is drawn.
3. tell    rows.jsonl (a row a picture), the table, the report; --export has the layouts of official evaluators.

Without a suite a published model has a column for each task and scorer, and the tiny worlds have their own: GenEval's
strict verdicts over tags, the OCR reward, print quality, or both sides of Q's tasks (harness/suites.py).
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import settings
from harness import cli, threads
from settings import Settings

if __name__ == "__main__":
    threads.sleep_while_waiting()
    cli.answer_early(sys.argv[1:], "eval.py")

import torch
from tqdm import tqdm

from data.common import write_atomic
from data.files import Prompt
from data.pictures import stacked
from harness import arena, drawn, export, load, ownership, page, plan, ranks, suites, tables
from harness.compare import RESAMPLES, elo
from models import flow
from scorers import panel as scoring
from scorers import registry
from scorers import world as published


def panel_of(s: Settings, device: torch.device) -> scoring.Panel | None:
    """The scorers of an evaluation, loaded and tested; None if none is asked for."""
    asked = suites.asked_of(s)
    return scoring.build(asked, device) if asked else None


def score(
    name: str, pictures: Sequence[drawn.Picture], folder: Path, s: Settings, panel: scoring.Panel | None
) -> list[dict]:
    """A model's rows (harness/suites.py), scored from the files of its pictures in `folder`, task by task."""
    world, rows = load.world_of(s), []
    shown = tqdm(total=len(pictures), desc=f"scoring {name}", leave=False, delay=1)
    for task, part in drawn.by_prompts(pictures, s.micro_batch or 96):
        images, prompts = stacked(folder / p.file for p in part), [p.prompt for p in part]
        found = dict(world.score(images, prompts, task, panel))
        if world.KINDS and settings.suite_list(s):  # a tiny world's own scores, and what a suite asks for besides
            found |= published.score(images, prompts, task, panel)
        for picture, *values in zip(part, *found.values(), strict=True):
            told = {metric: float(v) for metric, v in zip(found, values, strict=True) if not math.isnan(v)}
            rows.append(picture.row(name, folder, told))
        shown.update(len(part))
    shown.close()
    return rows


def evaluate(
    model: flow.FlowModel, name: str, prompts: Mapping[str, Sequence[Prompt]], s: Settings, cfg: float, folder: Path,
    panel: scoring.Panel | None = None,
) -> list[dict] | None:  # fmt: skip
    """The rows of the selected expert on rank 0; None on the other ranks, which call this too, since all of them draw.

    cfg is the guidance scale that it draws with. Its pictures are drawn anew, below the run's `folder`.
    """
    pictures, where = drawn.listed(prompts), folder / "pictures" / name
    drawn.draw_to(where, model, pictures, s, cfg, name, anew=True)
    if ranks.rank_and_world()[0] > 0:
        return None
    return score(name, pictures, where, s, panel)


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
    prompts = load.test_prompts(s)
    pictures = drawn.listed(prompts, s.samples)
    for layout in filter(None, s.export.split(",")):
        export.places(layout, pictures)
    if asked := suites.asked_of(s):
        registry.check(asked)
    if first:
        ownership.prepare(s)
    ranks.check_shared(folder)
    places = {"base": (None, settings.teacher_cfg(s))}
    places |= {f"teacher {task}": (where, settings.teacher_cfg(s)) for task, where in s.teachers.items()}
    places |= {name: (where, settings.student_cfg(s)) for name, where in s.compare.items()}
    folders = draw_all(s, device, folder, pictures, places)
    found = {}
    if first:
        panel = panel_of(s, device)
        rows = [row for name, where in folders.items() for row in score(name, pictures, where, s, panel)]
        exported(s, folder, rows, pictures, folders)
        found = tell(s, folder, rows, prompts, device)
    del lock
    return found, folder / "report.html"


def draw_all(
    s: Settings, device: torch.device, folder: Path, pictures: Sequence[drawn.Picture],
    places: Mapping[str, tuple[str | None, float]],
) -> dict[str, Path]:  # fmt: skip
    """{model: the folder of its pictures}, after they are drawn. places: {model: (where it is, guidance scale)}.

    Models are loaded only if one of them has something to draw.
    """
    base = load.identity_of(s.model, load.base_files(s))
    folders = {
        name: drawn.folder_of(folder, name, s, cfg, [base, *([load.identity_of(where)] if where else [])])
        for name, (where, cfg) in places.items()
    }
    if all(drawn.is_whole(where / p.file) for where in folders.values() for p in pictures):
        return folders
    model = load.base_model(s, device)
    for name, (where, _) in places.items():
        if where:
            model.add_expert(expert_of(name), where)
    for name, (where, cfg) in places.items():
        expert = expert_of(name) if where else None
        model.keep([expert] if expert else [])
        with model.adapter(expert):
            drawn.draw_to(folders[name], model, pictures, s, cfg, name)
    return folders


def expert_of(name: str) -> str:
    """What a model of the table is called beside the base; no name of a student is one of a teacher."""
    return name.replace(" ", ":") if name.startswith("teacher ") else f"compare:{name}"


def exported(
    s: Settings, folder: Path, rows: Sequence[dict], pictures: Sequence[drawn.Picture], folders: Mapping[str, Path]
) -> None:
    """Write every --export, and read what official code has said of an earlier one into the rows."""
    layouts = [word for word in s.export.split(",") if word]
    if "table3" in settings.suite_list(s) and "compbench" not in layouts:
        layouts.append("compbench")
    for layout, (name, where) in product(layouts, folders.items()):
        target = folder / "export" / layout / name
        export.export(layout, target, where, pictures)
        if layout == "compbench":
            told = export.official(target, pictures)
            for row in rows if told else ():
                if row["model"] == name and (value := told.get((row["task"], row["index"], row["sample"]))) is not None:
                    row["scores"]["official"] = value
            if lines := export.commands(target, told):
                print("\n".join(["run in T2I-CompBench's repository, then repeat this command:", *lines]))


def tell(
    s: Settings, folder: Path, rows: Sequence[dict], prompts: Mapping[str, Sequence[Prompt]], device: torch.device
) -> dict[str, dict]:
    """Write the report -> {model: its numbers}."""
    found, more = suites.numbers(rows, suites.of(s, rows), RESAMPLES), {}
    if above := {name: row["above"] for name, row in found.items() if "above" in row}:
        more["differences"] = tables.Table(above, f"minus {next(iter(found))}", tables.teachers(above))
    asked = suites.asked_of(s)
    if "arena" in settings.suite_list(s):
        aside = asked.scorers if asked else ()  # where rules vote, they do so by the world's own scores
        shown = [{**row, "scores": {k: v for k, v in row["scores"].items() if k not in aside}} for row in rows]
        votes = arena.vote(shown, folder, suites.arena_judge(s, str(device)))
        write_atomic(folder / "votes.jsonl", "".join(json.dumps(vote) + "\n" for vote in votes))
        models, wins, categories = arena.wins(votes)
        ratings = elo(wins, models, categories)
        more["arena"] = tables.Table(ratings, ceilings=tables.teachers(ratings), digits=0)
        print(tables.aligned(more["arena"]))
    teachers = {task: found[f"teacher {task}"]["scores"] for task in prompts if task in s.teachers}
    own = [scores[task].value for task, scores in teachers.items() if task in scores]
    notes = suites.left_out(s, asked)
    notes += [f"Mean of the teachers' own-task scores: {sum(own) / len(own):.3f}."] if own else []
    page.write(folder, s, found, rows, notes, load.seen_in_training(s), more)
    return found


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
        print("interrupted: repeat the command to go on; pictures that are drawn stay", file=sys.stderr)
        return 130
    if rows:
        print("\n".join(tables.lines_of(rows)))
        print(f"report: {where}")
    return 0


if __name__ == "__main__":
    ranks.leave(main)
