"""The pipeline of both papers, one short loop a stage:

    pretrain   flow matching on the tiny world's drawings (F Eq. 1, Q Eq. 2)
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

import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import plan
import settings
from settings import TASKS, Settings, is_tiny, task_list

if __name__ == "__main__":
    plan.answer_early(sys.argv[1:], "train.py")

import numpy as np
import torch
from torch import Tensor

import adapters
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


def rows_of(run: Run, prompts: Mapping[str, list[Prompt]]) -> list[Row]:
    """The P*G trajectories of the present step on this rank, group by group, task by task."""
    s = run.s
    return [
        Row(prompt, data.seed_for("row", s.seed, s.stage, s.task, run.step, task, place, g))
        for prompt, task, place in batch(run, prompts, run.step)
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


# ------------------------------------------------------------------------------------------------------------- grpo
def train_teacher(s: Settings) -> Path:
    """GRPO on one reward (F 4.1, Q Eq. 4-6): roll out groups, score, compare within groups, step."""
    # DEVIATION: F 6.1 trains the quality teacher on the prompts of all tasks; here it sees its own, as a specialist.
    prompts = evaluation.load_prompts(s, "train", s.train_prompts, TASKS if s.task == "mix" else (s.task,))
    run = student_run(s)
    prepare(run, prompts)
    for step in run.steps("reward"):
        began = time.time()
        (task,) = pool(s, prompts, step)
        rows = rows_of(run, prompts)
        shares = batches(rows, len(rows) // s.updates)  # each optimizer update has its own prompts
        rollouts = [roll_out(run, share, settings.rewards_of(s, task)) for share in shares]
        stats = [update_policy(run, *rollout) for rollout in rollouts]
        metrics = {key: float(np.mean([stat[key] for stat in stats])) for key in stats[0]}
        metrics["reward"] = float(np.mean([scores.mean() for _, scores in rollouts]))
        metrics["group_std"] = float(np.mean([scores.std(1, correction=0).mean() for _, scores in rollouts]))
        run.log({**metrics, "seconds": time.time() - began})
    return finish(run)


@torch.no_grad()
def roll_out(run: Run, rows: Sequence[Row], weights: Mapping[str, float]) -> tuple[list[dict], Tensor]:
    """Sample a trajectory a row from the current policy (F Eq. 5-6) and score the images.

    Returns the micro-batches, {"path": transitions, "velocity": v(x, t)} each, and the rewards (P, G).
    """
    s, model, parts, images = run.s, run.model, [], []
    for part in batches(rows, s.micro_batch):
        run.stop_if_asked()
        sources = [row.source() for row in part]
        x = sde.standard_normal((len(part), *model.latent_shape), sources).to(model.device)
        velocity = guided(model, part, s.cfg)
        ts, window = model.time_grid(s.num_steps), settings.window_of(s)
        path = list(sde.rollout(velocity, x, ts, s.noise_level, s.kernel, window, sources))
        images.append(model.decode(path[-1].x_next))
        parts.append({"path": path, "velocity": velocity})
    judge = tiny.reward if is_tiny(s) else rewards.judge
    scores_B = judge(torch.cat(images), [row.prompt for row in rows], weights)
    return parts, torch.from_numpy(scores_B).reshape(-1, s.group_size)


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


def update_policy(run: Run, parts: Sequence[dict], rewards_PG: Tensor) -> dict[str, float]:
    """One optimizer update on the clipped objective (Q Eq. 6), averaged over rows and trained steps."""
    s, steps, totals = run.s, trained_steps(run), {}
    advantage_B = grpo.group_advantages(rewards_PG, s.advantage_std).flatten().float()
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
    for _ in run.steps("gap"):
        began = time.time()
        metrics = distil_step(run, rows_of(run, prompts), experts, single_pass)
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


def finish(run: Run) -> Path:
    """Evaluate the exported weights, write the report, say where everything is -> the last checkpoint."""
    s, rows = run.s, {}
    run.model.keep([])
    if s.eval_prompts:
        prompts = evaluation.load_prompts(s, "test", s.eval_prompts, task_list(s))
        with run.exported():
            result = evaluation.evaluate(run.model, prompts, s)
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
        {"pretrain": pretrain, "grpo": train_teacher, "sft": sft, "merge": merge_teachers, "opd": distil}[s.stage](s)


def main(argv: Sequence[str] | None = None) -> int:
    """0: done or stopped in good order; 2: the user's to mend; 1: anything else, with its traceback; 130: Ctrl-C."""
    try:
        s, chosen = settings.parse(list(sys.argv[1:] if argv is None else argv))
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
