"""Where do the figures about Q in docs/RESULTS.md come from? Every question of Q that the tiny-qwen world can answer.

    python -m bench.qwen_rl merging    Fig. 5-6: base, teachers, Mix-RL and the OPD student on both tasks
    python -m bench.qwen_rl guidance   Fig. 3: guidance in rollout and objective, in the rollout alone, in neither
    python -m bench.qwen_rl timesteps  4.2: a reward that can be hacked, trained at all steps or at a few noisy ones
    python -m bench.qwen_rl curation   4.2: curated prompts against all prompts, at equal compute
    python -m bench.qwen_rl student    4.3: how near an unguided student comes to its guided teachers, and its price
    python -m bench.qwen_rl nft        Eq. 7-9 against Eq. 6: the two objectives, at equal numbers of pictures
    python -m bench.qwen_rl w2         Eq. 17's bound beside a W2 that is known

All but the last train, three seeds each (hours on two cores); finished runs are not repeated, and `merging`'s are
used by the others. Each prints a markdown table, mean ± sample standard deviation.
"""

import json
import math
import time
from pathlib import Path

import torch

import eval as evaluation
import kl
import settings
import train
from bench.runs import SEEDS, ends, parsed, run_job, scores_of, table, trained
from harness import load, ranks, rollout
from models import hub

COLUMNS = ("t2i alignment", "t2i aesthetic", "t2i", "edit instruction", "edit identity", "edit", "average")
QWEN = ["--preset", "tiny-qwen"]


def seeded(name: str, seed: int, *flags: str) -> Path:
    """The run bench-q-NAME-SEED, trained unless it has been evaluated."""
    return trained(f"bench-q-{name}-{seed}", *QWEN, "--seed", str(seed), *flags)


def teacher(task: str, seed: int) -> Path:
    return seeded(f"grpo-{task}", seed, "--stage", "grpo", "--task", task)


def scores_at(run: Path | None, guidance: str) -> dict[str, float]:
    """Scores of a run (None: the base) on all test prompts, drawn with guidance ("both") or without ("neither")."""
    s = parsed(*QWEN, "--stage", "opd", "--guidance", guidance)
    model = load.base_model(s, ranks.start(s))
    if run:
        model.add_expert("expert", str(hub.last_checkpoint(run)))
    prompts = load.load_prompts(s, "test", s.eval_prompts, settings.test_tasks(s))
    with model.adapter("expert" if run else None):
        return evaluation.evaluate(model, prompts, s, settings.student_cfg(s))["scores"]


def opd_student(seed: int) -> Path:
    """The OPD student of a seed's own two teachers."""
    teachers = [f"{task}={teacher(task, seed)}" for task in ("t2i", "edit")]
    return seeded("opd", seed, "--stage", "opd", "--teachers", *teachers)


def mixed(seed: int, share: int) -> Path:
    """Mix-RL, both tasks in every step. share 1: as many steps as a teacher has, hence half as many trajectories of
    each task; 2: twice as many steps, as many trajectories of each task as its own teacher has seen."""
    steps = share * parsed(*QWEN, "--stage", "grpo", "--task", "t2i").steps
    name = "grpo-mix" if share == 2 else f"grpo-mix{steps}"
    return seeded(name, seed, "--stage", "grpo", "--task", "mix", "--steps", str(steps))


def merging() -> None:
    rows = {"base, guided": [scores_at(None, "both")], "base, not guided": [scores_at(None, "neither")]}
    for seed in SEEDS:
        runs = {
            "t2i teacher": teacher("t2i", seed), "edit teacher": teacher("edit", seed),
            "Mix-RL, a teacher's steps": mixed(seed, 1), "Mix-RL, both teachers' steps": mixed(seed, 2),
            "OPD student, not guided": opd_student(seed),
        }  # fmt: skip
        for name, run in runs.items():
            rows.setdefault(name, []).append(scores_of(run))
    table(rows, COLUMNS)


def guidance() -> None:
    """Each strategy's teacher of the task t2i, drawn with guidance and without; `edit` was not trained on."""
    rows: dict[str, list] = {}
    for strategy in ("both", "rollout", "neither"):
        for seed in SEEDS:
            own = ["--stage", "grpo", "--task", "t2i", "--guidance", strategy]
            run = teacher("t2i", seed) if strategy == "rollout" else seeded(f"guidance-{strategy}", seed, *own)
            reward = dict(zip(("reward, first five steps", "reward, last five steps"), ends(run, "reward")))
            for drawn in ("both", "neither"):
                found = scores_at(run, drawn)
                name = f"{strategy}, drawn {'guided' if drawn == 'both' else 'not guided'}"
                rows.setdefault(name, []).append(found | reward)
    table(rows, ("reward, first five steps", "reward, last five steps", "t2i alignment", "t2i aesthetic", "edit"))


def timesteps() -> None:
    """The aesthetic reward alone, which a blank or wrong picture can win; alignment is held out."""
    rows: dict[str, list] = {"base, guided": [scores_at(None, "both") | dict.fromkeys(("first", "last"), math.nan)]}
    ways = {"all steps": ["--train-steps", "all", "--window", "0:99"], "a few noisy ones": []}
    for name, flags in ways.items():
        for seed in SEEDS:
            own = ["--stage", "grpo", "--task", "t2i", "--rewards", "quality=1", *flags]
            run = seeded(f"steps-{name.split()[0]}", seed, *own)
            first, last = ends(run, "reward")
            rows.setdefault(name, []).append(scores_of(run) | {"first": first, "last": last})
    table(rows, ("first", "last", "t2i aesthetic", "t2i alignment", "edit"))


def curation(share: float = 0.75) -> None:
    """Curated: the same number of GRPO steps less those that drawing the candidates cost."""
    s = parsed(*QWEN, "--stage", "curate")
    full = parsed(*QWEN, "--stage", "grpo", "--task", "t2i")
    rows: dict[str, list] = {}
    for seed in SEEDS:
        run = f"bench-q-curate-{seed}"
        if train.main([*QWEN, "--stage", "curate", "--tasks", "t2i", "--name", run, "--seed", str(seed)]):
            raise SystemExit(2)
        lines = (Path("runs", run, "ranges") / "rank-0.jsonl").read_text().splitlines()
        groups = len({json.loads(line)["text"] for line in lines if line})  # drawing one is `share` of training on one
        steps = full.steps - round(share * groups * s.group_size / (full.prompts_per_step * full.group_size))
        own = ["--stage", "grpo", "--task", "t2i", "--steps", str(steps), "--prompts", f"t2i=runs/{run}/prompts/t2i"]
        rows.setdefault("all prompts", []).append(scores_of(teacher("t2i", seed)))
        rows.setdefault(f"curated, {steps} steps", []).append(scores_of(seeded("curated", seed, *own)))
    table(rows, COLUMNS[:3])


def nft() -> None:
    """DiffusionNFT's teacher of the task t2i beside GRPO's."""
    rows: dict[str, list] = {}
    for seed in SEEDS:
        rows.setdefault("GRPO", []).append(scores_of(teacher("t2i", seed)))
        rows.setdefault("NFT", []).append(scores_of(seeded("nft-t2i", seed, "--stage", "nft", "--task", "t2i")))
    table(rows, COLUMNS)


def student() -> None:
    """How far pictures lie from the guided teacher's of the same noise, and what drawing them costs."""
    s = parsed(*QWEN, "--stage", "opd")
    rows: dict[str, list] = {}
    prompts = load.load_prompts(s, "test", s.eval_prompts, settings.test_tasks(s))
    for seed in SEEDS:
        model = load.base_model(s, ranks.start(s))
        for task in prompts:
            model.add_expert(task, str(hub.last_checkpoint(teacher(task, seed))))
        model.add_expert("opd", str(hub.last_checkpoint(opd_student(seed))))
        drawn: dict[str, list] = {}
        took: dict[str, float] = {}
        for task, some in prompts.items():
            ways = {"teacher, guided": (task, s.cfg), "teacher, not guided": (task, 1.0), "base, guided": (None, s.cfg),
                    "OPD student, not guided": ("opd", 1.0)}  # fmt: skip
            for name, (expert, cfg) in ways.items():
                with model.adapter(expert):
                    rollout.draw(model, some[:8], s.eval_steps, s.micro_batch, seed, cfg)  # warm
                    began = time.perf_counter()
                    latents = rollout.draw(model, some, s.eval_steps, s.micro_batch, seed, cfg)
                    drawn.setdefault(name, []).append(model.decode(latents))
                    took[name] = took.get(name, 0.0) + time.perf_counter() - began
        for name, pictures in drawn.items():
            gaps = [(a - b).square().mean().sqrt() for a, b in zip(pictures, drawn["teacher, guided"], strict=True)]
            found = dict(zip((f"distance, {task}" for task in prompts), map(float, gaps), strict=True))
            rows.setdefault(name, []).append(found | {"time": took[name] / took["teacher, guided"]})
    table(rows, (*(f"distance, {task}" for task in prompts), "time"))


def w2() -> None:
    """Q Eq. 17 on flows between Gaussians, where everything is known: p_1 = N(0, I), p_0 = N(m, c^2 I) in D dimensions.

    The velocity is affine in x, v = a(t) x + b(t), the flow maps x_1 to m + c x_1, and the Euclidean W2 of two such
    Gaussians is sqrt(|m - m*|^2 + D (c - c*)^2). The student differs from the teacher by m, by c, or by both.
    """
    dims, ts = 3, torch.linspace(1, 0, 2001, dtype=torch.float64)
    inner = ts.clamp(1e-6, 1 - 1e-6)

    def flow(mean: float, scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(a, b, var): the velocity a x + b of p_t = N((1-t) m, ((1-t)^2 c^2 + t^2) I), and p_t's variance."""
        var = (1 - inner) ** 2 * scale**2 + inner**2
        a = (inner - (1 - inner) * scale**2) / var  # E[eps - x_0 | x_t] = -m + a (x - (1-t) m)
        return a, -mean * (1 + a * (1 - inner)), var

    print("\n| teacher | student | W2 | bound of Eq. 17 | bound / W2 |\n|---|---|---:|---:|---:|")
    for scale_t, mean, scale in ((0.8, 0.6, 0.8), (0.8, 1.5, 0.8), (0.8, 0.5, 0.4), (0.8, 1.0, 1.2), (0.3, 1.0, 0.3),
                                 (0.3, 0.5, 0.8), (0.05, 1.0, 0.05)):  # fmt: skip
        (a_t, b_t, _), (a, b, var) = flow(0.5, scale_t), flow(mean, scale)
        # E|v - v*|^2 over the student's own p_t: the affine difference at its mean, squared, and its slope on the rest
        centre = (a - a_t) * (1 - inner) * mean + b - b_t
        bound = kl.w2_bound(dims * (centre**2 + (a - a_t) ** 2 * var), a_t.abs(), ts).item()
        true = math.sqrt(dims * ((mean - 0.5) ** 2 + (scale - scale_t) ** 2))
        names = (f"N({m:g}, {c:g}^2)" for m, c in ((0.5, scale_t), (mean, scale)))
        print(f"| {' | '.join(names)} | {true:.3f} | {bound:.3f} | {bound / true:.2f} |")


if __name__ == "__main__":
    run_job("qwen_rl", merging, guidance, timesteps, curation, student, nft, w2)
