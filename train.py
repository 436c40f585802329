"""The pipelines of both papers, one short loop a stage:

    pretrain   flow matching on the tiny world's drawings (F Eq. 1, Q Eq. 2)
    curate     keep the prompts from which a policy can learn (Q 4.2)                                    teach.py
    grpo       one teacher per task by GRPO (F 4.1, Q Eq. 4-6); --task mix is the baseline that learns   teach.py
               everything at once (F App. A's GRPO-mix, Q 4.3's Mix-RL)
    nft        the same by DiffusionNFT (Q Eq. 7-9)                                                      teach.py
    sft        cold start: flow matching on images of the routed teachers (F 5.1)
    merge      cold start: one adapter out of the teachers' (F 5.1)
    opd        multi-teacher on-policy distillation (F Eq. 7-12, Q Eq. 14)                               distil.py
    all        the presets' own order: F merges, distils and compares; Q trains teachers and distils them

    torchrun --nproc_per_node=8 train.py --stage opd                     # SD3.5-M, F App. A
    torchrun --nproc_per_node=8 train.py --preset qwen-rl --stage grpo --task t2i
    python train.py --preset tiny --stage opd                            # a laptop, minutes; also --preset tiny-qwen

Each loop reads like the paper's algorithm; the mathematics is in sde, kl, grpo, nft, opd and merge, what a step draws
in rollout, what a run needs besides in runtime.
"""

import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import settings
from harness import plan, threads
from scorers import registry
from settings import Settings, task_list

if __name__ == "__main__":
    threads.sleep_while_waiting()
    plan.answer_early(sys.argv[1:], "train.py")

import numpy as np
import torch
from torch import Tensor

import eval as evaluation
import merge
import sde
from data import files as data
from harness import distil, ranks, report, rollout, teach
from harness import load as student
from harness import run as runtime
from harness.rollout import batches
from harness.run import Run
from models import flow
from models import load as models
from models import lora as adapters
from scorers import panel as scoring
from tiny import drawings as tiny
from tiny import edits as tiny_edit


# --------------------------------------------------------------------------------------------------------- pretrain
def pretrain(s: Settings) -> Path:
    """The base model: flow matching (F Eq. 1, Q Eq. 2) on drawings whose captions are sometimes wrong."""
    run = Run(s, models.new_tiny(s.seed, device=ranks.start(s), qwen="edit" in task_list(s)))
    for _ in run.steps("loss"):
        began, rng = time.time(), random.Random(run.generator("world", run.rank).initial_seed())
        noise, loss = run.generator("noise", run.rank), 0.0
        for part in tiny_batches(s, rng):
            captions = ["" if rng.random() < s.caption_dropout else caption for caption in part["captions"]]
            x0 = run.model.latents(torch.from_numpy(np.stack(part["images"])))
            tokens = torch.tensor([run.model.tokenize(caption) for caption in captions])
            cond = run.model.encode_tokens(tokens, part["sources"])
            loss += flow_matching(run, x0, training_times(run, len(x0), noise), cond, noise, s.batch_size)
        run.log({"loss": loss, "grad_norm": run.update(), "seconds": time.time() - began})
    return finish(run)


def tiny_batches(s: Settings, rng: random.Random) -> Iterator[dict]:
    """A step's drawings: {"images", "captions", "sources"}; of a world that edits too, half of them edits."""
    edits = s.batch_size // 2 if "edit" in task_list(s) else 0
    images, captions = zip(*(tiny.training_example(rng) for _ in range(s.batch_size - edits)), strict=True)
    yield {"images": images, "captions": captions, "sources": None}
    if edits:
        sources, images, captions = zip(*(tiny_edit.training_edit(rng) for _ in range(edits)), strict=True)
        yield {"images": images, "captions": captions, "sources": [torch.from_numpy(source) for source in sources]}


def training_times(run: Run, count: int, noise: torch.Generator) -> Tensor:
    """t of flow matching, (B,): logit-normal as in SD3, moved by the model's schedule (`FlowModel.train_shift`)."""
    return torch.sigmoid(torch.randn(count, generator=noise) + run.model.train_shift)


def flow_matching(run: Run, x0: Tensor, t: Tensor, cond: flow.Cond, noise: torch.Generator, of: int) -> float:
    """Backward of one flow-matching batch (F Eq. 1, Q Eq. 2), in micro-batches -> its part of the loss of `of` rows."""
    eps, total = sde.standard_normal(x0.shape, noise), 0.0
    for part in batches(range(len(x0)), run.s.micro_batch):
        i = slice(part[0], part[-1] + 1)
        clean, e, at = (value[i].to(run.model.device) for value in (x0, eps, t))
        v = run.model.velocity(sde.interpolate(clean, e, at), at, cond.rows(i))  # v_theta(x_t, t, c)
        loss = sde.flow_matching_loss(v, clean, e).sum() / of
        loss.backward()
        total += loss.item()
    return total


# -------------------------------------------------------------------------------------------- cold start: sft, merge
def sft(s: Settings) -> Path:
    """Cold start by SFT (F 5.1): each teacher draws its own task's prompts, the student learns what they drew."""
    prompts = rollout.load_prompts(s, "train", s.train_prompts, task_list(s))
    run = student.student_run(s)
    experts = student.load_teachers(run.model, s)
    count = -(-s.sft_images // len(prompts))
    chosen = {task: [some[i % len(some)] for i in range(count)] for task, some in prompts.items()}
    rollout.prepare(run, {}, [p for some in chosen.values() for p in some])
    drawn = {}
    for task, rows in chosen.items():
        run.model.keep([experts[task]])
        with run.model.adapter(experts[task]):
            seed = data.seed_for(s.seed, "sft", task)
            drawn[task] = rollout.draw(run.model, rows, s, seed, settings.teacher_cfg(s))  # latents: no VAE is needed
    run.model.keep([])
    for _ in run.steps("loss"):
        run.stop_if_asked()
        began, noise, loss = time.time(), run.generator("noise", run.rank), 0.0
        places = torch.randint(count * len(chosen), (s.batch_size,), generator=noise).sort().values
        for number, (task, rows) in enumerate(chosen.items()):  # edits and others do not fit into one batch
            own = places[places // count == number] % count
            if len(own):
                cond, _ = rollout.conditions(run.model, [rows[i] for i in own], 1.0)
                times = training_times(run, len(own), noise)
                loss += flow_matching(run, drawn[task][own], times, cond, noise, s.batch_size)
        run.log({"loss": loss, "grad_norm": run.update(), "seconds": time.time() - began})
    return finish(run)


def merge_teachers(s: Settings) -> Path:
    """Cold start by merging (F 5.1): the mean of the teachers' updates as one adapter. No training."""
    device = ranks.start(s)
    student.locate_all(s)
    model = student.base_model(s, device)
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


# ------------------------------------------------------------------------------------------------ the whole pipeline
def finish(run: Run, panel: scoring.Panel | None = None) -> Path:
    """Evaluate the exported weights, write the report, say where everything is -> the last checkpoint.

    panel: the scorers that are at hand anyway; else those that --rewards names are loaded, if it names any.
    """
    s, rows = run.s, {}
    run.model.keep([])
    if s.eval_prompts:
        prompts = rollout.load_prompts(s, "test", s.eval_prompts, settings.test_tasks(s))
        with run.exported():
            result = evaluation.evaluate(run.model, prompts, s, settings.student_cfg(s), panel)
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
    """--stage all, in the order of `settings.parts_of`, and the table. The tiny worlds have no published base: there,
    pretraining comes first. F has published teachers, and merges them into a cold start; Q trains its own."""

    def part(stage: str, **more) -> Path:
        name = "-".join([s.name, stage, *([more["task"]] if "task" in more else [])])
        return STAGES[stage](settings.for_stage(chosen, stage, name=name, **more))

    base, teachers, cold, init = s.model, s.teachers, {}, ""
    for stage in settings.parts_of(s):
        common = {"model": base, "teachers": teachers}
        if stage == "pretrain":
            base = str(part(stage).parents[1])
        elif stage == "grpo":
            teachers = {task: str(part(stage, task=task, model=base).parents[1]) for task in task_list(s)}
        elif stage == "opd":
            learnt = str(part(stage, **common, init=init).parents[1])
        else:  # a cold start; OPD begins with the merged one
            cold[stage] = str(part(stage, **common).parents[1])
            init = cold.get("merge", "")
    if not s.eval_prompts:
        return Path(learnt)
    compared = {**{{"merge": "merged"}.get(k, k): v for k, v in cold.items()}, "opd student": learnt}
    final = settings.for_stage(chosen, "eval", name=s.name, **common, compare=compared)
    rows, where = evaluation.compare(final)
    if rows:
        print(report.markdown_table({name: row["scores"] for name, row in rows.items()}))
        print(f"\npictures: {where.parent / 'samples'}\nreport:   {where}")
    return where.parent


# A stage's settings -> what it has made.
STAGES = {
    "pretrain": pretrain, "curate": teach.curate, "sft": sft, "merge": merge_teachers,
    "grpo": lambda s: finish(*teach.train_teacher(s)), "nft": lambda s: finish(*teach.train_teacher(s)),
    "opd": lambda s: finish(distil.distil(s)),
}  # fmt: skip


def run_stage(s: Settings, chosen: dict) -> None:
    if s.wandb:
        runtime.require_extra("wandb", "wandb", "--wandb")
    if s.stage == "all":
        everything(s, chosen)
    elif s.stage in ("grpo", "nft") and not s.task:
        for task in task_list(s):
            STAGES[s.stage](settings.for_stage(chosen, s.stage, task=task, name=f"{s.name}-{task}"))
    else:
        STAGES[s.stage](s)


def main(argv: Sequence[str] | None = None) -> int:
    """0: done or stopped in good order; 2: the user's to mend; 1: anything else, with its traceback; 130: Ctrl-C."""
    try:
        s, chosen = settings.parse(list(sys.argv[1:] if argv is None else argv))
        registry.read(s.rewards, settings.rewarded_tasks(s), settings.is_tiny(s))
        if s.dry_run:
            print(plan.describe(s))
            return 0
        run_stage(s, chosen)
        return 0
    except ranks.USER_ERRORS as fault:
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
