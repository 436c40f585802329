"""What does a stage load? Its prompts, its scorers, the frozen base, the student and the teachers beside it."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from huggingface_hub import ModelCardData

import settings
from data import benchmarks, preferences
from data import files as data
from data.batches import seed_for
from data.common import write_atomic
from data.files import Prompt
from data.pictures import check_sources, places
from harness import identity, ownership, ranks
from harness.run import Run
from models import flow, hub, lora, qwen_vl, tiny
from models import load as models
from models.experts import STUDENT, Experts
from rewards import unclosed
from scorers import panel, registry, vlm_trained, world
from settings import Settings, is_tiny, rewarded_tasks, task_list
from tiny import drawings, edits
from tiny import judge as tiny_judge


# --------------------------------------------------------------------------------------------- worlds and prompts
def world_of(s: Settings) -> ModuleType:
    """The world of a run: it makes and checks prompts, draws what a base learns from, and scores an evaluation."""
    return {"tiny": drawings, "tiny-qwen": edits}.get(s.preset, world)


def load_prompts(s: Settings, split: str, count: int, tasks: Sequence[str]) -> dict[str, list[Prompt]]:
    """The prompts of each task: from the user's files (--prompts) or `count` generated ones.

    Edits of real pictures need a file. Without one they are not tested, and training on them is refused.
    DataError names file and line.
    """
    mine, found = read_own_prompts(s, split), {}
    if "edit" in tasks and "edit" not in mine and "edit" not in world_of(s).TASKS:
        if split == "train":
            needed = "--prompts edit=FILE.jsonl, or --tasks without edit"
            raise settings.SettingsError(f"edits need source pictures: {needed}")
        tasks = [task for task in tasks if task != "edit"]
    for task in tasks:
        try:
            found[task] = mine.get(task) or world_of(s).make_prompts(task, split, count)
        except ValueError as fault:
            raise data.DataError(f"--{'eval' if split == 'test' else split}-prompts {count}: {fault}") from None
        if split == "test":
            found[task] = found[task][:count]
    return found


def test_prompts(s: Settings) -> dict[str, list[Prompt]]:
    """The prompts of an evaluation by task, and those of benchmarks by what they call their parts."""
    found = load_prompts(s, "test", s.eval_prompts, settings.test_tasks(s))
    for name in settings.suite_list(s):
        found |= benchmarks.read(name, s.prompts[name], s.eval_prompts) if name in settings.BENCHMARKS else {}
    return found


def read_own_prompts(s: Settings, split: str) -> dict[str, list[Prompt]]:
    """--prompts TASK=PATH ... -> prompts by task; "auto" routes each prompt by itself (F Eq. 7, `data.task_of`).

    A folder without a test split, as curation leaves it, has no test prompts to give.
    """
    found: dict[str, list[Prompt]] = {}
    most = math.inf if is_tiny(s) else models.most_sources(s.model)
    for task, path in s.prompts.items():
        trained = split == "test" and not data.holds_split(path, "test") and data.holds_split(path, "train")
        if task in settings.BENCHMARKS or trained:
            continue
        prompts, odd = data.read_prompts(path, "quality" if task == "auto" else task, split), []
        for prompt in prompts:
            if task == "auto":
                own = data.task_of(prompt.text, prompt.metadata)
                # Q knows two tasks: whatever is not an edit is drawn from text.
                prompt = prompt._replace(task="t2i" if own != "edit" and "t2i" in task_list(s) else own)
                odd += [prompt.source] * (prompt.task == "quality" and unclosed(prompt.text))
            world_of(s).check_prompt(prompt)
            known = settings.known_tasks(s)
            if prompt.task not in known:
                at = f"{prompt.source}: a prompt of the task {prompt.task!r}"
                raise data.DataError(f"{at}; this model knows {', '.join(known)}")
            if shown := places(prompt):
                flow.check_count(len(shown), most, s.model, f"{prompt.source}: ")
            check_sources(prompt)
            found.setdefault(prompt.task, []).append(prompt)
        if odd:
            said = f"{len(odd)} prompts have a quote that is not closed and go to quality, the first at {odd[0]}"
            ranks.tell_once(f"--prompts auto={path}: {said}")
    return found


def seen_in_training(s: Settings) -> list[str]:
    """A warning for each of the user's prompt files that is both training and test set, and for each folder whose two
    files share prompts."""
    notes = []
    for task, path in s.prompts.items():
        if task in settings.BENCHMARKS:
            continue
        if not Path(path).is_dir():
            said = "is no folder with a train and a test split: a model that was trained on it has seen its tests."
            notes.append(f"--prompts {task}={path} {said}")
        elif all(data.holds_split(path, split) for split in data.SPLITS):
            own = (data.read_prompts(path, "quality" if task == "auto" else task, split) for split in data.SPLITS)
            train, test = ({(p.text, places(p)) for p in some} for some in own)
            if both := len(train & test):
                notes.append(f"--prompts {task}={path}: {both} of {len(test)} test prompts are training prompts, too.")
    return notes


def panel_of(s: Settings) -> panel.Panel:
    """The scorers that --rewards names, or the tasks' own."""
    return panel.build(asked_of(s), ranks.start(s), s.on_reward_failure == "drop")


def asked_of(s: Settings) -> registry.Asked:
    """What --rewards asks for, in the run's world. RewardError, one line."""
    return registry.read(s.rewards, rewarded_tasks(s), world_of(s))


# ------------------------------------------------------------------------------------------- what a run reads
def claim(s: Settings) -> ownership.Lock | None:
    """Hold the run's folder, see `ownership.claim`: before scorers and models are loaded."""
    found: dict[str, str] = {}
    for name, value in settings.read_by(s).items():
        if name in ("model", "anchor", "init", "data", "rewards"):
            found[f"--{name}"] = value
        elif isinstance(value, dict):
            found |= {f"--{name} {key}": where for key, where in value.items()}
    return ownership.claim(s, found)


def inputs_of(s: Settings) -> dict[str, str]:
    """{flag: identity} of what the run reads (harness/identity.py), {} on ranks that do not need it.

    Everything is found or fetched before. SettingsError if the run was made with other content, and as `try_all`.
    """
    locate_all(s)
    found = _identities(s) if ranks.rank_and_world()[0] == 0 or s.stage == "curate" else {}
    if found:
        ownership.check_inputs(s, found)
    try_all(s)
    return found


def _identities(s: Settings) -> dict[str, str]:
    found, read, places = {}, settings.read_by(s), checkpoints_of(s)
    if files := base_files(s):
        found["--model"] = identity_of(s.model, files)
    if s.stage == "opd" and s.mar > 0:  # also if it is one of the teachers
        places["anchor"] = s.teachers.get(s.anchor, s.anchor)
    for name, where in places.items():
        found[flag_of(name)] = identity_of(where)
    for task, path in read.get("prompts", {}).items():
        if data.holds_split(path, "train"):
            found[f"--prompts {task}"] = identity.data(data.prompt_file(Path(path), "train"))
    if read.get("data"):
        found["--data"] = identity.data(Path(s.data))
    if s.stage in ("curate", *settings.RL):
        found["--rewards"] = identity.scorers(asked_of(s))
    return found


def identity_of(where: str, files: Sequence[str] = ()) -> str:
    """The identity of a checkpoint's weights: of a base by the patterns of its files, of any other without them."""
    if files:
        return identity.weights(hub.locate(where, files), files)
    place = hub.locate(where)
    place = hub.lora_file(place) if hub.kind(place) == "file" else place
    return identity.weights(place, (*hub.ADAPTER_FILES, *hub.TRANSFORMER_FILES))


# ------------------------------------------------------------------------------------------ student and teachers
def locate_all(s: Settings) -> None:
    """Find or fetch every checkpoint that the run will read. ModelError names the flag of one that is not there.

    One rank of each node goes first, so that a download happens once.
    """
    if ranks.local_rank() > 0:
        ranks.wait()
    base = {"model": s.model} if base_files(s) else {}
    for name, where in (base | checkpoints_of(s)).items():
        with _named(name):
            hub.locate(where, base_files(s)) if name in base else hub.kind(hub.locate(where))
    if ranks.local_rank() == 0:
        ranks.wait()


def try_all(s: Settings) -> None:
    """Try every checkpoint on the base's shapes, before its weights are read. ModelError names the flag of one that
    does not fit: another base's, of other shapes, or with numbers that are not finite."""
    if not (found := checkpoints_of(s)):
        return
    with _named("model"):
        place = hub.locate(s.model, base_files(s))
        empty = Experts(hub.empty_transformer(hub.transformer_config(place)), "meta")
        empty.source, empty.fingerprint = s.model, hub.fingerprint(hub.transformer_in(place))
    for name, where in found.items():
        with _named(name):
            lora_only = s.stage == "merge" or (name == "init" and s.parameters != "full")
            (empty.read_adapter if lora_only else empty.check)(hub.locate(where))


@contextmanager
def _named(name: str) -> Iterator[None]:
    """A ModelError inside begins with the flag of the checkpoint."""
    try:
        yield
    except hub.ModelError as fault:
        raise hub.ModelError(f"{flag_of(name)}: {fault}") from fault


def base_files(s: Settings) -> tuple[str, ...]:
    """Patterns of the files of --model that the stage reads; none if it makes its own model."""
    if s.stage == "pretrain" or (s.stage == "reward" and is_tiny(s)):
        return ()
    return qwen_vl.FILES if s.stage == "reward" else models.BASE_FILES


def checkpoints_of(s: Settings) -> dict[str, str]:
    """What the stage reads beside its base: {"teacher TASK", "anchor", "init" or "compare NAME": where it is}."""
    found = {}
    if s.stage in ("sft", "merge", "opd", "eval"):
        found |= {f"teacher {task}": where for task, where in s.teachers.items()}
    found |= {"anchor": where for where in anchors(s)}  # noqa: B035
    if s.stage in ("curate", *settings.LORA) and s.init:
        found["init"] = s.init
    return found | {f"compare {name}": where for name, where in (s.compare if s.stage == "eval" else {}).items()}


def flag_of(name: str) -> str:
    """The flag that gives a checkpoint of `checkpoints_of`."""
    return "--" + name.replace("teacher ", "teachers ")


def anchors(s: Settings) -> list[str]:
    """MAR's anchor, if it is on (F Eq. 12) and the anchor is not one of the teachers."""
    return [s.anchor] if s.stage == "opd" and s.mar > 0 and s.anchor not in s.teachers else []


def new_base_run(s: Settings) -> Run:
    """A tiny base with fresh weights, all of which train."""
    device = ranks.start(s)
    return Run(s, tiny.new_tiny(s.seed, device=device, qwen="edit" in task_list(s)), inputs=inputs_of(s))


def base_model(s: Settings, device: torch.device | str = "cpu") -> flow.FlowModel:
    """The frozen base that the settings describe, on `device`."""
    trains = s.stage in settings.LORA
    how = trains and s.gradient_checkpointing, trains and s.compile
    more = (s.precision, settings.size_of(s), s.text_length, s.source_resolution, s.cfg_rescale, *how)
    return models.load(s.model, device, is_tiny(s), *more)


def student_run(s: Settings) -> Run:
    """The frozen base and the student: a LoRA on it or a transformer of its own, new or from --init (a cold start)."""
    device, full = ranks.start(s), s.parameters == "full"
    inputs = inputs_of(s)
    model = base_model(s, "cpu" if full else device)
    if full:
        model.train_fully(s.init, needs_base(s), device, ranks.sharding(s.parallel, s.precision, device))
        return Run(s, model, inputs=inputs)
    state, config = None, lora.lora_config(s.rank, s.alpha)
    if s.init:
        state, config = model.read_adapter(hub.locate(s.init))
    with torch.random.fork_rng(devices=[]):  # the gaussian A of a new adapter
        torch.manual_seed(seed_for(s.seed, "lora"))
        model.add_adapter(STUDENT, config, state)
    return Run(s, model, config, inputs)


def needs_base(s: Settings) -> bool:
    """Does a full-parameter student need the frozen base beside it: for LoRA teachers, or for the KL to the base?"""
    if s.stage in ("curate", "grpo", "nft"):
        return s.stage != "curate" and s.beta > 0
    return any(hub.kind(hub.locate(where)) != "full" for where in (*s.teachers.values(), *anchors(s)))


def load_teachers(model: flow.FlowModel, s: Settings) -> dict[str, str]:
    """Put the teachers and MAR's anchor beside the student -> {task: its teacher's name}, "anchor" too if MAR is on."""
    experts = {}
    for task, where in s.teachers.items():
        experts[task] = f"teacher:{task}"
        model.add_expert(experts[task], where)
    if s.stage == "opd" and s.mar > 0:
        experts["anchor"] = experts.get(s.anchor, "anchor")
        if experts["anchor"] == "anchor":
            model.add_expert("anchor", s.anchor)
    return experts


# ------------------------------------------------------------------------------------------------------ reward model
class RewardRun(Run):
    """A run that trains a judge instead of a flow: its checkpoints hold a reward model."""

    def export(self, folder: Path) -> None:
        if self.rank > 0:
            return
        with self.exported():
            vlm_trained.save(self.model, folder, self.s.objective)
        base = "" if is_tiny(self.s) else hub.hub_id(self.s.model)
        front = ModelCardData(base_model=base or None, tags=["reward-model"])
        equation = {"pointwise": 11, "pairwise": 10}[self.s.objective]
        scores = [f"- {key}: {value:.4g}" for key, value in self.record.last.items() if key.startswith("held_")]
        lines = [
            "---", front.to_yaml(), "---", "", "# A reward model", "",
            f"Objective: {self.s.objective} (Qwen-Image-2.0-RL, Eq. {equation}); {self.step} steps.", "",
            *(["Agreement with people on held-out prompts:", "", *scores, ""] if scores else []),
        ]  # fmt: skip
        write_atomic(folder / "README.md", "\n".join(lines))


def reward_run(s: Settings) -> tuple[RewardRun, list, list]:
    """A judge to be trained, the items that it learns from, and those that are held out.

    A tiny world's learns from prints that are drawn here, a VLM from --data, which is read before the model.
    """
    device = ranks.start(s)
    if is_tiny(s):
        training, held = tiny_judge.marked_prints(tiny_judge.PROMPTS, s.objective, s.seed, s.holdout)
    else:
        training, held = preferences.split(preferences.read(s.data, s.objective), s.holdout)
    if not training or not held:
        missing = "held out" if training else "to train on"
        raise data.DataError(f"--holdout {s.holdout}: no prompt is {missing}; change it, or add prompts to --data")
    inputs = inputs_of(s)
    if is_tiny(s):
        return RewardRun(s, tiny_judge.TinyJudge(seed=s.seed).to(device), inputs=inputs), training, held
    judge = vlm_trained.VLMJudge(s.model, device, getattr(torch, s.precision))
    judge.add_lora(lora.lora_config(s.rank, s.alpha, vlm_trained.TARGETS), seed=s.seed)
    return RewardRun(s, judge, inputs=inputs), training, held
