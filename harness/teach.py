"""How does a policy become a teacher? Reinforcement learning from rewards, F 4.1 and Q 4.1-4.2.

    curate        keep the prompts from which a policy can learn (Q 4.2)
    teacher       draw groups, score them, compare within groups, step; the objective is
        grpo      the clipped policy ratio of noisy transitions (Q Eq. 6)
        nft       forward-process regression on the finished pictures (Q Eq. 7-9)

Q 4.1's hybrid, `--guidance rollout`: pictures are drawn with classifier-free guidance, so that rewards see what the
model can do, and the objective is without, so that the two branches are not moved against each other. `both` and
`neither` are Q's two other strategies; `grpo.hybrid_transition` says which ratio the hybrid optimises.
"""

import concurrent.futures
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import grpo
import kl
import nft
import rewards
import sde
import settings
from data import files as data
from data.files import Prompt
from harness import checkpoints, curation, ranks, rollout
from harness.load import student_run
from harness.rollout import Row, batches, roll_out, trained_steps
from harness.run import Run
from scorers import panel as scoring
from scorers import registry
from scorers.remote import Limits
from settings import Settings, is_tiny, task_list


def curate(s: Settings) -> Path:
    """Prompt curation (Q 4.2): keep the prompts whose G samples differ in their reward by more than a threshold.

    The student is the base, or --init. A prompt's line is written as soon as it is known, so that a run that was
    killed goes on; ranks share the prompts.
    """
    prompts = rollout.load_prompts(s, "train", s.train_prompts, task_list(s))
    panel = panel_of(s, ranks.start(s))  # before the model: a scorer that is not installed is found out at once
    panel.check(p for some in prompts.values() for p in some)
    run = student_run(s)
    # Other rewards, samples or weights give other ranges: what an earlier run found with them does not count.
    moves_nothing = (*checkpoints.FREE, "threshold", "train_prompts", "prompts", "rewards", "threads", "out", "config")
    alike = {k: v for k, v in asdict(s).items() if k not in moves_nothing}
    asked = registry.read(s.rewards, settings.rewarded_tasks(s), is_tiny(s))
    where = ("device", "endpoints", "key_env", *Limits._fields)  # what a --rewards file says of the way to a scorer
    alike["scorers"] = {n: {k: v for k, v in e.items() if k not in where} for n, e in asked.scorers.items()}
    alike["weights"] = asked.weights
    known = curation.Ranges(run.folder / "ranges", run.rank, data.seed_for(json.dumps(alike, sort_keys=True)))
    unknown = {curation.key(p): p for some in prompts.values() for p in some if not known.has(p)}  # each of them once
    mine = list(unknown.values())[run.rank :: run.world]
    ranks.wait()  # nobody writes before everybody has read
    rollout.encode_all(run.model, mine, settings.student_cfg(s) != 1)
    for part in tqdm(batches(mine, s.prompts_per_step), s.name, disable=run.rank > 0):
        rows = [Row(p, data.seed_for("row", s.seed, s.stage, p.text, g)) for p in part for g in range(s.group_size)]
        _, images = roll_out(run, rows, stoppable=False)
        asked = [row.prompt for row in rows]
        scores = panel.ask(images, asked, s.group_size, rollout.sources(asked))
        known.add(part, scoring.totals(scores).reshape(len(part), -1))
    ranks.wait()
    if run.rank == 0:
        print(curation.write(run.folder, prompts, known.all(), s.threshold))
    ranks.wait()
    return run.folder


def panel_of(s: Settings, device: torch.device) -> scoring.Panel:
    asked = registry.read(s.rewards, settings.rewarded_tasks(s), is_tiny(s))
    return scoring.build(asked, device, is_tiny(s), s.on_reward_failure == "drop")


def train_teacher(s: Settings) -> tuple[Run, scoring.Panel]:
    """GRPO (F 4.1, Q Eq. 4-6, 13) or DiffusionNFT (Q Eq. 7-9): draw groups, score, compare within groups, step."""
    # DEVIATION: F 6.1 trains the quality teacher on the prompts of all tasks; here it sees its own, as a specialist.
    prompts = rollout.load_prompts(s, "train", s.train_prompts, task_list(s) if s.task == "mix" else (s.task,))
    panel = panel_of(s, ranks.start(s))
    panel.check(p for some in prompts.values() for p in some)
    run = student_run(s)
    rollout.prepare(run, prompts)
    update = {"grpo": update_policy, "nft": update_forward}[s.stage]
    later = scoring.Later(lambda images, some: panel.ask(images, some, s.group_size, rollout.sources(some)))
    ahead, warned = None, set()
    for step in run.steps("reward"):
        warn_if_hacked(run, panel.watched, warned)
        began = time.time()
        shares = ahead or draw_shares(run, prompts, later, step)
        # Nothing is drawn ahead of a checkpoint: a run that continues from it begins as this one goes on.
        more = s.overlap and step + 1 < s.steps and (step + 1) % s.save_every
        ahead = draw_shares(run, prompts, later, step + 1) if more else None
        scores = collect(run, shares)
        stats = []
        for share, found in zip(shares, scores, strict=True):
            advantages = scoring.advantages(found, s.group_size, s.combine, s.advantage_std)
            stats.append(update(run, share["parts"], advantages))
        metrics = {key: float(np.mean([stat[key] for stat in stats])) for key in stats[0]}
        everything = scoring.joined(scores)
        metrics |= scoring.metrics(everything, s.group_size)
        run.log({**metrics, "seconds": time.time() - began}, scoring.histograms(everything))
    later.close()
    return run, panel


def draw_shares(run: Run, prompts: Mapping[str, list[Prompt]], later: scoring.Later, step: int) -> list[dict]:
    """Roll out a step's trajectories, a share of the prompts for each optimizer update, and hand each share to the
    scorers as soon as it is drawn: {"parts", "prompts", "scores": a Future}."""
    rows, shares = rollout.rows_of(run, prompts, step), []
    for some in batches(rows, len(rows) // run.s.updates):
        with run.old_policy():  # nft: the old policy draws (Q Eq. 8)
            parts, images = roll_out(run, some)
        asked = [row.prompt for row in some]
        shares.append({"parts": parts, "prompts": asked, "scores": later.submit(images, asked)})
    return shares


def collect(run: Run, shares: Sequence[dict]) -> list[scoring.Scores]:
    """Wait for the scorers. One that fails for good ends the run on every rank, after a checkpoint, with its words."""
    fault, scores = None, []
    for share in shares:  # not longer than a scheduler's grace: a far judge may take far more
        while not (run.asked_to_stop or share["scores"].done()):
            concurrent.futures.wait([share["scores"]], timeout=0.2)
    run.stop_if_asked()
    try:
        scores = [share["scores"].result() for share in shares]
        if all(found.lost.all() for found in scores):
            raise rewards.RewardError("every prompt's group of a step was lost; the messages above say why")
    except rewards.RewardError as error:
        fault = error
    run.fail_together(fault, rewards.RewardError)
    return scores


def warn_if_hacked(run: Run, watch: Sequence[str], warned: set[str]) -> None:
    """One line, once, for a watched scorer that falls while the trained reward rises (`scoring.is_hacked`)."""
    for name in watch if run.rank == 0 else ():
        if name not in warned and scoring.is_hacked(run.history("reward"), run.history(f"reward/{name}")):
            warned.add(name)
            print(f"warning: step {run.step}: the reward rises while {name} falls", file=sys.stderr)


def update_policy(run: Run, parts: Sequence[dict], advantage_PG: Tensor) -> dict[str, float]:
    """One optimizer update on the clipped objective (Q Eq. 6), averaged over rows and trained steps."""
    steps, totals, advantage_B = trained_steps(run), {}, advantage_PG.flatten()
    weight = 1 / (len(steps) * len(advantage_B))
    sizes = [len(part["path"][0].x) for part in parts]
    for part, advantage in zip(parts, advantage_B.to(run.model.device).split(sizes), strict=True):
        for n in steps:
            loss_B, stats = policy_step(run, part["path"][n], part["velocity"], advantage)
            (loss_B.sum() * weight).backward()
            for key, value in stats.items():
                totals[key] = totals.get(key, 0.0) + value.item() * weight * len(loss_B)
    return {**totals, "grad_norm": run.update()}


def policy_step(run: Run, old: sde.Transition, velocity: Callable, advantage_B: Tensor) -> tuple[Tensor, dict]:
    """Loss (B,) and statistics of one stored transition under the policy of now (F Eq. 3, Q Eq. 6)."""
    s = run.s
    v = velocity(old.x, old.t)
    mean = sde.transition_mean(old, v, s.noise_level, s.kernel)
    log_prob = sde.log_prob(old.x_next, mean, old.std, s.log_prob)
    log_prob_old = sde.log_prob(old.x_next, old.mean, old.std, s.log_prob)
    ratio = grpo.guard_ratio(log_prob, log_prob_old, mean, old.mean, old.std, s.log_prob) if s.guard else None
    kl_B = None
    if s.beta > 0:  # KL to the frozen base (Flow-GRPO's regulariser), F Eq. 9
        with run.model.adapter(None):
            v_base = velocity(old.x, old.t)
        kl_B = kl.velocity_kl(v, v_base, old.t, old.dt, old.sigma, s.log_prob)
    return grpo.policy_loss(log_prob, log_prob_old, advantage_B, s.clip, s.advantage_clip, kl_B, s.beta, ratio)


def update_forward(run: Run, parts: Sequence[dict], advantage_PG: Tensor) -> dict[str, float]:
    """One optimizer update on the forward-process loss (Q Eq. 7-9), averaged over rows and trained times."""
    s, steps, totals, ts = run.s, trained_steps(run), {}, run.model.time_grid(run.s.num_steps)
    r_B = nft.optimality(advantage_PG.flatten(), s.advantage_clip).to(run.model.device)
    weight = 1 / (len(steps) * len(r_B))
    sizes = [len(part["path"][-1].x) for part in parts]
    for part, r in zip(parts, r_B.split(sizes), strict=True):
        x0 = part["path"][-1].x_next
        eps = {n: sde.standard_normal(x0.shape, part["noise"]).to(x0) for n in steps}  # of each time and row its own
        noisy = {n: sde.interpolate(x0, eps[n], float(ts[n])) for n in steps}  # x_t, as in pretraining
        with torch.no_grad(), run.old_policy():
            v_old = {n: part["velocity"](noisy[n], float(ts[n])) for n in steps}
        for n in steps:
            v = part["velocity"](noisy[n], float(ts[n]))
            loss_B = nft.nft_loss(v, v_old[n], eps[n] - x0, r, s.interpolation, reduce="mean")
            stats = {"loss": loss_B, "moved": sde.flat_reduce((v - v_old[n]).square(), "mean")}
            if s.beta > 0:
                with run.model.adapter(None):
                    v_base = part["velocity"](noisy[n], float(ts[n]))
                stats["distance"] = nft.velocity_penalty(v, v_base, reduce="mean")
                loss_B = loss_B + s.beta * stats["distance"]
            (loss_B.sum() * weight).backward()
            for key, value in stats.items():
                totals[key] = totals.get(key, 0.0) + value.detach().sum().item() * weight
    return {**totals, "grad_norm": run.update()}
