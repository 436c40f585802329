"""What stands on the accelerator: experts that share one backbone, and everything found before it loads."""

import pytest

from harness import load, ranks
from models import hub
from models import load as models
from models.tiny import load_tiny
from tests.helpers.runs import TASKS, tiny_settings


@pytest.mark.parametrize("stage, mar, anchor, expected", [
    ("opd", 0.02, "quality", "teacher:quality"),  # a teacher's task: no second copy
    ("opd", 0.02, "path", "anchor"), ("opd", 0.0, "quality", None), ("sft", 0.02, "quality", None),
])  # fmt: skip
def test_teachers_and_anchor_share_one_backbone(world, stage, mar, anchor, expected):
    teachers = {task: str(folder) for task, folder in world.teachers.items()}
    anchor = teachers["text"] if anchor == "path" else anchor
    model = load_tiny(world.base)
    experts = load.load_teachers(model, tiny_settings(stage=stage, mar=mar, anchor=anchor, teachers=teachers))
    assert experts.pop("anchor", None) == expected
    assert experts == {task: f"teacher:{task}" for task in TASKS}
    assert len(model.adapters) == 3 + (expected == "anchor")


@pytest.mark.parametrize("what", ["model", "teachers", "anchor", "init", "compare"])
def test_everything_is_found_before_anything_is_loaded(world, monkeypatch, what):
    good = {"model": str(world.base), "teachers": {"text": str(world.teachers["text"])}, "tasks": "text"}
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("nothing may be loaded yet"))
    missing = {"teachers": {"text": "./no"}, "compare": {"x": "./no"}}.get(what, "./no")
    load.locate_all(tiny_settings(**good, mar=0.0, anchor="./no"))  # an anchor that nobody asks for
    stage = "eval" if what == "compare" else "opd"
    with pytest.raises(hub.ModelError, match="^./no"):
        load.locate_all(tiny_settings(**{**good, "stage": stage, "anchor": "text", what: missing}))


@pytest.mark.parametrize("local, expected", [(0, ["locate"] * 4 + ["wait"]), (1, ["wait"] + ["locate"] * 4)])
def test_one_rank_a_node_looks_first(world, monkeypatch, local, expected):
    """What it fetches, the others find in the cache."""
    s = tiny_settings(model=str(world.base), teachers={task: str(folder) for task, folder in world.teachers.items()})
    order, real = [], hub.locate
    monkeypatch.setattr(hub, "locate", lambda *args: order.append("locate") or real(*args))
    monkeypatch.setattr(ranks, "wait", lambda: order.append("wait"))
    monkeypatch.setattr(ranks, "local_rank", lambda: local)
    load.locate_all(s)
    assert order == expected
