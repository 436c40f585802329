"""What does a step of distillation cost beside the released loop's, and how much does it tell for its seconds?

    python -m bench.release seconds   CPU seconds of a step: the released loop, ours by what is guided, and the bare
                                      calls of the transformer in each
    python -m bench.release memory    most bytes of tensors at once: single pass, stored trajectory, released loop
    python -m bench.release noise     variance of a step's gradient times its seconds: the released loop, all states of
                                      a trajectory, k drawn ones; F's ten steps and Q's forty in the tiny worlds

The released loop is `released_step`, written from its description in plain calls. What is compared takes turns in one
run. The last line is JSON.
"""

import itertools
import json
import statistics
import tempfile
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kl
import sde
import train
from bench.runs import parsed, run_job
from bench.speed import random_run
from data.files import Prompt
from harness import load, rollout
from harness.plan import SD35_MEDIUM
from harness.rollout import Row
from harness.run import Run
from models.experts import STUDENT
from models.flow import Cond
from settings import Settings, student_cfg, task_list, teacher_cfg

# SD3.5-M's transformer with 3 layers of 4 heads: 7.7 million parameters.
SMALL = SD35_MEDIUM | {
    "num_layers": 3, "num_attention_heads": 4, "caption_projection_dim": 256, "joint_attention_dim": 4096,
    "pooled_projection_dim": 256, "dual_attention_layers": (), "sample_size": 32, "pos_embed_max_size": 32,
}  # fmt: skip


def released_step(run: Run, rows: Sequence[Row], experts: dict[str, str]) -> None:
    """A step as the release does it: store whole trajectories; then the student again, its teacher and the anchor at
    every trained state. A micro-batch has one task. The ratio is 1 here and has a gradient, as in `opd.released`."""
    s, model, level = run.s, run.model, rollout.noise_of(run.s)[0]
    trained = rollout.trained_steps(s, run.generator("subset"))
    for part in rollout.micro_batches(model, rows, s.micro_batch, by_task=True):
        share, task = len(part) / len(rows) / len(trained), part[0].prompt.task
        cond, uncond = rollout.conditions(model, rollout.prompts_of(part), teacher_cfg(s))
        x, noise = rollout.pure_noise(model, part)
        student = rollout.Field(model, cond, uncond, student_cfg(s))
        with torch.no_grad():
            path = list(sde.rollout(student, x, model.time_grid(s.num_steps), level, generator=noise))
        for at in (path[n] for n in trained):
            v = student(at.x, at.t)
            with model.adapter(experts[task]):
                v_teacher = model.velocity(at.x, at.t, cond, uncond, teacher_cfg(s))
            if level:
                mean, mean_teacher = (sde.transition_mean(at, u, level) for u in (v, v_teacher))
                old, new = (sde.log_prob(at.x_next, m, at.std, "mean") for m in (at.mean, mean))
                loss = (new - old).exp() * kl.gaussian_kl(mean, mean_teacher, at.std, "mean")  # F Eq. 6, 8
            else:
                loss = (v - v_teacher).square().flatten(1).mean(1)  # Q Eq. 14
            if "anchor" in experts:
                with model.adapter(experts["anchor"]):
                    v_anchor = model.velocity(at.x, at.t, cond, uncond, teacher_cfg(s))
                mean_anchor = sde.transition_mean(at, v_anchor, level)
                loss = loss + s.mar * kl.gaussian_kl(mean, mean_anchor, at.std, "mean")  # F Eq. 12
            (loss.mean() * share).backward()
    run.update()


def gradient(run: Run, step: Callable[[], object]) -> Tensor:
    """What a step leaves in the trained tensors, (M,), in place of its update."""
    run.update, found = lambda: 0.0, run.weights.parameters.values()
    step()
    del run.update
    flat = torch.cat([p.grad.flatten() for p in found])
    for p in found:
        p.grad = None
    return flat


def bare(run: Run, step: Callable[[], None]) -> Callable[[], None]:
    """A step's calls of the transformer, forwards and backwards, with nothing around them."""
    model, calls, real = run.model, [], run.model._run

    def recorded(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        calls.append((model.layers[0]._active_adapter, x.detach(), t, cond, torch.is_grad_enabled()))
        return real(x, t, cond)

    model._run = recorded
    step()
    del model._run

    def again() -> None:
        for name, x, t, cond, learns in calls:
            model._use(name)
            with torch.set_grad_enabled(learns):
                v = model._run(x, t, cond)
            if learns:
                v.backward(v)
        model._use(STUDENT)

    return again


def in_turn(works: Sequence[Callable[[], object]], rounds: int) -> tuple[list[float], list[list]]:
    """Works take turns, the first turn does not count -> the median of each one's CPU seconds, and its results."""
    times, results = [[] for _ in works], [[] for _ in works]
    for _ in range(1 + rounds):
        for own, made, work in zip(times, results, works, strict=True):
            began = time.process_time()
            made.append(work())
            own.append(time.process_time() - began)
    return [statistics.median(own[1:]) for own in times], [made[1:] for made in results]


def table(columns: Sequence[str], rows: Sequence[Sequence]) -> None:
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(cell if isinstance(cell, str) else f"{cell:.3g}" for cell in row) + " |")
    print(json.dumps([dict(zip(columns, row, strict=True)) for row in rows]), flush=True)


def small_run(count: int) -> tuple[Run, list[Row], dict[str, str]]:
    """`count` rows of one task on the small SD3 with random weights: student, teacher and anchor all differ."""
    flags = "--stage opd --tasks composition --precision float32 --resolution 128 --micro-batch 0"
    flags += " --rank 16 --no-gradient-checkpointing --drawn-states 0 --estimator released --no-resume"
    flags += f" --prompts-per-step 1 --group-size {count}"
    s = parsed(*flags.split(), "--out", tempfile.mkdtemp())
    run, experts = random_run(s, torch.device("cpu"), SMALL)
    torch.manual_seed(0)
    for name, p in run.model.transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)
    words, pooled = SMALL["joint_attention_dim"], SMALL["pooled_projection_dim"]
    cond = Cond(torch.randn(count, 16, words), torch.randn(count, pooled))
    run.model.encode = lambda prompts, images=None: cond.rows(slice(len(prompts)))
    return run, rollout.rows_of(run, {"composition": [Prompt("a prompt", "composition", {}, "bench")]}, 0), experts


def seconds(count: str = "2", rounds: str = "5") -> None:
    """Steps of so many rows: ten sampling steps, nine trained, guidance 4.5, MAR, one teacher."""
    run, rows, experts = small_run(int(count))

    def take(step: Callable, s: Settings) -> None:
        run.s = s
        step(run, rows, experts)

    steps = (released_step, train.distil_step)
    g_released, g_ours = (gradient(run, partial(take, step, run.s)) for step in steps)
    if not float((g_released - g_ours).norm()) < 1e-4 * float(g_ours.norm()):
        raise SystemExit("the released loop's gradient is not ours")
    named = {"released loop": partial(take, released_step, run.s)}
    for k, guidance in itertools.product((0, 1), ("both", "teacher", "neither")):
        s = replace(run.s, guidance=guidance, drawn_states=k)
        named[f"guidance {guidance}, {k or 'all'} of the states"] = partial(take, train.distil_step, s)
    spent, _ = in_turn([*named.values(), *(bare(run, work) for work in named.values())], int(rounds))
    pairs = zip(named, spent, spent[len(named) :], strict=False)
    table(
        [f"{count} rows", "CPU seconds", "the release's by it", "it by its bare calls"],
        [[name, own, spent[0] / own, own / alone] for name, own, alone in pairs],
    )


class Peak(TorchDispatchMode):
    """most: the largest number of bytes that tensors made inside have held at once."""

    def __init__(self):
        super().__init__()
        self.live, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(made):  # a view, and what is changed in place, is no new memory
            if isinstance(x, Tensor) and (storage := x.untyped_storage())._cdata not in self.live.keys() | given:
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata)
        self.most = max(self.most, sum(self.live.values()))
        return made


def memory(count: str = "2") -> None:
    """Most MiB of tensors that a step of so many rows makes, beside the weights: single pass, stored, and released."""
    run, rows, experts = small_run(int(count))
    found = []
    for checkpointing, guidance in itertools.product((False, True), ("both", "teacher", "neither")):
        if checkpointing:
            run.model.transformer.enable_gradient_checkpointing()
        run.s, peaks = replace(run.s, guidance=guidance), []
        for step, estimator in ((train.distil_step, "analytic"), (train.distil_step, "path"), (released_step, "path")):
            run.s = replace(run.s, estimator=estimator)
            with Peak() as peak:
                gradient(run, lambda step=step: step(run, rows, experts))
            peaks.append(peak.most / 2**20)
        found.append([f"guidance {guidance}{', checkpointing' * checkpointing}", *peaks, peaks[0] / peaks[1]])
    table([f"{count} rows", "single pass", "stored trajectory", "released loop", "single pass by stored"], found)


# F's steps, guidance and trained states, Q's steps and guidance, in the tiny worlds that know teachers. The released
# loop learns F through the ratio's gradient, ours by `analytic`, the presets' own: they have the same mean on-policy.
SETTINGS = {
    "F": "--preset tiny --num-steps 10 --window 0:9 --guidance both --cfg 4.5",
    "Q": "--preset tiny-qwen --num-steps 40",
}


def noise(setting: str = "F", repeats: str = "32", warmup: str = "8") -> None:
    """A step of 12 rows, after some steps of training: the trace of its gradient's covariance times its seconds.

    All have the same rows in a turn, since a few rows have far larger gradients than the others.
    """
    flags = [*SETTINGS[setting].split(), "--stage", "opd", "--prompts-per-step", "12", "--group-size", "1"]
    s = parsed(*flags, "--drawn-states", "0", "--no-resume", "--out", tempfile.mkdtemp())
    prompts, run = load.load_prompts(s, "train", s.train_prompts, task_list(s)), load.student_run(s)
    experts, turns = load.load_teachers(run.model, s), defaultdict(lambda: itertools.count(int(warmup)))
    for step in range(int(warmup)):
        train.distil_step(run, rollout.rows_of(run, prompts, step), experts)

    def take(step: Callable, k: int, every: int = 1) -> Tensor:
        run.s = replace(s, drawn_states=k, anchor_every=every)
        rows = rollout.rows_of(run, prompts, next(turns[step, k, every]))
        return gradient(run, lambda: step(run, rows, experts))

    named = {"released loop": partial(take, released_step, 0), "ours, all states": partial(take, train.distil_step, 0)}
    named |= {f"ours, {k} drawn": partial(take, train.distil_step, k) for k in (1, 2, 3)}
    if s.mar:
        named["ours, all states, MAR on every 4th row"] = partial(take, train.distil_step, 0, 4)
    spent, made = in_turn(list(named.values()), int(repeats))
    traces = [float(torch.stack(own).var(0).sum()) for own in made]
    rows = [[name, trace, own, traces[0] * spent[0] / (trace * own)] for name, trace, own in zip(named, traces, spent)]
    table([f"{setting}: step", "trace of the covariance", "CPU seconds", "the release's product by its own"], rows)


if __name__ == "__main__":
    run_job("release", seconds, memory, noise)
