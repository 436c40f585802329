"""Q's studies that are no comparison of runs (those are in bench/claims.py):

    python -m bench.qwen_rl student    4.3: how near an unguided student comes to its guided teachers, and its price
    python -m bench.qwen_rl w2         Eq. 17's bound beside a W2 that is known

`student` uses the runs of claim 7b, and trains them if they are not there.
"""

import math
import time

import torch

import kl
import settings
from bench.reproduce import SEEDS, trained
from bench.runs import parsed, run_job, table
from harness import load, ranks, rollout
from models import hub

QWEN = ["--preset", "tiny-qwen"]


def student() -> None:
    """How far pictures lie from the guided teacher's of the same noise, and what drawing them costs."""
    s = parsed(*QWEN, "--stage", "opd")
    rows: dict[str, list] = {}
    prompts = load.load_prompts(s, "test", s.eval_prompts, settings.test_tasks(s))
    for seed in SEEDS:
        model = load.base_model(s, ranks.start(s))
        for task in prompts:
            model.add_expert(task, str(hub.last_checkpoint(trained(f"q-{task}", seed))))
        model.add_expert("opd", str(hub.last_checkpoint(trained("q-opd", seed))))
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
    run_job("qwen_rl", student, w2)
