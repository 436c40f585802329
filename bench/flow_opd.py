"""Where do the learning results of F in docs/RESULTS.md come from? (`collateral` has no row there yet.)

    python -m bench.flow_opd estimators   the table of F Eq. 11's estimators on a linear-Gaussian flow (minutes)
    python -m bench.flow_opd collateral   F Eq. 4: cosines between the tasks' policy gradients, tiny world (a minute)
    python -m bench.flow_opd judges       pointwise and pairwise reward models (Q Fig. 2) as a reward of GRPO
    python -m bench.flow_opd learning     OPD, its estimators and GRPO-mix on the tiny world; words after it choose
                                          the recipes whose name has one of them (an hour or two on two cores)
    python -m bench.flow_opd states       all states of a trajectory, or one that is drawn; both tiny worlds

    python -m bench.flow_opd picture      README's picture, docs/demo.png, from the runs of `make demo`

`judges`, `learning` and `states` train three seeds. Finished runs are not repeated. Each job prints a markdown table.
"""

import json
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import torch

import grpo
import sde
from bench.runs import SEEDS, ends, parsed, run_job, scores_of, table, trained
from harness import load, report, rollout
from harness.run import read_metrics
from scorers import panel
from settings import FLOW_TASKS, window_of

# name -> flags of train.py. `merged` stands for the cold start that `--stage merge` writes first.
LEARNING = {
    "OPD analytic, from merged": ["--stage", "opd", "--init", "runs/bench-merge"],
    "OPD analytic, from base, 50 steps": ["--stage", "opd", "--steps", "50"],
    "OPD literal (F Eq. 10-11), from base, 50 steps": ["--stage", "opd", "--steps", "50", "--estimator", "literal"],
    "OPD velocity (Q Eq. 14), from base, 50 steps": ["--stage", "opd", "--steps", "50", "--estimator", "velocity"],
    "GRPO-mix 3:1:1 (F App. A), from merged": ["--stage", "grpo", "--task", "mix", "--init", "runs/bench-merge"],
}
COLUMNS = ("composition", "text", "quality", "average")


def estimators() -> None:
    """The study of tests/helpers/linear_gaussian.py with 400,000 trajectories."""
    script = Path(__file__).parents[1] / "tests" / "helpers" / "linear_gaussian.py"
    subprocess.run([sys.executable, script, "--trajectories", "400000"], check=True)


def collateral(prompts_per_step: str = "3") -> None:
    """F Eq. 4 on the tiny world: what a GRPO step on one task does to another, as cosines of policy gradients."""
    advantages, scores = {}, {}
    for task in FLOW_TASKS:
        flags = ["--preset", "tiny", "--stage", "grpo", "--task", task, "--prompts-per-step", prompts_per_step]
        s = parsed(*flags, "--no-resume", "--out", tempfile.mkdtemp())
        run, scorers = load.student_run(s), load.panel_of(s)
        prompts = load.load_prompts(s, "train", s.train_prompts, (task,))
        rollout.prepare(run, prompts)
        rows = rollout.rows_of(run, prompts, 0)
        drawn, images = rollout.roll_out(run.model, rows, s, range(*window_of(s)))
        found = scorers.ask(images, rollout.prompts_of(rows), s.group_size)
        advantages[task] = panel.advantages(found, s.group_size, s.combine, s.advantage_std).flatten()  # A_1, (B,)
        log_prob_B = 0.0  # of a whole trajectory
        for old in drawn.path:
            mean = sde.transition_mean(old, drawn.velocity(old.x, old.t), s.noise_level)
            log_prob_B = log_prob_B + sde.log_prob(old.x_next, mean, old.std, "sum")
        own = [p for p in run.model.transformer.parameters() if p.requires_grad]
        by_row = (torch.autograd.grad(log_prob, own, retain_graph=True) for log_prob in log_prob_B)
        scores[task] = torch.stack([torch.cat([g.flatten() for g in row]) for row in by_row])  # grad log pi, (B, M)
    gradients = {task: (advantages[task][:, None] * scores[task]).mean(0) for task in scores}  # grad J_k, (M,)
    print("| learned | " + " | ".join(scores) + " |\n|---|" + "---:|" * len(scores))
    for one in scores:
        impacts = [
            grpo.collateral_impact(gradients[k], advantages[one], scores[one]) / gradients[k].norm() for k in scores
        ]
        print(f"| {one} | " + " | ".join(f"{float(impact / gradients[one].norm()):+.2f}" for impact in impacts) + " |")


def judges(*steps: str) -> None:
    """Q Fig. 2's question: two reward models of one architecture, each as GRPO's reward, judged by the true rules.

    For every seed both are trained on graded prints of the tiny world, then a quality teacher from the shipped base
    on each. The table has what the true rules say of the teacher's pictures.
    """
    rows: dict[str, list[dict]] = {}
    more = ["--steps", *steps] if steps else []
    for objective in ("pointwise", "pairwise"):
        for seed in SEEDS:
            flags = ["--preset", "tiny", "--seed", str(seed)]
            judge = trained(f"bench-rm-{objective}-{seed}", *flags, "--stage", "reward", "--objective", objective)
            recipe = judge / "reward.json"
            scorer = {"kind": "trained", "model": str(judge)}
            recipe.write_text(json.dumps({"scorers": {"judge": scorer}, "weights": {"default": {"judge": 1.0}}}))
            flags += ["--stage", "grpo", "--task", "quality", "--rewards", str(recipe), *more]
            run = trained(f"bench-judged-{objective}-{seed}", *flags)
            first, last = ends(run, "reward/judge")
            rows.setdefault(objective, []).append(scores_of(run) | {"judge at first": first, "judge at last": last})
    table(rows, [*COLUMNS, "judge at first", "judge at last"], "reward model")


def learning(*words: str) -> None:
    """Every recipe of LEARNING (that has one of `words`) with every seed."""
    trained("bench-merge", "--preset", "tiny", "--stage", "merge")
    rows: dict[str, list[dict]] = {}
    for title, flags in LEARNING.items():
        for seed in SEEDS if not words or any(word in title for word in words) else ():
            name = "bench-" + "".join(c if c.isalnum() else "-" for c in title.lower()) + f"-{seed}"
            run = trained(name, "--preset", "tiny", *flags, "--seed", str(seed))
            first, last = ends(run, "gap")  # the velocity gap to the routed teacher
            rows.setdefault(title, []).append(scores_of(run) | {"gap at first": first, "gap at last": last})
    table(rows, [*COLUMNS, "gap at first", "gap at last"], "student")


def states() -> None:
    """--drawn-states 1 against all states, from the base: as many steps, and about as many seconds (of the steps)."""
    for world, steps in (("tiny", 50), ("tiny-qwen", 30)):  # F's SDE, Q's ODE
        rows: dict[str, list[dict]] = {}
        for seed, (drawn, count) in product(SEEDS, ((0, steps), (1, steps), (1, 2 * steps))):
            flags = ["--drawn-states", str(drawn), "--steps", str(count), "--seed", str(seed)]
            run = trained(f"bench-states-{world}-{drawn}-{count}-{seed}", "--preset", world, "--stage", "opd", *flags)
            found = {"average": scores_of(run)["average"], "seconds": sum(row["seconds"] for row in read_metrics(run))}
            rows.setdefault(f"{'one drawn' if drawn else 'all states'}, {count} steps", []).append(found)
        table(rows, ["average", "seconds"], world)


def picture(merged: str = "runs/demo-merge", student: str = "runs/demo-opd") -> None:
    """Eight test prompts by the base, the teacher of each prompt's task, the merged adapter and the student."""
    s = parsed("--preset", "tiny", "--stage", "opd")
    model = load.base_model(s)
    experts = load.load_teachers(model, s)
    for name, where in (("merged", merged), ("student", student)):
        model.add_expert(name, where)
    found = load.load_prompts(s, "test", 3, FLOW_TASKS)
    images, captions = [], []
    for row in ("base", "teacher", "merged", "student"):
        for task, prompts in found.items():
            with model.adapter({"base": None, "teacher": experts[task]}.get(row, row)):
                images += model.decode(rollout.draw(model, prompts, s.eval_steps, 0, s.seed, 1.0))
            captions += [f"{p.text}\n{row}" for p in prompts]
    keep = [i for i in range(len(images)) if i % 9 != 8]  # the grid has eight columns
    report.save_grid(Path("docs/demo.png"), [images[i] for i in keep], [captions[i] for i in keep])


if __name__ == "__main__":
    run_job("flow_opd", estimators, collateral, judges, learning, states, picture)
