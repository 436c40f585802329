"""What is drawn at a step: which prompts, from which noise, with how much guidance?

A row's noise belongs to the row, whatever the micro-batch and the number of ranks. Rows lie task by task and group by
group. The rows of a micro-batch have equally many source pictures of the same shapes, see `pictures.layout`.
Rollout, objective and teachers each have a guidance scale (Q 4.1, 4.3): `settings.student_cfg`, `trained_cfg`,
`teacher_cfg`.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import groupby, zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

import grpo
import opd
import sde
import settings
from data.batches import batches, prompt_batch, seed_for
from data.files import Prompt
from data.pictures import layout, places, sources_of
from harness import load, ranks
from harness.run import Run
from harness.weights import poisoned
from models.experts import STUDENT
from models.flow import Cond, FlowModel, check_count
from settings import Settings

MIX = {"composition": 3, "text": 1, "quality": 1}  # F App. A: epochs of GenEval : OCR : PickScore


# ------------------------------------------------------------------------------------------------ prompts of a step
class Row(NamedTuple):
    """One trajectory to be: its prompt, and the seed of all noise along it."""

    prompt: Prompt
    seed: int
    counts: bool = True  # False: a repeat without weight, see `in_step`
    states: tuple[float, ...] = ()  # opd: the weight of each of its S states, see `draw_states`
    x0: Tensor | None = None  # sft: latents that its teacher has drawn
    anchored: int = 1  # opd: how many times MAR counts it, see `rows_of`

    def generator(self) -> torch.Generator:
        """A fresh generator on the CPU: the same noise on any device, rank and micro-batch."""
        return torch.Generator().manual_seed(self.seed)

    def learnt(self) -> tuple[int, ...]:
        """Which of its S states have a weight."""
        return tuple(n for n, weight in enumerate(self.states) if weight)


def own_prompts(run: Run, prompts: Mapping[str, list[Prompt]], step: int) -> list[tuple[Prompt, str, int]]:
    """The prompts of a step for this rank, update by update: (prompt, task, place in the task's batch of all ranks).

    n ranks with P prompts each have the nP prompts of one rank with nP. Those are shared evenly among the tasks, and
    the tasks take turns; so each of the step's updates, a stretch of this order, has all tasks. The ranks take turns
    within an update, task by task, edits last.
    """
    s, count = run.s, run.s.prompts_per_step * run.world
    if s.task == "mix" and s.mix == "turns":  # GRPO-mix (F App. A): the task whose turn it is
        task = grpo.mix_schedule(step, {task: MIX.get(task, 1) for task in prompts})
        prompts = {task: prompts[task]}
    drawn = []
    for i, (task, some) in enumerate(prompts.items()):
        places = range(len(range(i, count, len(prompts))))
        batch = prompt_batch(some, len(places), seed_for(s.seed, task), step, 0, 1) if places else []
        drawn.append([(prompt, task, place) for prompt, place in zip(batch, places, strict=True)])
    in_turn = [found for turn in zip_longest(*drawn) for found in turn if found]
    order, mine = {task: i for i, task in enumerate(prompts)}, []
    for share in batches(in_turn, count // (1 if s.stage == "curate" else s.updates)):
        mine += sorted(share, key=lambda found: (layout(found[0]), order[found[1]]))[run.rank :: run.world]
    return mine


def rows_of(run: Run, prompts: Mapping[str, list[Prompt]], step: int) -> list[Row]:
    """The P*G trajectories of a step on this rank, group by group; task by task within each update."""
    s = run.s
    every = s.anchor_every if s.stage == "opd" else 1

    def anchored(*which: int | str, i: int) -> int:
        """How often MAR counts the i-th of a task's rows on all ranks: of `every` neighbours a random one so often."""
        return every * (i % every == seed_for("anchor", s.seed, *which, i // every) % every)

    return [
        Row(prompt, seed_for("row", s.seed, s.stage, s.task, step, task, place, g), anchored=anchored(step, task, i=i))
        for prompt, task, place in own_prompts(run, prompts, step)
        for g, i in enumerate(range(place * s.group_size, (place + 1) * s.group_size))
    ]


def micro_batches(model: FlowModel, rows: Sequence[Row], size: int, by_task: bool = False) -> list[Sequence[Row]]:
    """Rows in parts of at most `size` (0: no limit), in order; a part has one `layout`, one `FlowModel.tokens` and one
    draw of states; by_task: one task, too."""

    def kind(row: Row) -> tuple:
        tokens = model.tokens(row.prompt.text, sources_of(row.prompt))
        return layout(row.prompt), tokens, row.learnt(), by_task and row.prompt.task

    return [part for _, some in groupby(rows, kind) for part in batches(list(some), size)]


def in_step(parts: Sequence[Sequence[Row]]) -> list[Sequence[Row]]:
    """A rank's parts, as many on every rank, because under FSDP the ranks' forwards go together.

    Edits and others may be cut into fewer parts on one rank than on another. It repeats a row, which does not count.
    """
    spare = [parts[-1][-1]._replace(counts=False)]
    return [*parts, *[spare] * (ranks.most([len(parts)])[0] - len(parts))]


def draw_states(rows: Sequence[Row], size_S: Tensor, count: int, by_task: bool = False) -> list[Row]:
    """The rows with the weights of their S states: all alike (count 0), or of `count` drawn ones, `opd.state_weights`.

    A row's draw is its own, whatever its micro-batch and rank. Rows that learn from the same states lie together, so
    that their walk ends at the last of them; by_task: within their task.
    """
    if not count:
        return [row._replace(states=(1 / len(size_S),) * len(size_S)) for row in rows]
    u_B = torch.stack(
        [torch.rand((), generator=Row(row.prompt, seed_for("states", row.seed)).generator()) for row in rows]
    )
    weights_SB = opd.state_weights(opd.state_probabilities(size_S), count, u_B)
    rows = [row._replace(states=tuple(own)) for row, own in zip(rows, weights_SB.T.tolist(), strict=True)]
    order = {task: i for i, task in enumerate(dict.fromkeys(row.prompt.task for row in rows)) if by_task}
    return sorted(rows, key=lambda row: (layout(row.prompt), order.get(row.prompt.task), row.learnt()))


def weights_of(part: Sequence[Row], device: torch.device) -> Tensor:
    """(S, B): the weight of each state in a row's mean over its states; 0 for a row that does not count."""
    return torch.tensor([[weight * row.counts for weight in row.states] for row in part], device=device).T


def learnt_in(part: Sequence[Row], trained: Sequence[int], parallel: str) -> list[int]:
    """Which of the S trained transitions a row of the part learns from; under FSDP, where all ranks walk together, a
    row of any rank's part."""
    learnt = [int(any(row.states[n] for row in part)) for n in range(len(trained))]
    return [n for n, on in zip(trained, learnt if parallel == "ddp" else ranks.most(learnt), strict=True) if on]


def anchored_in(part: Sequence[Row], experts: Mapping[str, str]) -> Tensor:
    """Which rows MAR's anchor is asked about, ascending: those that MAR counts, and those that the anchor teaches."""
    teaches = [experts[row.prompt.task] == experts["anchor"] for row in part]
    return torch.tensor([i for i, row in enumerate(part) if row.anchored or teaches[i]], dtype=torch.long)


def prompts_of(rows: Iterable[Row]) -> list[Prompt]:
    return [row.prompt for row in rows]


# ------------------------------------------------------------------------------------------- what the model is told
def conditions(model: FlowModel, prompts: Sequence[Prompt], cfg: float) -> tuple[Cond, Cond | None]:
    """Cond of the prompts and, if guidance is on, of as many empty prompts with the same source pictures."""
    images = [sources_of(p) for p in prompts]
    cond = model.encode([p.text for p in prompts], images)
    for who, *parts in ("the text encoder", cond.tokens, cond.pooled), ("the VAE", *cond.sources):
        for part in parts:
            check_finite(model, who, part)
    return cond, None if cfg == 1 else model.encode([model.empty] * len(prompts), images)


def check_finite(model: FlowModel, who: str, x: Tensor | None) -> None:
    """FloatingPointError that names what is to blame if a part of the model has given a number that is not finite."""
    if x is not None and not x.isfinite().all():
        raise FloatingPointError(poisoned(model) or f"{who} of {model.source} gives numbers that are not finite")


def encode_all(model: FlowModel, prompts: Iterable[Prompt], guided: bool) -> None:
    """Encode distinct prompts once and for all, and the empty prompt if guidance needs it, picture by picture.

    Says of how many prompts of a file the end is not read. ModelError by line for more pictures than the model takes.
    """
    prompts, texts = list(prompts), {}
    for p in prompts:
        check_count(len(places(p)), model.most_sources, model.source, f"{p.source}: ")
        texts.setdefault(places(p), {}).setdefault(p.text, p)
    asked = []
    for some in texts.values():
        pictures = sources_of(next(iter(some.values())))
        asked += [(text, pictures) for text in dict.fromkeys([*some, *([model.empty] * guided)])]
    cut, files = model.prepare([text for text, _ in asked], [pictures for _, pictures in asked]), {}
    for p in prompts:
        if p.text in cut:
            files.setdefault(p.source.rpartition(":")[0], {})[p.source] = None
    for file, lines in files.items():
        whose = "prompts of rank 0" if ranks.rank_and_world()[1] > 1 else "prompts"
        said = f"{len(lines)} {whose} are longer than --text-length {model.text_length} tokens and are cut there"
        ranks.tell_once(f"{file}: {said}, the first is {next(iter(lines))}")


def prepare(run: Run, prompts: Mapping[str, list[Prompt]], more: Iterable[Prompt] = ()) -> None:
    """Encode, before the first step, every prompt that the rest of the run will need; then no text encoder is left."""
    s = run.s
    tests = load.load_prompts(s, "test", s.eval_prompts, settings.test_tasks(s)) if s.eval_prompts else {}
    steps = range(run.step, s.steps) if prompts else ()
    wanted = [p for step in steps for p, _, _ in own_prompts(run, prompts, step)]
    wanted += [*(p for some in tests.values() for p in some), *more]
    encode_all(run.model, wanted, settings.teacher_cfg(s) != 1)  # with guidance anywhere, that of teachers is on


# ----------------------------------------------------------------------------------------------------- trajectories
def walks_ode(s: Settings) -> bool:
    """Does the stage walk the ODE? Q Eq. 8 and 14 ask for the deterministic sampler."""
    return s.stage == "nft" or (s.stage == "opd" and s.states == "ode")


def noise_of(s: Settings) -> tuple[float, tuple[int, int], str]:
    """(level, window, kernel) of the stage's `sde.rollout`: which transitions are stochastic, how much, and how."""
    if walks_ode(s):
        return 0.0, (0, 0), "sde"
    return s.noise_level, settings.window_of(s), s.kernel if s.stage in ("curate", "grpo") else "sde"


def trained_steps(s: Settings, generator: torch.Generator) -> list[int]:
    """Indices of the transitions that are trained, ascending, the same on every rank: all, or a subset (Q 4.2).

    F's SDE: of the stochastic ones, because an ODE step has no density, hence no ratio and no KL. The ODE (Q
    Eq. 14, `--states ode`) and the forward process (Q Eq. 8): of all. Distillation trains all of these; `draw_states`
    chooses among them row by row.

    ERRATUM (Q 4.1-4.2): Q draws with a 40-step ODE and optimises GRPO's ratio, which no deterministic step has. Two
    readings are possible, and both are here: a stochastic window at high noise (--stage grpo --window 0:16), or the
    forward-process loss, which needs only the finished picture (--stage nft).
    """
    start, stop = (0, s.num_steps) if walks_ode(s) else settings.window_of(s)
    if s.stage == "opd" or s.train_steps == "all":
        return list(range(start, stop))
    count = min(s.train_count, stop - start)
    return [start + n for n in grpo.timestep_subset(stop - start, count, s.train_steps, generator=generator)]


def pure_noise(model: FlowModel, rows: Sequence[Row]) -> tuple[Tensor, list[torch.Generator]]:
    """Where the rows' trajectories begin: x at t = 1, (B, C, H, W), and the generators of the noise along them."""
    noise = [row.generator() for row in rows]
    return sde.standard_normal((len(rows), *model.latent_shape), noise).to(model.device), noise


class Field:
    """The velocity field of one micro-batch, v(x, t), guided by `cfg`.

    What an expert computes from the conditioning alone it computes once for all times (`Cond.kept`). At the times
    `whole` the student does not use it: the objective's forward, which has a gradient and hence cannot, must give the
    same bits there, so that the first ratio is 1.
    """

    def __init__(self, model: FlowModel, cond: Cond, uncond: Cond | None, cfg: float, whole: Collection[float] = ()):
        self.model, self.branches, self.cfg, self.whole = model, (cond, uncond), cfg, whole
        self.forget()

    def forget(self) -> None:
        """Give up what is kept."""
        keeps = self.model.keeps_prefix
        self.keeping = [b._replace(kept={}) if b and keeps else b for b in self.branches]

    def __call__(self, x: Tensor, t: float) -> Tensor:
        plain = self.model.selected == STUDENT and t in self.whole
        return self.model.velocity(x, t, *(self.branches if plain else self.keeping), self.cfg)


class HybridField:
    """The field of Q 4.1's hybrid: guided, and it remembers v(x, t, c) of the last state (`v_cond`) for the objective.

    The branches are two forwards, not one: the objective's forward has as many rows, and rows computed in a batch of
    another size differ in the last bits, so that the first ratio would not be 1.
    """

    def __init__(self, model: FlowModel, cond: Cond, uncond: Cond, cfg: float, whole: Collection[float]):
        self.guide, self.cfg = model.guide, cfg
        self.with_prompt, self.without = Field(model, cond, None, 1.0, whole), Field(model, uncond, None, 1.0)
        self.v_cond: Tensor | None = None

    def __call__(self, x: Tensor, t: float) -> Tensor:
        self.v_cond = self.with_prompt(x, t)
        return self.guide(self.without(x, t), self.v_cond, self.cfg)


class Noised(NamedTuple):
    """Finished latents with noise again, at one time, and what Q Eq. 7-8 need there."""

    t: float
    x: Tensor  # (B, C, H, W) x_t of Q Eq. 1
    v_target: Tensor  # v* = eps - x_0
    v_old: Tensor  # of the policy that drew x_0


class Trajectories(NamedTuple):
    """One micro-batch of finished trajectories, and what an objective needs to train on them."""

    path: list[sde.Transition] | list[Noised]  # at the trained steps: grpo's transitions, nft's states
    x0: Tensor  # (B, C, H, W) the finished latents
    velocity: Field  # of the objective
    counts: Tensor  # (B,) bool, on the CPU: `Row.counts`


@torch.no_grad()
def roll_out(
    model: FlowModel, rows: Sequence[Row], s: Settings, trained: Sequence[int] = ()
) -> tuple[Trajectories, Tensor]:
    """Sample one micro-batch from the current policy (F Eq. 5-6): its trajectories, and the images (B, 3, H, W).

    trained: the steps that will be learnt from. With Q 4.1's hybrid, grpo's path is what `grpo.hybrid_transition` makes
    of the guided one. nft's noise and v_old are taken here, from the policy that draws: it may be another one later.
    """
    drawn, learnt = settings.student_cfg(s), settings.trained_cfg(s)
    cond, uncond = conditions(model, prompts_of(rows), drawn)
    times = [float(t) for t in model.time_grid(s.num_steps)]
    whole = [times[n] for n in trained]
    hybrid = HybridField(model, cond, uncond, drawn, whole) if drawn != learnt else None
    x, noise = pure_noise(model, rows)
    level, window, kernel = noise_of(s)
    policy = hybrid or Field(model, cond, uncond, drawn, whole)
    path, objective = [], Field(model, cond, uncond, learnt, whole)
    for step in sde.rollout(policy, x, times, level, kernel, window, noise):
        x = step.x_next
        if s.stage == "grpo" and step.index in trained:
            path.append(grpo.hybrid_transition(step, hybrid.v_cond, level, kernel) if hybrid else step)
    for t in whole if s.stage == "nft" else ():
        eps = sde.standard_normal(x.shape, noise).to(x)  # of each time and row its own
        at = sde.interpolate(x, eps, t)  # as in pretraining
        path.append(Noised(t, at, eps - x, objective(at, t)))
    check_finite(model, "the velocity", x)
    images = model.decode(x)
    check_finite(model, "the VAE", images)
    counts = torch.tensor([row.counts for row in rows])
    return Trajectories(path, x, objective, counts), images


@torch.no_grad()
def sampled(model: FlowModel, part: Sequence[Row], steps: int, cfg: float) -> Tensor:
    """ODE samples (Q Eq. 3) of one micro-batch by the expert that is selected: latents (B, C, H, W) on its device."""
    x, _ = pure_noise(model, part)
    cond, uncond = conditions(model, prompts_of(part), cfg)
    x = sde.sample(Field(model, cond, uncond, cfg), x, model.time_grid(steps))
    check_finite(model, "the velocity", x)
    return x


def draw(model: FlowModel, prompts: Sequence[Prompt], steps: int, size: int, seed: int, cfg: float) -> Tensor:
    """ODE samples (B, C, H, W) of the expert that is selected, latents on the CPU, the same on every rank.

    steps: of sampling; size: of a micro-batch (0: 96); cfg: the guidance scale. Noise depends on `seed` and the row
    alone. The ranks take turns, edits last; the last turn is filled up with the last row again, because under FSDP
    every rank must run as many forwards as the others.
    """
    rank, world = ranks.rank_and_world()
    order = sorted(range(len(prompts)), key=lambda i: layout(prompts[i]))
    turns = order + order[-1:] * (-len(order) % world)
    mine = [Row(prompts[i], seed_for("draw", seed, i)) for i in turns[rank::world]]
    drawn = []
    for part in in_step(micro_batches(model, mine, size or 96)):
        counts = torch.tensor([row.counts for row in part])
        drawn.append(sampled(model, part, steps, cfg).cpu()[counts])
    all_of_them = torch.stack(ranks.gathered(torch.cat(drawn)), 1).flatten(0, 1)  # as in `turns`
    return all_of_them[torch.tensor(order).argsort()]
