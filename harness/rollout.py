"""What is drawn at a step: which prompts, from which noise, with how much guidance?

    prompts      of a task: the user's files or generated ones; of a step: a function of (seed, step, rank)
    noise        belongs to a trajectory (`Row.seed`), whatever the micro-batch and the number of ranks
    guidance     Q 4.1 and 4.3: the rollout, the objective and the teachers each have a scale of their own
                 (`settings.student_cfg`, `trained_cfg`, `teacher_cfg`)
    trajectories of a policy that will be trained on them (`roll_out`), or plain ODE samples (`draw`)

A step's rows lie task by task and group by group, and go through the model in micro-batches, none of which mixes edits
with prompts that have no source picture: their token sequences differ in length.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import grpo
import sde
import settings
from data import files as data
from data import written
from data.files import Prompt
from harness import ranks
from harness.run import Run
from models import flow
from settings import Settings, is_tiny, task_list
from tiny import drawings as tiny
from tiny import edits as tiny_edit

MIX = {"composition": 3, "text": 1, "quality": 1}  # F App. A: epochs of GenEval : OCR : PickScore


# --------------------------------------------------------------------------------------------------------- prompts
def load_prompts(s: Settings, split: str, count: int, tasks: Sequence[str]) -> dict[str, list[Prompt]]:
    """Prompts of each task: the user's files (--prompts) or generated ones; DataError names file and line."""
    mine, found = read_own_prompts(s, split), {}
    make = {"tiny": tiny, "tiny-qwen": tiny_edit}.get(s.preset, written).make_prompts
    if split == "test" and "edit" not in mine and not is_tiny(s):
        tasks = [task for task in tasks if task != "edit"]  # edits without test pictures are not drawn
    if "edit" in tasks and "edit" not in mine and not is_tiny(s):
        raise settings.SettingsError("edits need source pictures: --prompts edit=FILE.jsonl, or --tasks without edit")
    for task in tasks:
        try:
            found[task] = mine.get(task) or make(task, split, count)
        except ValueError as fault:
            raise data.DataError(f"--{'eval' if split == 'test' else split}-prompts {count}: {fault}") from None
        if split == "test":
            found[task] = found[task][:count]
    return found


def read_own_prompts(s: Settings, split: str) -> dict[str, list[Prompt]]:
    """--prompts TASK=PATH ... -> prompts by task; "auto" routes each prompt by itself (F Eq. 7, `data.task_of`).

    A folder without a test split, as curation leaves it, has no test prompts to give.
    """
    found: dict[str, list[Prompt]] = {}
    for task, path in s.prompts.items():
        if split == "test" and not data.holds_split(path, "test") and data.holds_split(path, "train"):
            continue
        for prompt in data.read_prompts(path, "quality" if task == "auto" else task, split):
            if task == "auto":
                own = data.task_of(prompt.text, prompt.metadata)
                # Q knows two tasks: whatever is not an edit is drawn from text.
                prompt = prompt._replace(task="t2i" if own != "edit" and "t2i" in task_list(s) else own)
            if is_tiny(s):
                (tiny_edit if s.preset == "tiny-qwen" else tiny).check_prompt(prompt)
            known = settings.known_tasks(s)
            if prompt.task not in known:
                at = f"{prompt.source}: a prompt of the task {prompt.task!r}"
                raise data.DataError(f"{at}; this model knows {', '.join(known)}")
            data.check_source(prompt)
            found.setdefault(prompt.task, []).append(prompt)
    return found


def batches(items: Sequence, size: int) -> list[Sequence]:
    """`items` in parts of `size`, the last one shorter; size 0: all in one part."""
    size = size or len(items)
    return [items[i : i + size] for i in range(0, len(items), size)]


def sources(prompts: Sequence[Prompt]) -> list[Tensor | None] | None:
    """The source pictures of edits, (3, H, W) in [0, 1], None for a prompt without one; None where none has one."""
    found = [data.source_image(p) for p in prompts]
    if all(image is None for image in found):
        return None
    return [image if image is None else torch.from_numpy(image).permute(2, 0, 1) / 255 for image in found]


def conditions(model: flow.FlowModel, prompts: Sequence[Prompt], cfg: float) -> tuple[flow.Cond, flow.Cond | None]:
    """Cond of the prompts and, where guidance is on, of as many empty prompts with the same source pictures."""
    images = sources(prompts)
    cond = model.encode([p.text for p in prompts], images)
    return cond, None if cfg == 1 else model.encode([model.empty] * len(prompts), images)


def encode_all(model: flow.FlowModel, prompts: Iterable[Prompt], guided: bool) -> None:
    """Encode distinct prompts once and for all, and what guidance sets against them; pictures are read one by one."""
    known = {(p.text, p.metadata.get("image")): p for p in prompts}.values()
    asked = [(p.text, p) for p in known]
    if guided:
        asked += [(model.empty, p) for p in {p.metadata.get("image"): p for p in known}.values()]
    pictures = (image[0] if (image := sources([p])) else None for _, p in asked)
    model.prepare([text for text, _ in asked], pictures)


# ------------------------------------------------------------------------------------------------ prompts of a step
class Row(NamedTuple):
    """One trajectory to be: its prompt, and the seed of all noise along it."""

    prompt: Prompt
    seed: int

    def source(self) -> torch.Generator:
        """A fresh generator on the CPU: the same noise on any device, rank and micro-batch."""
        return torch.Generator().manual_seed(self.seed)


def pool(s: Settings, prompts: Mapping[str, list[Prompt]], step: int) -> Mapping[str, list[Prompt]]:
    """The tasks that a step draws from: all of them, or in GRPO-mix (F App. A) the one whose turn it is."""
    if s.task == "mix" and s.mix == "turns":
        shares = {task: MIX.get(task, 1) for task in prompts}
        task = grpo.mix_schedule(step, shares)
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


def micro_batches(rows: Sequence[Row], size: int) -> list[Sequence[Row]]:
    """Rows in parts of at most `size` (0: no limit), in order; no part has both edits and others."""
    kinds = (list(some) for _, some in groupby(rows, lambda row: "image" in row.prompt.metadata))
    return [part for some in kinds for part in batches(some, size)]


def prepare(run: Run, prompts: Mapping[str, list[Prompt]], more: Iterable[Prompt] = ()) -> None:
    """Encode, before the first step, every prompt that the rest of the run will need; then no text encoder is left."""
    s = run.s
    tests = load_prompts(s, "test", s.eval_prompts, settings.test_tasks(s)) if s.eval_prompts else {}
    wanted = [p for step in range(run.step, s.steps) for p, _, _ in batch(run, prompts, step)]
    wanted += [*(p for some in tests.values() for p in some), *more]
    encode_all(run.model, wanted, settings.teacher_cfg(s) != 1)  # with guidance anywhere, that of teachers is on


# ----------------------------------------------------------------------------------------------------- trajectories
def trained_steps(run: Run) -> list[int]:
    """Indices of the transitions that are trained: a subset (Q 4.2), the same on every rank.

    Of the stochastic ones: an ODE step has no density, hence no ratio and no KL. Objectives that need neither
    (`velocity`, Q Eq. 14, and the forward process, Q Eq. 8) choose among all.

    ERRATUM (Q 4.1-4.2): Q draws with a 40-step ODE and optimises GRPO's ratio, which no deterministic step has. Two
    readings are possible, and both are here: a stochastic window at high noise (--stage grpo --window 0:16), or the
    forward-process loss, which asks for nothing but the finished picture (--stage nft).
    """
    s = run.s
    start, stop = (0, s.num_steps) if deterministic(s) else settings.window_of(s)
    count = None if s.train_steps == "all" else min(s.train_count, stop - start)
    subset = grpo.timestep_subset(stop - start, count, s.train_steps, generator=run.generator("subset"))
    return [start + n for n in subset]


def deterministic(s: Settings) -> bool:
    """Does the stage walk the ODE? (Q Eq. 8 and 14 ask for the deterministic sampler.)"""
    return s.stage == "nft" or (s.stage == "opd" and s.states == "ode")


@torch.no_grad()
def roll_out(run: Run, rows: Sequence[Row], stoppable: bool = True) -> tuple[list[dict], Tensor]:
    """Sample a trajectory a row from the current policy (F Eq. 5-6).

    Returns the micro-batches and the images (B, 3, H, W). A micro-batch is {"path": transitions, "velocity": the field
    v(x, t) of the objective, "noise": the rows' generators}. Under Q 4.1's hybrid the path is what
    `grpo.hybrid_transition` makes of the guided one.
    """
    s, model, parts, images = run.s, run.model, [], []
    level, window = (0.0, None) if deterministic(s) else (s.noise_level, settings.window_of(s))
    ends = deterministic(s) or s.stage == "curate"  # nobody asks for more than the end of the trajectory
    for part in micro_batches(rows, s.micro_batch):
        if stoppable:
            run.stop_if_asked()
        noise = [row.source() for row in part]
        x = sde.standard_normal((len(part), *model.latent_shape), noise).to(model.device)
        cond, uncond = conditions(model, [row.prompt for row in part], settings.student_cfg(s))
        plain: deque[Tensor] = deque(maxlen=0 if ends else None)  # v(x, t, c), where the rollout alone is guided
        walk = sde.rollout(policy(model, cond, uncond, s, plain), x, model.time_grid(s.num_steps), level, s.kernel,
                           window, noise)  # fmt: skip
        path = [*deque(walk, maxlen=1 if ends else None)]
        images.append(model.decode(path[-1].x_next))
        if plain:
            pairs = zip(path, plain, strict=True)
            path = [grpo.hybrid_transition(step, v, s.noise_level, s.kernel) for step, v in pairs]
        cfg = settings.trained_cfg(s)
        parts.append({"path": path, "velocity": field(model, cond, uncond, cfg), "noise": noise})
    return parts, torch.cat(images)


def field(model: flow.FlowModel, cond: flow.Cond, uncond: flow.Cond | None, cfg: float) -> Callable:
    """The velocity field of one micro-batch, v(x, t), as sde.rollout wants it."""
    return lambda x, t: model.velocity(x, t, cond, uncond, cfg)


def policy(model: flow.FlowModel, cond: flow.Cond, uncond: flow.Cond | None, s: Settings, plain: deque) -> Callable:
    """The field that draws. Where the objective is without guidance and this is not, v(x, t, c) is left in `plain`:
    from a forward of its own, because the objective's has as many rows, and rows computed otherwise differ in the last
    bits, so that the first ratio would not be 1."""
    cfg = settings.student_cfg(s)
    if cfg == settings.trained_cfg(s):
        return field(model, cond, uncond, cfg)

    def guided(x: Tensor, t: float) -> Tensor:
        v_cond = model.velocity(x, t, cond)
        plain.append(v_cond)
        return model.guide(model.velocity(x, t, uncond), v_cond, cfg)

    return guided


@torch.no_grad()
def draw(model: flow.FlowModel, prompts: Sequence[Prompt], s: Settings, seed: int, cfg: float) -> Tensor:
    """ODE samples (B, C, H, W) of the expert that is selected, latents on the CPU, the same on every rank.

    Noise depends on `seed` and on the row alone; cfg is the guidance scale. Rank r draws rows r, r + world, ...; a
    last, incomplete round is filled up with the first rows again, because under FSDP every rank must run as many
    forwards as the others. Prompts have source pictures or have none, all of them.
    """
    rank, world = ranks.rank_and_world()
    size = -(-len(prompts) // world)
    rows = [(k * world + rank) % len(prompts) for k in range(size)]
    ts, drawn = model.time_grid(s.eval_steps), []
    for part in batches(rows, s.micro_batch or 96):
        noise = [torch.Generator().manual_seed(data.seed_for("draw", seed, i)) for i in part]
        x = sde.standard_normal((len(part), *model.latent_shape), noise).to(model.device)
        cond, uncond = conditions(model, [prompts[i] for i in part], cfg)
        drawn.append(sde.sample(field(model, cond, uncond, cfg), x, ts).cpu())
    mine = torch.cat(drawn)
    if not dist.is_initialized():
        return mine
    parts = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(parts, mine)
    return torch.stack(parts, 1).flatten(0, 1)[: len(prompts)]  # row k * world + r is rank r's k-th
