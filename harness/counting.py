"""How many forwards does a stage's step take? Its own loop in train.py counts them, with a model that computes nothing.

A loop is handed `CountingLoad` in place of harness/load.py. There is no second description of the pipeline.
"""

import io
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

import rewards
import sde
import settings
from data import benchmarks
from data.batches import seed_for
from data.files import Prompt
from harness import drawn, load, ranks
from models import flow, hub
from models.experts import STUDENT
from scorers import panel
from settings import Settings, is_tiny, student_cfg, teacher_cfg
from tiny import edits


class CountingModel(flow.FlowModel):
    """A model that computes nothing. `found`: {(moment, who, with gradient?): [forwards, rows, those of known prefix]}.

    Guidance and experts are asked through `FlowModel.velocity`, so that what is counted is what would be computed.
    The latents are small, because no count depends on their size.
    """

    latent_shape, precision, device, hosted = (1, 2, 2), "float32", torch.device("cpu"), ()
    most_sources, source = math.inf, "the plan"

    def __init__(self, like: type[flow.FlowModel] | flow.FlowModel = flow.FlowModel):
        self.together, self.keeps_prefix = like.together, like.keeps_prefix
        self.who, self.moment, self.found = "student", "before", {}  # who computes, when, and what was counted
        self.weight = torch.zeros((), requires_grad=True)

    def _forward(self, x: Tensor, t: Tensor, cond: flow.Cond) -> Tensor:
        count = self.found.setdefault((self.moment, self.who, torch.is_grad_enabled()), [0, 0, 0])
        count[0] += 1
        count[1] += len(x)
        count[2] += len(x) * cond.kept_by(self.who, dict)[1]
        return 0 * x + self.weight

    @property
    def selected(self) -> str:
        return STUDENT if self.who == "old policy" else self.who

    @contextmanager
    def adapter(self, name: str | None) -> Iterator[None]:
        before, self.who = self.who, "teachers" if (name or "").startswith("teacher ") else name or "base"
        with torch.no_grad():
            yield
        self.who = before

    def keep(self, names) -> None:
        pass

    def encode(self, prompts: Sequence[str] | Tensor, images=None) -> flow.Cond:
        return flow.Cond(torch.zeros(len(prompts), 1, 1))

    encode_tokens, time_grid = encode, staticmethod(sde.time_grid)

    def tokenize(self, prompt: str) -> list[int]:
        return [0]

    def latents(self, images: Tensor) -> Tensor:
        return torch.zeros(len(images), *self.latent_shape)

    def decode(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x), 3, 8, 8)


class CountingRun:
    """What a loop asks of a `Run`, for one step that writes nothing and updates nothing."""

    asked_to_stop, step, inputs = "", 0, {}

    def __init__(self, s: Settings, model: CountingModel, folder: Path):
        self.s, self.model, self.folder = s, model, folder
        self.rank, self.world = ranks.rank_and_world()
        unknown = torch.zeros(s.num_steps, dtype=torch.float64)  # hence states are drawn alike
        self.weights = SimpleNamespace(state_size=unknown)

    def generator(self, *what: int | str, step: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(seed_for(self.s.seed, self.s.stage, self.s.task, step, *what))

    def steps(self, shown: str) -> Iterator[int]:
        self.model.moment = "step"
        yield 0
        self.model.moment = "after"

    def old_policy(self, step: int):
        return self.model.adapter("old policy") if self.s.stage == "nft" else nullcontext()

    def update(self) -> float:
        return 0.0

    def log(self, *what) -> None:
        pass

    stop_if_asked = fail_together = follow = drew = log


class CountingLoad:
    """Stands where a loop has `harness.load`: prompts that say nothing, scorers that say 0, a model that counts."""

    world_of = staticmethod(load.world_of)

    def __init__(self, s: Settings, model: CountingModel, folder: Path):
        self.s, self.model, self.folder = s, model, folder

    def load_prompts(self, s: Settings, split: str, count: int, tasks: Sequence[str]) -> dict[str, list[Prompt]]:
        tasks = tasks[:1] if s.stage == "curate" else tasks  # a step of it has the prompts of one task
        count = min(count, s.prompts_per_step * ranks.rank_and_world()[1])
        return {task: stand_ins(s, split, task, count) for task in tasks}

    def panel_of(self, s: Settings) -> panel.Panel:
        scorer = rewards.Scorer("none", lambda images, *_: torch.zeros(len(images)), 0.0, 0.0)
        return panel.Panel([scorer], {panel.DEFAULT: {"none": 1.0}})

    def student_run(self, s: Settings) -> CountingRun:
        return CountingRun(s, self.model, self.folder)

    new_base_run = student_run

    def load_teachers(self, model: CountingModel, s: Settings) -> dict[str, str]:
        experts = {task: f"teacher {task}" for task in s.teachers}
        on = s.stage == "opd" and s.mar > 0
        model.hosted = tuple(where for where in (*s.teachers.values(), *[s.anchor] * on) if takes_turns(where))
        return experts | ({"anchor": experts.get(s.anchor, "anchor")} if on else {})


def takes_turns(where: str) -> bool:
    """Is a teacher a full checkpoint? A task's name is no path, and what lies on the Hub counts as an adapter."""
    with suppress(hub.ModelError):
        return not hub.hub_id(where) and hub.kind(hub.locate(where)) == "full"
    return False


def stand_ins(s: Settings, split: str, task: str, count: int) -> list[Prompt]:
    """Prompts of a task. Edits are the user's own, if they can be read: only such as have pictures of one number and
    shape fit into one forward."""
    if task == "edit" and not is_tiny(s):
        with suppress(*ranks.USER_ERRORS, OSError):  # the plan says what is wrong with them
            own = load.read_own_prompts(s, split).get(task, [])
            if own:
                return own if split == "train" else own[:count]
    more = {"image": edits.make_prompts("edit", "train", 1)[0].metadata["image"]} if task == "edit" else {}
    return [Prompt(f"{task} {i}", task, more, "plan") for i in range(count)]


def forwards(
    s: Settings, loop: Callable | None, like: type[flow.FlowModel] | flow.FlowModel = flow.FlowModel
) -> dict[tuple[str, str, bool], list[int]]:
    """The forwards of a rank of a model like this one, counted, as `CountingModel.found`.

    The moments are "before" the first step, one "step", and the test pictures in the "end", whoever draws them. loop:
    the stage's of train.py; None for one without forwards of its own. Teachers are counted together.
    """
    model = CountingModel(like)
    model.moment = "step" if s.stage == "curate" else "before"  # curation knows no other moment
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        if loop:
            loop(replace(s, steps=1, eval_prompts=0), CountingLoad(s, model, Path(folder)))
    model.moment, scales = "end", [("base", teacher_cfg(s))] * settings.shows_base(s) + [("", student_cfg(s))]
    if s.stage == "eval":
        scales = [("", student_cfg(s))] * len(s.compare) + [("", teacher_cfg(s))] * (1 + len(s.teachers))
    own = [name for name in settings.suite_list(s) if name in settings.BENCHMARKS]
    tasks = [*settings.test_tasks(s), *(part for name in own for part in benchmarks.parts(name))]
    prompts = {task: stand_ins(s, "test", task, s.eval_prompts) for task in tasks} if s.eval_prompts else {}
    for model.who, cfg in scales if s.stage in settings.SHOWN and prompts else ():
        nothing = lambda *_: None  # noqa: E731
        drawn.draw(model, drawn.listed(prompts, s.samples), s, cfg, is_there=nothing, keep=nothing)
    return model.found
