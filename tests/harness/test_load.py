"""Oracles for what stands on the accelerator: experts that share one backbone, and everything found before it loads."""

import pytest

from harness import load as student
from harness import ranks
from models import load as models
from models import lora as adapters
from tests.conftest import TASKS, tiny_settings


def test_teachers_and_anchor_share_one_backbone(world):
    teachers = {task: str(folder) for task, folder in world.teachers.items()}
    for stage, mar, anchor, expected in (
        ("opd", 0.02, "quality", "teacher:quality"),  # a teacher's task: no second copy
        ("opd", 0.02, teachers["text"], "anchor"),
        ("opd", 0.0, "quality", None),
        ("sft", 0.02, "quality", None),
    ):
        model = models.load_tiny(world.base)
        experts = student.load_teachers(model, tiny_settings(stage=stage, mar=mar, anchor=anchor, teachers=teachers))
        assert experts.pop("anchor", None) == expected
        assert experts == {task: f"teacher:{task}" for task in TASKS}
        assert len(model.adapters) == 3 + (expected == "anchor")


@pytest.mark.parametrize("what", ["model", "teachers", "anchor", "init", "compare"])
def test_everything_is_found_before_anything_is_loaded(world, tmp_path, monkeypatch, what):
    good = {"model": str(world.base), "teachers": {"text": str(world.teachers["text"])}, "tasks": "text"}
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("nothing may be loaded yet"))
    missing = {"teachers": {"text": "./no"}, "compare": {"x": "./no"}}.get(what, "./no")
    student.locate_all(tiny_settings(**good, mar=0.0, anchor="./no"))  # an anchor that nobody asks for
    with pytest.raises(adapters.ModelError, match=r"^\./no: no such file or folder"):
        student.locate_all(tiny_settings(**{**good, "anchor": "text", what: missing}))


def test_one_rank_a_node_looks_first(world, monkeypatch):
    """What it fetches, the others find in the cache."""
    s = tiny_settings(model=str(world.base), teachers={task: str(folder) for task, folder in world.teachers.items()})
    for local, expected in ((0, ["locate"] * 4 + ["wait"]), (1, ["wait"] + ["locate"] * 4)):
        order, real = [], adapters.locate
        with monkeypatch.context() as patch:
            patch.setattr(adapters, "locate", lambda *args, o=order, real=real: o.append("locate") or real(*args))
            patch.setattr(ranks, "wait", lambda o=order: o.append("wait"))
            patch.setattr(ranks, "local_rank", lambda local=local: local)
            student.locate_all(s)
        assert order == expected
