"""The pipelines of both papers, one loop a stage:

    pretrain   flow matching on a tiny world's drawings (F Eq. 1, Q Eq. 2)
    curate     keep the prompts from which a policy can learn (Q 4.2)
    grpo       one teacher for each task by GRPO (F 4.1, Q Eq. 4-6); --task mix is the baseline that learns
               everything at once (F App. A's GRPO-mix, Q 4.3's Mix-RL)
    nft        the same by DiffusionNFT (Q Eq. 7-9)
    sft        cold start: flow matching on images of the routed teachers (F 5.1)
    merge      cold start: one adapter out of the teachers' (F 5.1)
    opd        multi-teacher on-policy distillation (F Eq. 7-12, Q Eq. 14)
    reward     a reward model from marks of people or their preferences (Q 3.1, Eq. 10-12)
    all        the presets' own order: F merges, distils and compares; Q trains teachers and distils them

    torchrun --nproc_per_node=8 train.py --stage opd                     # SD3.5-M, F App. A
    torchrun --nproc_per_node=8 train.py --preset qwen-rl --stage grpo --task t2i
    python train.py --preset tiny --stage opd                            # a laptop, minutes; also --preset tiny-qwen

The mathematics is in sde, kl, grpo, nft, opd, merge and reward_model. harness/rollout.py draws a step's rows, noise and
micro-batches; harness/load.py says what a student and a teacher are. A name with _B has a value for each row, with
_PG for each sample of each prompt. Every backward takes its rows' share of the mean over a step's rows and trained
transitions. A loop's `load` loads its model and scorers; `--dry-run` hands in one whose models only count.
"""

import concurrent.futures
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import settings
from harness import cli, threads
from settings import Settings, task_list

if __name__ == "__main__":
    threads.sleep_while_waiting()
    cli.answer_early(sys.argv[1:])

import torch
from torch import Tensor
from tqdm import tqdm

import eval as evaluation
import grpo
import kl
import merge
import nft
import opd
import reward_model
import rewards
import sde
from data.batches import batches, prompt_batch, seed_for
from data.pictures import layout, sources
from data.preferences import Pair, Sample
from harness import curation, load, ownership, page, plan, ranks, rollout, suites, tables
from harness.ranks import USER_ERRORS
from harness.rollout import Row, Trajectories, in_step, micro_batches, prompts_of
from harness.run import Run, Stopped, read_metrics
from harness.stats import averaged, ratio_stats, shares_of, summed, warn_of_equal, warn_of_hacking, warn_of_ratio
from models import flow, hub, lora
from models.experts import STUDENT
from scorers import panel as scoring
from scorers import vlm_trained
from scorers.panel import Panel


# --------------------------------------------------------------------------------------------------------- pretrain
def pretrain(s: Settings, load=load) -> Run:
    """The base model: flow matching (F Eq. 1, Q Eq. 2) on drawings whose captions are sometimes wrong."""
    run = load.new_base_run(s)
    for _ in run.steps("loss"):
        began, rng, loss, first = time.time(), random.Random(run.generator("world").initial_seed()), 0.0, 0
        rows = s.batch_size * run.world  # of all ranks, which take turns
        for images, captions, before in load.world_of(s).training_batch(rng, rows, task_list(s)):
            captions = ["" if rng.random() < 0.1 else caption for caption in captions]  # v(x, t, "") is for guidance
            mine = [i for i in range(len(images)) if (first + i) % run.world == run.rank]
            for some in batches(mine, s.micro_batch):
                tokens = torch.tensor([run.model.tokenize(captions[i]) for i in some])
                cond = run.model.encode_tokens(tokens, before and [before[i] for i in some])  # embeddings train, too
                noise = [run.generator("row", first + i) for i in some]
                loss += flow_matching(run, run.model.latents(images[some]), cond, noise, torch.ones(len(some)))
            first += len(images)
        run.log({"loss": loss, "grad_norm": run.update(), "seconds": time.time() - began})
    return run


def flow_matching(run: Run, x0: Tensor, cond: flow.Cond, noise: Sequence[torch.Generator], counts: Tensor) -> float:
    """Backward of a micro-batch of flow matching (F Eq. 1, Q Eq. 2) -> its part of the mean over --batch-size rows.

    noise: each row's own generator, which gives its t and its eps; counts: (B,), 0 for a row without weight.
    """
    device = run.model.device
    normal = torch.stack([torch.randn((), generator=g) for g in noise])
    t = torch.sigmoid(normal + run.model.train_shift).to(device)  # as in SD3, moved by the model's schedule
    x0, eps = x0.to(device), sde.standard_normal(x0.shape, noise).to(device)
    v = run.model.velocity(sde.interpolate(x0, eps, t), t, cond)  # v_theta(x_t, t, c), Q Eq. 1
    loss = (sde.flow_matching_loss(v, x0, eps) * counts.to(device)).sum() / run.s.batch_size  # F Eq. 1, Q Eq. 2
    loss.backward()
    return loss.item()


# ----------------------------------------------------------------------------------------------------------- curate
def curate(s: Settings, load=load) -> Path:
    """Prompt curation (Q 4.2): keep the prompts whose G samples differ in their reward by more than a threshold.

    The student is the base, or --init. A prompt's line is written as soon as it is known, so that a run that was
    killed goes on. The ranks share the prompts.
    """
    prompts = load.load_prompts(s, "train", s.train_prompts, task_list(s))
    panel = load.panel_of(s)  # before the model: a scorer that is not installed is found out at once
    panel.check(p for some in prompts.values() for p in some)
    run = load.student_run(s)
    known = curation.Ranges(run.folder / "ranges", run.rank, curation.fingerprint(s, run.inputs))
    unknown = {curation.key(p): p for some in prompts.values() for p in some if not known.has(p)}  # each of them once
    mine = list(unknown.values())[run.rank :: run.world]
    ranks.wait()  # nobody writes before everybody has read
    rollout.encode_all(run.model, mine, settings.student_cfg(s) != 1)
    for part in tqdm(batches(mine, s.prompts_per_step), s.name, disable=run.rank > 0):
        rows = [Row(p, seed_for("row", s.seed, s.stage, p.text, g)) for p in part for g in range(s.group_size)]
        parts = micro_batches(run.model, rows, s.micro_batch)
        images = torch.cat([rollout.roll_out(run.model, some, s)[1] for some in parts])
        scores = panel.ask(images, prompts_of(rows), s.group_size, sources(prompts_of(rows)))
        known.add(part, scoring.totals(scores).reshape(len(part), -1))
    ranks.wait()
    if run.rank == 0:
        print(curation.write(run.folder, prompts, known.all(), s.threshold))
        ownership.forget(run.folder)
    ranks.wait()
    return run.folder


# -------------------------------------------------------------------------------------------- teachers: grpo and nft
def train_teacher(s: Settings, load=load) -> tuple[Run, Panel]:
    """GRPO (F 4.1, Q Eq. 4-6, 13) or DiffusionNFT (Q Eq. 7-9): draw groups, score, compare within groups, step.

    Q 4.1's hybrid (--guidance rollout) draws with classifier-free guidance, so that the rewards see what the model can
    do, and leaves it out of the objective. `both` and `neither` are Q's two other strategies.
    """
    prompts = load.load_prompts(s, "train", s.train_prompts, task_list(s) if s.task == "mix" else (s.task,))
    panel = load.panel_of(s)
    panel.check(p for some in prompts.values() for p in some)
    run = load.student_run(s)
    rollout.prepare(run, prompts)
    update = {"grpo": update_policy, "nft": update_forward}[s.stage]
    later = scoring.Later(lambda images, some: panel.ask(images, some, s.group_size, sources(some)))
    ahead, unsuspected, first, equal = None, set(panel.watched), run.step, 0
    for step in run.steps("reward"):
        unsuspected -= warn_of_hacking(run, unsuspected)
        began = time.time()
        shares = ahead or draw_shares(run, prompts, step, later)  # F Eq. 5-6, or Q Eq. 3
        # DEVIATION (Q 4.1): with --overlap the next step is drawn before this one is learnt from, by an older policy.
        # Nothing is drawn ahead of a checkpoint: a run that continues from it begins as this one goes on.
        more = s.overlap and step + 1 < s.steps and (step + 1) % s.save_every
        ahead = draw_shares(run, prompts, step + 1, later) if more else None
        scores, stats = collect(run, shares), []
        if ahead:
            run.drew()
        for share, found in zip(shares, scores, strict=True):
            if not found.lost.all():
                advantage_PG = scoring.advantages(found, s.group_size, s.combine, s.advantage_std)  # Q Eq. 4, 13
                kept_B = torch.from_numpy(~found.lost).float()
                weight_B = kept_B * run.world / kept_B.sum()  # a lost group pulls nothing, and no mean counts it
                own = (values.chunk(run.world)[run.rank] for values in (advantage_PG.flatten(), weight_B))
                stats.append(update(run, share.parts, *own))  # Q Eq. 6, or Q Eq. 7-9
        run.follow()  # nft: after the step's last update, so that all of them have the old policy that drew (Q Eq. 7)
        if not ahead:
            run.drew()
        if step == first and s.stage == "grpo" and not (first and s.overlap):  # else an older policy may have drawn it
            warn_of_ratio(run, stats[0])
        metrics, joined = averaged(stats), scoring.joined(scores)
        metrics |= scoring.metrics(joined, s.group_size) | {"seconds": time.time() - began}
        run.log(metrics, scoring.histograms(joined))
        equal = warn_of_equal(run, metrics, equal)
    later.close()
    return run, panel


class Share(NamedTuple):
    """The trajectories of one optimizer update, and what the scorers will say of them, in order."""

    parts: list[Trajectories]
    scores: list[concurrent.futures.Future]


def draw_shares(run: Run, prompts: Mapping[str, list], step: int, later: scoring.Later) -> list[Share]:
    """Roll out a step's rows, one share for each optimizer update.

    Groups go to the scorers as soon as they are whole, and are scored while the next micro-batch is drawn (Q 4.1).
    """
    s, shares, rows = run.s, [], rollout.rows_of(run, prompts, step)
    trained = rollout.trained_steps(s, run.generator("subset", step=step))
    for share in batches(rows, len(rows) // s.updates):
        found, waiting, asked = Share([], []), [], 0
        for some in in_step(micro_batches(run.model, share, s.micro_batch)):
            run.stop_if_asked()
            with run.old_policy(step):  # nft: the old policy draws (Q Eq. 8)
                part, pictures = rollout.roll_out(run.model, some, s, trained)
            found.parts.append(part)
            waiting += pictures[part.counts]
            if whole := len(waiting) // s.group_size * s.group_size:
                about = prompts_of(share[asked : asked + whole])
                found.scores.append(later.submit(torch.stack(waiting[:whole]), about))
                waiting, asked = waiting[whole:], asked + whole
        shares.append(found)
    return shares


def collect(run: Run, shares: Sequence[Share]) -> list[scoring.Scores]:
    """Wait for the scorers -> each update's answers on all ranks, rank by rank.

    If one fails for good, the run ends on every rank, after a checkpoint, with its words.
    """
    fault, scores = None, []
    for future in (future for share in shares for future in share.scores):
        while not (run.asked_to_stop or future.done()):  # not longer than a scheduler's grace: a judge may take more
            concurrent.futures.wait([future], timeout=0.2)
    run.stop_if_asked()
    try:
        scores = [scoring.joined([future.result() for future in share.scores]) for share in shares]
    except rewards.RewardError as error:
        fault = error
    run.fail_together(fault, rewards.RewardError)
    scores = [all_ranks(found) for found in scores]
    if all(found.lost.all() for found in scores):
        fault = rewards.RewardError("every prompt's group of a step was lost; the messages above say why")
    run.fail_together(fault, rewards.RewardError)
    return scores


def all_ranks(mine: scoring.Scores) -> scoring.Scores:
    """The answers about the rows of all ranks, rank by rank."""
    values, weights, lost = (torch.cat(ranks.gathered(torch.tensor(part).double()), -1).numpy() for part in mine[1:])
    return scoring.Scores(mine.names, values, weights, lost.astype(bool))


def update_policy(run: Run, parts: Sequence[Trajectories], advantage_B: Tensor, weight_B: Tensor) -> dict:
    """One optimizer update on the clipped objective (F Eq. 3, Q Eq. 6), a weighted mean over rows and transitions."""
    s, stats = run.s, []
    for part, own_B, own_weight_B in shared_out(run, parts, advantage_B, weight_B):
        for step in part.path:
            v, mean_ref = part.velocity(step.x, step.t), None  # v_theta(x_t, t, c)
            mean = sde.transition_mean(step, v, s.noise_level, s.kernel)  # F Eq. 5-6
            if s.beta > 0:  # KL to the frozen base (Flow-GRPO's regulariser)
                with run.model.adapter(None):
                    v_ref = part.velocity(step.x, step.t)
                mean_ref = sde.transition_mean(step, v_ref, s.noise_level, s.kernel)
            loss_B, found = grpo.policy_loss(
                step, mean, own_B, s.clip, s.advantage_clip, s.log_prob, s.guard, mean_ref, s.beta
            )  # Q Eq. 6
            (loss_B * own_weight_B).sum().backward()
            stats.append(shares_of(found, own_weight_B))
    return {**ratio_stats(summed(stats)), "grad_norm": run.update()}


def update_forward(run: Run, parts: Sequence[Trajectories], advantage_B: Tensor, weight_B: Tensor) -> dict:
    """One optimizer update on the forward-process loss (Q Eq. 7-9), a weighted mean over rows and trained times."""
    s, stats = run.s, []
    r_B = nft.optimality(advantage_B, s.advantage_clip)  # Q 2.2
    for part, own_B, own_weight_B in shared_out(run, parts, r_B, weight_B):
        for at in part.path:
            v = part.velocity(at.x, at.t)
            loss_B = nft.nft_loss(v, at.v_old, at.v_target, own_B, s.interpolation, reduce="mean")  # Q Eq. 7-8
            found = {"loss": loss_B, "moved": sde.flat_reduce((v - at.v_old).square(), "mean")}
            if s.beta > 0:
                with run.model.adapter(None):
                    v_base = part.velocity(at.x, at.t)
                found["distance"] = nft.velocity_penalty(v, v_base, reduce="mean")  # Q Eq. 9
                loss_B = loss_B + s.beta * found["distance"]
            (loss_B * own_weight_B).sum().backward()
            stats.append(shares_of(found, own_weight_B))
    return {**summed(stats), "grad_norm": run.update()}


def shared_out(
    run: Run, parts: Sequence[Trajectories], values_B: Tensor, weight_B: Tensor
) -> Iterator[tuple[Trajectories, Tensor, Tensor]]:
    """Each part with its rows' values and their weight at each of its transitions, (B,); 0 for repeats (`in_step`)."""
    first = 0
    for part in parts:
        some = slice(first, first := first + int(part.counts.sum()))
        own = (torch.zeros(len(part.counts)).masked_scatter(part.counts, x[some]) for x in (values_B, weight_B))
        value, weight = (x.to(run.model.device) for x in own)
        yield part, value, weight / len(part.path)
        part.velocity.forget()


# -------------------------------------------------------------------------------------------- cold start: sft, merge
def sft(s: Settings, load=load) -> Run:
    """Cold start by SFT (F 5.1): each teacher draws its own task's prompts, the student learns what they drew."""
    prompts = load.load_prompts(s, "train", s.train_prompts, task_list(s))
    run = load.student_run(s)
    experts = load.load_teachers(run.model, s)
    count = -(-s.sft_images // len(prompts))
    chosen = {task: [some[i % len(some)] for i in range(count)] for task, some in prompts.items()}
    rollout.prepare(run, {}, [p for some in chosen.values() for p in some])
    pool = []
    for task, some in chosen.items():
        run.model.keep([experts[task]])
        with run.model.adapter(experts[task]):
            seed = seed_for(s.seed, "sft", task)  # latents: no VAE is needed
            drawn = rollout.draw(run.model, some, s.eval_steps, s.micro_batch, seed, settings.teacher_cfg(s))
        pool += [Row(prompt, 0, x0=x0) for prompt, x0 in zip(some, drawn, strict=True)]
    run.model.keep([])
    for step in run.steps("loss"):
        began, loss = time.time(), 0.0
        places = torch.randint(len(pool), (s.batch_size * run.world,), generator=run.generator("batch")).tolist()
        seeds = (seed_for("row", s.seed, s.stage, step, i) for i in range(len(places)))
        rows = [pool[place]._replace(seed=seed) for place, seed in zip(places, seeds)]  # of all ranks
        mine = sorted(rows, key=lambda row: layout(row.prompt))[run.rank :: run.world]
        for some in in_step(micro_batches(run.model, mine, s.micro_batch)):
            run.stop_if_asked()
            cond, _ = rollout.conditions(run.model, prompts_of(some), 1.0)
            x0, counts = torch.stack([row.x0 for row in some]), torch.tensor([row.counts for row in some])
            loss += flow_matching(run, x0, cond, [row.generator() for row in some], counts)
        run.log({"loss": loss, "grad_norm": run.update(), "seconds": time.time() - began})
    return run


def merge_teachers(s: Settings) -> Run:
    """Cold start by merging (F 5.1): the mean of the teachers' updates as one adapter. No training."""
    device = ranks.start(s)
    inputs = load.inputs_of(s)
    model = load.base_model(s, device)
    states, scales = [], []
    for where in s.teachers.values():
        state, config = model.read_adapter(hub.locate(where))
        states.append(state)
        scales.append(config.lora_alpha / config.r)
    merged = merge.merge_lora(states, method=s.merge_method, scales=scales)
    rank = next(value.shape[0] for key, value in merged.items() if "lora_A" in key)
    config = lora.lora_config(rank, rank)  # merge_lora's update is B @ A at scale 1, hence alpha = rank
    model.add_adapter(STUDENT, config, merged)
    run = Run(s, model, config, inputs)
    run.save()
    return run


# -------------------------------------------------------------------------------------------------------------- opd
def distil(s: Settings, load=load) -> Run:
    """Multi-teacher on-policy distillation (F Eq. 7-12, Q Eq. 14): learn from the teachers on the student's own states.

    The student walks its own trajectories: F's SDE, or Q's ODE (--states ode). With --guidance teacher (Q 4.3) only the
    teachers are guided: the student learns to draw without guidance, in half the forwards.
    """
    prompts = load.load_prompts(s, "train", s.train_prompts, task_list(s))
    run = load.student_run(s)
    experts = load.load_teachers(run.model, s)  # {task: its teacher}, and "anchor"
    rollout.prepare(run, prompts)
    first = run.step
    for step in run.steps("gap"):
        began, stats = time.time(), distil_step(run, rollout.rows_of(run, prompts, step), experts)
        if step == first and "ratio_mean" in stats[0]:
            warn_of_ratio(run, stats[0])
        run.log({**averaged(stats), "seconds": time.time() - began})
    return run


def distil_step(run: Run, rows: Sequence[Row], experts: Mapping[str, str]) -> list[dict[str, float]]:
    """An optimizer update for each share of a step's rows, on the mean over rows and trained transitions -> metrics."""
    s, stats, trained = run.s, [], rollout.trained_steps(run.s, run.generator("subset"))
    size_S = run.weights.state_size[trained]  # of the gradient at each state, as far as it is known
    seen_2S = torch.zeros(2, len(trained), device=run.model.device)  # sums over rows of its square, and their number
    drawn, shares = 0 if s.estimator in opd.NEEDS_FUTURE else s.drawn_states, []
    alone = bool(run.model.hosted)  # full-checkpoint teachers take turns: a part has one task, hence one teacher
    for share in batches(rows, len(rows) // s.updates):
        share = rollout.draw_states(share, size_S, drawn, alone)
        shares.append(in_step(micro_batches(run.model, share, s.micro_batch, alone)))
    visited = visits(run, [part for share in shares for part in share], trained, experts)
    visited = iter(list(visited)) if s.updates > 1 else visited  # one old policy draws for all updates (F Eq. 11)
    for share in shares:
        terms, count = [], sum(row.counts for part in share for row in part)
        for part in share:
            weight_SB = rollout.weights_of(part, run.model.device) / count  # 1/(S rows), or as states are drawn
            m_B = torch.tensor([row.anchored for row in part], device=run.model.device)  # how often MAR counts a row
            for at, v in next(visited):
                step, n = at.step, trained.index(at.step.index)
                loss_B, found = opd.ESTIMATORS[s.estimator](at, v)  # F Eq. 9-11, Q Eq. 14
                found |= {"loss": loss_B, "gap": sde.flat_reduce((v - at.v_target).square(), "mean")}
                if at.v_anchor is not None:
                    # DEVIATION (F Eq. 12): w(t) is infinite on the ODE's states; MAR has the estimator's weight.
                    found["mar"] = m_B * opd.mar_penalty(v, at.v_anchor, step.t, step.dt, step.sigma, "mean", s.weight)
                    loss_B = loss_B + s.mar * found["mar"]  # F Eq. 12
                if "off" in found:  # the sum of weights, by which the statistics of the ratio are divided
                    found["weight"] = torch.ones_like(loss_B)
                if step.sigma > 0:  # F Eq. 9 in nats per dimension, for the log
                    found["kl"] = kl.velocity_kl(v, at.v_target, step.t, step.dt, step.sigma, "mean")
                (loss_B * weight_SB[n]).sum().backward()
                terms.append(shares_of(found, weight_SB[n]))
                learnt_B = weight_SB[n] > 0
                seen_2S[:, n] += torch.stack([(opd.state_size_sq(at, v) * learnt_B).sum(), learnt_B.sum()])
        found = summed(terms)
        stats.append({**(ratio_stats(found) if "off" in found else found), "grad_norm": run.update()})
    ranks.average([seen_2S])
    run.weights.state_size[trained] = opd.running_size(size_S, *seen_2S.double().cpu())
    return stats


def visits(run: Run, parts: Sequence, trained: Sequence[int], experts: Mapping[str, str]) -> Iterator[Iterator]:
    """Part by part the trained transitions of the student's walk, each with the student's v and its gradient.

    Single pass: the rollout's own forward carries the gradient, and nothing is stored. A path estimator's credit lies
    in the future, and with several updates the student has moved on: there each trained state is computed again.
    """
    s, model = run.s, run.model
    level, window, kernel = rollout.noise_of(s)
    for part in parts:
        run.stop_if_asked()
        # "Only the active teacher is loaded onto the GPU" (Q 4.3): a full checkpoint is sent away after its part.
        model.keep({experts[row.prompt.task] for row in part} | {experts.get("anchor", "")})
        cond, uncond = rollout.conditions(model, prompts_of(part), settings.teacher_cfg(s))
        learnt, times = rollout.learnt_in(part, trained, s.parallel), model.time_grid(s.num_steps).tolist()
        whole, cfg = [times[n] for n in learnt], settings.student_cfg(s)
        student = rollout.Field(model, cond, uncond, cfg, whole)  # v_theta(x, t, c)
        routed, anchor = opd.route([row.prompt.task for row in part], experts), experts.get("anchor")  # k = R(c)
        asked = {**routed, **({anchor: rollout.anchored_in(part, experts)} if anchor else {})}  # whom about which rows
        fields = {
            name: rollout.Field(model, cond.rows(rows), uncond and uncond.rows(rows), settings.teacher_cfg(s))
            for name, rows in asked.items()
        }
        teachers = partial(label, run, routed, asked, fields, anchor)  # F Eq. 7
        x, noise = rollout.pure_noise(model, part)
        walk = sde.rollout(student, x, times, level, kernel, window, noise)  # F Eq. 5-6
        walk = islice(walk, max(learnt) + 1)  # no picture is needed: the walk ends at the last state that teaches
        if s.updates == 1 and s.estimator not in opd.NEEDS_FUTURE:
            yield single_pass(walk, x, times, teachers, learnt)
        else:
            yield replay(walk, teachers, learnt, rollout.Field(model, cond, uncond, cfg), s.estimator)


def single_pass(walk: Iterator, x: Tensor, times: Sequence, teachers: Callable, trained: Sequence[int]) -> Iterator:
    """The rollout's own v learns: a visit is handed over while its graph is alive. Before it the teachers answer."""
    for n in range(max(trained) + 1):
        at = teachers(x, times[n]) if n in trained else None
        with torch.set_grad_enabled(n in trained):  # no graph where nothing is trained
            step = next(walk)
        if at:
            yield at._replace(step=step), step.v
        x = step.x_next


def replay(walk: Iterator, teachers: Callable, trained: Sequence[int], student: Callable, estimator: str) -> Iterator:
    """Walks and labels at once. The student's v is computed again, with its gradient, when a visit is asked for."""
    with torch.no_grad():
        found = [teachers(step.x, step.t)._replace(step=step) for step in walk if step.index in trained]
    return ((at, student(at.step.x, at.step.t)) for at in opd.credited(estimator, found))


def label(
    run: Run, routed: Mapping[str, Tensor], asked: Mapping[str, Tensor], fields: Mapping[str, rollout.Field],
    anchor: str | None, x: Tensor, t: float,
) -> opd.Visit:  # fmt: skip
    """A state's targets: the teachers' velocity (F Eq. 7) and the anchor's (F Eq. 12; 0 for rows that MAR leaves out).

    Without MAR there is no anchor's. The transition, `step`, is not made yet.
    """
    s, model, v_anchor = run.s, run.model, None
    if anchor:
        v_anchor = torch.zeros_like(x)
        if len(asked[anchor]):
            with model.adapter(anchor):
                v_anchor[asked[anchor]] = fields[anchor](x[asked[anchor]], t)

    def teacher(name: str, rows: Tensor, x: Tensor, t: float) -> Tensor:
        if name == anchor:  # it has answered
            return v_anchor[rows]
        with model.adapter(name):
            return fields[name](x, t)

    v_target = opd.target_velocity(routed, teacher, x, t)  # v_k(x_t, t, c), F Eq. 7
    return opd.Visit(None, v_target, v_anchor, None, s.weight, s.log_prob, s.clip, s.advantage_clip)


# ------------------------------------------------------------------------------------------------------ reward model
def reward(s: Settings) -> Path:
    """A reward model from marks of pictures, or from preferences between two (Q 3.1) -> the last checkpoint.

    Agreement with people is measured at every checkpoint, on prompts that are never trained on.
    """
    run, training, held = load.reward_run(s)
    pictures = {"pointwise": 1, "pairwise": 2}[s.objective]  # of an item
    count, together = s.batch_size // pictures, s.micro_batch or s.batch_size
    for step in run.steps("loss"):
        began, loss = time.time(), 0.0
        items = prompt_batch(training, count, s.seed, step, run.rank, run.world)
        for part in batches(items, together // pictures):
            run.stop_if_asked()
            mean = reward_loss(run.model, part) * (len(part) / count)
            mean.backward()
            loss += mean.item()
        metrics = {"loss": loss, "grad_norm": run.update()}
        if (step + 1) % s.save_every == 0 or step + 1 == s.steps:
            with run.exported():
                metrics |= vlm_trained.agreement(run.model, held, together)
        run.log({**metrics, "seconds": time.time() - began})
    rows = {f"step {row.pop('step')}": row for row in read_metrics(run.folder)}
    rows = {name: {key: row[key] for key in row if key.startswith("held_")} for name, row in rows.items()}
    note = f"Objective: {s.objective}; {len(training)} items to train on, {len(held)} held out, of other prompts."
    return tell(run, {name: {"scores": row, "tags": {}} for name, row in rows.items() if row}, notes=[note])


def reward_loss(judge: vlm_trained.Judge, items: Sequence[Sample] | Sequence[Pair]) -> Tensor:
    """The mean over samples of Q Eq. 11, or over pairs of Q Eq. 10, a scalar; one forward, also for pairs."""
    prompts = [item.prompt for item in items]
    if isinstance(items[0], Sample):
        R_B = judge.scores([item.image for item in items], prompts)  # Q Eq. 12
        y_B = torch.tensor([item.score for item in items], device=R_B.device)
        return reward_model.pointwise_loss(R_B, y_B)  # Q Eq. 11
    pictures = [item.winner for item in items] + [item.loser for item in items]
    return reward_model.pairwise_loss(*judge.scores(pictures, prompts + prompts).chunk(2))  # Q Eq. 10, 12


# ------------------------------------------------------------------------------------------------ the whole pipeline
def finish(run: Run, panel: Panel | None = None) -> Path:
    """Evaluate the base and the exported weights, write the report, say where everything is -> the last checkpoint.

    panel: the scorers that are at hand; without it, those that --rewards names are loaded, if it names any.
    """
    s, rows, found, notes = run.s, [], {}, []
    run.model.keep([])
    if s.eval_prompts:
        prompts = load.load_prompts(s, "test", s.eval_prompts, settings.test_tasks(s))
        panel = panel or (evaluation.panel_of(s, run.model.device) if run.rank == 0 else None)
        before = run.model.adapter(None), settings.teacher_cfg(s)  # the base, as it comes
        shown = {"base" if s.name != "base" else "the base": before} if settings.shows_base(s) else {}
        for name, (weights, cfg) in {**shown, s.name: (run.exported(), settings.student_cfg(s))}.items():
            with weights:
                rows += evaluation.evaluate(run.model, name, prompts, s, cfg, run.folder, panel) or []
        if rows:
            found = suites.numbers(rows, suites.of(s, rows))
            run.write_card(run.checkpoint, found[s.name]["scores"])
        if not shown and s.stage != "pretrain":
            notes = ["The base is not beside a student whose every parameter trains: eval.py shows both."]
    return tell(run, found, rows, notes)


def tell(run: Run, found: Mapping[str, dict], rows: Sequence[dict] = (), notes: Sequence[str] = ()) -> Path:
    """Write the report, say where everything is and what its last row has -> the last checkpoint."""
    if run.rank == 0:
        name, warnings = run.s.name, load.seen_in_training(run.s) if rows else ()
        where = page.write(run.folder, run.s, found, rows, notes, warnings)
        last = list(found.values())[-1]["scores"] if found else {}
        shown = "  ".join(f"{key} {value:.3f}" for key, value in last.items())
        print(f"{name}: {shown or 'done'}\n  checkpoint {run.checkpoint}\n  report     {where}")
    ranks.wait()
    return run.checkpoint


# The loop of a stage, which --dry-run walks, too; and all of the stage, from its settings to what it has made.
LOOPS = {"pretrain": pretrain, "curate": curate, "grpo": train_teacher, "nft": train_teacher, "sft": sft, "opd": distil}
STAGES = {
    "pretrain": lambda s: finish(pretrain(s)), "curate": curate, "sft": lambda s: finish(sft(s)),
    "merge": lambda s: finish(merge_teachers(s)), "grpo": lambda s: finish(*train_teacher(s)),
    "nft": lambda s: finish(*train_teacher(s)), "opd": lambda s: finish(distil(s)), "reward": reward,
}  # fmt: skip


def perform(s: Settings) -> Path:
    """One stage -> what it has made. Nobody else has the run's folder while it lasts."""
    lock = load.claim(s)
    made = STAGES[s.stage](s)
    del lock
    return made


def everything(s: Settings, chosen: dict) -> Path:
    """--stage all, in the order of `settings.parts_of`, and the table. The tiny worlds have no published base: there,
    pretraining comes first. F has published teachers, and merges them into a cold start; Q trains its own."""
    made, taught, cold = {"model": s.model, "teachers": s.teachers}, {}, {}
    for part in cli.parts(chosen):
        init = {"init": cold["merge"]} if part.stage == "opd" and cold else {}  # OPD begins with the merged teachers
        where = str(perform(replace(part, **made, **init)).parents[1])
        if part.stage == "pretrain":
            made["model"] = where
        elif part.stage == "grpo":
            made["teachers"] = taught = {**taught, part.task: where}
        elif part.stage == "opd":
            learnt = where
        else:
            cold[part.stage] = where
    if not s.eval_prompts:
        return Path(learnt)
    compared = {**{{"merge": "merged"}.get(k, k): v for k, v in cold.items()}, "opd student": learnt}
    final = cli.for_stage(chosen, "eval", name=s.name, **made, compare=compared)
    rows, where = evaluation.compare(final)
    if rows:
        print("\n".join(tables.lines_of(rows)))
        print(f"report: {where}")
    return where.parent


def run_stage(s: Settings, chosen: dict) -> None:
    if s.stage == "all":
        everything(s, chosen)
    else:
        for part in cli.parts(chosen):
            perform(part)


def main(argv: Sequence[str] | None = None) -> int:
    """0: done or stopped in good order; 2: the user's to mend; 1: anything else, with its traceback; 130: Ctrl-C."""
    try:
        s, chosen = cli.parse(list(sys.argv[1:] if argv is None else argv))
        load.asked_of(s)
        if s.dry_run:
            return plan.show(s, LOOPS, cli.parts(chosen))
        if s.wandb and find_spec("wandb") is None:
            raise settings.SettingsError("--wandb needs an extra: pip install -e '.[wandb]'")
        run_stage(s, chosen)
        return 0
    except (*USER_ERRORS, OSError) as fault:
        return ranks.fail(fault)
    except Stopped as stop:
        code, message = stop.code, str(stop)
    except KeyboardInterrupt:
        code, message = 130, "interrupted: repeat the command to continue from the last checkpoint"
    # Out here the exception is gone, and with it the run's progress bar: the message gets a line of its own.
    if ranks.rank_and_world()[0] == 0:
        print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    ranks.leave(main)
