"""F's studies that are no runs of train.py (those are in bench/claims.py):

    python -m bench.flow_opd estimators   the table of F Eq. 11's estimators on a linear-Gaussian flow (minutes)
    python -m bench.flow_opd picture      README's picture, docs/demo.png, from the runs of `make demo`
"""

import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import grpo
import sde
from bench.runs import parsed, run_job
from data.pictures import to_picture
from harness import load, rollout
from scorers import panel
from settings import FLOW_TASKS, window_of


def estimators() -> None:
    """The study of tests/helpers/linear_gaussian.py with 400,000 trajectories."""
    script = Path(__file__).parents[1] / "tests" / "helpers" / "linear_gaussian.py"
    subprocess.run([sys.executable, script, "--trajectories", "400000"], check=True)


def collateral(*more: str) -> list[float]:
    """F Eq. 4 on the tiny world: what a GRPO step on one task does to another, as the cosines of the three pairs of
    the tasks' policy gradients. more: flags of GRPO, --init among them."""
    advantages, scores = {}, {}
    for task in FLOW_TASKS:
        flags = ["--preset", "tiny", "--stage", "grpo", "--task", task, "--prompts-per-step", "3"]
        s = parsed(*flags, *more, "--no-resume", "--out", tempfile.mkdtemp())
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
    return [
        float(grpo.collateral_impact(gradients[k], advantages[one], scores[one]) / gradients[k].norm()
              / gradients[one].norm()) for one, k in combinations(FLOW_TASKS, 2)
    ]  # fmt: skip


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
    grid([images[i] for i in keep], [captions[i] for i in keep]).save("docs/demo.png")


def grid(images: Sequence[Tensor], captions: Sequence[str]) -> Image.Image:
    """Pictures (3, H, H) in [0, 1], eight a row and five times as large, each with its caption of four lines below."""
    edge = 5 * images[0].shape[-1]
    height = edge + 62
    sheet = Image.new("RGB", (8 * (edge + 8) + 8, -(-len(images) // 8) * height + 8), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = 8 + i % 8 * (edge + 8), 8 + i // 8 * height
        sheet.paste(to_picture(image).resize((edge, edge), Image.Resampling.NEAREST), (x, y))
        pen.rectangle((x - 1, y - 1, x + edge, y + edge), outline=(170, 170, 170))
        lines = [line for part in caption.split("\n") for line in textwrap.wrap(part, edge // 6)]  # 6 pixels a letter
        pen.text((x, y + edge + 2), "\n".join(lines), "black", font)
    return sheet


if __name__ == "__main__":
    run_job("flow_opd", estimators, picture)
