"""Both papers' claims in miniature (bench/claims.py), and the section of docs/RESULTS.md that says how each came out.

    python -m bench.reproduce             every claim, in the order of bench/claims.py; says first how long it takes
    python -m bench.reproduce 4 7a        these claims
    python -m bench.reproduce page        nothing is run: the page is written from what has been run
    QUICK=1 python -m bench.reproduce     one seed, a tenth of the steps, a third of the prompts, no rate tuned

SEEDS=0,1 chooses seeds. A finished run is not run again, an interrupted one goes on. What is measured becomes a line of
docs/reproduced.jsonl at once: run, seed, scores on a fresh split, command, commit, CPU seconds. The page is written
from these lines alone, so that what another machine has measured stays. Two processes may share the claims.

The fresh split: of each task 96 test prompts that are not among the 192 on which recipes were chosen, in noise that
none was looked at with. Tags of composition with so few test prompts that all of them are among the 192 (all but
color_attr) repeat them: there only the noise is new.
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from itertools import cycle, islice, product
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

import opd
import sde
import train
from bench import flow_opd
from bench.claims import CLAIMS, QUICK, RUNS, SEEDS, TEACHERS, TUNED, Claim, flags_of, folder_of, world_of
from bench.runs import ends, parsed
from bench.runs import trained as run_to_its_end
from data.batches import seed_for
from data.common import write_atomic
from data.files import Prompt
from harness import load, ranks, rollout, suites, tables
from harness.drawn import Picture
from harness.run import Run, read_metrics
from models import hub
from scorers.common import diversity

COUNT, TARGET = (30 if QUICK else 96), 0.85
SECONDS = {"grpo": 2.5, "nft": 2.5, "opd": 1.0, "sft": 0.3, "reward": 0.15}  # a step, on one free core
OVERHEAD = 6 if QUICK else 15  # seconds of a run besides its steps: loading, and the fresh split
RECORDS = Path("runs/quick.jsonl" if QUICK else "docs/reproduced.jsonl")
PAGE, MARKS = Path("docs/RESULTS.md"), ("<!-- bench.reproduce -->\n", "<!-- /bench.reproduce -->\n")


# --------------------------------------------------------------------------------------------------------- the runs
def trained(name: str, seed: int) -> Path:
    """The folder of a run that is finished, after all that it needs."""
    folder = folder_of(name, seed)
    for needed in re.findall(r"@([\w-]+)", RUNS[name]):
        trained(needed, seed)
    done = folder / "done"
    if done.exists() and not is_of(done.read_text(), name, seed):
        raise SystemExit(f"{folder} was made by another command than today's: remove it")
    if not done.exists():
        flags = [*flags_of(name, seed), *tuned(name), "--name", folder.name]
        with walked_by_teachers() if name == "teacher-states" else mock.patch.dict({}):
            run_to_its_end(flags)
        if "reward" in flags:
            recipe = {"scorers": {"judge": {"kind": "trained", "model": str(folder)}},
                      "weights": {"default": {"judge": 1.0}}}  # fmt: skip
            write_atomic(folder / "reward.json", json.dumps(recipe))
        write_atomic(done, f"python train.py {' '.join(flags)}")
    return folder


def tuned(name: str) -> list[str]:
    """--lr with the best training reward, for a run in TUNED: the reward is that of the rollouts, never of a test."""
    if name not in TUNED or QUICK:
        return []
    flags, found = flags_of(name, 0), {}
    s = parsed(*flags)
    for factor in TUNED[name]:
        folder = Path("runs", f"repro-{name}-lr{factor}")
        if not (folder / "done").exists():
            more = ["--lr", f"{s.lr * factor:.3g}", "--steps", str(s.steps // 2), "--name", folder.name]
            run_to_its_end([*flags, *more])
            write_atomic(folder / "done", commit())
        found[factor] = ends(folder, "reward")[1]
    return ["--lr", f"{s.lr * max(found, key=found.get):.3g}"]


@contextmanager
def walked_by_teachers() -> Iterator[None]:
    """`train.visits` with one change: the routed teacher walks, and the student learns on *its* states (off-policy)."""

    def visits(run, parts, trained_steps, experts):
        for part in parts:
            cond, uncond = rollout.conditions(run.model, rollout.prompts_of(part), 1.0)
            student = rollout.Field(run.model, cond, uncond, 1.0)
            routed = opd.route([row.prompt.task for row in part], experts)

            def teacher(x, t, routed=routed, cond=cond):
                def one(name, rows, x, t):
                    with run.model.adapter(name):
                        return run.model.velocity(x, t, cond.rows(rows), None, 1.0)

                return opd.target_velocity(routed, one, x, t)

            x, noise = rollout.pure_noise(run.model, part)
            level, window, kernel = rollout.noise_of(run.s)
            with torch.no_grad():
                walk = sde.rollout(teacher, x, run.model.time_grid(run.s.num_steps), level, kernel, window, noise)
                steps = [step for step in walk if step.index in trained_steps]
            label = (step.v for step in steps)
            about = (run.s.weight, run.s.log_prob, run.s.clip, run.s.advantage_clip)
            yield ((opd.Visit(at, v, None, None, *about), student(at.x, at.t)) for at, v in zip(steps, label))

    with mock.patch.object(train, "visits", visits):
        yield


def commit() -> str:
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()


# --------------------------------------------------------------------------------------------------- the fresh split
@cache
def fresh(world, task: str) -> list[Prompt]:
    """COUNT test prompts of a task, every tag as often: unseen ones, or, if a tag has none, its seen ones again."""
    seen = {p.text for p in world.make_prompts(task, "test", 192)}
    many = {p.text: p for p in world.make_prompts(task, "test", 3000, seed=77)}.values()
    tags: dict[str, list[Prompt]] = {}
    for prompt in many:
        tags.setdefault(prompt.metadata.get("tag", "") if task == "composition" else "", []).append(prompt)
    for own in tags.values():
        own[:] = [p for p in own if p.text not in seen] or own
    return list(islice((next(turn) for turn in cycle([cycle(own) for own in tags.values()])), COUNT))


def scores_of(name: str, seed: int) -> None:
    """Record what the fresh split says of a run, of a shipped adapter (a folder) or of the base ("")."""
    run, _, guided = name.partition(" | ")
    base, began = run in ("", "q-"), time.process_time()
    folder = trained(run, seed) if run in RUNS else Path(run)
    s = parsed(*world_of(run), "--stage", "opd")
    model, world, cfg = load.base_model(s, ranks.start(s)), load.world_of(s), s.cfg if guided else 1.0
    prompts = {task: fresh(world, task) for task in s.tasks.split(",")}
    steps = hub.checkpoints_in(folder) if run in RUNS else [Path(run)]
    curve: dict[str, float] = {}
    for where_from in steps if "--keep" in RUNS.get(run, "") else steps[-1:]:
        if not base:
            model.add_expert(where_from.name, str(where_from))
        with model.adapter(None if base else where_from.name):
            rows = []
            for task, some in prompts.items():
                told = world.score(drawn(model, s, some, seed, cfg), some, task)
                for i, (p, *own) in enumerate(zip(some, *told.values(), strict=True)):
                    rows.append(Picture(p, task, i, 0).row("", folder, dict(zip(told, own, strict=True))))
            scores = suites.numbers(rows, suites.WORLDS[s.preset])[""]["scores"]
            if "quality" in prompts:
                four = [p for p in prompts["quality"][:16] for _ in range(4)]
                groups = drawn(model, s, four, seed + 100, cfg).unflatten(0, (-1, 4))
                scores["diversity"] = statistics.mean(diversity(group.numpy()) for group in groups)
        curve[where_from.name[5:]] = scores["average"]
    if metrics := read_metrics(folder):
        scores["gap at first"], scores["gap at last"] = ends(folder, "gap")
        scores["seconds"] = sum(row["seconds"] for row in metrics)  # of the steps alone
        if len(curve) == 3:
            scores |= zip(("a third", "two thirds"), curve.values())
        own = parsed(*flags_of(run, seed))
        per_step = own.prompts_per_step * own.group_size
        reached = [int(step) * per_step for step, average in curve.items() if average >= TARGET]
        scores["to 0.85"] = min(reached, default=float("nan"))
    made = folder / "done"
    record(name, seed, began, scores=scores, curve=curve, command=made.read_text() if made.exists() else "")


def drawn(model, s, prompts, seed: int, cfg: float) -> torch.Tensor:
    """Pictures of prompts with the noise of a seed, which is no training or test noise."""
    return model.decode(rollout.draw(model, prompts, s.eval_steps, s.micro_batch, seed_for("fresh", seed), cfg))


# --------------------------------------------------------------------------------- what no evaluation of a run shows
def gradients(flags: list[str], steps: int) -> torch.Tensor:
    """The flat gradients, (steps, M), of the first steps of distillation, the student being left as it is."""
    kept: list[torch.Tensor] = []

    def update(run: Run) -> float:
        own = [p for p in run.model.transformer.parameters() if p.grad is not None]
        kept.append(torch.cat([p.grad.flatten() for p in own]))
        for p in own:
            p.grad = None
        return 0.0

    with mock.patch.object(Run, "update", update), tempfile.TemporaryDirectory() as out:
        train.distil(parsed(*flags, "--steps", str(steps), "--out", out, "--no-resume", "--eval-prompts", "0"))
    return torch.stack(kept)


def noise(name: str, seed: int) -> None:
    """Root mean square distance of a step's gradient from the mean, over the mean's norm: 0 without variance."""
    began = time.process_time()
    g = gradients(flags_of(name, seed), 2 if QUICK else 8)
    spread = float((g - g.mean(0)).norm(dim=1).square().sum().div(len(g) - 1).sqrt() / g.mean(0).norm())
    record(f"noise {name}", seed, began, scores={"noise": spread})


def cosines(seed: int) -> None:
    """Claim 5: the lowest and the mean cosine between two tasks' gradients, of policy and of distillation."""
    flags, began = ["--seed", str(seed)], time.process_time()
    found = {"policy, base": flow_opd.collateral(*flags),
             "policy, mixed": flow_opd.collateral(*flags, "--init", str(trained("mix", seed)))}  # fmt: skip
    own = [gradients([*world_of(""), "--stage", "opd", "--mar", "0", "--drawn-states", "0", "--tasks", task,
                      "--prompts-per-step", "12", *flags], 1)[0] for task in TEACHERS]  # fmt: skip
    found["distillation, base"] = [float(torch.cosine_similarity(a, b, 0)) for i, a in enumerate(own) for b in own[:i]]
    shown = {row: {"lowest cosine": min(all_), "mean cosine": statistics.mean(all_)} for row, all_ in found.items()}
    record("claim 5", seed, began, rows=shown | {"0": {"lowest cosine": 0.0, "mean cosine": 0.0}})


def surpassing(seed: int) -> None:
    """Claim 8: on which share of prompts is a model above every teacher, in the mean of four pictures?"""
    began, s = time.process_time(), parsed(*world_of(""), "--stage", "opd")
    model, world = load.base_model(s, ranks.start(s)), load.world_of(s)
    for name, where in {**TEACHERS, "student": trained("merge-opd", seed)}.items():
        model.add_expert(name, str(hub.last_checkpoint(where) if name == "student" else where))
    above: dict[str, list[bool]] = {"OPD (merge)": [], "routed teacher again": []}
    for task in TEACHERS:
        some = [p for p in fresh(world, task) for _ in range(4)]

        def means(expert, noise_seed, some=some, task=task):
            with model.adapter(expert):
                (each,) = world.score(drawn(model, s, some, noise_seed, 1.0), some, task).values()
            return torch.tensor(each).reshape(-1, 4).mean(1)

        best = torch.stack([means(name, seed + 200) for name in TEACHERS]).amax(0)
        above["OPD (merge)"] += (means("student", seed + 300) > best).tolist()
        above["routed teacher again"] += (means(task, seed + 300) > best).tolist()
    shares = {row: {"share": statistics.mean(map(float, own))} for row, own in above.items()}
    record("claim 8", seed, began, rows=shares)


MEASURED = {"5": cosines, "8": surpassing}


# ------------------------------------------------------------------------------------------------------ the records
def records() -> dict[tuple[str, int], dict]:
    """(run, seed) -> what was recorded of it last, if its command is still the one that the claims have."""
    lines = RECORDS.read_text().splitlines() if RECORDS.exists() else []
    rows = {(row["run"], row["seed"]): row for row in map(json.loads, lines)}
    return {of: row for of, row in rows.items() if is_of(row.get("command"), of[0].partition(" | ")[0], of[1])}


@cache
def is_of(command: str | None, name: str, seed: int) -> bool:
    """Is a command that of a run, but for a tuned rate? True for what is no run of its own."""
    return name not in RUNS or f"{command} ".startswith(f"python train.py {' '.join(flags_of(name, seed))} ")


def record(run: str, seed: int, began: float, **found) -> None:
    """Add a line to the records. began: when this process's CPU clock was at its start."""
    row = {"run": run, "seed": seed, **found, "seconds": round(time.process_time() - began, 1), "commit": commit()}
    RECORDS.parent.mkdir(exist_ok=True)
    with RECORDS.open("a") as file:
        file.write(json.dumps(row) + "\n")


def needs(claim: Claim) -> dict[str, Callable[[int], None]]:
    """{name in the records: what records it for a seed} of a claim."""
    if claim.number in MEASURED:
        return {f"claim {claim.number}": MEASURED[claim.number]}
    found = {name: partial(scores_of, name) for name in claim.rows.values()}
    if "noise" in claim.columns:
        found |= {f"noise {name}": partial(noise, name) for name in claim.rows.values() if name in RUNS}
    return found


def found_by(claim: Claim, seed: int) -> dict[str, dict]:
    """{row: scores, seconds, commit} of a claim for a seed, from the records."""
    known = records()
    if whole := known.get((f"claim {claim.number}", seed)):
        return {row: whole | {"scores": own} for row, own in whole["rows"].items()}
    rows = {row: known[name, seed] for row, name in claim.rows.items() if (name, seed) in known}
    for row, name in claim.rows.items():
        if row in rows and (more := known.get((f"noise {name}", seed))):
            rows[row] |= {"scores": rows[row]["scores"] | more["scores"]}
    return rows


# ---------------------------------------------------------------------------------------------------------- the page
def estimate(claims: Iterable[Claim], seeds: list[int]) -> float:
    """Hours on one free core of what claims still need, rates that are tuned included, a shared run once."""
    known, left = records(), set()

    def need(name: str, seed: int) -> None:
        if name in RUNS and not (folder_of(name, seed) / "done").exists():
            left.add((name, seed))
            for other in re.findall(r"@([\w-]+)", RUNS[name]):
                need(other, seed)

    missing = {(name, seed) for claim, seed in product(claims, seeds) for name in needs(claim)} - set(known)
    total = OVERHEAD * len(missing)
    for name, seed in missing:
        need({"claim 5": "mix", "claim 8": "merge-opd"}.get(name, name.partition(" | ")[0]), seed)
    for name in {name for name, _ in left}:
        s = parsed(*flags_of(name, 0))
        half = len(TUNED.get(name, ())) / 2 * (not QUICK)
        total += SECONDS.get(s.stage, 0.0) * s.steps * (sum(run == name for run, _ in left) + half)
    return total / 3600


def verdict(claim: Claim, seeds: Mapping[int, Mapping[str, dict]]) -> str:
    """One plain sentence: reproduced, not reproduced, not decided by one seed, or not run."""
    said, holds, fewest = [], [], len(seeds)
    for a, b, column in claim.above:
        pairs = [(rows[a]["scores"], rows[b]["scores"]) for rows in seeds.values() if a in rows and b in rows]
        gaps = [one[column] - other[column] for one, other in pairs if column in one and column in other]
        if not gaps:
            return f"**Not run**: `{a}` beside `{b}` is missing."
        cell = tables.over_seeds([{"": gap} for gap in gaps], [""])[""]
        holds.append(all(gap > 0 for gap in gaps) and not cell.value <= cell.std)
        fewest = min(fewest, cell.n)
        said.append(f"{a} - {b}, {column}: {tables.text(cell, 3)}")
    word = "Reproduced" if all(holds) else "Not reproduced" if not any(holds) else "Reproduced in part"
    word = word if fewest > 1 else "Not decided"  # one seed has no spread
    return f"**{word}** ({'; '.join(said)}; {fewest} seed{'s' * (fewest > 1)})."


def section(claim: Claim) -> list[str]:
    seeds = {seed: rows for seed in SEEDS if (rows := found_by(claim, seed))}
    lines = [f"**{claim.number}. {claim.title}** ({claim.source}). {verdict(claim, seeds)} {claim.note}".rstrip(), ""]
    names = list(dict.fromkeys(row for rows in seeds.values() for row in rows))
    if names:
        cells = {}
        for name in [name for name in names if name != "0"]:
            own = [rows[name]["scores"] for rows in seeds.values() if name in rows]
            cells[name] = tables.over_seeds(own, [c for c in claim.columns if any(c in scores for scores in own)])
        ceilings = [name for name in cells if re.match("teacher |(t2i|edit) teacher", name)]
        lower = ("gap at first", "gap at last", "noise", "to 0.85", "seconds")
        lines += [tables.markdown(tables.Table(cells, ceilings=ceilings, lower=lower)), ""]
    took = sum(row.get("seconds", 0.0) for rows in seeds.values() for row in rows.values()) / 60
    commits = sorted({row["commit"] for rows in seeds.values() for row in rows.values() if "commit" in row})
    done = f"commit {', '.join(commits)}, {took:.0f} minutes of CPU time" if commits else "not run"
    left = estimate([claim], SEEDS)
    there = {row: sum(row in rows for rows in seeds.values()) for row in claim.rows}
    missing = [row + f" ({n} of {len(SEEDS)} seeds)" * (n > 0) for row, n in there.items() if n < len(SEEDS)]
    more = f"; not or not all run: {', '.join(missing)}" if missing and names else ""
    more += f"; {left:.1f} hours of one free core are left for seeds {', '.join(map(str, SEEDS))}" if left else ""
    return [*lines, f"`{'QUICK=1 ' * QUICK}python -m bench.reproduce {claim.number}`: {done}{more}.", ""]


def page() -> None:
    """Write the section between the marks of docs/RESULTS.md; of QUICK, print it."""
    text = "\n".join(line for claim in CLAIMS for line in section(claim))
    if QUICK:
        print(text)
        return
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    write_atomic(PAGE, before + MARKS[0] + text + MARKS[1] + rest.partition(MARKS[1])[2])


def main(words: list[str]) -> None:
    known = [claim.number for claim in CLAIMS]
    if unknown := [word for word in words if word not in (*known, "page")]:
        raise SystemExit(f"unknown claim {unknown[0]!r}: choose from {', '.join(known)}, page")
    chosen = [claim for claim in CLAIMS if not words or claim.number in words]
    if words == ["page"]:
        return page()
    print(f"about {estimate(chosen, SEEDS):.1f} hours of one free core are left", flush=True)
    train.time = SimpleNamespace(time=time.process_time)  # a step's seconds are those of this process alone
    for claim, seed in product(chosen, SEEDS):
        for name, measure in needs(claim).items():
            if (name, seed) not in records():
                measure(seed)
        page() if not QUICK else None
    page()


if __name__ == "__main__":
    main(sys.argv[1:])
