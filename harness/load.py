"""What stands on the accelerator in a stage: the base, the student, and the experts beside it?

    locate_all     find or fetch everything that the stage will read, before any of it is loaded
    student_run    the frozen base and the student: a LoRA on it or a transformer of its own
    load_teachers  the routed teachers (F Eq. 7, Q 4.3) and MAR's anchor (F Eq. 12)
"""

import torch

from data import files as data
from harness import ranks
from harness.run import Run
from models import flow
from models import load as models
from models import lora as adapters
from settings import Settings, is_tiny


def locate_all(s: Settings) -> None:
    """Find (or fetch) everything that a run will read, before any of it is loaded. ModelError names what is not there.

    One rank a node goes first, so that a download happens once.
    """
    if ranks.local_rank() > 0:
        ranks.wait()
    adapters.locate(s.model, models.BASE_FILES)
    teachers = s.teachers.values() if s.stage in ("opd", "sft", "merge", "eval") else ()
    anchor = [s.anchor] if s.stage == "opd" and s.mar > 0 and s.anchor not in s.teachers else []
    for where in (*teachers, *anchor, *([s.init] if s.init else []), *s.compare.values()):
        adapters.kind(adapters.locate(where))
    if ranks.local_rank() == 0:
        ranks.wait()


def base_model(s: Settings, device: torch.device | str = "cpu") -> flow.FlowModel:
    """The frozen base that the settings describe, on `device`."""
    more = (s.precision, s.resolution, s.text_length, s.source_resolution, s.cfg_rescale, s.gradient_checkpointing)
    return models.load(s.model, device, is_tiny(s), *more)


def student_run(s: Settings) -> Run:
    """The frozen base and a student: a LoRA on it or a transformer of its own, new or from --init (a cold start)."""
    device = ranks.start(s)
    locate_all(s)
    model, lora = base_model(s, device), None
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
    if s.stage in ("grpo", "nft"):
        return s.beta > 0
    anchor = [s.anchor] if s.stage == "opd" and s.mar > 0 and s.anchor not in s.teachers else []
    return any(adapters.kind(adapters.locate(where)) != "full" for where in (*s.teachers.values(), *anchor))


def load_teachers(model: flow.FlowModel, s: Settings) -> dict[str, str]:
    """Put every teacher (and MAR's anchor) beside the student: {task: expert's name}, with "anchor" where MAR is on."""
    experts = {}
    for task, where in s.teachers.items():
        experts[task] = f"teacher:{task}"
        model.add_expert(experts[task], where)
    if s.mar > 0 and s.stage == "opd":
        experts["anchor"] = experts.get(s.anchor, "anchor")
        if experts["anchor"] == "anchor":
            model.add_expert("anchor", s.anchor)
    return experts
