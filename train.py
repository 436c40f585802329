"""The pipeline of both papers, one short loop a stage:

    pretrain   flow matching on the tiny world's drawings (F Eq. 1, Q Eq. 2)
    grpo       one teacher per task by GRPO (F 4.1, Q Eq. 4-6); --task mix is the GRPO-mix baseline (F App. A)
    sft        cold start: flow matching on images of the routed teachers (F 5.1)
    merge      cold start: one adapter out of the teachers' (F 5.1)
    opd        multi-teacher on-policy distillation with manifold anchor regularisation (F Eq. 7-12, Q Eq. 14)
    all        everything from nothing, then the table

    python train.py --preset tiny --stage opd
    torchrun --nproc_per_node=2 train.py --preset tiny --stage opd

Each loop reads like the paper's algorithm; the mathematics is in sde, kl, grpo, opd and merge, what a run needs
besides in runtime. Randomness: every step makes its own generators from (seed, stage, step, rank).
"""

import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import settings
from settings import TASKS, Settings, task_list

if __name__ == "__main__":
    settings.answer_early(sys.argv[1:], "train.py")

import numpy as np
import torch
from torch import Tensor

import data
import eval as evaluation
import grpo
import kl
import merge
import models
import opd
import runtime
import sde
import tiny
from data import Prompt
from runtime import Run

MIX = {"composition": 3, "text": 1, "quality": 1}  # F App. A: epochs of GenEval : OCR : PickScore


# --------------------------------------------------------------------------------------------------------- pretrain
def pretrain(s: Settings) -> Path:
    """The base model: flow matching (F Eq. 1, Q Eq. 2) on drawings whose captions are sometimes wrong."""
    run = Run(s, models.new_tiny(s.seed))
    for _ in run.steps("loss"):
        began, rng = time.time(), random.Random(run.generator("world").initial_seed())
        pairs = [tiny.training_example(rng) for _ in range(s.batch_size)]
        captions = ["" if rng.random() < s.caption_dropout else caption for _, caption in pairs]
        x0 = run.model.latents(torch.from_numpy(np.stack([image for image, _ in pairs])))
        noise = run.generator("noise")
        # t is logit-normal as in SD3, moved towards noise: in so small an image content is decided early.
        t = torch.sigmoid(torch.randn(len(x0), generator=noise) + 0.4)
        loss = flow_matching(run, x0, t, run.model.encode_tokens(tokens(captions)), noise)
        run.log({"loss": loss, "grad_norm": run.update(), "seconds": time.time() - began})
    return finish(run)


def tokens(captions: Sequence[str]) -> Tensor:
    return torch.tensor([tiny.tokenize(caption) for caption in captions])


def flow_matching(run: Run, x0: Tensor, t: Tensor, cond: models.Cond, noise: torch.Generator) -> float:
    """Backward of one flow-matching batch (F Eq. 1, Q Eq. 2) -> its loss."""
    eps = torch.randn(x0.shape, generator=noise)
    v = run.model.velocity(sde.interpolate(x0, eps, t), t, cond)  # v_theta(x_t, t, c)
    loss = sde.flow_matching_loss(v, x0, eps).mean()
    loss.backward()
    return loss.item()


# ------------------------------------------------------------------------------------------------------------- grpo
def train_teacher(s: Settings) -> Path:
    """GRPO on one reward (F 4.1, Q Eq. 4-6): roll out groups, score, compare within groups, step."""
    # DEVIATION: F 6.1 trains the quality teacher on the prompts of all tasks; here it sees its own, as a specialist.
    tasks = TASKS if s.task == "mix" else (s.task,)
    prompts = evaluation.load_prompts(s, "train", s.train_prompts, tasks)
    run = student_run(s)
    for step in run.steps("reward"):
        began = time.time()
        task = grpo.mix_schedule(step, MIX) if s.task == "mix" else s.task
        batch = mixed_batch(run, {task: prompts[task]} if s.task == "mix" else prompts, s.prompts_per_step)
        chunks = []
        for i, part in enumerate(evaluation.batches(batch, s.prompts_per_step // s.updates)):
            chunks.append(rollout_group(run, part, settings.rewards_of(s, task), i))
        stats = [update_policy(run, chunk) for chunk in chunks]
        metrics = {key: float(np.mean([stat[key] for stat in stats])) for key in stats[0]}
        metrics["reward"] = float(np.mean([chunk["rewards"].mean() for chunk in chunks]))
        metrics["group_std"] = float(np.mean([chunk["rewards"].std(1, correction=0).mean() for chunk in chunks]))
        run.log({**metrics, "seconds": time.time() - began})
    return finish(run)


def mixed_batch(run: Run, prompts: dict[str, list[Prompt]], count: int) -> list[Prompt]:
    """`count` prompts for this step and rank, shared evenly among the tasks (the first ones take what is left)."""
    sizes = [len(range(i, count, len(prompts))) for i in range(len(prompts))]
    return [
        prompt
        for (task, some), size in zip(prompts.items(), sizes, strict=True) if size
        for prompt in data.prompt_batch(some, size, data.seed_for(run.s.seed, task), run.step, run.rank, run.world)
    ]  # fmt: skip


def repeat(prompts: Sequence[Prompt], group_size: int) -> list[Prompt]:
    """P prompts -> P*G rows, a group's rows side by side."""
    return [p for p in prompts for _ in range(group_size)]


@torch.no_grad()
def rollout_group(run: Run, prompts: Sequence[Prompt], weights: dict[str, float], chunk: int) -> dict:
    """Sample G trajectories a prompt from the current policy (F Eq. 5-6) and score their images."""
    s, model = run.s, run.model
    rows = repeat(prompts, s.group_size)
    cond, uncond = evaluation.conditions(model, [p.text for p in rows], s.cfg)
    noise = run.generator("rollout", chunk)
    x = torch.randn((len(rows), *model.latent_shape), generator=noise)
    ts = model.time_grid(s.num_steps)
    velocity = guided(model, cond, uncond, s.cfg)
    path = list(sde.rollout(velocity, x, ts, s.noise_level, s.kernel, settings.window_of(s), noise))
    rewards_B = tiny.reward(model.decode(path[-1].x_next), rows, weights)
    rewards_PG = torch.from_numpy(rewards_B).reshape(len(prompts), s.group_size)
    return {"path": path, "rewards": rewards_PG, "velocity": velocity}


def guided(model: models.FlowModel, cond, uncond, cfg: float) -> Callable[[Tensor, float], Tensor]:
    """The velocity field of one batch, v(x, t), as sde.rollout wants it."""
    return lambda x, t: model.velocity(x, t, cond, uncond, cfg)


def trained_steps(run: Run) -> list[int]:
    """Indices of the transitions that are trained: a subset (Q 4.2) of the stochastic ones.

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


def update_policy(run: Run, chunk: dict) -> dict[str, float]:
    """One optimizer update on the clipped objective (Q Eq. 6), averaged over the trained steps."""
    s = run.s
    advantage_B = grpo.group_advantages(chunk["rewards"], s.advantage_std).flatten().float()
    steps, totals = trained_steps(run), {}
    for n in steps:
        old = chunk["path"][n]
        v = chunk["velocity"](old.x, old.t)
        mean = sde.transition_mean(old, v, s.noise_level, s.kernel)
        log_prob = sde.log_prob(old.x_next, mean, old.std, s.log_prob)
        log_prob_old = sde.log_prob(old.x_next, old.mean, old.std, s.log_prob)
        ratio = grpo.guard_ratio(log_prob, log_prob_old, mean, old.mean, old.std, s.log_prob) if s.guard else None
        kl_B = None
        if s.beta > 0:  # KL to the frozen base (Flow-GRPO's regulariser), F Eq. 9
            with run.model.adapter(None):
                v_base = chunk["velocity"](old.x, old.t)
            kl_B = kl.velocity_kl(v, v_base, old.t, old.dt, old.sigma, s.log_prob)
        loss_B, stats = grpo.policy_loss(
            log_prob, log_prob_old, advantage_B, s.clip, s.advantage_clip, kl_B, s.beta, ratio
        )
        (loss_B.mean() / len(steps)).backward()
        for key, value in stats.items():
            totals[key] = totals.get(key, 0.0) + value.item() / len(steps)
    return {**totals, "grad_norm": run.update()}


# -------------------------------------------------------------------------------------------- cold start: sft, merge
def sft(s: Settings) -> Path:
    """Cold start by SFT (F 5.1): each teacher draws its own task's prompts, the student learns the images."""
    prompts = evaluation.load_prompts(s, "train", s.train_prompts, task_list(s))
    run = student_run(s)
    experts = evaluation.load_teachers(run.model, s)
    images, texts = [], []
    for task, some in prompts.items():
        count = -(-s.sft_images // len(prompts))
        rows = [some[i % len(some)] for i in range(count)]
        with run.model.adapter(experts[task]):
            images.append(evaluation.draw(run.model, rows, s.eval_steps, s.cfg, data.seed_for(s.seed, "sft", task)))
        texts += [p.text for p in rows]
    x0 = run.model.latents(torch.cat(images))
    for _ in run.steps("loss"):
        began, noise = time.time(), run.generator("noise")
        rows = torch.randint(len(x0), (s.batch_size,), generator=noise)
        t = torch.sigmoid(torch.randn(len(rows), generator=noise) + 0.4)  # as in pretraining
        loss = flow_matching(run, x0[rows], t, run.model.encode([texts[i] for i in rows]), noise)
        run.log({"loss": loss, "grad_norm": run.update(), "seconds": time.time() - began})
    return finish(run)


def merge_teachers(s: Settings) -> Path:
    """Cold start by merging (F 5.1): the mean of the teachers' updates as one adapter. No training."""
    model = models.load_tiny(runtime.adapter_folder(s.model))
    adapters, scales = [], []
    for path in s.teachers.values():
        state, config = models.load_adapter(runtime.adapter_folder(path), model)
        adapters.append(state)
        scales.append(config.lora_alpha / config.r)
    merged = merge.merge_lora(adapters, method=s.merge_method, scales=scales)
    rank = next(value.shape[0] for key, value in merged.items() if "lora_A" in key)
    lora = models.lora_config(rank, rank)  # merge_lora's update is B @ A at scale 1, hence alpha = rank
    model.add_adapter(models.STUDENT, lora, merged)
    run = Run(s, model, lora)
    run.save()
    return finish(run)


# -------------------------------------------------------------------------------------------------------------- opd
def distil(s: Settings) -> Path:
    """Multi-teacher on-policy distillation (F Eq. 7-12, Q Eq. 14): learn from the teachers on one's own states."""
    prompts = evaluation.load_prompts(s, "train", s.train_prompts, task_list(s))
    run = student_run(s)
    experts = evaluation.load_teachers(run.model, s)
    # The path estimators credit an action with what comes after it: they need the whole trajectory first.
    single_pass = s.single_pass and s.estimator in opd.SINGLE_PASS
    for _ in run.steps("gap"):
        began = time.time()
        rows = repeat(mixed_batch(run, prompts, s.prompts_per_step), s.group_size)
        metrics = distil_step(run, rows, experts, single_pass)
        run.log({**metrics, "grad_norm": run.update(), "seconds": time.time() - began})
    return finish(run)


def distil_step(run: Run, rows: Sequence[Prompt], experts: dict[str, str], single_pass: bool) -> dict[str, float]:
    """Rollout, labels and backward of one batch; the gradient is the mean over samples and trained steps."""
    s, model = run.s, run.model
    cond, uncond = evaluation.conditions(model, [p.text for p in rows], s.cfg)
    routed = opd.route([p.task for p in rows], {t: experts[t] for t in task_list(s)})  # F Eq. 7
    noise = run.generator("rollout")
    x = torch.randn((len(rows), *model.latent_shape), generator=noise)
    steps, ts = trained_steps(run), model.time_grid(s.num_steps)
    learnt = {float(ts[n]) for n in steps}

    def student(x: Tensor, t: float) -> Tensor:
        with torch.set_grad_enabled(single_pass and t in learnt):  # no graph where nothing is trained
            return model.velocity(x, t, cond, uncond, s.cfg)

    level, window = (0.0, None) if deterministic(s) else (s.noise_level, settings.window_of(s))
    walk = sde.rollout(student, x, ts, level, window=window, generator=noise)
    totals: dict[str, float] = {}
    if single_pass:
        for step in walk:  # each transition trains as it is made; nothing is stored
            if step.index in steps:
                targets = label(run, step, cond, uncond, routed, experts)
                learn(run, step, step.v, *targets, None, len(steps), totals)
        return totals
    path = [step for step in walk if step.index in steps]
    targets = [label(run, step, cond, uncond, routed, experts) for step in path]
    for step, target, future in zip(path, targets, futures(s, path, targets), strict=True):
        learn(run, step, model.velocity(step.x, step.t, cond, uncond, s.cfg), *target, future, len(steps), totals)
    return totals


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


def learn(run, step, v, v_target, v_anchor, future, count: int, totals: dict[str, float]) -> None:
    """Backward of one transition: the estimator's loss (F Eq. 11, Q Eq. 14) plus lambda MAR (F Eq. 12)."""
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
    (loss_B.mean() / count).backward()
    for key, value in found.items():
        totals[key] = totals.get(key, 0.0) + value.detach().mean().item() / count


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
    """The frozen base with a student LoRA on it: new, or from --init (a cold start)."""
    model = models.load_tiny(runtime.adapter_folder(s.model))
    state, lora = None, models.lora_config(s.rank, s.alpha)
    if s.init:
        state, lora = models.load_adapter(runtime.adapter_folder(s.init), model)
    with torch.random.fork_rng():  # the gaussian A of a new adapter
        torch.manual_seed(data.seed_for(s.seed, "lora"))
        model.add_adapter(models.STUDENT, lora, state)
    return Run(s, model, lora)


def finish(run: Run) -> Path:
    """Evaluate the exported weights, write the report, say where everything is -> the last checkpoint."""
    s = run.s
    if run.rank == 0:
        tasks = task_list(s)
        prompts = evaluation.load_prompts(s, "test", s.eval_prompts, tasks)
        with run.exported():
            result = evaluation.evaluate(run.model, prompts, s)
        evaluation.save_samples(run.folder, "final", result, prompts)
        report = evaluation.write_report(run.folder, s.name, {s.name: result}, tasks)
        shown = "  ".join(f"{key} {result[key]:.3f}" for key in (*tasks, "average"))
        print(f"{s.name}: {shown}\n  checkpoint {run.checkpoint}\n  report     {report}")
    runtime.wait()
    return run.checkpoint


def everything(s: Settings, chosen: dict) -> Path:
    """--stage all: pretraining, the three teachers, both cold starts, OPD from the merged one, and the table."""

    def part(stage: str, **more) -> Settings:
        name = "-".join([s.name, stage, *([more["task"]] if "task" in more else [])])
        return settings.for_stage(chosen, stage, name=name, **more)

    base = str(pretrain(part("pretrain")).parents[1])
    teachers = {t: str(train_teacher(part("grpo", task=t, model=base)).parents[1]) for t in TASKS}
    common = {"model": base, "teachers": teachers}
    cold = {
        "sft": str(sft(part("sft", **common)).parents[1]),
        "merged": str(merge_teachers(part("merge", **common)).parents[1]),
    }
    student = str(distil(part("opd", **common, init=cold["merged"])).parents[1])
    final = settings.for_stage(chosen, "opd", name=s.name, **common, mar=0.0, compare={**cold, "opd student": student})
    if runtime.start(s.threads)[0] == 0:
        rows, report = evaluation.compare(final)
        print(evaluation.markdown_table(rows, [*task_list(s), "average"]))
        print(f"\npictures: {report.parent / 'samples'}\nreport:   {report}")
    return Path(s.out) / s.name


def run_stage(s: Settings, chosen: dict) -> None:
    if s.stage == "all":
        everything(s, chosen)
    elif s.stage == "grpo" and not s.task:
        for task in TASKS:
            train_teacher(settings.for_stage(chosen, "grpo", task=task, name=f"{s.name}-{task}"))
    else:
        {"pretrain": pretrain, "grpo": train_teacher, "sft": sft, "merge": merge_teachers, "opd": distil}[s.stage](s)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        s, chosen = settings.parse(list(sys.argv[1:] if argv is None else argv))
        if s.dry_run:
            print(settings.plan(s))
            return 0
        run_stage(s, chosen)
        return 0
    except evaluation.USER_ERRORS as fault:
        code, message = 2, f"error: {fault}"
    except KeyboardInterrupt:
        code, message = 130, "interrupted: repeat the command to continue from the last checkpoint"
    # Out here the exception is gone, and with it the run's progress bar: the message gets a line of its own.
    print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
