"""The pipeline of both papers, one short loop a stage:

    pretrain   flow matching on the tiny world's drawings (F Eq. 1, Q Eq. 2)
    curate     keep the prompts from which a policy can learn (Q 4.2)
    grpo       one teacher per task by GRPO (F 4.1, Q Eq. 4-6); --task mix is the GRPO-mix baseline (F App. A)
    sft        cold start: flow matching on images of the routed teachers (F 5.1)
    merge      cold start: one adapter out of the teachers' (F 5.1)
    opd        multi-teacher on-policy distillation with manifold anchor regularisation (F Eq. 7-12, Q Eq. 14)
    all        both cold starts, OPD from the merged one, then the table; the tiny world makes base and teachers first

    torchrun --nproc_per_node=8 train.py --stage opd          # SD3.5-M, F App. A
    python train.py --preset tiny --stage opd                 # a laptop, minutes

Each loop reads like the paper's algorithm; the mathematics is in sde, kl, grpo, opd and merge, what a run needs
besides in runtime. A step's trajectories go through the model in micro-batches; a trajectory's noise is its own
(`Row.seed`), so that neither the micro-batch nor the number of ranks changes it.
"""

import concurrent.futures
import json
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import plan
import recipe
import settings
from settings import TASKS, Settings, is_tiny, task_list

if __name__ == "__main__":
    plan.answer_early(sys.argv[1:], "train.py")

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import adapters
import curation
import data
import eval as evaluation
import flow
import grpo
import kl
import merge
import models
import opd
import ranks
import report
import rewards
import runtime
import scoring
import sde
import tiny
from data import Prompt
from eval import batches
from runtime import Run

MIX = {"composition": 3, "text": 1, "quality": 1}  # F App. A: epochs of GenEval : OCR : PickScore


class Row(NamedTuple):
    """One trajectory to be: its prompt, and the seed of all noise along it."""

    prompt: Prompt
    seed: int

    def source(self) -> torch.Generator:
        """A fresh generator on the CPU: the same noise on any device, rank and micro-batch."""
        return torch.Generator().manual_seed(self.seed)


# ------------------------------------------------------------------------------------------------ prompts of a step
def pool(s: Settings, prompts: Mapping[str, list[Prompt]], step: int) -> Mapping[str, list[Prompt]]:
    """The tasks that a step draws from: all of them, or in GRPO-mix (F App. A) the one whose turn it is."""
    if s.stage == "grpo" and s.task == "mix":
        task = grpo.mix_schedule(step, MIX)
        return {task: prompts[task]}
    return prompts


def batch(run: Run, prompts: Mapping[str, list[Prompt]], step: int) -> Iterator[tuple[Prompt, str, int]]:
    """P prompts of a step for this rank, shared evenly among the tasks (the first ones take what is left).

    Yields (prompt, task, place), place being the prompt's number within its task's global batch of the step.
    """
    s, tasks = run.s, pool(run.s, prompts, step)
    for i, (task, some) in enumerate(tasks.items()):
        size = len(range(i, s.prompts_per_step, len(tasks)))
        if size:
            mine = data.prompt_batch(some, size, data.seed_for(s.seed, task), step, run.rank, run.world)
            for j, prompt in enumerate(mine):
                yield prompt, task, run.rank * size + j


def rows_of(run: Run, prompts: Mapping[str, list[Prompt]], step: int) -> list[Row]:
    """The P*G trajectories of a step on this rank, group by group, task by task."""
    s = run.s
    return [
        Row(prompt, data.seed_for("row", s.seed, s.stage, s.task, step, task, place, g))
        for prompt, task, place in batch(run, prompts, step)
        for g in range(s.group_size)
    ]


def prepare(run: Run, prompts: Mapping[str, list[Prompt]], more: Iterable[Prompt] = ()) -> None:
    """Encode, before the first step, every prompt that the rest of the run will need; then no text encoder is left."""
    s = run.s
    tests = evaluation.load_prompts(s, "test", s.eval_prompts, task_list(s)) if s.eval_prompts else {}
    run.model.prepare(
        text
        for texts in (
            [""] if s.cfg != 1 or tests else [],
            (p.text for step in range(run.step, s.steps) for p, _, _ in batch(run, prompts, step)),
            (p.text for some in tests.values() for p in some),
            (p.text for p in more),
        )
        for text in texts
    )


# --------------------------------------------------------------------------------------------------------- pretrain
def pretrain(s: Settings) -> Path:
    """The base model: flow matching (F Eq. 1, Q Eq. 2) on drawings whose captions are sometimes wrong."""
    run = Run(s, models.new_tiny(s.seed, device=ranks.start(s)))
    for _ in run.steps("loss"):
        began, rng = time.time(), random.Random(run.generator("world", run.rank).initial_seed())
        pairs = [tiny.training_example(rng) for _ in range(s.batch_size)]
        captions = ["" if rng.random() < s.caption_dropout else caption for _, caption in pairs]
        x0 = run.model.latents(torch.from_numpy(np.stack([image for image, _ in pairs])))
        tokens = torch.tensor([tiny.tokenize(caption) for caption in captions])
        noise = run.generator("noise", run.rank)
        loss = flow_matching(run, x0, training_times(run, len(x0), noise), run.model.encode_tokens(tokens), noise)
        run.log({"loss": loss, "grad_norm": run.update(), "seconds": time.time() - began})
    return finish(run)


def training_times(run: Run, count: int, noise: torch.Generator) -> Tensor:
    """t of flow matching, (B,): logit-normal as in SD3, moved by the model's schedule (`FlowModel.train_shift`)."""
    return torch.sigmoid(torch.randn(count, generator=noise) + run.model.train_shift)


def flow_matching(run: Run, x0: Tensor, t: Tensor, cond: flow.Cond, noise: torch.Generator) -> float:
    """Backward of one flow-matching batch (F Eq. 1, Q Eq. 2), in micro-batches -> its loss."""
    eps, total = sde.standard_normal(x0.shape, noise), 0.0
    for part in batches(range(len(x0)), run.s.micro_batch):
        i = slice(part[0], part[-1] + 1)
        clean, e, at = (value[i].to(run.model.device) for value in (x0, eps, t))
        v = run.model.velocity(sde.interpolate(clean, e, at), at, cond.rows(i))  # v_theta(x_t, t, c)
        loss = sde.flow_matching_loss(v, clean, e).sum() / len(x0)
        loss.backward()
        total += loss.item()
    return total


# ----------------------------------------------------------------------------------------------------- curate, grpo
def curate(s: Settings) -> Path:
    """Prompt curation (Q 4.2): keep the prompts whose G samples differ in their reward by more than a threshold.

    The student is the base, or --init. A prompt's line is written as soon as it is known, so that a run that was
    killed goes on; ranks share the prompts.
    """
    prompts = evaluation.load_prompts(s, "train", s.train_prompts, task_list(s))
    panel = panel_of(s, ranks.start(s))  # before the model: a scorer that is not installed is found out at once
    panel.check(p for some in prompts.values() for p in some)
    run = student_run(s)
    # Other rewards, samples or weights give other ranges: what an earlier run found with them does not count.
    moves_nothing = (*runtime.FREE, "threshold", "train_prompts", "prompts", "rewards")
    alike, asked = {k: v for k, v in asdict(s).items() if k not in moves_nothing}, recipe.read(s)
    where = ("device", "endpoints", "key_env", *recipe.LIMITS)  # what a --rewards file says of the way to a scorer
    alike["scorers"] = {n: {k: v for k, v in e.items() if k not in where} for n, e in asked.scorers.items()}
    alike["weights"] = asked.weights
    known = curation.Ranges(run.folder / "ranges", run.rank, data.seed_for(json.dumps(alike, sort_keys=True)))
    unknown = {(p.task, p.text): p for some in prompts.values() for p in some if not known.has(p)}  # each of them once
    mine = list(unknown.values())[run.rank :: run.world]
    ranks.wait()  # nobody writes before everybody has read
    run.model.prepare(["", *(p.text for p in mine)])
    for part in tqdm(batches(mine, s.prompts_per_step), s.name, disable=run.rank > 0):
        rows = [Row(p, data.seed_for("row", s.seed, s.stage, p.text, g)) for p in part for g in range(s.group_size)]
        _, images = roll_out(run, rows, stoppable=False)
        scores = panel.ask(images, [row.prompt for row in rows], s.group_size)
        known.add(part, panel.totals(scores, [row.prompt for row in rows]).reshape(len(part), -1))
    ranks.wait()
    if run.rank == 0:
        print(curation.write(run.folder, prompts, known.all(), s.threshold))
    ranks.wait()
    return run.folder


def panel_of(s: Settings, device: torch.device) -> scoring.Panel:
    return scoring.build(recipe.read(s), device, is_tiny(s), s.on_reward_failure == "drop")


def train_teacher(s: Settings) -> Path:
    """GRPO on rewards (F 4.1, Q Eq. 4-6, 13): roll out groups, score, compare within groups, step."""
    # DEVIATION: F 6.1 trains the quality teacher on the prompts of all tasks; here it sees its own, as a specialist.
    prompts = evaluation.load_prompts(s, "train", s.train_prompts, TASKS if s.task == "mix" else (s.task,))
    panel, watch = panel_of(s, ranks.start(s)), recipe.read(s).watch
    panel.check(p for some in prompts.values() for p in some)
    run = student_run(s)
    prepare(run, prompts)
    later, ahead = scoring.Later(lambda images, some: panel.ask(images, some, s.group_size)), None
    for step in run.steps("reward"):
        stop_if_hacked(run, watch)  # before anything is drawn: what is saved is a whole step
        began = time.time()
        shares = ahead or draw_shares(run, prompts, later, step)
        # Nothing is drawn ahead of a checkpoint: a run that continues from it begins as this one goes on.
        more = s.overlap and step + 1 < s.steps and (step + 1) % s.save_every
        ahead = draw_shares(run, prompts, later, step + 1) if more else None
        scores = collect(run, shares)
        stats = []
        for share, found in zip(shares, scores, strict=True):
            advantages = panel.advantages(found, share["prompts"], s.group_size, s.combine, s.advantage_std)
            stats.append(update_policy(run, share["parts"], advantages))
        metrics = {key: float(np.mean([stat[key] for stat in stats])) for key in stats[0]}
        everything = scoring.joined(scores)
        rows = [p for share in shares for p in share["prompts"]]
        metrics |= scoring.metrics(panel, everything, rows, s.group_size)
        metrics |= alarms(run, watch, metrics)
        run.log({**metrics, "seconds": time.time() - began}, scoring.histograms(everything))
    later.close()
    return finish(run, panel)


def draw_shares(run: Run, prompts: Mapping[str, list[Prompt]], later: scoring.Later, step: int) -> list[dict]:
    """Roll out a step's trajectories, a share of the prompts for each optimizer update, and hand each share to the
    scorers as soon as it is drawn: {"parts", "prompts", "scores": a Future}."""
    rows, shares = rows_of(run, prompts, step), []
    for some in batches(rows, len(rows) // run.s.updates):
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


def alarms(run: Run, watch: Mapping[str, dict], metrics: Mapping[str, float] | None = None) -> dict[str, float]:
    """alarm/NAME of every watched scorer: 1 where the trained reward rises while it falls (`scoring.is_hacked`).

    Over the steps that are logged and, if given, the one whose metrics are about to be.
    """

    def curve(key: str) -> list[float]:
        return run.history(key) + ([metrics[key]] if metrics else [])

    found = {}
    for name, w in watch.items():
        hacked = scoring.is_hacked(curve("reward"), curve(f"reward/{name}"), w["window"], w["drop"])
        found[f"alarm/{name}"] = float(hacked)
    return found


def stop_if_hacked(run: Run, watch: Mapping[str, dict]) -> None:
    """Say the alarms of the steps that are done, and end the run where one is asked to: again, if it is repeated."""
    standing = alarms(run, watch)
    for name, w in watch.items():
        if ranks.any_rank(standing[f"alarm/{name}"] > 0):  # rank 0 has the log; others may not see its folder
            message = f"step {run.step}: the reward rises while {name} has fallen by more than {w['drop']:g}"
            if w["stop"]:
                run.fail_together(rewards.RewardError(f"{message}: reward hacking"), rewards.RewardError)
            elif run.rank == 0:
                print(f"alarm: {message}", file=sys.stderr)


@torch.no_grad()
def roll_out(run: Run, rows: Sequence[Row], stoppable: bool = True) -> tuple[list[dict], Tensor]:
    """Sample a trajectory a row from the current policy (F Eq. 5-6).

    Returns the micro-batches, {"path": transitions, "velocity": v(x, t)} each, and the images (B, 3, H, W).
    """
    s, model, parts, images = run.s, run.model, [], []
    for part in batches(rows, s.micro_batch):
        if stoppable:
            run.stop_if_asked()
        sources = [row.source() for row in part]
        x = sde.standard_normal((len(part), *model.latent_shape), sources).to(model.device)
        velocity = guided(model, part, s.cfg)
        ts, window = model.time_grid(s.num_steps), settings.window_of(s)
        path = list(sde.rollout(velocity, x, ts, s.noise_level, s.kernel, window, sources))
        images.append(model.decode(path[-1].x_next))
        parts.append({"path": path, "velocity": velocity})
    return parts, torch.cat(images)


def guided(model: flow.FlowModel, rows: Sequence[Row], cfg: float) -> Callable[[Tensor, float], Tensor]:
    """The velocity field of one micro-batch, v(x, t), as sde.rollout wants it."""
    cond, uncond = evaluation.conditions(model, [row.prompt.text for row in rows], cfg)
    return lambda x, t: model.velocity(x, t, cond, uncond, cfg)


def trained_steps(run: Run) -> list[int]:
    """Indices of the transitions that are trained: a subset (Q 4.2) of the stochastic ones, the same on every rank.

    The forward-only ODE steps have no density, hence no ratio and no KL; `velocity` (Q Eq. 14) needs neither.
    """
    s = run.s
    start, stop = (0, s.num_steps) if deterministic(s) else settings.window_of(s)
    count = None if s.train_steps == "all" else min(s.train_count, stop - start)
    subset = grpo.timestep_subset(stop - start, count, s.train_steps, generator=run.generator("subset"))
    return [start + n for n in subset]


def deterministic(s: Settings) -> bool:
    """Does the stage walk the ODE? (Q Eq. 14's estimator is defined on the states of the deterministic sampler.)"""
    return s.stage == "opd" and s.estimator in opd.NEEDS_ODE


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


# -------------------------------------------------------------------------------------------- cold start: sft, merge
def sft(s: Settings) -> Path:
    """Cold start by SFT (F 5.1): each teacher draws its own task's prompts, the student learns what they drew."""
    prompts = evaluation.load_prompts(s, "train", s.train_prompts, task_list(s))
    run = student_run(s)
    experts = evaluation.load_teachers(run.model, s)
    count = -(-s.sft_images // len(prompts))
    chosen = {task: [some[i % len(some)] for i in range(count)] for task, some in prompts.items()}
    prepare(run, {}, [p for some in chosen.values() for p in some])
    drawn = []
    for task, rows in chosen.items():
        run.model.keep([experts[task]])
        with run.model.adapter(experts[task]):
            drawn.append(evaluation.draw(run.model, rows, s, data.seed_for(s.seed, "sft", task)))
    run.model.keep([])
    x0, texts = torch.cat(drawn), [p.text for rows in chosen.values() for p in rows]  # latents: no VAE is needed
    for _ in run.steps("loss"):
        run.stop_if_asked()
        began, noise = time.time(), run.generator("noise", run.rank)
        rows = torch.randint(len(x0), (s.batch_size,), generator=noise)
        cond = run.model.encode([texts[i] for i in rows])
        loss = flow_matching(run, x0[rows], training_times(run, len(rows), noise), cond, noise)
        run.log({"loss": loss, "grad_norm": run.update(), "seconds": time.time() - began})
    return finish(run)


def merge_teachers(s: Settings) -> Path:
    """Cold start by merging (F 5.1): the mean of the teachers' updates as one adapter. No training."""
    device = ranks.start(s)
    evaluation.locate_all(s)
    model = models.load(s, device)
    states, scales = [], []
    for where in s.teachers.values():
        folder = adapters.locate(where)
        if adapters.kind(folder) == "full":
            raise adapters.ModelError(f"{folder}: a full checkpoint; --stage merge merges LoRA teachers")
        state, config = model.read_adapter(folder)
        states.append(state)
        scales.append(config.lora_alpha / config.r)
    merged = merge.merge_lora(states, method=s.merge_method, scales=scales)
    rank = next(value.shape[0] for key, value in merged.items() if "lora_A" in key)
    lora = adapters.lora_config(rank, rank)  # merge_lora's update is B @ A at scale 1, hence alpha = rank
    model.add_adapter(flow.STUDENT, lora, merged)
    run = Run(s, model, lora)
    run.save()
    return finish(run)


# -------------------------------------------------------------------------------------------------------------- opd
def distil(s: Settings) -> Path:
    """Multi-teacher on-policy distillation (F Eq. 7-12, Q Eq. 14): learn from the teachers on one's own states."""
    prompts = evaluation.load_prompts(s, "train", s.train_prompts, task_list(s))
    run = student_run(s)
    experts = evaluation.load_teachers(run.model, s)
    prepare(run, prompts)
    # The path estimators credit an action with what comes after it: they need the whole trajectory first.
    single_pass = s.single_pass and s.estimator in opd.SINGLE_PASS
    for step in run.steps("gap"):
        began = time.time()
        metrics = distil_step(run, rows_of(run, prompts, step), experts, single_pass)
        run.log({**metrics, "grad_norm": run.update(), "seconds": time.time() - began})
    return finish(run)


def distil_step(run: Run, rows: Sequence[Row], experts: Mapping[str, str], single_pass: bool) -> dict[str, float]:
    """Rollout, labels and backward of one batch; the gradient is the mean over rows and trained steps.

    Rows come task by task, so that a micro-batch mostly has one teacher. A full-checkpoint teacher is fetched while
    the micro-batch before its own computes, and sent away after its last.
    """
    parts, totals = batches(rows, run.s.micro_batch), {}
    needed = [{experts[row.prompt.task] for row in part} for part in parts]
    for i, part in enumerate(parts):
        run.stop_if_asked()
        run.model.keep(needed[i] | needed[(i + 1) % len(parts)] | {experts.get("anchor", "")})
        distil_part(run, part, experts, single_pass, len(rows), totals)
    return totals


def distil_part(run: Run, rows: Sequence[Row], experts, single_pass: bool, batch_rows: int, totals: dict) -> None:
    """One micro-batch: walk the student's trajectory, ask the teachers, backward."""
    s, model = run.s, run.model
    cond, uncond = evaluation.conditions(model, [row.prompt.text for row in rows], s.cfg)
    routed = opd.route([row.prompt.task for row in rows], {t: experts[t] for t in task_list(s)})  # F Eq. 7
    sources = [row.source() for row in rows]
    x = sde.standard_normal((len(rows), *model.latent_shape), sources).to(model.device)
    steps, ts = trained_steps(run), model.time_grid(s.num_steps)
    learnt, weight = {float(ts[n]) for n in steps}, 1 / (len(steps) * batch_rows)

    def student(x: Tensor, t: float) -> Tensor:
        with torch.set_grad_enabled(single_pass and t in learnt):  # no graph where nothing is trained
            return model.velocity(x, t, cond, uncond, s.cfg)

    level, window = (0.0, None) if deterministic(s) else (s.noise_level, settings.window_of(s))
    walk = sde.rollout(student, x, ts, level, window=window, generator=sources)
    if single_pass:
        for step in walk:  # each transition trains as it is made; nothing is stored
            if step.index in steps:
                targets = label(run, step, cond, uncond, routed, experts)
                learn(run, step, step.v, *targets, None, weight, totals)
        return
    path = [step for step in walk if step.index in steps]
    targets = [label(run, step, cond, uncond, routed, experts) for step in path]
    for step, target, future in zip(path, targets, futures(s, path, targets), strict=True):
        learn(run, step, model.velocity(step.x, step.t, cond, uncond, s.cfg), *target, future, weight, totals)


def label(run: Run, step: sde.Transition, cond, uncond, routed, experts) -> tuple[Tensor, Tensor | None]:
    """The teachers' velocities at the student's states (F Eq. 7), and the anchor's (F Eq. 12) where MAR is on."""
    model, cfg = run.model, run.s.cfg
    anchor, v_anchor = experts.get("anchor"), None
    if anchor:
        with model.adapter(anchor):
            v_anchor = model.velocity(step.x, step.t, cond, uncond, cfg)

    def teacher(name: str, index: Tensor, x: Tensor, t: float) -> Tensor:
        if name == anchor:  # the anchor already answered for every row
            return v_anchor[index]
        with model.adapter(name):
            return model.velocity(x, t, cond.rows(index), uncond and uncond.rows(index), cfg)

    return opd.target_velocity(routed, teacher, step.x, step.t), v_anchor


def learn(run, step, v, v_target, v_anchor, future, weight: float, totals: dict[str, float]) -> None:
    """Backward of one transition: the estimator's loss (F Eq. 11, Q Eq. 14) plus lambda MAR (F Eq. 12), each row's
    times `weight`."""
    s = run.s
    at = {"t": step.t, "dt": step.dt, "sigma": step.sigma}
    loss_B = opd.opd_loss(
        s.estimator, v_student=v, v_target=v_target, **at, x=step.x, x_next=step.x_next, future=future,
        clip=None, reduce=s.log_prob, scale=s.kl_scale,
    )  # fmt: skip
    found = {"loss": loss_B, "gap": sde.flat_reduce((v - v_target).square(), "mean")}
    if v_anchor is not None:
        if deterministic(s):  # DEVIATION: w(t) is infinite without noise, so Q's objective takes Q's weight, 1
            mar_B = opd.velocity_matching(v, v_anchor, s.log_prob)
        else:
            mar_B = opd.mar_penalty(v, v_anchor, **at, reduce=s.log_prob, scale=s.kl_scale)
        loss_B, found["mar"] = loss_B + s.mar * mar_B, mar_B
    if step.sigma > 0:
        found["kl"] = kl.velocity_kl(v, v_target, **at)
    (loss_B.sum() * weight).backward()
    for key, value in found.items():
        totals[key] = totals.get(key, 0.0) + value.detach().sum().item() * weight


def futures(s: Settings, path: list[sde.Transition], targets: list) -> list[Tensor | None]:
    """What each action is credited with: later KLs (`path`), this and later log-ratios (`sampled_path`), or nothing."""
    if s.estimator == "path":
        kls = [kl.velocity_kl(p.v, v, p.t, p.dt, p.sigma, s.log_prob, s.kl_scale) for p, (v, _) in zip(path, targets)]
        return list(opd.reward_to_go(torch.stack(kls), inclusive=False))
    if s.estimator == "sampled_path":
        gains = [
            opd.sampled_reward(p.x_next, sde.sde_mean(p.x, v, p.t, p.dt, p.sigma), p.mean, p.std, s.log_prob)
            for p, (v, _) in zip(path, targets)
        ]
        return list(opd.reward_to_go(torch.stack(gains)))
    return [None] * len(path)


# -------------------------------------------------------------------------------------------------- shared by stages
def student_run(s: Settings) -> Run:
    """The frozen base and a student: a LoRA on it or a transformer of its own, new or from --init (a cold start)."""
    device = ranks.start(s)
    evaluation.locate_all(s)
    model, lora = models.load(s, device), None
    if s.parameters == "full":
        model.train_fully(s.init, keep_base=needs_base(s))
        ranks.shard(model, s)
        return Run(s, model)
    state, lora = None, adapters.lora_config(s.rank, s.alpha)
    if s.init:
        folder = adapters.locate(s.init)
        if adapters.kind(folder) == "full":
            raise adapters.ModelError(f"{folder}: a full checkpoint: add --parameters full, or give it as --model")
        state, lora = model.read_adapter(folder)
    with torch.random.fork_rng(devices=[]):  # the gaussian A of a new adapter
        torch.manual_seed(data.seed_for(s.seed, "lora"))
        model.add_adapter(flow.STUDENT, lora, state)
    return Run(s, model, lora)


def needs_base(s: Settings) -> bool:
    """Does a full-parameter student need the frozen base beside it: for LoRA teachers, or for the KL to the base?"""
    if s.stage == "grpo":
        return s.beta > 0
    anchor = [s.anchor] if s.stage == "opd" and s.mar > 0 and s.anchor not in s.teachers else []
    return any(adapters.kind(adapters.locate(where)) != "full" for where in (*s.teachers.values(), *anchor))


def finish(run: Run, panel: scoring.Panel | None = None) -> Path:
    """Evaluate the exported weights, write the report, say where everything is -> the last checkpoint.

    panel: the scorers that are at hand anyway; else those that --rewards names are loaded, if it names any.
    """
    s, rows = run.s, {}
    run.model.keep([])
    if s.eval_prompts:
        prompts = evaluation.load_prompts(s, "test", s.eval_prompts, task_list(s))
        with run.exported():
            result = evaluation.evaluate(run.model, prompts, s, panel)
        if result:
            report.save_samples(run.folder, "final", result, prompts)
            rows = {s.name: {key: result[key] for key in ("scores", "tags")}}
            run.write_card(run.checkpoint, result["scores"])
    if run.rank == 0:
        where = report.write_report(run.folder, s.name, rows)
        shown = "  ".join(f"{key} {value:.3f}" for row in rows.values() for key, value in row["scores"].items())
        print(f"{s.name}: {shown or 'done'}\n  checkpoint {run.checkpoint}\n  report     {where}")
    ranks.wait()
    return run.checkpoint


def everything(s: Settings, chosen: dict) -> Path:
    """--stage all: both cold starts, OPD from the merged one, and the table. The tiny world has no published base and
    teachers: there, pretraining and GRPO come first."""

    def part(stage: str, **more) -> Settings:
        name = "-".join([s.name, stage, *([more["task"]] if "task" in more else [])])
        return settings.for_stage(chosen, stage, name=name, **more)

    base, teachers = s.model, s.teachers
    if is_tiny(s):
        base = str(pretrain(part("pretrain")).parents[1])
        teachers = {t: str(train_teacher(part("grpo", task=t, model=base)).parents[1]) for t in TASKS}
    common = {"model": base, "teachers": teachers}
    # Merging takes seconds and is picky about its teachers: it goes first.
    merged = str(merge_teachers(part("merge", **common)).parents[1])
    cold = {"sft": str(sft(part("sft", **common)).parents[1]), "merged": merged}
    student = str(distil(part("opd", **common, init=cold["merged"])).parents[1])
    if not s.eval_prompts:
        return Path(student)
    final = settings.for_stage(chosen, "opd", name=s.name, **common, mar=0.0, compare={**cold, "opd student": student})
    rows, where = evaluation.compare(final)
    if rows:
        print(report.markdown_table({name: row["scores"] for name, row in rows.items()}))
        print(f"\npictures: {where.parent / 'samples'}\nreport:   {where}")
    return where.parent


def run_stage(s: Settings, chosen: dict) -> None:
    if s.wandb:
        runtime.require_extra("wandb", "wandb", "--wandb")
    if s.stage == "all":
        everything(s, chosen)
    elif s.stage == "grpo" and not s.task:
        for task in TASKS:
            train_teacher(settings.for_stage(chosen, "grpo", task=task, name=f"{s.name}-{task}"))
    else:
        stages = {"pretrain": pretrain, "curate": curate, "grpo": train_teacher, "sft": sft, "merge": merge_teachers}
        {**stages, "opd": distil}[s.stage](s)


def main(argv: Sequence[str] | None = None) -> int:
    """0: done or stopped in good order; 2: the user's to mend; 1: anything else, with its traceback; 130: Ctrl-C."""
    try:
        s, chosen = settings.parse(list(sys.argv[1:] if argv is None else argv))
        recipe.read(s)
        if s.dry_run:
            print(plan.describe(s))
            return 0
        run_stage(s, chosen)
        return 0
    except evaluation.USER_ERRORS as fault:
        return ranks.fail(fault)
    except runtime.Stopped as stop:
        code, message = 0, str(stop)
    except KeyboardInterrupt:
        code, message = 130, "interrupted: repeat the command to continue from the last checkpoint"
    # Out here the exception is gone, and with it the run's progress bar: the message gets a line of its own.
    if ranks.rank_and_world()[0] == 0:
        print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    ranks.leave(main)
