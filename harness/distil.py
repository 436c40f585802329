"""How do several teachers become one student? On-policy distillation, F Eq. 7-12 and Q Eq. 14.

    roll out      the student walks its own trajectories: F's SDE, or Q's ODE (`--estimator velocity`)
    label         each state is shown to the teacher of its task (F Eq. 7), with guidance where Q 4.3 has it on the
                  teacher alone: the student then learns to draw without, in half the forwards
    learn         the estimator's gradient (`opd.ESTIMATORS`), plus lambda MAR (F Eq. 12)

Single pass: the rollout's own forward carries the gradient, one forward fewer a state, and nothing is stored.
"""

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import kl
import opd
import sde
import settings
from harness import load as student
from harness import rollout
from harness.rollout import Row, deterministic, trained_steps
from harness.run import Run
from settings import Settings, task_list


def distil(s: Settings) -> Run:
    """Multi-teacher on-policy distillation (F Eq. 7-12, Q Eq. 14): learn from the teachers on one's own states."""
    prompts = rollout.load_prompts(s, "train", s.train_prompts, task_list(s))
    run = student.student_run(s)
    experts = student.load_teachers(run.model, s)
    rollout.prepare(run, prompts)
    # The path estimators credit an action with what comes after it: they need the whole trajectory first.
    single_pass = s.estimator not in opd.NEEDS_FUTURE
    for step in run.steps("gap"):
        began = time.time()
        metrics = distil_step(run, rollout.rows_of(run, prompts, step), experts, single_pass)
        run.log({**metrics, "grad_norm": run.update(), "seconds": time.time() - began})
    return run


def distil_step(run: Run, rows: Sequence[Row], experts: Mapping[str, str], single_pass: bool) -> dict[str, float]:
    """Rollout, labels and backward of one batch; the gradient is the mean over rows and trained steps.

    Rows come task by task, so that a micro-batch mostly has one teacher. A full-checkpoint teacher is fetched while
    the micro-batch before its own computes, and sent away after its last.
    """
    parts, totals = rollout.micro_batches(rows, run.s.micro_batch), {}
    needed = [{experts[row.prompt.task] for row in part} for part in parts]
    for i, part in enumerate(parts):
        run.stop_if_asked()
        run.model.keep(needed[i] | needed[(i + 1) % len(parts)] | {experts.get("anchor", "")})
        distil_part(run, part, experts, single_pass, len(rows), totals)
    return totals


def distil_part(run: Run, rows: Sequence[Row], experts, single_pass: bool, batch_rows: int, totals: dict) -> None:
    """One micro-batch: walk the student's trajectory, ask the teachers, backward."""
    s, model = run.s, run.model
    cond, uncond = rollout.conditions(model, [row.prompt for row in rows], settings.teacher_cfg(s))
    routed = opd.route([row.prompt.task for row in rows], {t: experts[t] for t in task_list(s)})  # F Eq. 7
    noise = [row.source() for row in rows]
    x = sde.standard_normal((len(rows), *model.latent_shape), noise).to(model.device)
    steps, ts = trained_steps(run), model.time_grid(s.num_steps)
    learnt, weight = {float(ts[n]) for n in steps}, 1 / (len(steps) * batch_rows)
    own = rollout.field(model, cond, uncond, settings.student_cfg(s))

    def walker(x: Tensor, t: float) -> Tensor:
        with torch.set_grad_enabled(single_pass and t in learnt):  # no graph where nothing is trained
            return own(x, t)

    level, window = (0.0, None) if deterministic(s) else (s.noise_level, settings.window_of(s))
    walk = sde.rollout(walker, x, ts, level, window=window, generator=noise)
    if single_pass:
        for step in walk:  # each transition trains as it is made; nothing is stored
            if step.index in steps:
                targets = label(run, step, cond, uncond, routed, experts)
                learn(run, step, step.v, *targets, None, weight, totals)
        return
    path = [step for step in walk if step.index in steps]
    targets = [label(run, step, cond, uncond, routed, experts) for step in path]
    visits = [visit(s, step, v_target) for step, (v_target, _) in zip(path, targets)]
    credits = opd.futures(s.estimator, visits, [step.v for step in path])
    for step, target, future in zip(path, targets, credits, strict=True):
        learn(run, step, own(step.x, step.t), *target, future, weight, totals)


def visit(s: Settings, step: sde.Transition, v_target: Tensor, future: Tensor | None = None) -> opd.Visit:
    """The transition as the estimators take it."""
    return opd.Visit(
        step.x, step.x_next, step.t, step.dt, step.sigma, v_target, future=future, reduce=s.log_prob, weight=s.weight
    )


def label(run: Run, step: sde.Transition, cond, uncond, routed, experts) -> tuple[Tensor, Tensor | None]:
    """The teachers' velocities at the student's states (F Eq. 7), and the anchor's (F Eq. 12) where MAR is on."""
    model, cfg = run.model, settings.teacher_cfg(run.s)
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
    at = visit(s, step, v_target, future)
    loss_B = opd.ESTIMATORS[s.estimator](at, v)
    found = {"loss": loss_B, "gap": sde.flat_reduce((v - v_target).square(), "mean")}
    if v_anchor is not None:
        # DEVIATION: w(t) is infinite without noise, so on the ODE's states MAR takes Q's weight, 1
        mar_B = opd.mar_penalty(v, v_anchor, at.t, at.dt, at.sigma, at.reduce, at.weight)
        loss_B, found["mar"] = loss_B + s.mar * mar_B, mar_B
    if step.sigma > 0:
        means = (sde.transition_mean(step, u, s.noise_level) for u in (v, v_target))
        found["kl"] = kl.gaussian_kl(*means, step.std)  # F Eq. 8, in nats
    (loss_B.sum() * weight).backward()
    for key, value in found.items():
        totals[key] = totals.get(key, 0.0) + value.detach().sum().item() * weight
